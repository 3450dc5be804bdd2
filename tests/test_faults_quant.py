"""Quantized files compute what their nodes say, in ONNX Runtime's integer kernels too, or are not written."""

import itertools
import re
from dataclasses import replace

import numpy as np
import onnx
import pandas as pd
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from calib_nb.analysis.compare import AgreementTask, compare_models
from calib_nb.analysis.diagnose import Thresholds, diagnose_model, next_step
from calib_nb.commands.quant import app as quant_app
from calib_nb.core.errors import InputError, ModelError
from calib_nb.core.similarity import decibels, sqnr
from calib_nb.demo import demo_data
from calib_nb.graph.build import conv, linear, network, sequential
from calib_nb.graph.linear import rewrite
from calib_nb.graph.model import open_graph, run
from calib_nb.graph.simplify import simplify
from calib_nb.npu.config import generate_config, save_config
from calib_nb.quant.adaround import RoundingOptions, adaround
from calib_nb.quant.equalize import clip_bounds, equalize
from calib_nb.quant.grid import kernel_rows, weight_grid
from calib_nb.quant.observe import ObserveOptions, observe
from calib_nb.quant.quantize import observe_graph, plain_graph, quantize_static, range_table
from calib_nb.quant.ranges import ranges
from calib_nb.quant.recipe import quantize_by
from calib_nb.quant.target import PROFILES
from calib_nb.quant.units import softmax_range
from calib_nb.quant.write import stored_weights, write_qdq

RNG = np.random.default_rng(0)
quantize_command = get_command(quant_app).commands["quantize"]
FIRST = RNG.normal(0, 0.3, (16, 3, 3, 3)).astype(np.float32)
LAST = RNG.normal(0, 0.3, (8, 16, 1, 1)).astype(np.float32)
IMAGES = list(RNG.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8))
targets = pytest.mark.parametrize("target", PROFILES.values(), ids=list(PROFILES))
two_targets = pytest.mark.parametrize("target", [PROFILES["per-tensor-npu"], PROFILES["xnnpack"]])
slow = pytest.mark.slow


def scale(bgr):
    return (bgr.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]


INPUTS = [scale(image) for image in IMAGES]


def both_ways(int8, name="y"):
    """Outputs for all inputs without ONNX Runtime's optimizer, and with it."""
    sessions = [open_graph(int8, threads=1, optimize=optimize) for optimize in (False, True)]
    return [np.stack([s.run([name], {"x": x})[0] for x in INPUTS]) for s in sessions]


def around(operator, factor=1.0, opset=18, **constants):
    """A network with an operator `s = ... (c)` between two convolutions."""
    text = f"c = Conv <pads = [1, 1, 1, 1]> (x, first)\n{operator}\ny = Conv (s, last)"
    return network(text, opset=opset, first=FIRST * np.float32(factor), last=LAST, **constants)


def int8_of(graph, target, method="minmax"):
    device = rewrite(plain_graph(graph, target))
    seen = observe_graph(device, IMAGES, scale, progress=False, threads=1)
    return write_qdq(device, range_table(device, ranges(seen, method)), target)


# ------------------------------------------------------------------ integer kernels and their assumptions

# With integer kernels in ONNX Runtime, then without.
OPERATORS = ("Softmax <axis = 1>", "Softmax <axis = -1>", "Sigmoid", "LeakyRelu <alpha = 0.1>", "GlobalAveragePool",
             "AveragePool <kernel_shape = [2, 2]>")  # fmt: skip
OTHERS = ("LogSoftmax <axis = 1>", "Tanh", "HardSigmoid", "Erf", "LpNormalization <axis = 1>", "HardSwish", "Softplus",
          "Softsign", "Elu", "Gelu", "Mish", "Exp", "Cos")  # fmt: skip


@two_targets
@pytest.mark.parametrize("operator", [*OPERATORS, *(pytest.param(name, marks=slow) for name in OTHERS)])
def test_an_operator_between_convolutions_is_what_its_nodes_say(operator, target):
    for factor in (0.01, 1.0):
        graph = around(f"s = {operator} (c)", factor, opset=20)
        wanted = np.stack([run(graph, x)["y"] for x in INPUTS])
        plain, fast = both_ways(int8_of(graph, target))
        assert sqnr(wanted, plain) > 28 and sqnr(wanted, fast) > 28


@two_targets
@pytest.mark.parametrize("method", ["kl", "percentile"])
def test_a_softmax_whose_range_is_cut_is_what_its_nodes_say(method, target):
    plain, fast = both_ways(int8_of(around("s = Softmax <axis = 1> (c)", 0.3), target, method))
    assert sqnr(plain, fast) > 35


