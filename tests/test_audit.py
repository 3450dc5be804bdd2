"""The audit: planted copies are named with their kind, other images are not, leaks end with exit code 1."""

import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from calib_nb.core.errors import InputError
from calib_nb.data import copies
from calib_nb.data.audit import audit_folder, audit_page, content_kind, fineness, picture_faults
from calib_nb.data.copies import WINDOWS, agreement, copy_views, find_copies, image_views, low_frequencies
from calib_nb.data.demo_images import paint_scene

SCENES = [paint_scene(i, height=120, width=160) for i in range(14)]


def jpeg(bgr, quality):
    return cv2.imdecode(cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)


def scaled(bgr, factor):
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return cv2.resize(bgr, None, fx=factor, fy=factor, interpolation=how)


def with_gamma(bgr, gamma):
    return cv2.LUT(bgr, np.uint8(np.round(255 * (np.arange(256) / 255) ** gamma)))


def framed(bgr, gray):
    return cv2.copyMakeBorder(scaled(bgr, 0.8), 30, 12, 9, 9, cv2.BORDER_CONSTANT, value=(gray,) * 3)


CHANGES = {
    "quality 30": lambda x: jpeg(x, 30),
    "half": lambda x: scaled(x, 0.5),
    "one and a half": lambda x: scaled(x, 1.5),
    "darker": lambda x: with_gamma(x, 1.6),
    "brighter": lambda x: with_gamma(x, 0.6),
    "cropped at one corner": lambda x: x[12:, 16:],
    "cropped in the middle": lambda x: x[6:-6, 8:-8],
    "mirrored": lambda x: cv2.flip(x, 1),
    "mirrored and cropped": lambda x: cv2.flip(x[:-8, 10:], 1),
    "in a dark frame": lambda x: framed(x, 18),
    "in a white frame": lambda x: framed(x, 255),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found_and_nothing_else(change):
    copies = [jpeg(CHANGES[change](scene), 92) for scene in SCENES]
    table = find_copies(*copy_views(SCENES), *copy_views(copies), progress=False)
    assert list(zip(table.left, table.right)) == [(i, i) for i in range(len(SCENES))]
    assert table.mirrored.eq("mirrored" in change).all()


def test_scenes_are_not_copies_of_one_another():
    assert len(find_copies(*copy_views(SCENES), progress=False)) == 0


def test_a_copy_is_found_from_either_side():
    views, image = copy_views([SCENES[0][12:, 16:], SCENES[1], SCENES[0]])
    table = find_copies(views, image, progress=False)
    assert table[["left", "right"]].values.tolist() == [[0, 2]] and bool(table.part[0])


def test_descriptions_in_a_mapped_file_find_the_same(tmp_path, monkeypatch):
    views, image = copy_views([*SCENES[:4], SCENES[0][12:, 16:], SCENES[1][:, ::-1]])
    there = find_copies(views, image, progress=False)
    (tmp_path / "views").write_bytes(views.tobytes())
    monkeypatch.setattr(copies, "_MAPPED", 0)
    mapped = np.memmap(tmp_path / "views", np.uint8, "r", shape=views.shape)
    assert len(there) == 2 and find_copies(mapped, image, progress=False).equals(there)


def test_cosines_over_a_window_are_those_of_the_cropped_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.float32)
    (top, bottom), (left, right) = (0.0, 0.925), (0.075, 1.0)
    at = WINDOWS.index(((top, bottom), (left, right)))
    fine = np.kron(pixels, np.ones((16, 16), np.float32))[: round(bottom * 1024), round(left * 1024) :]
    side = fine.shape[0]
    waves = np.cos(np.pi * np.arange(8)[:, None] * (np.arange(side) + 0.5) / side)
    expected = (waves @ fine.astype(float) @ waves.T) * np.hypot(np.arange(8)[:, None], np.arange(8))
    expected = expected.ravel()[1:] / np.linalg.norm(expected.ravel()[1:])
    value = low_frequencies(pixels[None].astype(np.uint8), at)[0]
    assert np.abs(value - expected).max() < 1e-2  # a window ends within one of the 1,024 points


