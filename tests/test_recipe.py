"""The recipe: guarded, repeatable, whole or absent, and clear about which images judged."""

import json
import logging
import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quantize import network, scale
from typer.testing import CliRunner

from calib_nb.analysis.compare import compare_models
from calib_nb.analysis.label_judge import Labels, label_halves, label_judges
from calib_nb.analysis.tasks import TaskKind
from calib_nb.commands.quant import app as quant_app
from calib_nb.core.errors import InputError
from calib_nb.core.run import sha256_file
from calib_nb.faces.demo import demo_detector
from calib_nb.faces.demo_drawings import drawn_scenes
from calib_nb.faces.verification import VerificationTask
from calib_nb.graph.build import network as build_network
from calib_nb.graph.contract import open_session
from calib_nb.graph.fixed import fix_batch
from calib_nb.graph.model import load_graph
from calib_nb.npu.config import generate_config, save_config
from calib_nb.quant.mixed import choose_float_nodes
from calib_nb.quant.quantize import read_history
from calib_nb.quant.recipe import STEPS, auto, quantize_by, split_images
from calib_nb.quant.sensitivity import NoiseMeasure, NoiseParts, noise_ratio
from calib_nb.quant.sensitivity import _halved as halved
from calib_nb.quant.target import PROFILES


@pytest.fixture(scope="module")
def images():
    return list(np.random.default_rng(1).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8))


@settings(derandomize=True)
@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_a_split_loses_nothing_and_shares_nothing(n, share, seed):
    calibration, tuning = split_images(list(range(n)), share=share, seed=seed)
    assert calibration and tuning and sorted(calibration + tuning) == list(range(n))
    assert calibration == sorted(calibration) and tuning == sorted(tuning)


@pytest.mark.parametrize("target", PROFILES)
def test_no_step_is_kept_that_does_not_help(tmp_path, images, target, caplog):
    model = network(tmp_path / "float.onnx")
    caplog.set_level(logging.INFO, "calib_nb")
    recipe = auto(model, images, scale, tmp_path / "int8.onnx", profile=target, progress=False)
    assert [r.message for r in caplog.records if re.fullmatch(r"the recipe takes about \d+ s", r.message)]
    kept, gains = recipe.steps[recipe.steps.kept].noise.to_numpy(), recipe.steps[["gain_db", "error_db"]]
    assert kept[-1] <= kept[0] and recipe.steps.noise.min() >= 0.8 * kept[-1]
    assert gains.iloc[0].eq(0).all() and (gains.error_db[1:] >= 0).all()
    assert recipe.steps.step[0] == "minmax" and list(dict.fromkeys(recipe.steps.step[1:])) == [
        s for s in STEPS if s in set(recipe.steps.step)
    ]
    # the written file is what the last kept row was measured on
    _, tuning = split_images(images)
    outputs = [
        [[session.run(None, {"input": scale(p)})[0]] for p in tuning]
        for session in (open_session(model), open_session(recipe.model.path))
    ]
    assert noise_ratio(*outputs) == pytest.approx(kept[-1], rel=1e-3)


def test_equal_inputs_give_equal_bytes_and_the_history_tells(tmp_path, images):
    model = network(tmp_path / "float.onnx")
    first, second = (auto(model, images, scale, tmp_path / f"{k}.onnx", progress=False).model for k in (1, 2))
    assert sha256_file(first.path) == sha256_file(second.path)
    history = read_history(first.path)
    assert (
        history["method"].startswith("auto: ")
        and json.loads(history["recipe"])[0] == "plain minmax"
        and 0 < float(history["int8_share"]) <= 1
    )
    assert json.loads(history["float_nodes"]) == list(first.float_nodes)


def test_the_profile_bounds_what_stays_in_float(tmp_path, images):
    model = network(tmp_path / "float.onnx")
    for name, target in PROFILES.items():
        quantized = auto(model, images, scale, tmp_path / f"{name}.onnx", profile=target, progress=False).model
        assert 1 - quantized.int8_share <= target.float_macs + 1e-9


@settings(derandomize=True)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=20), st.floats(0, 1), st.floats(0, 1))
def test_a_float_list_keeps_to_its_shares(rows, nodes, macs):
    import pandas as pd

    table = pd.DataFrame(
        {
            "node": [f"n{k}" for k in range(len(rows))],
            "op": "Conv",
            "macs_share": [a for a, _ in rows],
            "noise": sorted((b for _, b in rows), reverse=True),
        }
    )
    chosen = choose_float_nodes(table, nodes=nodes, macs=macs)
    assert len(chosen) <= nodes * len(rows) + 1e-6 and table.macs_share[table.node.isin(chosen)].sum() <= macs + 1e-6


