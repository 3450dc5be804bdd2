"""Depth maps as files: predicted and resumed, matched and scored, and which models are depth networks at all."""

import os
import shutil
import time

import cv2
import forked
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calib_nb.analysis.compare import run_model
from calib_nb.analysis.tasks import task_kinds, task_noise
from calib_nb.core.errors import ImageError, InputError, ModelError
from calib_nb.core.run import sha256_file
from calib_nb.data.preprocess import preset
from calib_nb.depth.demo import demo_depth
from calib_nb.depth.frames import depth_task, read_frames
from calib_nb.depth.metrics import DEPTH_METRICS, Scoring, depth_metrics
from calib_nb.depth.predict import (
    MapOptions,
    encode_map,
    find_map,
    map_names,
    predict_depth,
    read_map,
    score_maps,
    scores_by_range,
)
from calib_nb.depth.task import looks_like_depth, make_depth_task
from calib_nb.graph.build import conv, network, sequential
from calib_nb.graph.contract import open_session
from calib_nb.quant.quantize import quantize_static
from calib_nb.quant.sensitivity import noise_shares

SPLIT = "val_split.json"


@pytest.fixture(scope="module")
def demo():
    return demo_depth()


@pytest.fixture(scope="module")
def scored(demo):
    return read_frames(demo.root, SPLIT)


@pytest.fixture(scope="module")
def predicted(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps") / "maps"
    return predict_depth(demo.model, demo.root, folder, split_file=SPLIT, progress=False)


def content(folder) -> dict:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".png", ".npy", ".csv", ".json")}


# --- one map


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    hnp.arrays(np.float32, (3, 5), elements=st.floats(0, 300, width=32)),
    st.sampled_from([256.0, 1000.0, 100.0]),
)
def test_a_png_holds_depth_to_half_a_step(tmp_path_factory, depth, scale):
    path = tmp_path_factory.mktemp("png") / "map.png"
    path.write_bytes(encode_map(depth, scale))
    again = read_map(path, scale)
    reach = 65535 / scale
    assert ((again == 0) == (depth == 0)).all()  # "no depth" is no depth, and nothing else is
    inside = (depth * scale >= 1) & (depth <= reach)
    assert np.abs(again - depth)[inside].max(initial=0) <= 0.5 / scale + reach * 1e-6
    assert np.allclose(again[depth > reach], reach)


@pytest.mark.parametrize("shape", [(4, 6), (1, 4, 6), (1, 1, 4, 6)])
def test_an_npy_is_read_exactly(tmp_path, shape):
    depth = np.random.default_rng(0).uniform(1, 9, shape).astype(np.float32)
    np.save(tmp_path / "m.npy", depth)
    assert np.array_equal(read_map(tmp_path / "m.npy", 256), depth.reshape(4, 6))


def broken_maps():
    return {
        "wrong shape": lambda p: np.save(p, np.ones((2, 4, 4))),
        "not finite": lambda p: np.save(p, np.full((4, 4), np.inf)),
        "unreadable": lambda p: p.write_bytes(b"\x93NUMPY cut short"),
    }


@pytest.mark.parametrize("reason", broken_maps())
def test_a_broken_npy_is_refused_with_its_reason(tmp_path, reason):
    broken_maps()[reason](tmp_path / "m.npy")
    with pytest.raises(ImageError) as refused:
        read_map(tmp_path / "m.npy", 256)
    assert refused.value.reason == reason


def test_a_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "run"),)

    np.save(tmp_path / "m.npy", np.array([Evil()], object), allow_pickle=True)
    with pytest.raises(ImageError):
        read_map(tmp_path / "m.npy", 256)
    assert not (tmp_path / "run").exists()


@given(st.lists(st.text("aAb._/", min_size=1, max_size=6), max_size=8, unique=True))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_names_never_collide(stems):
    paths = sorted({f"{s.strip('/') or 'x'}{ending}" for s in stems for ending in (".jpg", ".png")})
    names = map_names(paths)
    assert len({n.casefold() for n in names}) == len(paths) and not any("/" in n for n in names)


# --- predicting


def test_maps_are_the_models_outputs(demo, scored, predicted):
    assert predicted.table["dataset_root"].tolist() == scored.table["dataset_root"].tolist()
    task = depth_task(scored, preset("depth", size=(96, 64)))
    outputs = run_model(open_session(demo.model), task, progress=False)
    for name, output in zip(predicted.table["name"], outputs, strict=True):
        exact = read_map(predicted.path / f"{name}.npy", 256)
        assert np.array_equal(exact, output["depth"][0, 0])
        # half a step, and float32's own error at 256 m
        assert np.abs(read_map(predicted.path / f"{name}.png", 256) - exact).max() <= 0.5 / 256 + 1e-5


