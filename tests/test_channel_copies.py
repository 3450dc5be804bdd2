"""Channels in copies: finer codes by Hermite's identity, the same float outputs, no more work than is allowed."""

from dataclasses import replace

import numpy as np
import onnx
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from passing import passing_network

from calib_nb.analysis.diagnose import diagnose_model
from calib_nb.analysis.match import match_models
from calib_nb.graph.build import conv, depthwise, linear, network, op, residual, sequential
from calib_nb.graph.layers import layers, macs
from calib_nb.graph.model import load_graph, run
from calib_nb.graph.simplify import simplify
from calib_nb.quant.channel_copies import copied_weight, copy_channels, copy_shifts, copy_units
from calib_nb.quant.harden import HardenOptions, harden_model
from calib_nb.quant.observe import observe
from calib_nb.quant.quantize import plain_graph, read_history
from calib_nb.quant.ranges import ranges
from calib_nb.quant.recipe import auto
from calib_nb.quant.target import PROFILES, profile
from calib_nb.quant.units import last_layers
from calib_nb.quant.write import write_qdq

TARGET = profile("int8-only")
PICTURES = [np.random.default_rng(k).integers(0, 256, (16, 16, 3), dtype=np.uint8) for k in range(12)]


def preprocess(bgr):
    return ((bgr.astype(np.float32) - 127.5) / 127.5).transpose(2, 0, 1)[None]


IMAGES = [preprocess(picture) for picture in PICTURES]


def minmax(graph):
    return ranges(observe(graph, PICTURES, preprocess, progress=False), "minmax")


def outputs(graph, images=IMAGES):
    return [np.concatenate([run(graph, x)[name].ravel() for x in images]) for name in graph.outputs]


@given(st.integers(1, 9), st.floats(-1e3, 1e3, allow_nan=False))
def test_the_mean_of_copies_is_as_fine_as_a_part_of_a_step(count, x):
    shifts = copy_shifts(count)
    assert abs(shifts.sum()) < 1e-12 and np.allclose(np.diff(shifts), 1 / count)
    mean = np.rint(x + shifts).mean()
    if abs(x * count % 1 - 0.5) > 1e-6:  # halfway either neighbour is right
        assert np.isclose(mean, np.rint(x * count) / count)
    assert abs(mean - x) <= 0.5 / count + 1e-9


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_weights_of_all_copies_are_the_weight(reads, writes, seed):
    weight = np.random.default_rng(seed).normal(size=(3, 4, 1, 2))
    scale = np.abs(weight).max() / 127
    copied = copied_weight(weight, np.array(scale), reads, writes).reshape(writes, 3, reads, 4, 1, 2)
    assert np.allclose(copied.sum(2).mean(0), weight)
    level = scale / reads
    rounded = (np.rint(copied / level) * level).sum(2).mean(0)
    assert np.abs(rounded - weight).max() <= 0.5 * scale / (reads * writes) + 1e-9


