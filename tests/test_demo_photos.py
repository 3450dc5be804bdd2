"""The synthetic pictures: their faults are what the truth says, measured here without the package's scores."""

import cv2
import numpy as np
import pandas as pd
import pytest

from calib_nb.core.errors import ImageError, InputError
from calib_nb.core.run import read_json, sha256_folder
from calib_nb.data.demo_images import IMAGE_FAULTS, degrade, graded_images, odd_files, paint_scene
from calib_nb.data.images import decode, find_images


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "photos"
    return folder, graded_images(folder)


def measured(image: np.ndarray, fault: str) -> float:
    """What a fault takes away, from the pixels alone."""
    luma = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY).astype(float)
    return {
        "blur": np.abs(np.diff(luma, axis=1)).mean(),
        "dark": luma.mean(),
        "bright": -luma.mean(),
        "flat": luma.std(),
        "gray": np.ptp(image.astype(float), axis=2).mean(),
        "small": image.size,
    }[fault]


@pytest.mark.parametrize("fault", IMAGE_FAULTS)
def test_every_fault_grows_from_grade_to_grade(photos, fault):
    folder, truth = photos
    scenes = truth.loc[truth["fault"] == fault, "scene"].unique()
    assert len(scenes) == 2
    for scene in scenes:
        left = [
            measured(decode(folder / p), fault) for p in truth.loc[truth["scene"] == scene].sort_values("grade")["path"]
        ]
        assert len(left) == 5 and (np.diff(left) < 0).all(), (scene, left)


def test_the_truth_is_written_and_true(photos):
    folder, truth = photos
    written = read_json(folder / "truth.json")
    assert written["synthetic"] is True and pd.DataFrame(written["pictures"]).astype({"amount": float}).equals(truth)
    assert find_images(folder) == list(truth["path"])
    for row in truth.itertuples():
        assert decode(folder / row.path).shape == (row.height, row.width, 3)


def test_same_arguments_same_bytes(photos, tmp_path):
    graded_images(tmp_path / "again")
    assert sha256_folder(photos[0]) == sha256_folder(tmp_path / "again")
    graded_images(tmp_path / "other", n=5, seed=1)
    assert (tmp_path / "other/scene_00/blur_0.jpg").read_bytes() != (photos[0] / "scene_00/blur_0.jpg").read_bytes()


def test_scenes_are_exposed_alike_and_differ():
    scenes = [paint_scene(i) for i in range(12)]
    assert all(100 < s.mean() < 150 for s in scenes)
    assert len({s.tobytes() for s in scenes}) == 12
    assert paint_scene(4, height=90, width=160).shape == (90, 160, 3)


def test_odd_files_are_what_they_say(tmp_path):
    odd = odd_files(tmp_path)
    assert set(odd["path"]) == {p.name for p in tmp_path.iterdir()}
    for row in odd.itertuples():
        if row.readable:
            decode(tmp_path / row.path)
        else:
            with pytest.raises(ImageError):
                decode(tmp_path / row.path)
    upright, turned = paint_scene(2, height=96, width=128).astype(int), decode(tmp_path / "rotated.jpg").astype(int)
    assert np.abs(upright - turned).mean() < 12  # JPEG, but the right way up


def test_an_unknown_fault():
    with pytest.raises(InputError, match="unknown fault"):
        degrade(np.zeros((4, 4, 3), np.uint8), "haze", 1)