def test_maps_have_the_size_of_the_image_or_of_the_model(demo, scored, tmp_path):
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in/a.png"), cv2.resize(cv2.imread(str(scored.images[0])), (50, 40)))
    for size, shape in (("image", (40, 50)), ("model", (64, 96))):
        options = MapOptions(("npy",), size=size)
        predict_depth(demo.model, tmp_path / "in", tmp_path / size, options=options, progress=False)
        assert read_map(tmp_path / size / "a.npy", 256).shape == shape
        assert not list((tmp_path / size).glob("*.png"))


KILLED = """
import sys, time
import calib_nb.depth.predict as p
whole = p._write_map
def slow(*a):
    if len(written) == 6:
        time.sleep(600)  # until the kill comes
    written.append(1)
    return whole(*a)
written = []
p._write_map = slow
p.predict_depth(sys.argv[1], sys.argv[2], sys.argv[3], split_file=sys.argv[4], progress=False)
"""


def test_a_killed_run_goes_on_and_ends_the_same(demo, predicted, tmp_path):
    process = forked.start_script(KILLED, demo.model, demo.root, tmp_path / "maps", SPLIT)
    until = time.monotonic() + 120
    journal = tmp_path / "maps" / "predictions.journal"
    while time.monotonic() < until and not (journal.is_file() and journal.read_bytes().count(b"\n") > 4):
        time.sleep(0.01)
    forked.kill(process)
    assert not (tmp_path / "maps/predictions.csv").exists()
    for path in (tmp_path / "maps").glob("*.npy"):
        assert np.load(path).shape == (64, 96)  # whole, whenever the kill came
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "maps").glob("*.npy")}
    again = predict_depth(demo.model, demo.root, tmp_path / "maps", split_file=SPLIT, progress=False)
    assert content(again.path) == content(predicted.path) and again.table.equals(predicted.table)
    kept = [p for p, stamp in stamps.items() if p.stat().st_mtime_ns == stamp]
    assert len(kept) >= 3  # the journal is ahead by at most the map that was being written


def test_a_changed_image_is_predicted_again(demo, scored, tmp_path):
    (tmp_path / "in").mkdir()
    shutil.copy(scored.images[0], tmp_path / "in/a.png")
    first = predict_depth(demo.model, tmp_path / "in", tmp_path / "out", progress=False).table["max_m"][0]
    shutil.copy(scored.images[-1], tmp_path / "in/a.png")
    os.utime(tmp_path / "in/a.png", ns=(1, 1))
    assert predict_depth(demo.model, tmp_path / "in", tmp_path / "out", progress=False).table["max_m"][0] != first


def test_what_cannot_be_predicted_is_listed(demo, tmp_path):
    """The faulty split: entries that lead nowhere and images that are missing or cut short; depth is not looked at."""
    faulty = predict_depth(demo.model, demo.root, tmp_path / "out", split_file="faulty_split.json", progress=False)
    reasons = faulty.rejected["reason"].tolist()
    assert {"no image", "truncated", "absolute path", "duplicate", "not an object"} <= set(reasons)
    assert len(faulty.table) + len(faulty.rejected) == 3 + 16


def test_an_output_with_nan_has_no_map(tmp_path):
    """The square root of a negative number is NaN: the dark image has a map, the bright one has none."""
    w = np.full((1, 3, 1, 1), -1.0)
    model = network("c = Conv (x, w, b); y = Sqrt (c)", inputs={"x": (1, 3, 8, 8)}, w=w, b=np.array([1.0]))
    model.save(tmp_path / "m.onnx")
    (tmp_path / "in").mkdir()
    for name, gray in (("dark", 0), ("bright", 255)):
        cv2.imwrite(str(tmp_path / f"in/{name}.png"), np.full((8, 8, 3), gray, np.uint8))
    done = predict_depth(tmp_path / "m.onnx", tmp_path / "in", tmp_path / "out", progress=False)
    assert done.table["name"].tolist() == ["dark"]
    assert done.rejected.to_dict("records") == [{"path": "bright.png", "reason": "not finite"}]
    (tmp_path / "in/dark.png").unlink()
    with pytest.raises(ModelError, match="none of 1 images has a map"):
        predict_depth(tmp_path / "m.onnx", tmp_path / "in", tmp_path / "out2", progress=False)