def test_bad_input_is_refused_and_nothing_is_written(tmp_path, images):
    model, out = network(tmp_path / "float.onnx"), tmp_path / "out.onnx"
    for arguments, message in (
        ({"steps": ("smoth",)}, "smooth"),
        ({"images": images[:1]}, "at least 2"),
        ({"images": []}, "no calibration images"),
        ({"profile": "npu"}, "per-tensor-npu"),
    ):
        with pytest.raises(InputError, match=message):
            auto(
                **{
                    "model": model,
                    "images": images,
                    "preprocess": scale,
                    "output": out,
                    "progress": False,
                    **arguments,
                }
            )
    with pytest.raises(InputError, match="auto"):
        quantize_by("auot", model, images, scale, out)
    assert not out.exists()


@pytest.mark.slow
def test_the_recipe_brings_edgeface_back(real_data, tmp_path):
    """One scale per tensor and every node in INT8 ruin its embeddings; a tenth of the nodes in float restore them."""
    from calib_nb.data.images import find_images
    from calib_nb.data.preprocess import preset

    faces = [real_data / "lfw/images" / p for p in find_images(real_data / "lfw/images")[::40]]
    model = fix_batch(real_data / "models/edgeface_xxs_q_dequant.onnx", tmp_path / "edgeface.onnx")
    recipe = auto(model, faces, preset("edgeface"), tmp_path / "npu.onnx", profile="per-tensor-npu", progress=False)
    assert recipe.steps.noise.iloc[0] > 0.5 and recipe.steps[recipe.steps.kept].noise.iloc[-1] < 0.2
    assert len(recipe.model.float_nodes) <= len(load_graph(model).nodes) / 10


@settings(derandomize=True)
@given(st.integers(1, 500), st.integers(24, 64), st.data())
def test_the_noisiest_of_many_nodes_is_found_in_few_runs(count, most, data):
    """Groups lose no node and share none; one that outweighs all others is measured alone."""
    loud, runs = data.draw(st.integers(0, count - 1)), []
    names = list(range(count))
    groups = halved(names, lambda group: runs.append(1) or sum(1.0 if n == loud else 1e-4 for n in group), most, False)
    assert len(runs) <= most and sorted(n for group, _ in groups for n in group) == names
    assert [loud] in [list(group) for group, _ in groups]
    assert all(noise == sum(1.0 if n == loud else 1e-4 for n in group) for group, noise in groups)


class _Counting:
    """A labelled task on arrays that counts how often it was made."""

    name, primary, higher_is_better = "counting", "accuracy", True

    def __init__(self, samples):
        self.samples, self.loaded = samples, []

    def load(self, sample):
        self.loaded.append(sample.tobytes())
        return scale(sample)

    def units(self, outputs, reference):
        same = [next(iter(a.values())).argmax() == next(iter(b.values())).argmax() for a, b in zip(outputs, reference)]
        return pd.DataFrame({"accuracy": np.array(same, float)})

    def metrics(self, units):
        return {"accuracy": float(units.accuracy.mean())}


def test_labels_that_judge_are_not_those_that_are_scored(tmp_path, images, monkeypatch):
    model, made = network(tmp_path / "float.onnx"), []
    others = list(np.random.default_rng(7).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8))
    kind = TaskKind("counting", "arrays", lambda *_: made.append(_Counting(others)) or made[-1], lambda model: None)
    monkeypatch.setattr("calib_nb.analysis.tasks.task_kinds", lambda: {"counting": kind})
    judge, scorer = label_judges(model, Labels("labels", "counting"), scale, [])
    recipe = auto(
        model, images, scale, tmp_path / "int8.onnx", steps=("methods", "clip"), judge=judge, progress=False, threads=1
    )
    assert len(made) == 1 and 2 <= recipe.steps.metric.notna().sum() <= 6
    judged = set(made[0].loaded)
    assert judged == {x.tobytes() for x in judge.task.samples} and len(judged) + len(scorer.task.samples) == 60
    made[0].loaded.clear()
    comparison = compare_models(model, {"int8": recipe.model.path}, scorer.task, latency_runs=2, progress=False)
    assert not judged & set(made[0].loaded) and len(comparison.units["int8"]) == len(scorer.task.samples)
    # the last word: no judged plan is better beyond its interval than the one that was kept
    kept = recipe.steps[recipe.steps.kept].iloc[-1]
    assert kept.metric >= recipe.steps.metric.max() - 0.5 and kept.noise == recipe.steps.noise[recipe.steps.kept].min()