@pytest.mark.parametrize("size", [4, 100, 5000])
def test_the_range_of_a_softmax_is_wide_enough_for_its_kernel(size):
    """All probabilities equal, which is the least that the largest one can be; against arithmetic."""
    graph = simplify(network("s = Softmax <axis = 1> (x); y = Relu (s)", inputs={"x": (1, size)}))
    target, x = PROFILES["per-tensor-npu"], np.zeros((1, size), np.float32)
    for high in (0.5 / size, 1 / size, 1.5 / size):
        table = _table({"x": (-0.01, 0.01), "s": (0, high), "y": (0, 2 / size)})
        assert np.allclose(run(write_qdq(graph, table, target), x)["y"], 1 / size, rtol=0.01)
    assert softmax_range(0.0, size) == (0, 2 / size) and 0.9999 < softmax_range(1.0, size)[1] < 1


def _table(ends):
    return pd.DataFrame.from_dict(ends, "index", columns=["low", "high"]).astype(float)


# ------------------------------------------------------------------ what ONNX Runtime refused


@two_targets
@pytest.mark.parametrize("axis", [1, 2, pytest.param(3, marks=slow), pytest.param(-2, marks=slow)])
def test_a_layer_normalization_over_several_axes(axis, target):
    shape = (16, 8, 8)[axis - 1 if axis > 0 else axis :]
    weights = {"gamma": 1 + RNG.normal(0, 0.3, shape), "beta": RNG.normal(0, 0.3, shape)}
    graph = around(f"s = LayerNormalization <axis = {axis}> (c, gamma, beta)", **weights)
    wanted = np.stack([run(graph, x)["y"] for x in INPUTS])
    every = replace(target, float_operators=())
    assert all(sqnr(wanted, got) > 28 for t in (target, every) for got in both_ways(int8_of(graph, t)))


@two_targets
def test_a_pad_that_names_its_axes(target):
    for inputs in ("(c, pads, , axes)", "(c, pads, value, axes)"):
        constants = {"pads": np.array([1, 0, 2, 1]), "axes": np.array([2, -1])}
        constants |= {"value": np.float32(0.5)} if "value" in inputs else {}
        graph = around(f"s = Pad {inputs}", **constants)
        wanted = np.stack([run(graph, x)["y"] for x in INPUTS])
        assert all(sqnr(wanted, got) > 28 for got in both_ways(int8_of(graph, target)))


# ------------------------------------------------------------------ masks

ATTENTION = """c = Conv <pads = [1, 1, 1, 1]> (x, first); r = Reshape (c, size); q = Transpose <perm = [0, 2, 1]> (r)
a = MatMul (q, r); s = Mul (a, quarter); {masked}; p = Softmax <axis = -1> (t); o = MatMul (p, q); y = MatMul (o, v)"""


@two_targets
@pytest.mark.parametrize(
    "least", [-1e4, -np.inf, *(pytest.param(least, marks=slow) for least in (-100.0, -1e9, np.finfo(np.float32).min))]
)
@pytest.mark.parametrize("masked", ["t = Add (s, mask)", "t = Where (seen, s, least)"])
def test_masked_attention(masked, least, target):
    seen = np.arange(64) < np.arange(1, 65)[:, None]
    masks = {"seen": seen, "least": np.float32(least)} if "Where" in masked else {"mask": np.where(seen, 0, least)}
    sizes = {"size": np.array([1, 16, 64]), "quarter": 0.25, "v": LAST[:, :, 0, 0].T}
    graph = network(ATTENTION.format(masked=masked), first=FIRST, **masks, **sizes)
    wanted = np.stack([run(graph, x)["y"] for x in INPUTS])
    assert all(sqnr(wanted, got) > 22 for got in both_ways(int8_of(graph, target)))


@two_targets
@pytest.mark.parametrize("least", [np.finfo(np.float32).min, -np.inf])
def test_padding_in_front_of_a_max_pool(least, target):
    pool = "p = Pad (c, pads, least); s = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (p)"
    graph = around(pool, pads=np.array([0, 0, 0, 0, 0, 0, 1, 1]), least=np.float32(least))
    wanted = np.stack([run(graph, x)["y"] for x in INPUTS])
    assert all(sqnr(wanted, got) > 28 for got in both_ways(int8_of(graph, target)))


