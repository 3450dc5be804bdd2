"""Hardened float files and range files, judged by NumPy and by ONNX Runtime's own quantizer."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pandas as pd
import pytest
from typer.testing import CliRunner

from calib_nb.commands.quant import app
from calib_nb.core.errors import InputError
from calib_nb.graph.build import conv, depthwise, linear, network, sequential
from calib_nb.graph.layers import get_weight, layers, set_weight
from calib_nb.graph.model import load_graph, run
from calib_nb.graph.simplify import simplify
from calib_nb.quant.black_boxes import BOXES, ort_static
from calib_nb.quant.clips import ClipTrials, clip_choices, insert_clips
from calib_nb.quant.harden import harden_model
from calib_nb.quant.observe import observe
from calib_nb.quant.quantize import plain_graph, range_table, read_history
from calib_nb.quant.range_files import read_ort_overrides, write_ranges
from calib_nb.quant.range_search import range_variants
from calib_nb.quant.ranges import RANGE_METHODS, ranges
from calib_nb.quant.sensitivity import NoiseMeasure, noise_ratio, noise_shares, outputs_of
from calib_nb.quant.target import profile
from calib_nb.quant.write import wide_tensors, write_qdq

IMAGES = list(np.random.default_rng(0).integers(0, 256, (10, 6, 6, 3)).astype(np.uint8))
TESTS = list(np.random.default_rng(1).integers(0, 256, (5, 6, 6, 3)).astype(np.uint8))


def preprocess(bgr):
    return ((bgr.astype(np.float32) - 128) / 64).transpose(2, 0, 1)[None]


def constants(path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def uneven():
    """A depthwise network as folded batch normalization leaves it: channels that differ by factors of hundreds."""
    body = [conv(8), "Relu", depthwise(), "Relu", conv(8, 1), "Relu", "GlobalAveragePool", "Flatten", linear(4)]
    graph, rng = simplify(sequential(*body, shape=(1, 3, 6, 6))), np.random.default_rng(2)
    layer = next(layer for layer in layers(graph) if layer.groups > 1)
    factors = np.exp(rng.normal(0, 2.5, 8)).astype(np.float32)
    set_weight(graph, layer, get_weight(graph, layer) * factors.reshape(-1, 1, 1, 1))
    return graph


def ort_noise(model, given, folder, per_channel) -> float:
    """Noise of what ONNX Runtime's default makes of a file, against the given float network, on other images."""
    inputs = [preprocess(image) for image in TESTS]
    path = ort_static(model, folder / "q.onnx", [preprocess(image) for image in IMAGES], per_channel=per_channel)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return noise_ratio(outputs_of(given, inputs, threads=1), [session.run(None, {name: x}) for x in inputs])


def test_a_clip_behind_a_residual_sum_survives_the_quantizer(tmp_path):
    weights = {
        "w": np.random.default_rng(3).normal(0, 1, (4, 3, 1, 1)),
        "v": np.random.default_rng(4).normal(0, 1, (4, 4, 1, 1)),
    }
    text = "a = Conv (x, w); b = Conv (a, v); s = Add (a, b); t = Relu (s); c = Conv (s, v); y = Add (t, c)"
    graph = simplify(network(text, inputs={"x": (1, 3, 6, 6)}, **weights))
    clipped = insert_clips(graph, pd.DataFrame({"low": [-1.5], "high": [0.75]}, index=["s"]))
    image = preprocess(TESTS[0])
    whole = run(graph, image, ["a", "b"])
    cut = np.clip(whole["a"] + whole["b"], -1.5, 0.75)
    expected = np.maximum(cut, 0) + np.einsum("oi,bihw->bohw", weights["v"][:, :, 0, 0], cut)
    assert np.allclose(run(clipped, image)["y"], expected, rtol=1e-4, atol=1e-4)
    path = clipped.save(tmp_path / "clipped.onnx")
    written = constants(ort_static(path, tmp_path / "q.onnx", [preprocess(image) for image in IMAGES]))
    scales = {name: float(value) for name, value in written.items() if name.endswith("_scale") and value.size == 1}
    of_sum = [scale for name, scale in scales.items() if name.startswith("s_") or name == "s_scale"]
    assert of_sum == pytest.approx([2.25 / 255] * len(of_sum)) and of_sum