POOL = op("MaxPool", "kernel_shape = [2, 2], strides = [2, 2]")
BODIES = {
    "convolutions": (conv(8), "Relu", conv(8, 1), "Relu", conv(4)),
    "depthwise": (conv(8), "Relu", depthwise(), "Relu", conv(8, 1), depthwise(), conv(4, 1)),
    "pooled": (conv(8), "Relu", POOL, conv(8), "Relu", "GlobalAveragePool", "Flatten", linear(5)),
    "residual": (conv(8), "Relu", residual(conv(8), "Relu", conv(8, 1)), "Relu", conv(4, 1)),
    "flattened": (conv(6, stride=4), "Relu", "Flatten", linear(12), "Relu", linear(3)),
    "leaky": (conv(8), op("LeakyRelu", "alpha = 0.1"), conv(8), op("Clip"), conv(4, 1)),
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("opset", [13, 18])
def test_float_outputs_stay_and_the_int8_form_gets_finer(name, opset):
    gains = []
    for seed in range(4):
        graph = simplify(sequential(*BODIES[name], shape=(1, 3, 16, 16), seed=seed, opset=opset))
        table, given_work = minmax(graph), macs(graph).macs.sum()
        copied = copy_channels(graph, table, TARGET, share=9, ends=True)
        onnx.checker.check_model(copied.graph.model)
        assert macs(copied.graph).macs.sum() == pytest.approx(given_work * (1 + copied.added))
        assert copied.graph.outputs == graph.outputs and copied.copies and copied.host_nodes
        wanted, as_float = outputs(graph)[0], outputs(copied.graph)[0]
        assert as_float.shape == wanted.shape
        plain = outputs(write_qdq(graph, table, TARGET))[0]
        int8 = outputs(write_qdq(copied.graph, minmax(copied.graph), TARGET, float_nodes=copied.host_nodes))[0]
        noise = [np.square(one - wanted).sum() for one in (plain, as_float, int8)]
        assert noise[1] < 0.5 * noise[0]  # the float network itself is far nearer than INT8 is
        gains.append(np.log(noise[0] / noise[2]))
    assert np.mean(gains) > np.log(1.3)


def test_what_passes_channels_on_is_copied_with_them():
    rng = np.random.default_rng(0)
    graph = passing_network(rng)
    none = pd.DataFrame({"low": [], "high": []})
    copied = copy_channels(graph, none, TARGET, share=9)
    assert copied.copies == dict.fromkeys(["c", "p", "m", "n", "r", "d", "k", "f"], 2) and copied.host_nodes == ()
    shapes = {name: copied.graph.shape(name) for name in ("c", "r", "f")}
    assert shapes == {"c": (1, 12, 4, 4), "r": (1, 12, 8, 8), "f": (1, 12 * 64)}
    for _ in range(5):
        x = rng.normal(size=(1, 3, 4, 4)).astype(np.float32)
        wanted, got = run(graph, x)["y"], run(copied.graph, x)["y"]
        assert np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()


def test_matmul_on_the_last_axis_and_transposed_convolutions():
    rng = np.random.default_rng(1)
    text = "a = MatMul (x, w)\nb = Add (a, bias)\nr = Relu (b)\ny = MatMul (r, v)"
    weights = {"w": rng.normal(size=(5, 8)), "bias": rng.normal(size=8), "v": rng.normal(size=(8, 3))}
    flat = network(text, inputs={"x": (1, 6, 5)}, **{k: v.astype(np.float32) for k, v in weights.items()})
    copied = copy_channels(flat, pd.DataFrame({"low": [0.0], "high": [9.0]}, index=["r"]), TARGET, share=9, ends=True)
    assert copied.copies == {"b": 2, "r": 2, "y": 4} and copied.graph.shape("r") == (1, 6, 16)
    text = "c = Conv (x, w)\nt = ConvTranspose <group = 4, strides = [2, 2]> (c, v)\ny = Conv (t, u)"
    weights = {"w": (4, 3, 1, 1), "v": (4, 1, 2, 2), "u": (2, 4, 1, 1)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in weights.items()}
    wide = network(text, inputs={"x": (1, 3, 4, 4)}, **weights)
    turned = copy_channels(wide, pd.DataFrame({"low": [], "high": []}), TARGET, share=9)
    assert turned.copies == {"c": 2, "t": 2}
    for graph, new, shape in ((flat, copied.graph, (1, 6, 5)), (wide, turned.graph, (1, 3, 4, 4))):
        x = rng.normal(size=shape).astype(np.float32)
        assert np.abs(run(new, x)["y"] - run(graph, x)["y"]).max() < 0.01 * np.abs(run(graph, x)["y"]).max()


def test_groups_of_several_channels_inputs_and_attention_stay():
    body = conv(8), "Relu", conv(8), "Softmax", conv(8, 1)
    bent = simplify(sequential(*body, shape=(1, 3, 8, 8)))
    assert [sorted(unit.tensors) for unit in copy_units(bent)] == [["conv0", "relu0"]]
    rng = np.random.default_rng(0)
    text = "c = Conv (x, w)\nd = Conv <group = 2> (c, v)\ny = Conv (d, u)"
    shapes = {"w": (8, 3, 1, 1), "v": (8, 4, 1, 1), "u": (2, 8, 1, 1)}
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    grouped = network(text, inputs={"x": (1, 3, 4, 4)}, **weights)
    assert copy_units(grouped) == []
    assert copy_channels(grouped, pd.DataFrame({"low": [], "high": []}), TARGET, share=9).copies == {}


@given(st.floats(0, 4), st.sampled_from(sorted(BODIES)))
@settings(max_examples=25, deadline=None)
def test_no_more_work_comes_in_than_is_allowed(share, name):
    graph = simplify(sequential(*BODIES[name], shape=(1, 3, 16, 16)))
    table = pd.DataFrame({"low": [], "high": []})
    copied = copy_channels(graph, table, TARGET, share=share, ends=True)
    assert 0 <= copied.added <= share + 1e-12 and (copied.added == 0) == (not copied.copies)
    assert macs(copied.graph).macs.sum() == pytest.approx(macs(graph).macs.sum() * (1 + copied.added))


def test_a_recipe_and_hardening_say_what_they_added(tmp_path):
    body = conv(8, stride=2), "Relu", depthwise(), "Relu", conv(16, 1), "Relu", conv(4, 1)
    model = sequential(*body, shape=(1, 3, 16, 16)).save(tmp_path / "m.onnx")
    steps = {"steps": ("copies",), "progress": False}
    spare = replace(TARGET, extra_macs=1.0)
    made = auto(model, PICTURES, preprocess, tmp_path / "q.onnx", profile=spare, **steps)
    assert made.steps.step[made.steps.kept].tolist() == ["minmax", "copies"]
    assert 0 < made.model.added_macs <= 1 and float(read_history(made.model.path)["added_macs"]) > 0
    npu = auto(model, PICTURES, preprocess, tmp_path / "n.onnx", profile="per-tensor-npu", **steps)
    assert npu.steps.step.tolist() == ["minmax"] and npu.model.added_macs == 0
    hard = harden_model(model, PICTURES, preprocess, tmp_path / "h.onnx", **steps, extra_macs=1.0)
    none = harden_model(model, PICTURES, preprocess, tmp_path / "g.onnx", **steps, options=HardenOptions(extra_macs=0))
    assert 0 <= hard.added_macs <= 1 and "copies" in set(hard.steps.step)
    assert none.steps.step.tolist() == ["given"] and none.added_macs == 0


def test_copies_are_matched_and_diagnosed_as_one(tmp_path):
    body = conv(8, stride=2), "Relu", depthwise(), "Relu", conv(16, 1), "Relu", conv(4, 1)
    model = sequential(*body, shape=(1, 3, 16, 16)).save(tmp_path / "m.onnx")
    graph = plain_graph(load_graph(model), TARGET)
    copied = copy_channels(graph, minmax(graph), TARGET, share=9).graph
    int8 = write_qdq(copied, minmax(copied), TARGET)
    file = int8.save(tmp_path / "q.onnx")
    matched = match_models(model, file)
    assert not matched.unmatched and set(matched.copies.values()) == {(1, 2)} and len(matched.copies) == 3
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    name = next(iter(matched.copies))
    assert np.array_equal(matched.joined(name, matched.copied(name, x)), x) and matched.copied("y", x) is x
    diagnosis = diagnose_model(model, file, PICTURES, preprocess, progress=False)
    wanted, got = outputs(load_graph(model))[0], outputs(int8)[0]
    end = diagnosis.ends.iloc[0]
    assert end.sqnr_db == pytest.approx(
        10 * np.log10(np.square(wanted).sum() / np.square(got - wanted).sum()), abs=0.01
    )
    assert (diagnosis.table.sqnr_alone_db > diagnosis.table.sqnr_db - 3).all()
    plain = write_qdq(graph, minmax(graph), TARGET).save(tmp_path / "p.onnx")
    alone = [diagnose_model(model, one, PICTURES, preprocess, progress=False).table.set_index("output").sqnr_alone_db
             for one in (plain, file)]  # fmt: skip
    assert (alone[1][list(matched.copies)] > alone[0][list(matched.copies)] + 2).all()


def test_the_target_bounds_what_comes_in():
    assert {name for name, one in PROFILES.items() if one.extra_macs} == {"int8-only"}
    assert PROFILES["int8-only"].extra_macs == 0.25


def test_real_networks(real_data):
    for name in ("face_detection_yunet_2023mar.onnx", "vww_mobilenet_v1_0.25_96.onnx"):
        graph = plain_graph(load_graph(real_data / "models" / name), TARGET)
        shape = graph.shape(graph.inputs[0])
        x = np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)
        names = [layer.output for layer in layers(graph)]
        seen = run(graph, x, names)
        table = pd.DataFrame({n: [v.min(), v.max()] for n, v in seen.items()}, index=["low", "high"]).T
        copied = copy_channels(graph, table, TARGET, share=0.25, ends=True)
        assert 0.1 < copied.added <= 0.25 and last_layers(graph)[0]
        wanted, got = run(graph, x), run(copied.graph, x)
        for output, value in wanted.items():
            assert np.sqrt(np.square(got[output] - value).mean()) < 0.01 * max(np.sqrt(np.square(value).mean()), 0.1)