@two_targets
def test_a_mask_that_more_than_a_softmax_reads_keeps_its_nodes_in_float(target):
    masked = "t = Add (c, mask); e = Exp (t); f = Softmax <axis = -1> (t); s = Add (e, f)"
    graph = around(masked, mask=np.where(np.arange(8) < 5, 0, -np.inf))
    wanted = np.stack([run(graph, x)["y"] for x in INPUTS])
    assert all(sqnr(wanted, got) > 25 for got in both_ways(int8_of(graph, target)))


def test_an_error_speaks_of_tensors_that_the_file_has(tmp_path):
    text = "c = Conv (x, w); n = BatchNormalization (c, g, b, m, v); e = Exp (n); z = Sub (e, e2); y = Relu (z)"
    text = text.replace("z = Sub (e, e2)", "h = Exp (e); z = Sub (h, h)")
    stats = {"g": np.full(4, 9.0), "b": np.zeros(4), "m": np.zeros(4), "v": np.ones(4)}
    model = network(text, w=np.ones((4, 3, 1, 1)), **stats).save(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="tensor '[xcneh]' holds NaN or infinity on array-"):
        quantize_static(model, IMAGES, scale, tmp_path / "q.onnx", progress=False)
    assert not (tmp_path / "q.onnx").exists()


# ------------------------------------------------------------------ run before it is written


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    specs = conv(8), "Relu", conv(8), "Relu", "GlobalAveragePool", linear(5)
    return sequential(*specs).save(tmp_path_factory.mktemp("small") / "float.onnx")


@pytest.mark.parametrize("method", ["minmax", "auto"])
def test_what_a_kernel_computes_otherwise_is_an_error_that_names_the_node(tmp_path, monkeypatch, method):
    """The writer as it was: with the observed range of a Softmax."""
    model = around("s = Softmax <axis = 1> (c)", 0.01)
    model.nodes[1].name = "attention"
    monkeypatch.setattr("calib_nb.quant.units.softmax_range", lambda high, size: (0.0, high))
    with pytest.raises(ModelError, match="kernel for node 'attention' .Softmax. .*--keep-float") as caught:
        quantize_by(method, model.save(tmp_path / "m.onnx"), IMAGES, scale, tmp_path / "q.onnx", progress=False)
    assert caught.value.exit_code == 2 and sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