def test_equal_frames_give_few_pairs_for_each():
    views, image = copy_views([jpeg(SCENES[0], quality) for quality in range(60, 95)])
    table = find_copies(views, image, progress=False)
    assert 34 <= len(table) <= 35 * 2 * 8 and set(table.left) | set(table.right) == set(range(35))


def test_blocks_and_threads_change_nothing(monkeypatch):
    views, image = copy_views([*SCENES, *(jpeg(x[:, ::-1], 70) for x in SCENES), *(x[12:, 16:] for x in SCENES)])
    there = copies.near_views(views, views, image, image, workers=1)
    assert len(there) >= 4 * len(SCENES)
    for tile, workers in (((5, 3), 3), ((2, 64), 2)):
        monkeypatch.setattr(copies, "_TILE", tile)
        rows = copies.near_views(views, views, image, image, workers=workers)
        assert np.array_equal(rows[:, [0, 1, 3]], there[:, [0, 1, 3]]) and np.allclose(rows, there, atol=1e-6)
    assert copies.near_views(views[:0], views, image[:0], image).shape == (0, 4)


def test_views_without_detail_agree_with_nothing():
    plain = image_views(np.full((50, 60, 3), 90, np.uint8))[0]
    assert agreement(plain, plain) == 0 and not low_frequencies(plain[None]).any()