def test_pairs_of_faces_share_no_image_between_the_halves():
    rng = np.random.default_rng(0)
    crops = {f"{k}.png": rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) for k in range(200)}
    names = list(crops)
    rows = [(names[a], names[b], bool(k % 2), k % 10) for k, (a, b) in enumerate(rng.integers(0, 200, (150, 2)))]
    table = pd.DataFrame(rows, columns=["first", "second", "same", "fold"])
    halves = label_halves(VerificationTask(crops, table, preprocess=lambda crop: crop))
    first, second = ({x.tobytes() for x in half.samples} for half in halves)
    assert not first & second and min(len(half.rows) for half in halves) >= 20


# ------------------------------------------------------------------ what noise is measured in


def _far(reference, outputs):
    """Pixels that the values above 1 move: background does not count."""
    sure = reference[0] > 1
    count = sure.sum()
    return np.array([np.square(reference[0][sure] - outputs[0][sure]).mean() if count else 0.0]), np.array([count > 0])


FAR = NoiseMeasure(_far, "drift of peaks", "px", goal=0.01, floor=1.0, counted=lambda outputs: [outputs[0] > 1])


def _peaks(path):
    """Values of 0 to 3 that count, beside a background down to -60."""
    weights = {"w": np.float32([[[[1.5 / 255]], [[0]], [[0]]], [[[0]], [[-60 / 255]], [[0]]]])}
    return build_network("y = Conv (x, w)", inputs={"x": (1, 3, 16, 16)}, **weights).save(path)


def _as_is(bgr):
    return bgr.astype(np.float32).transpose(2, 0, 1)[None]


def test_ranges_of_outputs_come_from_the_values_that_count(tmp_path):
    model, images = (
        _peaks(tmp_path / "m.onnx"),
        list(np.random.default_rng(3).integers(0, 256, (30, 16, 16, 3), np.uint8)),
    )
    recipe = auto(
        model, images, _as_is, tmp_path / "q.onnx", profile="int8-only", noise=FAR, steps=("outputs",), progress=False
    )
    assert recipe.steps.step[recipe.steps.kept].tolist() == ["minmax", "outputs"]
    assert recipe.steps.gain_db.iloc[-1] > 20 > recipe.steps.error_db.iloc[-1]
    # one step of the range 0 to 2.25 instead of one of -60 to 1.5
    assert recipe.model.measure is FAR and FAR.number(recipe.model.noise) < 2.25 / 255
    assert FAR.text(recipe.model.noise).endswith(" px") and list(recipe.shown)[3] == "drift_px"
    assert recipe.model.output_db < 6 and recipe.model.usable  # the background is cut off, which only dB say


def test_a_goal_has_the_unit_of_the_noise(tmp_path):
    model, images = (
        _peaks(tmp_path / "m.onnx"),
        list(np.random.default_rng(3).integers(0, 256, (9, 16, 16, 3), np.uint8)),
    )
    rare = {"profile": "qnn-htp", "noise": FAR, "steps": ("wide_nodes",), "progress": False}
    with pytest.raises(InputError, match="goal_db 40, and drift of peaks in px; expected goal, in px"):
        auto(model, images, _as_is, tmp_path / "q.onnx", goal_db=40, **rare)
    loose, tight = (auto(model, images, _as_is, tmp_path / "q.onnx", goal=goal, **rare).model for goal in (5.0, 0.001))
    assert loose.wide_tensors == 0 < tight.wide_tensors


def test_the_error_of_a_gain_is_that_of_the_jackknife():
    rng = np.random.default_rng(5)
    weights = rng.integers(0, 2, (12, 2)).astype(float)
    before, after = (NoiseParts(rng.exponential(1, (12, 2)), weights) for _ in range(2))

    def gain(rows):
        logs = [
            np.log10([np.average(p.values[rows, k], weights=weights[rows, k]) for k in range(2)])
            for p in (before, after)
        ]
        return 10 * np.average(logs[0] - logs[1], weights=weights[rows].sum(0))

    left_out = [gain(np.arange(12) != k) for k in range(12)]
    expected = gain(np.arange(12)), np.sqrt(11 / 12 * np.square(np.array(left_out) - np.mean(left_out)).sum())
    assert after.gain(before) == pytest.approx(expected)
    assert after.surely_below(after) is False and NoiseParts(after.values / 2, weights).surely_below(after)


def test_the_shell_shows_pixels_for_a_yunet(tmp_path):
    drawn_scenes(tmp_path / "faces", 6, size=(320, 240))
    model, config = demo_detector(), tmp_path / "c.json"
    save_config(generate_config("yunet", tmp_path / "faces" / "ub" / "images", model=model), config)
    line = f"quantize --model {model} --config {config} --output {tmp_path / 'q.onnx'} --method minmax"
    result = CliRunner().invoke(quant_app, line.split())
    assert result.exit_code == 0 and re.search(r"drift of faces on some of them: 0\.\d+ px", result.output)
    assert "dB" not in result.output