@pytest.mark.parametrize("method", ["minmax", "auto"])
def test_what_onnx_runtime_refuses_is_an_error_that_names_the_node(tmp_path, monkeypatch, method):
    """The writer as it was: a Pad with its axes."""
    constants = {"pads": np.array([1, 1, 1, 1]), "axes": np.array([2, 3])}
    model = around("s = Pad (c, pads, , axes)", **constants)
    monkeypatch.setattr("calib_nb.quant.write._Writer.pad_every_axis", lambda self, node: None)
    with pytest.raises(ModelError, match="cannot run node '.*' .* of the INT8 network"):
        quantize_by(method, model.save(tmp_path / "m.onnx"), IMAGES, scale, tmp_path / "q.onnx", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


def test_outputs_that_jump_are_no_fault_of_a_kernel(tmp_path):
    """Hardmax and TopK change by one where two numbers are nearly equal; nothing that works may be refused."""
    for operator in ("s = Hardmax <axis = 1> (c)", "s = Floor (c)", "g = Greater (c, zero); s = Where (g, c, zero)"):
        constants = {"zero": np.float32(0)} if "zero" in operator else {}
        model = around(operator, **constants).save(tmp_path / "m.onnx")
        assert quantize_static(model, IMAGES, scale, tmp_path / "q.onnx", progress=False).path.exists()


# ------------------------------------------------------------------ how bad, and what stays in float


def test_the_noise_of_the_outputs_is_measured_and_a_floor_says_what_is_unusable(tmp_path, small):
    for method in ("minmax", "auto"):
        made = quantize_by(method, small, IMAGES, scale, tmp_path / "q.onnx", progress=False).model
        pairs = [[run_file(path, x) for x in INPUTS] for path in (small, made.path)]
        assert made.usable and abs(made.output_db - float(sqnr(*map(np.stack, pairs)))) < 6


def test_a_network_that_one_scale_cannot_hold_is_unusable_and_still_written(hopeless):
    made = hopeless[1]
    assert not made.usable and made.output_db < 6 and made.path.exists()
    assert decibels(1, made.noise) == pytest.approx(made.output_db)


def run_file(path, x):
    import onnxruntime as ort

    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize("method", ["minmax", "auto"])
def test_nodes_named_as_the_file_does_stay_in_float(tmp_path, method):
    text = """c = Conv (x, first); n = BatchNormalization (c, one, zero, zero, one); r = Relu (n); d = Conv (r, last)
    y = Relu (d)"""
    values = {"one": np.ones(16), "zero": np.zeros(16)}
    graph = network(text, first=FIRST, last=LAST, **values)
    for node in graph.nodes:
        node.name = f"/backbone/{node.output[0]}"
    model = graph.save(tmp_path / "m.onnx")
    for name in ("/backbone/n", "/backbone/c", "n")[: 1 if method == "auto" else 3]:
        recipe = quantize_by(
            method, model, IMAGES, scale, tmp_path / "q.onnx", keep_float=[name], profile="xnnpack", progress=False
        )
        kept = [n for n in onnx.load(recipe.model.path).graph.node if n.op_type == "Conv"]
        assert recipe.model.int8_share < 0.5 and "/backbone/" in recipe.model.float_nodes[0] and len(kept) == 2
    with pytest.raises(InputError, match="no node '/backbone/k'.*did you mean"):
        quantize_by(method, model, IMAGES, scale, tmp_path / "no.onnx", keep_float=["/backbone/k"], progress=False)
    assert not (tmp_path / "no.onnx").exists()


# ------------------------------------------------------------------ one grid, from recipe to file


def test_the_guard_against_16_bits_belongs_to_one_target():
    w = RNG.uniform(0.9, 1, (4, 8)).astype(np.float32)
    assert [p.name for p in PROFILES.values() if p.avx2_safe] == ["ort-cpu"]
    for target in PROFILES.values():
        codes = weight_grid(w, 0, target, rows=kernel_rows(w))[0]
        assert (codes.max() == 127) == (target.name != "ort-cpu")
    free = replace(PROFILES["ort-cpu"], avx2_safe=False)
    assert np.array_equal(weight_grid(w, 0, free, rows=kernel_rows(w))[0], weight_grid(w, 0, free)[0])


@targets
def test_the_weights_that_a_repair_sees_are_those_of_the_file(target):
    graph = rewrite(plain_graph(sequential(conv(8), "Relu", conv(8), "Relu", "GlobalAveragePool", linear(5)), target))
    table = range_table(graph, ranges(observe_graph(graph, IMAGES, scale, progress=False, threads=1)))
    int8 = write_qdq(graph, table, target)
    rounded = stored_weights(graph, int8)
    again = write_qdq(rounded, table, target)
    for name in (c for c in int8.constants if c.startswith("weight") and c.endswith("codes")):
        read = name.replace("codes", "read")
        pair = [run(g, INPUTS[0], [read])[read] for g in (int8, again)]
        assert np.array_equal(*pair)


# ------------------------------------------------------------------ readers of scalars, threads


@pytest.mark.parametrize("shape", [(), (1,)])
def test_bounds_of_a_clip_may_be_lists_of_one(shape):
    graph = around("s = Clip (c, low, high)", low=np.zeros(shape), high=np.full(shape, 1.5))
    assert clip_bounds(graph, graph.nodes[1]) == (0, 1.5)
    assert sqnr(*(np.stack([run(g, x)["y"] for x in INPUTS[:3]]) for g in (graph, equalize(graph, INPUTS)))) > 90
    table = range_table(graph, _table({"x": (-1, 1), "c": (-9, 9), "s": (0, 1.5), "y": (-9, 9)}))
    assert table.loc["c"].tolist() == [0, 1.5]


@slow  # the import of torch
def test_rounding_is_learned_in_front_of_a_clip_with_lists_of_one():
    graph = around("s = Clip (c, low, high)", low=np.zeros(1), high=np.full(1, 1.5))
    learned = adaround(graph, INPUTS[:2], progress=False, options=RoundingOptions(iterations=10, rows=64))
    assert sqnr(*(np.stack([run(g, x)["y"] for x in INPUTS[:3]]) for g in (graph, learned))) > 25


def test_statistics_per_channel_do_not_depend_on_threads():
    graph = sequential(conv(8), "Relu", conv(4))
    images = [RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8) for _ in range(24)]
    options = ObserveOptions(per_channel=("relu0", "y"))

    def sums(threads):
        stats = observe(graph, images, scale, threads=threads, options=options, progress=False)
        return np.concatenate([stats.channels[name] for name in ("relu0", "y")])

    assert all(np.array_equal(sums(1), sums(threads)) for threads in (2, 3, 8, 8))


# ------------------------------------------------------------------ verdicts of compare, diagnose and the shell