@pytest.fixture
def folders(tmp_path):
    """A calibration and a validation folder with planted faults."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, names in ((ours, range(4)), (theirs, range(4, 7))):
        folder.mkdir()
        for i in names:
            cv2.imwrite(str(folder / f"{i}.jpg"), SCENES[i])
    return ours, theirs


def test_leaks_are_named_with_their_kind(folders):
    ours, theirs = folders
    shutil.copy(ours / "0.jpg", theirs / "bytes.jpg")
    cv2.imwrite(str(theirs / "again.png"), SCENES[1])
    cv2.imwrite(str(theirs / "mirror.jpg"), cv2.flip(SCENES[2], 1))
    cv2.imwrite(str(theirs / "crop.jpg"), SCENES[3][10:, 12:])
    result = audit_folder(*folders, progress=False)
    kinds = dict(zip(result.leaks.validation, result.leaks.kind))
    wanted = {"bytes.jpg": "same file", "again.png": "same picture", "mirror.jpg": "mirrored", "crop.jpg": "part"}
    assert kinds == wanted and not result.passed and len(result.copies) == 0


def test_odd_files_are_named(folders):
    ours, _ = folders
    data = (ours / "0.jpg").read_bytes()
    (ours / "cut.jpg").write_bytes(data[: len(data) // 2])
    (ours / "empty.jpg").write_bytes(b"")
    (ours / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (ours / "wrong.png").write_bytes((ours / "1.jpg").read_bytes())
    (ours / "video.mp4").write_bytes(b"0")
    (ours / "raw.dng").write_bytes(b"0")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(SCENES[9]).save(ours / "turned.jpg", exif=exif)
    Image.fromarray(np.dstack([SCENES[10], SCENES[10][..., :1]])).save(ours / "clear.png")
    cv2.imwrite(str(ours / "gray.png"), cv2.cvtColor(SCENES[11], cv2.COLOR_BGR2GRAY))
    cv2.imwrite(str(ours / "blank.png"), np.full((40, 50, 3), 200, np.uint8))
    cv2.imwrite(str(ours / "shot.png"), framed(SCENES[12], 240))
    result = audit_folder(ours, progress=False)
    odd = {name: set(rows.fault) for name, rows in result.faults.groupby("path")}
    assert odd["cut.jpg"] == {"corrupt"} and odd["empty.jpg"] == {"corrupt"}
    assert odd["phone.jpg"] == {"corrupt", "mislabelled"} and odd["wrong.png"] == {"mislabelled"}
    assert "rotated" in odd["turned.jpg"] and "alpha" in odd["clear.png"] and "gray" in odd["gray.png"]
    assert odd["blank.png"] == {"blank"} and "screenshot" in odd["shot.png"]
    assert not {"0.jpg", "1.jpg", "2.jpg", "3.jpg"} & set(odd)
    assert result.passed_over == {".dng": 1, ".mp4": 1} and result.passed
    assert ["1.jpg", "wrong.png", "same file"] in result.copies[["left", "right", "kind"]].values.tolist()
    assert "ftyp" not in audit_page(result) and "holds HEIC" in audit_page(result)


def test_kinds_by_their_first_bytes_agree_with_the_encoders():
    for ending, kind in ((".jpg", "JPEG"), (".png", "PNG"), (".bmp", "BMP"), (".webp", "WebP"), (".tiff", "TIFF")):
        assert content_kind(cv2.imencode(ending, SCENES[0])[1].tobytes()[:16]) == kind


def test_enlarging_empties_the_upper_frequencies():
    grain = np.random.default_rng(1).integers(0, 256, (100, 100), np.uint8)
    values = [fineness(scaled(grain, factor)) for factor in (1, 2, 3)]
    assert values[0] > -0.3 and max(values[1:]) < -1
    assert "another shape" in picture_faults(np.dstack([np.tile(grain, (1, 5))] * 3), (100, 100))["size"]


def test_detail_is_judged_at_the_size_of_the_models_input():
    grain = np.random.default_rng(1).integers(0, 256, (100, 100), np.uint8)
    smooth = np.dstack([cv2.GaussianBlur(scaled(grain, 3), (0, 0), 2)] * 3)
    for size, flagged in ((None, True), ((300, 300), True), ((60, 60), False)):
        assert ("upscaled" in picture_faults(smooth, size)) == flagged


@pytest.mark.parametrize(("soft", "named"), [(3, 3), (24, 0)])
def test_a_soft_set_is_said_once_and_not_of_each_file(tmp_path, soft, named):
    """Of a sharp set the soft images are named; a set that is mostly soft is said in one sentence."""
    for k in range(30):
        grain = np.random.default_rng(k).integers(0, 256, (100, 100), np.uint8)
        blur = cv2.GaussianBlur(scaled(grain, 3), (0, 0), 2 + k / 30)
        cv2.imwrite(str(tmp_path / f"{k:02}.png"), np.dstack([blur if k < soft else grain] * 3))
    result = audit_folder(tmp_path, progress=False)
    assert (result.faults.fault == "upscaled").sum() == named and len(result.notes) == (named == 0)
    assert len(result.files.fineness) == 30 and result.files.fineness[:soft].max() < -2.45
    if not named:
        assert "24 of 30 images" in str(result) and "24 of 30 images" in audit_page(result)
    sized = audit_folder(tmp_path, input_size=(290, 290), progress=False)
    assert (sized.faults.fault == "upscaled").sum() == soft and not sized.notes


def test_people_leak_by_their_folder_only_when_faces_are_audited(tmp_path):
    for name, i in (("a/ann/1", 0), ("a/bob/2", 1), ("b/ann/3", 2)):
        Path(tmp_path, name).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / f"{name}.jpg"), SCENES[i])
    assert audit_folder(tmp_path / "a", tmp_path / "b", progress=False).passed
    result = audit_folder(tmp_path / "a", tmp_path / "b", faces=True, progress=False)
    assert result.leaks[["calibration", "validation", "kind"]].values.tolist() == [
        ["ann/1.jpg", "ann/3.jpg", "same person"]
    ]


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        audit_folder(tmp_path / "nowhere", progress=False)


def test_the_command_as_a_process(folders, tmp_path):
    ours, theirs = folders
    cv2.imwrite(str(theirs / "crop.jpg"), SCENES[3][10:, 12:])
    line = [sys.executable, "-m", "calib_nb", "audit", "--images", ours, "--against", theirs, "--output-dir", "out"]
    done = subprocess.run([*map(str, line), "--quiet"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "3.jpg is in" in done.stdout and done.stderr == ""
    assert (tmp_path / "out" / "audit.html").is_file()


@pytest.mark.slow
def test_planted_copies_of_real_images(real_data):
    images = [cv2.imread(str(p)) for p in sorted((real_data / "coco").rglob("*.jpg"))[:80]]
    for change in CHANGES:
        copies = [jpeg(CHANGES[change](bgr), 90) for bgr in images]
        table = find_copies(*copy_views(images), *copy_views(copies), progress=False)
        assert (table.left == table.right).sum() >= 79 and (table.left != table.right).sum() == 0, change