def test_no_clip_leaves_a_relu6_of_the_file_as_it_is():
    text = "a = Conv (x, w); h = Clip (a, low, high); y = Conv (h, v)"
    rng = np.random.default_rng(5)
    weights = {"w": rng.normal(0, 4, (4, 3, 1, 1)), "v": rng.normal(0, 1, (2, 4, 1, 1))}
    bounds = {"low": np.float32(0), "high": np.float32(6)}
    graph = simplify(network(text, inputs={"x": (1, 3, 6, 6)}, **weights, **bounds))
    stats = observe(graph, IMAGES, preprocess, progress=False)
    tables = {method: ranges(stats, method) for method in RANGE_METHODS}
    variants = {name: range_table(graph, table) for name, table in range_variants(tables, "minmax").items()}
    choices = [choice for choice in clip_choices(graph, variants) if choice.tensor == "h"]
    assert choices
    inputs = [preprocess(image) for image in TESTS]
    trials = ClipTrials(graph, variants["minmax"], choices, BOXES[:1])
    places = [len(choice.ends) - 1 for choice in choices]
    noise = trials.noise(places, inputs, outputs_of(graph, inputs, threads=1), noise_shares)
    assert noise[-1] < 1e-9  # a Clip without bounds would let more than 6 through


def test_a_file_for_one_scale_per_tensor_is_better_in_onnx_runtime(tmp_path):
    given = uneven()
    model = given.save(tmp_path / "m.onnx")
    hard = harden_model(
        model, IMAGES, preprocess, tmp_path / "h.onnx", weights="per-tensor", runs=200, width=1, progress=False
    )
    before, after = (ort_noise(path, given, tmp_path, False) for path in (model, hard.path))
    assert after < before / 4
    inputs = [preprocess(image) for image in TESTS]
    expected = outputs_of(given, inputs, threads=1)
    assert noise_ratio(expected, outputs_of(load_graph(hard.path), inputs, threads=1)) < 0.1


def test_a_file_for_any_compiler_is_no_worse_in_either(tmp_path):
    given = uneven()
    model = given.save(tmp_path / "m.onnx")
    hard = harden_model(model, IMAGES, preprocess, tmp_path / "h.onnx", runs=200, width=1, progress=False)
    for wide in (False, True):
        before, after = (ort_noise(path, given, tmp_path, wide) for path in (model, hard.path))
        assert after < before * 1.25  # on other images, by another quantizer
    assert hard.boxes.hardened.mean() > hard.boxes.given.mean()


def test_an_output_is_cut_to_what_counts_and_its_steps_are_finer_in_onnx_runtime(tmp_path):
    rng = np.random.default_rng(5)
    pictures = [rng.normal(128, size, (6, 6, 3)).clip(0, 255).astype(np.uint8) for size in np.geomspace(4, 60, 24)]
    weights = {"w": rng.normal(0, 1, (4, 3, 1, 1)), "v": rng.normal(0, 1, (4, 1, 3, 3))}
    text = "a = Conv (x, w); r = Relu (a); b = Conv <group = 4, pads = [1, 1, 1, 1]> (r, v)"
    graph = simplify(network(f"{text}; y = Transpose <perm = [0, 2, 3, 1]> (b)", inputs={"x": (1, 3, 6, 6)}, **weights))
    model = graph.save(tmp_path / "given.onnx")

    def counted(outputs):  # of values up to 10
        return [np.abs(outputs[0]) < 1]

    def error(expected, got):
        return np.array([np.square(expected[0] - got[0])[counted(expected)[0]].mean()]), np.ones(1)

    measure = NoiseMeasure(error, "error", "1", goal=1e-3, floor=1.0, counted=counted, sparse=True)
    options = {"noise": measure, "budget": 1e-3, "weights": "per-channel", "steps": ("outputs",), "progress": False}
    hard = harden_model(model, pictures, preprocess, tmp_path / "hard.onnx", **options)
    after = load_graph(hard.path)
    assert [n.op_type for n in after.nodes].count("Clip") == len(hard.clips) == 1
    assert -1.5 <= hard.clips.low.iloc[0] < hard.clips.high.iloc[0] <= 1.5
    assert [layer.groups for layer in layers(after)] == [1, 2]  # compilers merge a Clip into what is not depthwise
    assert json.loads(read_history(hard.path)["hardened"])[-1]["step"] == "outputs"
    steps = []
    for path in (model, hard.path):
        whole = run(load_graph(path), preprocess(pictures[-1]))["y"]
        quantized = ort_static(path, tmp_path / "q.onnx", [preprocess(image) for image in pictures])
        session = onnxruntime.InferenceSession(str(quantized), providers=["CPUExecutionProvider"])
        levels = np.unique(session.run(None, {session.get_inputs()[0].name: preprocess(pictures[-1])})[0])
        steps.append((whole, np.diff(levels).min()))
    (given, coarse), (cut, fine) = steps
    inside = np.abs(given) < 1
    assert np.allclose(given[inside], cut[inside], atol=1e-5) and np.abs(given).max() > 10 and fine < 0.4 * coarse