@pytest.fixture(scope="module")
def hopeless(tmp_path_factory):
    """Channels of sizes from 1e-4 to 1 in one tensor, which no scale per tensor can hold, and its INT8 file."""
    graph, sizes = around("s = Relu (c)"), np.geomspace(1e-4, 1, 16).astype(np.float32)
    graph.set_constant("first", FIRST * sizes.reshape(-1, 1, 1, 1))
    graph.set_constant("last", LAST / sizes.reshape(1, -1, 1, 1))
    folder = tmp_path_factory.mktemp("hopeless")
    path = graph.save(folder / "float.onnx")
    return path, quantize_static(path, IMAGES, scale, folder / "int8.onnx", profile="per-tensor-npu", progress=False)


def test_the_shell_ends_with_1_where_outputs_are_noise(tmp_path, monkeypatch):
    data = demo_data(tmp_path / "data", progress=False)
    monkeypatch.chdir(tmp_path)
    save_config(generate_config("resnet-tags", data / "calibration" / "images", model=data / "tagger.onnx"), "t.json")
    line = f"quantize --model {data / 'tagger.onnx'} --config t.json --output q.onnx --method minmax --num-samples 8"
    monkeypatch.setattr("calib_nb.quant.quantize.FLOOR_DB", 100.0)
    result = CliRunner().invoke(quant_app, line.split())
    assert result.exception.exit_code == 1 and "unusable" in str(result.exception)
    assert "--method auto" in str(result.exception) and "SQNR of the outputs" in result.output


@pytest.mark.parametrize("budget", [None, 0.5])
def test_compare_calls_noise_unusable_whatever_the_budget(hopeless, budget):
    path, made = hopeless
    task = AgreementTask(IMAGES, scale)
    comparison = compare_models(path, {"q": made.path}, task, budget=budget, latency_runs=2, progress=False)
    assert comparison.table.verdict.tolist() == ["reference", "unusable"] and not comparison.passed


def test_diagnose_calls_an_output_below_10_db_critical_and_names_options_that_exist(hopeless):
    diagnosis = diagnose_model(*(getattr(h, "path", h) for h in hopeless), IMAGES, scale, progress=False)
    assert diagnosis.verdict == "Critical" and diagnosis.summary.startswith("Critical: ")
    known = {option for p in quantize_command.params for option in (*p.opts, *p.secondary_opts)}
    every = pd.Series({"grade": "Critical", "own_db": 5.0, "clipped_share": 0.1, "node": "n", "weight_sqnr_db": 9.0})
    texts = [*diagnosis.table.next_step]
    for cause in ("clipping", "weights", "constants", "rounding"):
        for use, bulk, uneven, each in itertools.product((0.1, 1.0), (0.1, 1.0), (2.0, 60.0), (False, True)):
            row = {"cause": cause, "range_use": use, "bulk_use": bulk, "uneven": uneven, "weight_per_channel": each}
            for method in ("", "minmax", "kl", "auto: kl"):
                texts.append(next_step(pd.concat([every, pd.Series(row)]), None, Thresholds(), method))
    quiet = pd.Series({**every, "own_db": 30.0, "grade": "Warning"})
    texts += [next_step(quiet, None, Thresholds(), method) for method in ("", "auto: kl")]
    named = {word for text in texts for word in re.findall(r"--[a-z-]+", text)}
    assert {"--keep-float", "--method", "--profile", "--images", "--num-samples"} == named <= known
    assert all("--" in text for text in texts if text and "see " not in text)


def test_masked_attention_is_diagnosed_by_what_its_mask_leaves_visible(tmp_path):
    for least in (-1e4, -np.inf):
        mask = np.where(np.arange(64) < np.arange(1, 65)[:, None], 0, least)
        sizes = {"size": np.array([1, 16, 64]), "quarter": 0.25, "v": LAST[:, :, 0, 0].T}
        graph = network(ATTENTION.format(masked="t = Add (s, mask)"), first=FIRST, mask=mask, **sizes)
        path = graph.save(tmp_path / "m.onnx")
        made = quantize_static(path, IMAGES, scale, tmp_path / "q.onnx", profile="per-tensor-npu", progress=False)
        table = diagnose_model(path, made.path, IMAGES, scale, progress=False).table
        assert set(table.grade) == {"OK"} and table.sqnr_db[table.output == "t"].item() > 25


def test_a_target_without_float_keeps_nothing_in_float(tmp_path, small):
    assert [(p.float_nodes, p.float_macs) for p in PROFILES.values() if p.name == "int8-only"] == [(0, 0)]
    recipe = quantize_by("auto", small, IMAGES, scale, tmp_path / "q.onnx", profile="int8-only", progress=False)
    assert recipe.model.int8_share == 1 and recipe.model.float_nodes == ()
    assert "float_nodes" not in set(recipe.steps.step)
