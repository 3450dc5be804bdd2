"""The quality score: each metric answers to its fault, copies score alike, bad files are named, runs resume exactly."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import calib_nb
from calib_nb.core.errors import InputError
from calib_nb.core.parallel import parallel_map
from calib_nb.data.images import decode, find_images
from calib_nb.data.score import (
    SCORE_COLUMNS,
    SCORE_METRICS,
    ScoreConfig,
    measure_file,
    measure_quality,
    plot_scores,
    score_folder,
    score_image,
    scores,
)

GRAY = np.array([0.114, 0.587, 0.299])  # ITU-R BT.601, BGR


def texture(seed=0, height=240, width=320):
    rng = np.random.default_rng(seed)
    image = sum(
        cv2.resize(rng.random((n, n, 3), np.float32), (width, height), interpolation=cv2.INTER_CUBIC) / k
        for k, n in ((1, 4), (2, 16), (4, 64))
    )
    image = (image - image.min()) / np.ptp(image)
    return (255 * np.clip(0.1 + 0.8 * image, 0, 1)).astype(np.uint8)


@pytest.fixture(scope="module")
def photos(request):
    """Synthetic pictures, and photos of LFW where they are to be had."""
    images = [texture(seed) for seed in range(4)]
    if os.environ.get("CALIB_NB_DATA"):
        real = request.getfixturevalue("real_data")
        images += [cv2.imread(str(p)) for p in sorted((real / "lfw/images").glob("*/*.jpg"))[::40]]
        images += [cv2.imread(str(p)) for p in sorted((real / "coco/val").glob("*.jpg"))[::10]]
    return images


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "photos"
    root.mkdir()
    for i in range(30):
        cv2.imwrite(str(root / f"{i:02}.jpg"), texture(i, 60, 80))
    (root / "03.jpg").write_bytes((root / "03.jpg").read_bytes()[:500])
    (root / "04.jpg").write_bytes(b"")
    (root / "05.jpg").write_text("not an image")
    return root


# --- against independent computations


def numpy_raw(bgr):
    gray = np.floor(bgr.astype(float) @ GRAY + 0.5)
    padded = np.pad(gray, 1, mode="reflect")
    laplacian = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * gray
    return laplacian.var(), gray.mean(), gray.std()


def test_raw_numbers_equal_numpy(photos):
    for bgr in photos:
        raw, (variance, mean, std) = measure_quality(bgr), numpy_raw(bgr)
        assert raw["luma_mean"] == pytest.approx(mean, abs=0.02) and raw["luma_std"] == pytest.approx(
            std, abs=0.02
        )  # OpenCV's weights are 15-bit integers
        assert raw["laplacian_var"] == pytest.approx(variance, rel=0.02, abs=0.05)
        gray = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
        assert raw["laplacian_var"] == pytest.approx(cv2.Laplacian(gray, cv2.CV_64F).var(), rel=1e-9, abs=1e-9)
        assert raw["luma_mean"] == pytest.approx(gray.mean(), rel=1e-12) and raw["luma_std"] == pytest.approx(
            gray.std(), rel=1e-9
        )


def test_colour_on_the_grid_stands_for_the_whole(photos):
    for bgr in photos:
        pixels = bgr.reshape(-1, 3).astype(float)
        luma = pixels @ GRAY
        whole = np.hypot((0.713 * (pixels[:, 2] - luma)).std(), (0.564 * (pixels[:, 0] - luma)).std())
        assert measure_quality(bgr)["colorfulness"] == pytest.approx(whole, rel=0.15, abs=0.5)


def test_quality_is_the_weighted_mean(photos):
    for bgr in photos:
        s = score_image(bgr)
        assert s["quality"] == pytest.approx(
            0.35 * s["sharpness"]
            + 0.20 * s["brightness"]
            + 0.20 * s["contrast"]
            + 0.15 * s["resolution"]
            + 0.10 * s["color"],
            rel=1e-12,
        )
        assert all(0 <= s[name] <= 100 for name in (*SCORE_METRICS, "quality"))


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(0, 10_000), st.sampled_from(["noise", "black", "white", "flat"])
)
def test_any_array_is_scored_between_0_and_100(height, width, seed, kind):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = {"noise": noise, "black": noise * 0, "white": noise * 0 + 255, "flat": noise * 0 + noise[0, 0]}[kind]
    s = score_image(image)
    assert all(np.isfinite(value) for value in s.values()) and all(
        0 <= s[name] <= 100 for name in (*SCORE_METRICS, "quality")
    )
    if kind in ("black", "white"):
        assert s["brightness"] == s["contrast"] == s["sharpness"] == s["color"] == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (3, 4001), (1281, 1279), (2, 2)])
def test_odd_shapes(shape):
    s = score_image(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    assert (s["height"], s["width"]) == shape and np.isfinite(list(s.values())).all()


# --- each metric answers to its own fault


def falls(images, metric):
    values = [score_image(image)[metric] for image in images]
    assert all(later < earlier for earlier, later in zip(values, values[1:])), (metric, values)


def test_blur_lowers_sharpness(photos):
    for bgr in photos:
        falls([bgr, *(cv2.GaussianBlur(bgr, (0, 0), sigma) for sigma in (0.6, 1, 1.5, 2.5, 4))], "sharpness")


def test_exposure_lowers_brightness(photos):
    for bgr in photos:
        mean = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY).mean()
        falls(
            [np.clip(bgr * (gain * min(1, 120 / mean)), 0, 255).astype(np.uint8) for gain in (1, 0.7, 0.45, 0.25, 0.1)],
            "brightness",
        )
        falls(
            [
                255 - np.clip((255 - bgr.astype(float)) * gain * min(1, 120 / (255 - mean)), 0, 255).astype(np.uint8)
                for gain in (1, 0.7, 0.45, 0.25, 0.1)
            ],
            "brightness",
        )


def test_flattening_lowers_contrast(photos):
    for bgr in photos:
        falls(
            [np.round(bgr.mean() + (bgr - bgr.mean()) * share).astype(np.uint8) for share in (1, 0.75, 0.5, 0.25, 0.1)],
            "contrast",
        )


def test_downscaling_lowers_resolution(photos):
    for bgr in photos:
        falls(
            [
                cv2.resize(bgr, None, fx=share, fy=share, interpolation=cv2.INTER_AREA)
                for share in (1, 0.75, 0.5, 0.25, 0.1)
            ],
            "resolution",
        )
    assert (
        score_image(np.zeros((1024, 1024, 3), np.uint8))["resolution"]
        == score_image(np.zeros((2048, 1024, 3), np.uint8))["resolution"]
        == 100
    )


def test_gray_copy_has_no_colour(photos, tmp_path):
    for i, bgr in enumerate(photos):
        gray = cv2.cvtColor(bgr, cv2.COLOR_BGR2GRAY)
        assert score_image(cv2.cvtColor(gray, cv2.COLOR_GRAY2BGR))["color"] == 0
        cv2.imwrite(str(tmp_path / f"{i}.jpg"), gray)
        assert score_image(decode(tmp_path / f"{i}.jpg"))["color"] == 0
        falls(
            [
                np.round(gray[..., None] + (bgr - gray[..., None].astype(float)) * share).clip(0, 255).astype(np.uint8)
                for share in (1, 0.7, 0.4, 0)
            ],
            "color",
        ) if bgr.std(axis=2).mean() > 4 else None


def test_copies_score_alike(photos, tmp_path):
    for bgr in photos:
        original = score_image(bgr)
        for name, options in (
            ("a.png", []),
            ("a.jpg", [cv2.IMWRITE_JPEG_QUALITY, 95]),
            ("a.webp", [cv2.IMWRITE_WEBP_QUALITY, 101]),
            ("a.bmp", []),
        ):
            cv2.imwrite(str(tmp_path / name), bgr, options)
            copy = score_image(decode(tmp_path / name))
            tolerance = {"a.jpg": 4.0}.get(name, 0)
            assert all(abs(copy[metric] - original[metric]) <= tolerance for metric in SCORE_METRICS), (
                name,
                original,
                copy,
            )
            assert abs(copy["quality"] - original["quality"]) <= tolerance / 3


def test_large_images_stay_comparable(photos):
    for bgr in photos:
        at_reference = cv2.resize(bgr, (640, 480), interpolation=cv2.INTER_CUBIC)
        twice = cv2.resize(
            at_reference, (1280, 960), interpolation=cv2.INTER_NEAREST
        )  # reducing it gives the same pixels back
        small, large = score_image(at_reference), score_image(twice)
        assert all(
            large[metric] == pytest.approx(small[metric], abs=0.5) for metric in ("sharpness", "brightness", "contrast")
        )
        assert large["color"] == pytest.approx(small["color"], abs=3)  # the grid falls on other pixels
        assert score_image(at_reference, size=(1280, 960))["resolution"] == large["resolution"] == 100


# --- settings


@pytest.mark.parametrize(
    "options",
    [
        {"sharpness_weight": 0.5},
        {"color_weight": -0.1, "contrast_weight": 0.4},
        {"sharpness_half": 0},
        {"brightness_best": 255},
        {"contrast_half": float("nan")},
        {"reference_side": 0},
    ],
    ids=str,
)
def test_bad_settings(options):
    with pytest.raises(InputError):
        ScoreConfig(**options)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_bad_arrays(array):
    with pytest.raises(InputError, match="uint8"):
        score_image(array)


# --- folders


def test_table(folder):
    table = score_folder(folder, progress=False)
    assert tuple(table.columns) == SCORE_COLUMNS and list(table.path) == find_images(folder)
    bad = table[table.error != ""]
    assert dict(zip(bad.path, bad.error)) == {"03.jpg": "truncated", "04.jpg": "empty", "05.jpg": "unsupported"}
    assert bad.drop(columns=["path", "error"]).isna().all(axis=None) and table[table.error == ""].notna().all(axis=None)
    alone = score_image(decode(folder / "00.jpg"))
    assert all(table.loc[0, name] == value for name, value in alone.items())  # bit for bit
    assert table[["quality"]].equals(pd.DataFrame({"quality": scores(table)["quality"]}))


def test_the_same_table_for_any_number_of_workers(folder):
    first, *others = (score_folder(folder, workers=workers, progress=False) for workers in (1, 2, 7))
    for other in others:
        pd.testing.assert_frame_equal(first, other, check_exact=True)


def test_only_bad_files(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    table = score_folder(tmp_path, progress=False)
    assert list(table.error) == ["empty"] and table.quality.isna().all()


def test_strange_files_get_an_answer(tmp_path):
    image = Image.fromarray(texture(1, 48, 64)[..., ::-1].copy())
    exif = Image.Exif()
    exif[0x0112] = 6
    image.convert("L").save(tmp_path / "gray.jpg")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg")
    image.convert("RGBA").save(tmp_path / "rgba.png")
    image.convert("P").save(tmp_path / "palette.png")
    image.save(tmp_path / "rotated.jpg", exif=exif)
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    cv2.imwrite(str(tmp_path / "deep.png"), texture(1, 48, 64).astype(np.uint16) * 257)
    os.mkfifo(tmp_path / "pipe.jpg")
    table = score_folder(tmp_path, progress=False).set_index("path")
    assert table.error["pipe.jpg"] == "unsupported" and (table.error.drop("pipe.jpg") == "").all()
    assert table.color["gray.jpg"] == 0 and table.width["rotated.jpg"] == 48 and table.height["rotated.jpg"] == 64
    assert table.quality["deep.png"] == table.quality["rgba.png"] == score_image(texture(1, 48, 64))["quality"]
    assert abs(table.quality["cmyk.jpg"] - table.quality["rgba.png"]) < 10


def test_journal_resumes_and_notices_changes(folder, tmp_path, monkeypatch):
    journal = tmp_path / "journal"
    calls = []

    def counting(path, **options):
        calls.append(Path(path).name)
        return decode(path, **options)

    monkeypatch.setattr("calib_nb.data.score.decode", counting)
    first = score_folder(folder, journal=journal, progress=False)
    assert len(calls) == 30
    calls.clear()
    pd.testing.assert_frame_equal(first, score_folder(folder, journal=journal, progress=False), check_exact=True)
    assert calls == []
    cv2.imwrite(str(folder / "07.jpg"), texture(99, 60, 80))  # another picture under the same name
    os.utime(folder / "08.jpg", ns=(1, 1))  # touched
    table = score_folder(folder, journal=journal, progress=False)
    assert (
        sorted(calls) == ["07.jpg", "08.jpg"]
        and table.quality[7] != first.quality[7]
        and table.quality[8] == first.quality[8]
    )
    calls.clear()
    other = ScoreConfig(sharpness_half=10)
    pd.testing.assert_frame_equal(
        score_folder(folder, other, journal=journal, progress=False),
        score_folder(folder, other, progress=False),
        check_exact=True,
    )
    calls.clear()
    score_folder(folder, ScoreConfig(reference_side=30), journal=journal, progress=False)
    assert len(calls) == 30  # what it is measured at has changed
    calls.clear()
    shutil.copytree(folder, tmp_path / "elsewhere")
    score_folder(tmp_path / "elsewhere", ScoreConfig(reference_side=30), journal=journal, progress=False)
    assert len(calls) == 30


SCRIPT = """
import os, sys, time
import calib_nb.data.score as score
folder, journal, calls, stop, out = sys.argv[1:]
plain = score.decode
def counting(path, **options):
    with open(calls, "a") as f:
        f.write(path + "\\n")
    time.sleep(0.01 * (int(stop) < 10**6))  # so that a batch has one image
    while os.path.getsize(calls) > int(stop):  # until the kill comes
        time.sleep(0.01)
    return plain(path, **options)