@pytest.mark.parametrize("target", ["ort-cpu", "int8-only"])
def test_onnx_runtime_takes_the_scales_of_a_range_file(tmp_path, target):
    given = sequential(conv(4), "Relu", conv(4), "Relu", "GlobalAveragePool", "Flatten", linear(3), shape=(1, 3, 6, 6))
    model = plain_graph(given, profile(target)).save(tmp_path / "m.onnx")
    handed = write_ranges(
        model, IMAGES, preprocess, tmp_path / "o.json", format="ort", method="mse", profile=target, progress=False
    )
    overrides = {"TensorQuantOverrides": read_ort_overrides(handed.path)}
    inputs = [preprocess(image) for image in IMAGES]
    wide = profile(target).weight_per_channel
    written = constants(ort_static(model, tmp_path / "q.onnx", inputs, per_channel=wide, extra_options=overrides))
    for name, rows in handed.table.groupby("tensor"):
        if f"{name}_scale" in written:
            assert np.allclose(written[f"{name}_scale"].ravel(), rows.scale, rtol=1e-6), name
    weights = handed.table[handed.table.kind == "weight"].tensor
    assert all(f"{name}_scale" in written for name in weights)


def test_offsets_of_signed_activations_reach_their_range(tmp_path):
    model = uneven().save(tmp_path / "m.onnx")
    settings = {"format": "aimet", "profile": "xnnpack", "progress": False}
    handed = write_ranges(model, IMAGES, preprocess, tmp_path / "a.json", **settings)
    encodings = {e["name"]: e for e in json.loads(handed.path.read_text())["activation_encodings"]}
    rows = handed.table[handed.table.kind == "activation"]
    assert len(rows) == len(encodings)
    for row in rows.itertuples():
        assert encodings[row.tensor]["offset"][0] * encodings[row.tensor]["scale"][0] == pytest.approx(
            row.low, abs=1e-6
        )


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("harden --model m.onnx --config c.json --output h.onnx --weights per-row", "granularity of weights 'per-row'"),
        ("export-ranges --model m.onnx --config c.json --output o --format tflite", "format of ranges 'tflite'"),
    ],
    ids=["harden", "export-ranges"],
)
def test_mistakes_on_the_command_line_are_one_error(line, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    uneven().save("m.onnx")
    (tmp_path / "images").mkdir()
    import cv2

    for k, image in enumerate(IMAGES[:2]):
        cv2.imwrite(f"images/{k}.png", image)
    from calib_nb.npu.config import generate_config, save_config

    save_config(generate_config("resnet-tags", "images", model="m.onnx"), "c.json")
    result = CliRunner().invoke(app, line.split())
    assert result.exception.exit_code == 2 and text in str(result.exception)
    assert not (tmp_path / "h.onnx").exists() and not (tmp_path / "o").exists()


def test_ranges_have_the_bits_of_a_file(tmp_path):
    given = sequential(conv(4), "Relu", conv(4), "Sigmoid", "Flatten", linear(3), shape=(1, 3, 6, 6))
    model, target = given.save(tmp_path / "m.onnx"), profile("qnn-htp")
    simple = plain_graph(given, replace(target, weight_bits=4))
    table = range_table(simple, ranges(observe(simple, IMAGES, preprocess, progress=False), "minmax"))
    second = [n.name for n in simple.nodes if n.op_type == "Conv"][1]
    written = write_qdq(simple, table, target, wide_nodes=[second])
    int8, wide = written.save(tmp_path / "q.onnx"), set(wide_tensors(written))
    settings = {"format": "qnn", "profile": target, "int8": int8, "progress": False}
    handed = write_ranges(model, IMAGES, preprocess, tmp_path / "a.json", **settings)
    encodings = json.loads(handed.path.read_text())
    bits = {name: entries[0]["bitwidth"] for name, entries in encodings["activation_encodings"].items()}
    assert wide and set(bits.values()) == {8, 16} and all((bits[name] == 16) == (name in wide) for name in bits)
    scales = {n.input[0]: written.constant(n.input[1]) for n in written.nodes if n.op_type == "QuantizeLinear"}
    for row in handed.table[handed.table.kind == "activation"].itertuples():
        if row.tensor in scales:
            assert scales[row.tensor] == pytest.approx(row.scale, rel=1e-6)
    assert handed.missing.why.str.contains("does not quantize it").all() and set(handed.missing.tensor) == {"y"}
    four = write_qdq(simple, table, replace(target, weight_bits=4)).save(tmp_path / "4.onnx")
    blocks = write_ranges(model, IMAGES, preprocess, tmp_path / "c.json", **settings | {"int8": four})
    assert blocks.missing.why.str.contains("scale for each block").sum() == 1
    assert set(blocks.table[blocks.table.kind == "weight"].bits) == {8}
    for wrong in (model, tmp_path / "nowhere.onnx"):
        with pytest.raises(InputError, match="QuantizeLinear|cannot be read"):
            write_ranges(model, IMAGES, preprocess, tmp_path / "d.json", **settings | {"int8": wrong})
