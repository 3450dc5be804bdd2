"""Activations of 16 bits, all of them or some: against NumPy, ONNX's reference and ONNX Runtime."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from test_write import CPU, NPU, XNN, build, checked, noise, observed, simulated

from calib_nb.core.errors import InputError, ModelError
from calib_nb.graph.model import Graph, run
from calib_nb.graph.simplify import simplify
from calib_nb.quant.grid import activation_grid, bias_floor, bias_grid, block_grid, codes, weight_grid
from calib_nb.quant.quantize import QuantizeOptions, check_request, read_history
from calib_nb.quant.recipe import auto, quantize_by
from calib_nb.quant.target import PROFILES
from calib_nb.quant.write import CONTRIB, dequantized, int8_macs_share, stored_weights, wide_tensors, write_qdq

HTP = PROFILES["qnn-htp"]
SIGNED = replace(HTP, activation_signed=True, activation_symmetric=True)
TEXT = """c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
r = Relu (c)
p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)
d = Conv <group = 6, pads = [1, 1, 1, 1]> (p, v, e)
s = Sigmoid (d)
a = Add (s, p)
m = Mul (a, k)
f = Flatten (m)
y = Gemm (f, g, h)"""
SHAPES = {"w": (6, 4, 3, 3), "b": (6,), "v": (6, 1, 3, 3), "e": (6,), "k": (1, 6, 1, 1), "g": (96, 5), "h": (5,)}


@pytest.fixture(scope="module", params=[17, 21])
def network(request):
    """A small network of an opset with or without 16-bit Q and DQ, its images and ranges."""
    rng = np.random.default_rng(0)
    graph = build(TEXT, {n: rng.normal(0, 0.4, s).astype(np.float32) for n, s in SHAPES.items()}, opset=request.param)
    images = noise(graph)
    return graph, images, observed(graph, images)


def by_q(graph):
    """Type of the codes of each Q, and its domain."""
    nodes = [n for n in graph.nodes if n.op_type == "QuantizeLinear"]
    return {n.input[0]: (graph.constant(n.input[2]).dtype.name, n.domain) for n in nodes}


@pytest.mark.parametrize("target", [HTP.wide, SIGNED.wide, NPU.wide, XNN.wide, CPU.wide], ids=lambda p: p.name)
def test_every_activation_in_16_bits_runs_everywhere(network, target):
    graph, images, table = network
    written = checked(write_qdq(graph, table, target))
    found = by_q(written)
    kind, domain = f"{'' if target.activation_signed else 'u'}int16", "" if graph.opset >= 21 else CONTRIB
    assert set(found.values()) == {(kind, domain)} and len(wide_tensors(written)) == len(found)
    assert int8_macs_share(graph, written) == 1
    plain, fast = simulated(written, images[0])["y"], run(written, images[0])["y"]
    assert np.allclose(plain, fast, atol=1e-4 * np.abs(plain).max())
    if not domain:  # the reference knows no other domain
        assert np.allclose(ReferenceEvaluator(written.model).run(None, {"x": images[0]})[0], plain, atol=1e-5)
    weights = write_qdq(graph, table, replace(target, activation_bits=8))
    errors = [np.abs(simulated(one, images[0])["y"] - run(graph, images[0])["y"]).max() for one in (written, weights)]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("target", [HTP, SIGNED], ids=["unsigned", "signed"])
@pytest.mark.parametrize("names", [["Conv_d"], ["Sigmoid_s", "Add_a"], ["Gemm_y"], ["Relu_r", "Mul_m"], ["MaxPool_p"]])
def test_single_nodes_in_16_bits_are_converted_at_their_borders(network, target, names):
    graph, images, table = network
    written = checked(write_qdq(graph, table, target, wide_nodes=names))
    types = {kind for kind, _ in by_q(written).values()}
    assert len(types) == (1 if names == ["MaxPool_p"] else 2)  # a MaxPool takes the codes that it finds
    for node in written.nodes:  # what a node reads has one width
        read = [written.producer(i) for i in node.input if written.producer(i) is not None]
        quantized = [n for n in read if n.op_type == "DequantizeLinear" and n.input[0] not in written.constants]
        kinds = {written.constant(n.input[2]).dtype.itemsize for n in quantized}
        assert len(kinds) < 2
    plain, fast = simulated(written, images[0])["y"], run(written, images[0])["y"]
    assert np.allclose(plain, fast, atol=0.02 * np.abs(plain).max())
    if graph.opset >= 21:
        assert np.allclose(ReferenceEvaluator(written.model).run(None, {"x": images[0]})[0], plain, atol=1e-5)


def test_a_convolution_in_16_bits_by_hand():
    rng = np.random.default_rng(1)
    w, b = rng.normal(0, 1, (3, 4, 1, 1)).astype(np.float32), rng.normal(0, 1, 3).astype(np.float32)
    graph = build("c = Conv (x, w, b); y = Relu (c)", {"w": w, "b": b})
    images = noise(graph)
    table, x = observed(graph, images), images[0]
    sx, zx = activation_grid(*table.loc["x"], HTP.wide)
    sy, zy = activation_grid(*table.loc["y"], HTP.wide)
    q, sw, _ = weight_grid(w, 0, HTP, floor=bias_floor(b, sx))
    qb, sb, _ = bias_grid(b, sx, sw)
    sums = np.einsum("oc,bchw->bohw", q[:, :, 0, 0].astype(np.int64), codes(x, sx, zx).astype(np.int64) - int(zx))
    real = (sums + qb.reshape(1, -1, 1, 1)) * sb.astype(np.float64).reshape(1, -1, 1, 1)
    expected = (codes(np.maximum(real, 0), sy, zy).astype(np.float64) - int(zy)) * sy
    got = simulated(write_qdq(graph, table, HTP.wide), x)["y"]
    assert np.abs(got - expected).max() < 1.01 * sy and np.abs(qb).max() <= 2**30


@pytest.mark.parametrize("decade", [-9, -6, -3])
def test_a_bias_keeps_its_value_under_the_fine_scale_of_16_bits(decade):
    w = (np.random.default_rng(2).normal(0, 1, (4, 4, 1, 1)) * 10.0**decade).astype(np.float32)
    b = np.array([5.0, -3.0, 1e-3, 0.0], np.float32)
    graph = build("y = Conv (x, w, b)", {"w": w, "b": b})
    images = noise(graph)
    written = write_qdq(graph, observed(graph, images), HTP.wide)
    stored = next(n for n in written.nodes if n.op_type == "Conv").input[2]
    dq = written.producer(stored)
    values, scale = written.constant(dq.input[0]).astype(np.float64), written.constant(dq.input[1]).astype(np.float64)
    assert np.abs(values).max() <= 2**30 * 1.0001 and np.allclose(values * scale, b, atol=1e-6)
    assert np.abs(simulated(written, images[0])["y"] - run(graph, images[0])["y"]).max() < 2e-3


def test_unknown_nodes_and_bits_are_refused_in_one_line(network, tmp_path):
    graph, _, table = network
    with pytest.raises(InputError, match="did you mean 'Conv_d'"):
        write_qdq(graph, table, HTP, wide_nodes=["Conv_dd"])
    with pytest.raises(InputError, match="12-bit activations; expected 8 or 16"):
        QuantizeOptions(activation_bits=12).target("ort-cpu")
    with pytest.raises(InputError, match="wide_nodes 2.0"):
        replace(HTP, wide_nodes=2.0)
    with pytest.raises(InputError, match="12-bit activations"):
        check_request("m.onnx", [np.zeros(1)], tmp_path / "o.onnx", replace(HTP, activation_bits=12))


def uneven(path):
    """A network that lifts its values far from zero and brings them back: what 8 bits cannot hold, and 16 can."""
    rng = np.random.default_rng(3)
    constants = {"w": rng.normal(0, 0.3, (4, 3, 3, 3)), "v": rng.normal(0, 0.3, (4, 4, 3, 3)), "k": np.full(1, 200.0)}
    text = "c = Conv (x, w); m = Add (c, k); r = Relu (m); s = Sub (r, k); d = Conv (s, v); y = Sigmoid (d)"
    graph = build(text, {n: c.astype(np.float32) for n, c in constants.items()}, (1, 3, 8, 8))
    return simplify(graph).save(path)


def test_the_recipe_gives_16_bits_before_float(tmp_path):
    model, rng = uneven(tmp_path / "m.onnx"), np.random.default_rng(4)
    images = list(rng.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8))

    def preprocess(bgr):
        return ((bgr.astype(np.float32) - 128) / 64).transpose(2, 0, 1)[None]

    rare = {"progress": False, "steps": ("wide_nodes", "float_nodes")}
    eight = quantize_by("minmax", model, images, preprocess, tmp_path / "8.onnx", profile=HTP, progress=False)
    mixed = auto(model, images, preprocess, tmp_path / "mixed.onnx", profile=HTP, goal_db=25.0, **rare)
    steps = mixed.steps[mixed.steps.kept]
    assert eight.model.output_db < 25 <= mixed.model.output_db and mixed.model.wide_tensors > 0
    assert list(steps.step) == ["minmax", "wide_nodes"] and mixed.model.float_nodes == ()
    assert "16-bit activations" in steps.detail.iloc[-1] and "wide_tensors" in read_history(mixed.model.path)
    easy = auto(model, images, preprocess, tmp_path / "easy.onnx", profile=HTP, goal_db=-20.0, **rare)
    assert len(easy.steps) == 1 and easy.model.wide_tensors == 0
    plain = auto(model, images, preprocess, tmp_path / "plain.onnx", profile=replace(HTP, wide_nodes=0.0), **rare)
    assert "wide_nodes" not in set(plain.steps.step) and "wide_tensors" not in read_history(plain.model.path)


def test_products_have_4_bit_weights_in_blocks(network):
    graph, images, table = network
    target = replace(HTP, weight_bits=4, weight_block=16)
    if graph.opset < 21:
        with pytest.raises(ModelError, match="4-bit weights in opset 17; expected opset 21"):
            write_qdq(graph, table, target)
        return
    written = checked(write_qdq(graph, table, target))
    product = next(n for n in written.nodes if n.op_type == "Gemm")
    dq = written.producer(product.input[1])
    whole, scale = block_grid(graph.constant("g"), 16)
    assert [a.name for a in dq.attribute] == ["axis", "block_size"] and written.constant(
        dq.input[0]
    ).dtype.name == "int4"
    assert np.array_equal(written.constant(dq.input[0]).astype(np.int8), whole)
    assert np.allclose(dequantized(written, dq), whole * np.repeat(scale, 16, 0)) and product.input[2] == "h"
    assert np.allclose(stored_weights(graph, written).constant("g"), dequantized(written, dq))
    plain, fast = simulated(written, images[0])["y"], run(written, images[0])["y"]
    reference = ReferenceEvaluator(written.model).run(None, {"x": images[0]})[0]
    assert np.allclose(reference, plain, atol=1e-5) and np.allclose(plain, fast, atol=0.03 * np.abs(plain).max())
    eight = write_qdq(graph, table, HTP)
    convolutions = [[n.input[1] for n in one.nodes if n.op_type == "Conv"] for one in (written, eight)]
    for four, other in zip(*convolutions):
        assert np.array_equal(dequantized(written, written.producer(four)), dequantized(eight, eight.producer(other)))


@pytest.mark.parametrize("text", ["m = MatMul (x, w); y = Add (m, b)", "y = MatMul (x, w)"])
def test_a_bias_behind_4_bit_weights_stays_in_float(text):
    rng = np.random.default_rng(5)
    constants = {"w": rng.normal(0, 0.3, (33, 6)).astype(np.float32), "b": rng.normal(0, 1, 6).astype(np.float32)}
    graph = build(text, {n: c for n, c in constants.items() if n in text}, (1, 1, 4, 33), opset=21)
    images = noise(graph)
    written = checked(write_qdq(graph, observed(graph, images), replace(HTP.wide, weight_bits=4)))
    whole, scale = block_grid(constants["w"], 32)
    expected = images[0] @ (whole * np.repeat(scale, 32, 0)[:33]) + (constants["b"] if "b" in text else 0)
    assert np.abs(simulated(written, images[0])["y"] - expected).max() < 2e-3
    assert int8_macs_share(graph, written) == 1


@pytest.mark.slow
def test_a_file_with_4_bit_weights_goes_through_the_recipe(tmp_path):
    rng = np.random.default_rng(6)
    weights = {"w": rng.normal(0, 0.1, (192, 64)), "b": rng.normal(0, 0.1, 64), "v": rng.normal(0, 0.2, (64, 10))}
    text = "f = Flatten (x); g = Gemm (f, w, b); r = Relu (g); y = MatMul (r, v)"
    graph = build(text, {n: c.astype(np.float32) for n, c in weights.items()}, (1, 3, 8, 8))
    model, images = graph.save(tmp_path / "m.onnx"), list(rng.integers(0, 256, (6, 8, 8, 3)).astype(np.uint8))

    def preprocess(bgr):
        return ((bgr.astype(np.float32) - 128) / 64).transpose(2, 0, 1)[None]

    rare = {"progress": False, "profile": HTP, "weight_bits": 4}
    steps = ("bias", "float_nodes", "methods", "ranges")
    made = auto(model, images, preprocess, tmp_path / "4.onnx", steps=steps, **rare).model
    eight = quantize_by("minmax", model, images, preprocess, tmp_path / "8.onnx", profile=HTP, progress=False).model
    assert made.size_mb < eight.size_mb < made.float_size_mb and made.output_db > 10
    assert Graph(onnx.load(made.path)).opset >= 21
