"""The synthetic multi-label set: COCO's format, truth that fits the pixels, repeatable."""

import hashlib
import json

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.core.errors import InputError
from calib_nb.tags.coco import load_tagged
from calib_nb.tags.demo_drawings import CATEGORIES, draw_tagged_image, shape_mask, tagged_images, tagged_splits


def content(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), size=st.integers(32, 128), classes=st.integers(1, 8))
def test_every_annotation_is_what_can_be_seen(seed, size, classes):
    names = list(CATEGORIES)[:classes]
    photo, annotations = draw_tagged_image(np.random.default_rng(seed), size, names)
    assert photo.shape == (size, size, 3) and photo.dtype == np.uint8
    assert {name for name, _, _ in annotations} <= set(names)
    assert all(mask.any() for _, mask, _ in annotations)
    assert len(annotations) == 0 or np.sum([mask for _, mask, _ in annotations], axis=0).max() == 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(name=st.sampled_from(list(CATEGORIES)), angle=st.floats(0, 6.2), radius=st.floats(8, 20))
def test_a_shape_stays_within_its_radius(name, angle, radius):
    rows, columns = np.nonzero(shape_mask(name, 64, (32, 32), radius, angle))
    assert len(rows) and np.hypot(rows - 32, columns - 32).max() <= 1.15 * radius + 1


def test_equal_arguments_give_equal_bytes_and_other_seeds_do_not(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        tagged_images(tmp_path / name, 8, seed=seed)
    assert content(tmp_path / "a") == content(tmp_path / "b") != content(tmp_path / "c")


def test_the_json_is_cocos(tmp_path):
    path = tagged_images(tmp_path / "set", 60, size=64)
    data = json.loads(path.read_text())
    assert {"images", "annotations", "categories"} <= set(data)
    ids = [c["id"] for c in data["categories"]]
    assert len(set(ids)) == 8 and max(ids) > 8  # with gaps
    assert [a["id"] for a in data["annotations"]] == list(range(1, len(data["annotations"]) + 1))
    for a in data["annotations"]:
        x, y, w, h = a["bbox"]
        assert min(x, y) >= 0 and max(x + w, y + h) <= 64 and 0 < a["area"] <= w * h and a["iscrowd"] in (0, 1)
    for image in data["images"]:
        photo = cv2.imread(str(path.parent / "images" / image["file_name"]))
        assert photo.shape == (image["height"], image["width"], 3) == (64, 64, 3)


def test_degraded_images_are_worse_and_only_some(tmp_path):
    path = tagged_images(tmp_path / "set", 120)
    faults = [image["fault"] for image in json.loads(path.read_text())["images"]]
    photos = [cv2.imread(p, cv2.IMREAD_GRAYSCALE) for p in load_tagged(path).path]
    assert {"", "blurred", "dark", "flat"} == set(faults) and 20 <= sum(f != "" for f in faults) <= 55
    luma, contrast = (
        {f: np.median([measure(p) for p, g in zip(photos, faults, strict=True) if g == f]) for f in set(faults)}
        for measure in (np.mean, np.std)
    )
    assert luma["dark"] < 0.4 * luma[""] and contrast["flat"] < 0.5 * contrast[""]
    plain = json.loads(tagged_images(tmp_path / "plain", 20, graded=False).read_text())
    assert {image["fault"] for image in plain["images"]} == {""}


def test_targets_are_those_of_the_annotations(tmp_path):
    path = tagged_images(tmp_path / "set", 40, classes=5)
    data, table = json.loads(path.read_text()), load_tagged(path)
    name = {c["id"]: c["name"] for c in data["categories"]}
    for image, row in zip(data["images"], table.to_dict("records"), strict=True):
        tags = {name[a["category_id"]] for a in data["annotations"] if a["image_id"] == image["id"]}
        assert tags == {c for c in name.values() if row[c]}
    assert (table.drop(columns="path").sum(axis=1) == 0).any()


def test_splits_share_no_image(tmp_path):
    splits = tagged_splits(tmp_path / "s", train=20, calibration=15, val=10, size=48)
    digests = [d for s in splits.values() for d in content(s.parent / "images").values()]
    assert len(digests) == 45 == len(set(digests))


def test_what_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").write_bytes(b"x")
    with pytest.raises(InputError, match="already holds something"):
        tagged_images(tmp_path / "mine", 3)
    assert (tmp_path / "mine" / "photo.jpg").read_bytes() == b"x"


@pytest.mark.parametrize(
    "text", ["[]", '{"images": []}', '{"images": [{}], "annotations": [], "categories": []}', "null"]
)
def test_other_json_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match="COCO"):
        load_tagged(tmp_path / "x.json")


def test_real_coco_files_can_be_read(real_data):
    table = load_tagged(real_data / "coco" / "instances_val.json", real_data / "coco" / "val")
    assert table.shape[1] == 81 and set(table.drop(columns="path").to_numpy().ravel()) == {0, 1}
    assert cv2.imread(table.path[0]) is not None
