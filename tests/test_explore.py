"""The explorers without a browser: what a hand does, done from Python, and what they leave behind."""

import threading
import time
from unittest import mock

import cv2
import numpy as np
import pandas as pd
import pytest

from calib_nb.data.demo_images import paint_scene
from calib_nb.data.score import SCORE_COLUMNS, score_image
from calib_nb.explore.images import (
    IMAGE_AXES,
    ImagePool,
    ImageRules,
    choice_plot,
    choose_images,
    explore_images,
    view_order,
    why_image,
)
from calib_nb.explore.layers import explore_layers
from calib_nb.explore.pictures import Plot, inside, ticks
from calib_nb.explore.preprocessing import explore_preprocessing
from calib_nb.explore.widgets import Explorer, Figure, Gallery, Table, open_explorer


@pytest.fixture(scope="module")
def pool() -> ImagePool:
    """A thousand measured images that exist as numbers alone."""
    rng, n = np.random.default_rng(0), 1000
    raw = score_image(paint_scene(0, height=60, width=80))
    table = pd.DataFrame([{"path": f"{k:04d}.jpg", **raw, "error": ""} for k in range(n)], columns=SCORE_COLUMNS)
    table["laplacian_var"], table["luma_mean"] = rng.uniform(1, 900, n), rng.uniform(10, 245, n)
    table["sharpness"] = 100 * table.laplacian_var / (table.laplacian_var + 100)
    table.loc[7, [*SCORE_COLUMNS[1:-1], "error"]] = [np.nan] * (len(SCORE_COLUMNS) - 2) + ["truncated"]
    groups = pd.Series(np.arange(n) // 2, index=table.path).drop("0007.jpg")
    return ImagePool(None, table, groups, [b""] * n)


@pytest.mark.parametrize("strategy", ["quality_mix", "stratified", "balanced", "quotas", "random"])
@pytest.mark.parametrize("unique", [False, True])
def test_every_image_has_a_reason(pool, strategy, unique):
    rules = ImageRules(strategy=strategy, unique=unique, num_samples=50, take=("0003.jpg",), leave=("0004.jpg",))
    choice = choose_images(pool, rules)
    reasons = {path: why_image(pool, choice, path) for path in pool.table.path[::97]}
    reasons |= {path: why_image(pool, choice, path) for path in ("0003.jpg", "0004.jpg", "0007.jpg")}
    assert choice.table.chosen.sum() == 50
    chosen = set(choice.selection.rows.path)
    assert all((path in chosen) == text.startswith(("Chosen", "Taken")) for path, text in reasons.items())
    assert reasons["0003.jpg"] == "Taken by hand." and reasons["0004.jpg"] == "Left out by hand."
    assert reasons["0007.jpg"] == "Not a candidate: the file is truncated."


def test_a_slider_of_a_thousand_images_costs_little(pool):
    """The answer to a slider is arithmetic: no image is read (there are none), and no figure is drawn by a library."""
    start = time.process_time()
    for threshold in range(20, 60, 4):
        choice = choose_images(pool, ImageRules(threshold=threshold))
        choice_plot(choice)
        view_order(pool, choice, "chosen")
    assert (time.process_time() - start) / 10 < 2  # about 0.02 s


def test_all_images_taken_by_hand_need_no_rule(pool):
    choice = choose_images(pool, ImageRules(num_samples=2, take=("0001.jpg", "0002.jpg")))
    assert list(choice.selection.rows.path) == ["0001.jpg", "0002.jpg"]


def test_a_broken_file_is_in_the_gallery_and_has_no_dot(tmp_path):
    for k in range(3):
        cv2.imwrite(str(tmp_path / f"{k}.jpg"), paint_scene(k, height=60, width=80))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    explorer = explore_images(tmp_path, progress=False)
    assert len(explorer.pool.thumbs) == 4 and all(data[:2] == b"\xff\xd8" for data in explorer.pool.thumbs)
    explorer.view.value = "all"
    explorer.gallery.picked = 3
    assert "Not a candidate: the file is" in explorer.detail.value
    for axis in IMAGE_AXES:
        explorer.x.value = axis
    explorer.threshold.value = 100
    assert "score below 100" in explorer.message.value
    explorer.threshold.value = 0
    assert "score below" not in explorer.message.value


def test_an_explorer_leaves_nothing_running(tmp_path):
    for k in range(2):
        cv2.imwrite(str(tmp_path / f"{k}.jpg"), paint_scene(k, height=60, width=80))
    before = {t.name for t in threading.enumerate()}
    explorers = [explore_images(tmp_path, progress=False), explore_preprocessing()]
    explorers[0].threshold.value = 10
    explorers[1].step.value = 1
    until = time.monotonic() + 60
    # A busy machine takes a while to end a thread; the first bar of a process starts the one of tqdm.
    while left := {t.name for t in threading.enumerate()} - before - {"tqdm_monitor"}:
        assert time.monotonic() < until, left
        time.sleep(0.01)


@pytest.mark.parametrize(
    "make, line",
    [
        (lambda: explore_images("no/such"), "no/such"),
        (lambda: explore_layers("no_such.onnx"), "no config"),
        (lambda: explore_layers("no_such.onnx", "no_such.json"), "no_such.json"),
        (lambda: explore_preprocessing("no_such.json"), "no_such.json"),
        (lambda: explore_preprocessing("", "no_such.onnx"), "no_such.onnx"),
    ],
)
def test_what_cannot_be_opened_is_one_line(make, line):
    explorer = make()
    assert line in explorer.message.value and "calib-error" in explorer.message.value
    assert "\n" not in explorer.message.value and explorer.picture() == ""


def test_a_fault_of_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        open_explorer("fault", lambda: 1 / 0)


def test_names_from_outside_are_text_not_markup():
    explorer = Explorer("x", [], str)
    explorer.say("<img src=x onerror=alert(1)>", bad=True)
    assert "<img" not in explorer.message.value
    assert "<b>" not in Plot((0, 1), (0, 1), xlabel="<b>").svg


def test_thumbnails_travel_once():
    """What a gallery sends on an interaction is numbers; the pictures stay where they are."""
    gallery = Gallery(thumbs=[b"a" * 3000] * 1000, order=list(range(1000)))
    sent, gallery.comm = [], mock.Mock()  # a front end that listens
    gallery.send_state = lambda key: sent.append(key)
    gallery.order, gallery.chosen = [5, 3], [3]
    assert sent == ["order", "chosen"]


@pytest.mark.parametrize("ends", [(0, 1), (-3e-5, 2e-5), (1e6, 3e6), (0, 0.1), (-2.118, 2.64)])
def test_ticks_are_round_and_inside(ends):
    values = ticks(*ends)
    assert 2 <= len(values) <= 8
    assert min(values) >= ends[0] - 1e-9 and max(values) <= ends[1] + 1e-9 * abs(ends[1])


def test_a_point_on_no_polygon_is_outside():
    assert not inside([0.5], [0.5], []).any()
    assert inside([0.5], [0.5], [(0, 0), (1, 0), (1, 1), (0, 1)]).all()


def test_widgets_begin_empty():
    assert Figure().span == [0.0, 1.0] and Table().rows == [] and Gallery().picked == -1