score.decode = counting
score.score_folder(folder, workers=2, journal=journal, progress=False).to_pickle(out)
"""


def test_kill_9_then_the_same_table(folder, tmp_path):
    for i in range(30, 200):
        shutil.copy(folder / "00.jpg", folder / f"{i:03}.jpg")
    calls, journal, out = tmp_path / "calls", tmp_path / "journal", tmp_path / "out.pkl"
    environment = {**os.environ, "PYTHONPATH": str(Path(calib_nb.__file__).parents[1])}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(journal), str(calls)]
    process = subprocess.Popen([*command, str(100 * len(f"{folder}/00.jpg\n")), str(out)], env=environment)
    until = time.monotonic() + 120
    while time.monotonic() < until and not (journal.exists() and journal.read_bytes().count(b"\n") > 60):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(journal.read_text().splitlines()) - 1
    assert 50 <= kept < 200 and not out.exists()
    calls.unlink()
    subprocess.run([*command, str(10**9), str(out)], env=environment, check=True, timeout=120)
    assert len(calls.read_text().splitlines()) == 200 - kept
    pd.testing.assert_frame_equal(pd.read_pickle(out), score_folder(folder, progress=False), check_exact=True)


def test_plot(folder):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    table = score_folder(folder, progress=False)
    figure, ax = plt.subplots()
    assert plot_scores(table, ax) is ax and ax.get_title() == "27 images"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["quality", *SCORE_METRICS]
    plt.close(figure)


# --- real photos


def test_real_photos_spread(real_data):
    table = score_folder(real_data / "lfw/images", progress=False)
    assert len(table) == 1549 and (table.error == "").all()
    q = table.quality.quantile([0, 0.05, 0.5, 0.95, 1])
    assert 60 < q[0.5] < 72 and 70 < q[1] < 90 and q[0.95] - q[0.05] > 15
    assert (table.quality < 40).mean() < 0.01  # sound photos pass the default threshold ...
    dark = [
        score_image((decode(real_data / "lfw/images" / p) * 0.15).astype(np.uint8))["quality"] for p in table.path[::50]
    ]
    assert max(dark) < 40  # ... and these do not
    assert table.sharpness.max() < 100 and table.color.min() == 0


@pytest.mark.slow
def test_scoring_keeps_up_with_decoding(real_data):
    """A guard against a slow metric, not the benchmark: half the rate of decoding, where two thirds were measured."""
    root = str(real_data / "lfw/images")
    paths = find_images(root)

    def seconds(function):
        start = time.perf_counter()
        for _ in parallel_map(function, paths, progress=False):
            pass
        return time.perf_counter() - start

    def only_decode(path):
        return decode(os.path.join(root, path)).shape

    pairs = [seconds(only_decode) / seconds(functools.partial(measure_file, root, 640)) for _ in range(7)]
    assert np.median(pairs) > 0.5, pairs


def test_the_array_is_not_changed():
    image = texture()
    before = image.copy()
    score_image(image)
    assert np.array_equal(image, before)