def test_a_folder_in_use_is_left_alone(demo, scored, predicted, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years")
    (tmp_path / "empty").mkdir()
    before = content(predicted.path)
    for source, output, options, message in (
        (demo.root, tmp_path, MapOptions(), "holds something else"),
        (demo.root, predicted.path, MapOptions(scale=1000), "other settings"),
        (tmp_path / "empty", tmp_path / "never", MapOptions(), "no image"),
    ):
        with pytest.raises(InputError, match=message):
            split = SPLIT if source == demo.root else ""
            predict_depth(demo.model, source, output, split_file=split, options=options, progress=False)
    assert content(predicted.path) == before and not (tmp_path / "never").exists()


# --- scoring


def test_files_score_as_the_network_does(demo, scored, predicted):
    task = depth_task(scored, preset("depth", size=(96, 64)))
    outputs = run_model(open_session(demo.model), task, progress=False)
    units = task.units(outputs, outputs)
    scores = score_maps(predicted.path, scored)
    assert scores.missing.empty and scores.metrics == task.metrics(units)
    pd.testing.assert_frame_equal(scores.units, units)
    table = scores_by_range(scores.units)
    assert table["count"][0] == len(units) == table["count"][1:].sum()
    for row in table.iloc[1:].itertuples():
        part = units[units["depth_range"] == row.frames_of]
        assert row.abs_rel == pytest.approx(part["abs_rel"].mean())


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_maps_of_another_machine_are_matched_by_scene_and_name(scored, tmp_path, layout):
    for k in range(len(scored)):
        row = scored.table.iloc[k]
        stem = f"{row.dataset_root}/{row.filename}" if layout == "nested" else f"{scored.scenes[k]}_{row.filename}"
        (tmp_path / stem).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{stem}.png").write_bytes(encode_map(1.1 * scored.depth_map(k), 1000))
    scores = score_maps(tmp_path, scored, scale=1000)
    assert scores.missing.empty
    # a tenth too far; far maps are clipped at 65.5 m, and rounding is half a millimetre
    near = scores.units[scores.units["mean_depth_m"] < 15]
    assert np.allclose(near["abs_rel"], 0.1, atol=2e-3)


def test_maps_of_another_size_are_resized_as_in_evaluation(scored, tmp_path):
    rng, stem = np.random.default_rng(0), f"{scored.scenes[0]}_{scored.table.filename[0]}"
    small = rng.uniform(1, 9, (16, 24)).astype(np.float32)
    np.save(tmp_path / stem, small)
    scores = score_maps(tmp_path, scored)
    resized = cv2.resize(small, (96, 64), interpolation=cv2.INTER_LINEAR)
    by_hand = depth_metrics(resized, scored.depth_map(0))
    assert len(scores.units) == 1 and all(scores.metrics[m] == by_hand[m] for m in DEPTH_METRICS)
    assert len(scores.missing) == len(scored) - 1 and set(scores.missing["reason"]) == {"no map"}


def test_disparity_is_scored_as_disparity(scored, tmp_path):
    stem, depth = f"{scored.scenes[0]}_{scored.table.filename[0]}", scored.depth_map(0)
    np.save(tmp_path / stem, np.where(depth > 0, 1 / np.maximum(depth, 1e-3), 0))
    scores = score_maps(tmp_path, scored, scoring=Scoring(output="disparity"))
    assert scores.metrics["abs_rel"] < 1e-5


def test_maps_that_cannot_be_used_are_listed(scored, tmp_path):
    names = [f"{scene}_{name}" for scene, name in zip(scored.scenes, scored.table.filename)]
    for k, reason in enumerate(broken_maps()):
        broken_maps()[reason](tmp_path / f"{names[k]}.npy")
    (tmp_path / f"{names[3]}.png").write_bytes(encode_map(scored.depth_map(3))[:-9])
    (tmp_path / f"{names[4]}.png").write_bytes(encode_map(scored.depth_map(4)))
    scores = score_maps(tmp_path, scored, scale=256)
    assert scores.missing["reason"].tolist()[:4] == [*broken_maps(), "truncated"]
    assert len(scores.units) == 1 and len(scores.missing) == len(scored) - 1


def test_scores_need_a_scale_and_a_map(scored, tmp_path):
    with pytest.raises(InputError, match="usable map"):
        score_maps(tmp_path, scored, scale=256)
    (tmp_path / f"{scored.scenes[0]}_{scored.table.filename[0]}.png").write_bytes(encode_map(scored.depth_map(0)))
    with pytest.raises(InputError, match="unknown scale"):
        score_maps(tmp_path, scored)
    assert find_map(tmp_path, ["nothing"]) is None


# --- which models are depth networks


def test_the_registry_knows_depth(demo, scored):
    kind = task_kinds()["depth"]
    task = kind.make(demo.root / SPLIT, preset("depth", size=(96, 64)))
    assert task.samples == scored.images and make_depth_task(demo.root, task.preprocess).samples == task.samples
    x = np.float32([[[[1, 2], [4, 8]]]])
    assert task_noise(demo.model)([[x]], [[1.1 * x]])[0] == pytest.approx(np.log(1.1) ** 2, rel=1e-4)


def test_an_int8_depth_network_still_looks_like_one(demo, scored, tmp_path):
    chain, before = preset("depth", size=(96, 64)), sha256_file(demo.model)
    int8 = quantize_static(
        demo.model, scored.images[:4], chain, tmp_path / "q.onnx", profile="per-tensor-npu", progress=False
    )
    assert looks_like_depth(int8.path) and sha256_file(demo.model) == before


@pytest.mark.parametrize("ending", ["Sigmoid", "Relu", "Tanh"])
def test_a_mask_is_not_depth(tmp_path, ending):
    model = sequential(conv(1), ending, shape=(1, 3, 32, 64)).save(tmp_path / "m.onnx")
    assert not looks_like_depth(model) and task_noise(model) is noise_shares
