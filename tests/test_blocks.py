"""Weights of four bits: against NumPy, ONNX's reference and ONNX Runtime, in every place that a product has them."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from calib_nb.core.errors import InputError, ModelError
from calib_nb.graph.build import network
from calib_nb.graph.model import Graph, open_graph, run
from calib_nb.graph.simplify import simplify
from calib_nb.quant.blocks import WEIGHT_FORMATS, packed_blocks, products, quantize_weights_only
from calib_nb.quant.grid import block_grid

RNG = np.random.default_rng(0)


def matrix(*shape):
    return RNG.normal(0, 0.3, shape).astype(np.float32)


def rounded(weight, axis, block=32):
    """Weights of which neighbours along an axis share a scale, by NumPy alone from what `block_grid` says."""
    rows = np.moveaxis(weight, axis, 0)
    codes, scales = block_grid(rows, block)
    back = [codes[k] * scales[k // block] for k in range(len(rows))]
    return np.moveaxis(np.array(back, np.float32), 0, axis)


NETWORKS = {
    "MatMul": ("y = MatMul (x, w)", {"w": matrix(48, 7)}, (1, 1, 5, 48), {"w": 0}),
    "K below a block": ("y = MatMul (x, w)", {"w": matrix(5, 3)}, (1, 1, 4, 5), {"w": 0}),
    "K of one more": ("y = MatMul (x, w)", {"w": matrix(33, 6)}, (1, 1, 4, 33), {"w": 0}),
    "weights first": ("y = MatMul (w, x)", {"w": matrix(6, 50)}, (1, 1, 50, 4), {"w": 1}),
    "Gemm": ("f = Flatten (x); y = Gemm (f, w, b)", {"w": matrix(50, 9), "b": matrix(9)}, (1, 2, 5, 5), {"w": 0}),
    "Gemm, transB": (
        "f = Flatten (x); y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (f, w, b)",
        {"w": matrix(9, 50), "b": matrix(9)},
        (1, 2, 5, 5),
        {"w": 1},
    ),
    "Gemm without a bias": ("f = Flatten (x); y = Gemm (f, w)", {"w": matrix(50, 9)}, (1, 2, 5, 5), {"w": 0}),
    "weights of two nodes": (
        "a = MatMul (x, w); r = Relu (a); y = MatMul (r, w)",
        {"w": matrix(40, 40)},
        (1, 1, 3, 40),
        {"w": 0},
    ),
    "Transpose": (
        "t = Transpose <perm = [1, 0]> (w); i = Identity (t); y = MatMul (x, i)",
        {"w": matrix(7, 48)},
        (1, 1, 5, 48),
        {"w": 1},
    ),
}


def build(name, tmp_path):
    text, weights, shape, axes = NETWORKS[name]
    graph = network(text, inputs={"x": shape}, **weights)
    x = np.random.default_rng(1).normal(0, 1, shape).astype(np.float32)
    coarse = network(
        text, inputs={"x": shape}, **{k: rounded(v, axes[k]) if k in axes else v for k, v in weights.items()}
    )
    return graph.save(tmp_path / "m.onnx"), x, run(coarse, x)["y"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("form", WEIGHT_FORMATS)
def test_a_product_is_what_its_rounded_weights_say(name, form, tmp_path):
    model, x, expected = build(name, tmp_path)
    if (name, form) == ("weights first", "matmulnbits"):  # the operator has its weights second
        with pytest.raises(ModelError, match="fits the form matmulnbits; take the form qdq"):
            quantize_weights_only(model, tmp_path / "s.onnx", format=form)
        return
    small = quantize_weights_only(model, tmp_path / "s.onnx", format=form)
    assert small.nodes == (2 if name == "weights of two nodes" else 1) and small.left == ()
    proto = onnx.load(small.path)
    onnx.checker.check_model(proto, full_check=True)
    plain = open_graph(Graph(proto), optimize=False).run(None, {"x": x})[0]
    scale = np.abs(expected).max()
    assert np.allclose(plain, expected, atol=(1e-5 if form == "qdq" else 2e-2) * scale)
    assert np.allclose(run(Graph(proto).infer(), x)["y"], expected, atol=5e-2 * scale)
    if form == "qdq":
        assert np.allclose(ReferenceEvaluator(proto).run(None, {"x": x})[0], expected, atol=1e-5 * scale)
    codes = [i for i in proto.graph.initializer if i.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT8)]
    assert len(codes) == 1  # nodes that read the same weights share them


def test_what_a_form_cannot_hold_stays_in_float(tmp_path):
    text = "a = MatMul (w, x); y = MatMul (a, v)"
    graph = network(text, inputs={"x": (1, 1, 40, 40)}, w=matrix(40, 40), v=matrix(40, 8))
    model, x = graph.save(tmp_path / "m.onnx"), matrix(1, 1, 40, 40)
    small = quantize_weights_only(model, tmp_path / "s.onnx", format="matmulnbits")
    assert small.nodes == 1 and len(small.left) == 1
    assert np.allclose(
        run(Graph(onnx.load(small.path)).infer(), x)["y"],
        run(graph, x)["y"],
        atol=0.2 * np.abs(run(graph, x)["y"]).max(),
    )
    kept = quantize_weights_only(model, tmp_path / "k.onnx", keep_float=[small.left[0]])
    assert kept.left == small.left and kept.nodes == 1


def test_a_convolution_has_a_scale_per_channel(tmp_path):
    weights = {"w": matrix(6, 4, 3, 3), "b": matrix(6), "v": matrix(4, 1, 3, 3)}
    text = "d = Conv <group = 4> (x, v); y = Conv (d, w, b)"
    model = network(text, inputs={"x": (1, 4, 8, 8)}, **weights).save(tmp_path / "m.onnx")
    small = quantize_weights_only(model, tmp_path / "s.onnx", operators=["Conv"])
    coarse = {k: rounded(v.reshape(len(v), -1), 1, 36).reshape(v.shape) for k, v in weights.items() if k != "b"}
    x = matrix(1, 4, 8, 8)
    expected = run(network(text, inputs={"x": x.shape}, b=weights["b"], **coarse), x)["y"]
    proto = onnx.load(small.path)
    assert small.nodes == 2 and np.allclose(ReferenceEvaluator(proto).run(None, {"x": x})[0], expected, atol=1e-5)
    assert np.allclose(run(Graph(proto).infer(), x)["y"], expected, atol=1e-4)


def test_the_file_is_smaller_and_other_readers_keep_their_floats(tmp_path):
    text = "f = Flatten (x); y = Gemm (f, w); g = Gather <axis = 0> (w, at); z = Add (y, g)"
    graph = network(text, inputs={"x": (1, 1, 16, 16)}, outputs=("z",), w=matrix(256, 128), at=np.array([3]))
    model = graph.save(tmp_path / "m.onnx")
    both = quantize_weights_only(model, tmp_path / "both.onnx")
    x = matrix(1, 1, 16, 16)
    expected = run(graph, x)["z"]
    assert np.abs(run(Graph(onnx.load(both.path)).infer(), x)["z"] - expected).max() < 0.2 * np.abs(expected).max()
    alone = network("f = Flatten (x); y = Gemm (f, w)", inputs={"x": (1, 1, 16, 16)}, w=matrix(256, 128))
    for form in WEIGHT_FORMATS:
        small = quantize_weights_only(alone.save(tmp_path / "a.onnx"), tmp_path / "s.onnx", format=form)
        assert small.size_mb < 0.17 * small.float_size_mb


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 70), st.integers(1, 5), st.sampled_from([16, 32, 64]))
def test_blocks_round_no_worse_than_by_their_largest_weight(seed, rows, columns, block):
    rng = np.random.default_rng(seed)
    weight = (rng.normal(0, 1, (rows, columns)) * (rng.random((rows, columns)) > 0.2)).astype(np.float32)
    codes, scales = block_grid(weight, block)
    assert codes.dtype == np.int8 and codes.min() >= -8 and codes.max() <= 7 and scales.dtype == np.float32
    assert scales.shape == (-(-rows // block), columns) and (scales > 0).all()
    for k, scale in enumerate(scales):
        part, own = weight[k * block : (k + 1) * block], codes[k * block : (k + 1) * block] * scale
        plain = np.where(np.abs(part).max(0) > 0, np.abs(part).max(0) / 7, 1)
        simple = np.clip(np.rint(part / plain), -8, 7) * plain
        assert (np.square(own - part).sum(0) <= np.square(simple - part).sum(0) * 1.0001 + 1e-9).all()
    packed, turned = packed_blocks(*block_grid(weight, block), block)
    low, high = packed & 15, packed >> 4
    flat = np.stack([low, high], -1).reshape(columns, -1)[:, :rows].astype(int) - 8
    assert np.array_equal(flat.T, codes) and np.array_equal(turned, scales.T)


def test_weights_that_are_no_matrix_are_left(tmp_path):
    graph = simplify(network("y = MatMul (x, w)", inputs={"x": (1, 2, 4, 8)}, w=matrix(2, 8, 3)))
    assert products(graph) == []
    model = network("y = MatMul (x, w)", inputs={"x": (1, 1, 4, 32)}, w=matrix(32, 3)).save(tmp_path / "m.onnx")
    for wrong, said in (
        ({"block": 24}, "blocks of 24"),
        ({"format": "int4"}, "form of 4-bit"),
        ({"keep_float": ["no"]}, "node"),
    ):
        with pytest.raises(InputError, match=said):
            quantize_weights_only(model, tmp_path / "n.onnx", **wrong)
    with pytest.raises(InputError, match="another file"):
        quantize_weights_only(model, model)
    assert not (tmp_path / "n.onnx").exists()
