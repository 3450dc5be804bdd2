"""The QDQ writer: numbers by hand, every operator on every target, real networks."""

from dataclasses import replace

import numpy as np
import onnx
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.core.errors import InputError, ModelError
from calib_nb.core.similarity import sqnr
from calib_nb.graph.build import network
from calib_nb.graph.fixed import fix_batch
from calib_nb.graph.layers import activations, macs
from calib_nb.graph.model import Graph, load_graph, open_graph, run
from calib_nb.graph.simplify import simplify
from calib_nb.quant.grid import activation_grid, bias_floor, bias_grid, codes, kernel_rows, weight_grid
from calib_nb.quant.target import PROFILES, Profile
from calib_nb.quant.units import computing, int8_operators
from calib_nb.quant.write import int8_macs_share, int8_nodes, write_qdq

SYMMETRIC = Profile(
    "symmetric", weight_per_channel=True, weight_symmetric=True, activation_signed=True, activation_symmetric=True
)
ASYMMETRIC = Profile(
    "asymmetric", weight_per_channel=True, weight_symmetric=False, activation_signed=False, activation_symmetric=False
)
EVERY = [*PROFILES.values(), SYMMETRIC, ASYMMETRIC]
CPU, NPU, XNN = (PROFILES[k] for k in ("ort-cpu", "per-tensor-npu", "xnnpack"))
names = pytest.mark.parametrize("target", EVERY, ids=lambda p: p.name)


def build(text, constants, shape=(1, 4, 8, 8), outputs=("y",), opset=17):
    """A Graph with input "x" from ONNX's text, each node named after its operator and first output."""
    graph = network(text, inputs={"x": shape}, outputs=outputs, opset=opset, **constants)
    for node in graph.nodes:
        node.name = f"{node.op_type}_{node.output[0]}"
    return Graph(graph.model).infer()


def noise(graph, count=4, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 1, graph.shape(graph.inputs[0])).astype(np.float32) for _ in range(count)]


def observed(graph, images):
    """Min and max of everything that `activations` lists."""
    expected = [name for name in activations(graph) if name not in graph.inputs]
    values = [{**run(graph, x, expected), graph.inputs[0]: x} if expected else {graph.inputs[0]: x} for x in images]
    return pd.DataFrame(
        {n: (min(v[n].min() for v in values), max(v[n].max() for v in values)) for n in activations(graph)},
        index=["low", "high"],
    ).T


def checked(graph):
    onnx.checker.check_model(graph.model, full_check=True)
    return graph


def simulated(graph, x):
    """What the QDQ nodes say, operator by operator, without integer kernels."""
    session = open_graph(graph, optimize=False)
    return dict(zip(graph.outputs, session.run(graph.outputs, {graph.inputs[0]: x})))


def answer(graph, x, target):
    """The written network's outputs; of asymmetric weights (old kernels overflow on them), what the nodes say."""
    return run(graph, x) if target.weight_symmetric else simulated(graph, x)


# --- the grids


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(-1e30, 1e30), st.floats(0, 1e30), st.sampled_from(EVERY))
def test_an_activation_grid_holds_its_range(low, width, target):
    high = low + width
    scale, zero = activation_grid(low, high, target)
    assert (
        scale.shape == zero.shape == ()
        and scale.dtype == np.float32
        and zero.dtype == (np.int8 if target.activation_signed else np.uint8)
    )
    assert np.isfinite(scale) and scale >= np.finfo(np.float32).tiny
    bottom, top = target.activation_levels
    assert bottom <= zero <= top and (not target.activation_symmetric or zero == 0)
    wide = np.array([min(low, 0), 0, max(high, 0)])
    back = (codes(wide, scale, zero).astype(np.float64) - int(zero)) * float(scale)
    assert back[1] == 0 and np.abs(back - wide).max() <= 0.5001 * scale + 1e-6 * np.abs(wide).max()


@pytest.mark.parametrize("low,high", [(float("nan"), 1), (0, float("inf")), (2, 1)])
def test_a_wrong_range_is_refused(low, high):
    with pytest.raises(InputError, match="a range from"):
        activation_grid(low, high, CPU)


def test_other_bits_are_refused():
    four = Profile("four", True, True, False, False, weight_bits=4, activation_bits=4)
    with pytest.raises(InputError, match="4-bit activations"):
        activation_grid(0, 1, four)
    with pytest.raises(InputError, match="4-bit weights"):
        weight_grid(np.ones((2, 2)), 0, four)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.sampled_from(EVERY),
    st.integers(1, 9),
    st.integers(1, 17),
    st.floats(-12, 12),
    st.booleans(),
)
def test_weights_fit_and_no_neighbours_overflow(seed, target, channels, width, decade, floored):
    rng = np.random.default_rng(seed)
    w = (
        rng.normal(0.3, 1, (channels, width))
        * 10 ** rng.uniform(decade - 2, decade, (channels, 1))
        * (rng.random((channels, 1)) > 0.2)
    ).astype(np.float32)
    floor = bias_floor(rng.normal(0, 1, channels), 10 ** rng.uniform(-6, 2)) if floored else 0.0
    q, scale, zero = weight_grid(w, 0, target, rows=kernel_rows(w), floor=floor)
    assert (
        q.dtype == zero.dtype == np.int8
        and scale.dtype == np.float32
        and scale.shape == zero.shape == ((channels,) if target.weight_per_channel else ())
    )
    assert np.isfinite(scale).all() and (scale > 0).all()
    each = np.broadcast_to(scale, channels).astype(np.float64)[:, None]
    back = (q.astype(np.float64) - np.broadcast_to(zero, channels)[:, None]) * each
    assert (np.abs(back - w) <= each * (0.5001 if target.weight_symmetric else 1.0001)).all()
    if target.avx2_safe:
        pairs = np.pad(q.astype(int), ((0, 0), (0, width % 2))).reshape(channels, -1, 2)
        assert (255 * np.maximum(pairs, 0).sum(2)).max(initial=0) <= 32767 and (255 * np.minimum(pairs, 0).sum(2)).min(
            initial=0
        ) >= -32768


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.floats(-6, 3), st.sampled_from(EVERY))
def test_every_bias_fits_and_stays_exact(seed, decade, target):
    rng = np.random.default_rng(seed)
    bias, sx = rng.normal(0, 1, 8).astype(np.float32), np.float32(10**decade)
    w = (rng.normal(0, 1, (8, 5)) * 10 ** rng.uniform(-12, 0, (8, 1))).astype(np.float32)
    _, scale, _ = weight_grid(w, 0, target, rows=kernel_rows(w), floor=bias_floor(bias, sx))
    b, sb, zb = bias_grid(bias, sx, scale)
    assert b.dtype == zb.dtype == np.int32 and not zb.any() and np.allclose(sb, sx * scale, rtol=1e-6)
    assert (
        np.abs(b).max() <= 2**30 * 1.000001
        and (np.abs(b * sb.astype(np.float64) - bias) <= 0.51 * sb + 1e-6 * np.abs(bias)).all()
    )


def test_a_grid_in_use_is_kept_and_refined():
    w = np.array([[3.0, -2.0, 1.0, 0.0]], np.float32) * np.float32(0.37)
    q, scale, _ = weight_grid(w, 0, CPU)
    assert (
        np.allclose(q * scale, w, rtol=1e-6) and np.abs(q).max() == 126
    )  # 42 times as fine as its own step, for the bias' sake


def test_the_scale_floor_of_a_tensor_is_the_largest():
    assert weight_grid(np.ones((2, 2), np.float32), 0, NPU, floor=[0.5, 2.0])[1] == 2
    q, scale, _ = weight_grid(np.zeros((2, 2), np.float32), 0, CPU, floor=[0.0, 1e-9])
    assert not q.any() and scale.tolist() == [1.0, np.float32(1e-9)]


# --- the placement


OPERATORS = {
    "Conv": ("y = Conv <pads = [1, 1, 1, 1]> (x, w, b)", {"w": (6, 4, 3, 3), "b": (6,)}),
    "Conv, no bias": ("y = Conv (x, w)", {"w": (6, 4, 1, 1)}),
    "Conv, grouped": ("y = Conv <group = 2> (x, w, b)", {"w": (6, 2, 3, 3), "b": (6,)}),
    "Conv, depthwise": ("y = Conv <group = 4> (x, w, b)", {"w": (4, 1, 3, 3), "b": (4,)}),
    "Conv, depthwise x2": ("y = Conv <group = 4> (x, w, b)", {"w": (8, 1, 3, 3), "b": (8,)}),
    "Conv, Relu": ("c = Conv (x, w, b); y = Relu (c)", {"w": (6, 4, 3, 3), "b": (6,)}),
    "Conv, Relu6": (
        "c = Conv (x, w, b); y = Clip (c, zero, six)",
        {"w": (6, 4, 3, 3), "b": (6,), "zero": 0.0, "six": 6.0},
    ),
    "Conv, PRelu": ("c = Conv (x, w, b); y = PRelu (c, s)", {"w": (6, 4, 3, 3), "b": (6,), "s": (6, 1, 1)}),
    "Conv, LeakyRelu, Conv": (
        "c = Conv (x, w, b); l = LeakyRelu <alpha = 0.1> (c); y = Conv (l, v)",
        {"w": (6, 4, 3, 3), "b": (6,), "v": (2, 6, 1, 1)},
    ),
    "ConvTranspose": ("y = ConvTranspose <strides = [2, 2]> (x, w, b)", {"w": (4, 6, 2, 2), "b": (6,)}),
    "ConvTranspose, grouped": ("y = ConvTranspose <group = 2> (x, w, b)", {"w": (4, 3, 2, 2), "b": (6,)}),
    "Gemm": ("f = Flatten (x); y = Gemm <transB = 1> (f, w, b)", {"w": (10, 256), "b": (10,)}),
    "Gemm, Relu": ("f = Flatten (x); g = Gemm (f, w, b); y = Relu (g)", {"w": (256, 10), "b": (10,)}),
    "MatMul": ("y = MatMul (x, w)", {"w": (8, 5)}),
    "MatMul, bias": ("m = MatMul (x, w); y = Add (b, m)", {"w": (8, 5), "b": (5,)}),
    "MatMul, bias, Relu": ("m = MatMul (x, w); a = Add (m, b); y = Relu (a)", {"w": (8, 5), "b": (1, 1, 5)}),
    "MatMul of two": ("t = Transpose <perm = [0, 1, 3, 2]> (x); m = MatMul (x, t); y = Softmax <axis = -1> (m)", {}),
    "MatMul, constant first": ("y = MatMul (w, x)", {"w": (8, 8)}),
    "Conv whose bias comes from the MatMul's kind of Add": (
        "c = Conv (x, w); y = Add (c, b)",
        {"w": (6, 4, 1, 1), "b": (1, 6, 1, 1)},
    ),
    "Add, Mul, Sub": ("p = Add (x, a); q = Mul (p, m); y = Sub (q, x)", {"a": (4, 1, 1), "m": (1, 4, 1, 1)}),
    "constant of one": ("p = Mul (x, m); y = Add (p, a)", {"m": -0.37, "a": 2.5}),
    "x with itself": ("p = Mul (x, x); y = Add (p, p)", {}),
    "Div by a norm": ("n = ReduceL2 <axes = [1]> (x); c = Clip (n, eps); y = Div (x, c)", {"eps": 1e-12}),
    "Concat": (
        "s = Sigmoid (x); c = Concat <axis = 1> (x, s, k); y = Conv (c, w)",
        {"k": (1, 1, 8, 8), "w": (3, 9, 1, 1)},
    ),
    "Resize, nearest": ('y = Resize <mode = "nearest"> (x, , scales)', {"scales": np.array([1, 1, 2, 2], np.float32)}),
    "Conv, Resize, linear, Conv": (
        'c = Conv (x, w); r = Resize <mode = "linear"> (c, , scales); y = Conv (r, v)',
        {"scales": np.array([1, 1, 2, 2], np.float32), "w": (4, 4, 1, 1), "v": (3, 4, 1, 1)},
    ),
    "Resize, cubic": ('y = Resize <mode = "cubic"> (x, , scales)', {"scales": np.array([1, 1, 2, 2], np.float32)}),
    "pools": (
        "r = Relu (x); "
        "m = MaxPool <kernel_shape = [2, 2]> (r); "
        "a = AveragePool <kernel_shape = [2, 2]> (m); "
        "y = GlobalAveragePool (a)",
        {},
    ),
    "ReduceMean": ("y = ReduceMean <axes = [2, 3]> (x)", {}),
    "Split, Slice, Pad": (
        "c = Conv (x, w); "
        "p, q = Split <axis = 1> (c, sizes); "
        "s = Slice (q, from, to); "
        "d = Pad (p, pads); "
        "e = Conv (d, v); "
        "y = Concat <axis = 1> (e, s)",
        {
            "w": (4, 4, 1, 1),
            "v": (3, 2, 3, 3),
            "sizes": np.array([2, 2]),
            "from": np.array([0, 0]),
            "to": np.array([1, 1]),
            "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        },
    ),
    "LayerNormalization": (
        "n = LayerNormalization <axis = -1> (x, g, b); y = MatMul (n, w)",
        {"g": (8,), "b": (8,), "w": (8, 5)},
    ),
    "residual": (
        "c = Conv (x, w); a = Add (c, x); r = Relu (a); d = Conv (r, v); y = Add (d, r)",
        {"w": (4, 4, 1, 1), "v": (4, 4, 1, 1)},
    ),
    "shuffle": (
        "c = Conv (x, w); "
        "f = Reshape (c, five); "
        "t = Transpose <perm = [0, 2, 1, 3, 4]> (f); "
        "r = Reshape (t, four); "
        "d = Conv (r, v); "
        "y = Flatten (d)",
        {"w": (4, 4, 1, 1), "v": (4, 4, 1, 1), "five": np.array([1, 2, 2, 8, 8]), "four": np.array([1, 4, 8, 8])},
    ),
    "Gelu": ("g = Gelu (x); y = Conv (g, w)", {"w": (4, 4, 1, 1)}),
}


def operator_graph(case):
    text, constants = OPERATORS[case]
    rng = np.random.default_rng(3)
    values = {k: rng.normal(0, 0.3, v).astype(np.float32) if isinstance(v, tuple) else v for k, v in constants.items()}
    return build(text, values, opset=20 if case == "Gelu" else 17)


@names
@pytest.mark.parametrize("case", OPERATORS)
def test_every_operator_on_every_target(case, target):
    graph = operator_graph(case)
    before = graph.model.SerializeToString(deterministic=True)
    images = noise(graph)
    int8 = checked(write_qdq(graph, observed(graph, images), target))
    assert graph.model.SerializeToString(deterministic=True) == before
    assert (
        int8.outputs == graph.outputs
        and int8.inputs == graph.inputs
        and set(computing(graph, observed(graph, images))) <= {n.name for n in int8.nodes}
    )
    for x in images[:2]:
        expected, simulation, got = run(graph, x)["y"], simulated(int8, x)["y"], answer(int8, x, target)["y"]
        assert got.dtype == np.float32 and got.shape == expected.shape and np.isfinite(got).all()
        assert sqnr(expected, got) > 17
        assert (
            sqnr(simulation, got) > 30 or case == "Resize, cubic"
        )  # integer kernels say what the nodes say, but for a step here and there


@names
@pytest.mark.parametrize("case", OPERATORS)
def test_pairs_stand_as_kernels_expect_them(case, target):
    graph = operator_graph(case)
    int8 = write_qdq(graph, observed(graph, noise(graph)), target)
    for n in int8.nodes:
        if n.op_type == "DequantizeLinear":
            readers = int8.consumers(n.output[0])
            assert n.output[0] in int8.outputs or (len(readers) == 1 and list(readers[0].input).count(n.output[0]) == 1)
        if n.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = int8.constant(n.input[1]), int8.constant(n.input[2])
            assert scale.shape == zero.shape and (
                scale.shape == ()
                or (
                    n.op_type == "DequantizeLinear"
                    and scale.shape == (int8.shape(n.input[0])[[a.i for a in n.attribute if a.name == "axis"][0]],)
                )
            )
            assert (scale > 0).all() and np.isfinite(scale).all()
    assert sum(n.op_type == "QuantizeLinear" for n in int8.nodes) == len(
        {n.input[0] for n in int8.nodes if n.op_type == "QuantizeLinear"}
    )


GEMM = "f = Flatten (x); y = Gemm <transB = 1> (f, w, b)"


def oracle(graph, ranges, target, x):
    """Conv (1x1) + Relu or Gemm by NumPy: codes in, int64 sums, codes out."""
    node = next(n for n in graph.nodes if n.op_type in ("Conv", "Gemm"))
    w, b = graph.constant("w"), graph.constant("b")
    sx, zx = activation_grid(*ranges.loc["x"], target)
    q, sw, zw = weight_grid(w, 0, target, rows=kernel_rows(w), floor=bias_floor(b, sx))
    bq, _, _ = bias_grid(b, sx, sw)
    a = codes(x, sx, zx).astype(np.int64) - int(zx)
    wide = q.astype(np.int64) - np.broadcast_to(zw, len(q)).reshape(-1, *[1] * (q.ndim - 1)).astype(np.int64)
    sums = np.einsum("oc,bchw->bohw", wide[:, :, 0, 0], a) if node.op_type == "Conv" else a.reshape(len(a), -1) @ wide.T
    shape = (1, -1, 1, 1) if node.op_type == "Conv" else (1, -1)
    real = (sums + bq.reshape(shape)) * (float(sx) * np.broadcast_to(sw, len(q)).astype(np.float64)).reshape(shape)
    if node.op_type == "Gemm":
        return real, 1e-4 * np.abs(real).max()
    sy, zy = activation_grid(*ranges.loc["y"], target)
    return (codes(np.maximum(real, 0), sy, zy).astype(np.float64) - int(zy)) * sy, 1.01 * sy


@names
@pytest.mark.parametrize("case", ["Conv, Relu", "Gemm"])
def test_against_integer_arithmetic_by_hand(case, target):
    rng = np.random.default_rng(5)
    if case == "Gemm":
        graph = build(GEMM, {"w": rng.normal(0, 1, (7, 256)), "b": rng.normal(0, 9, 7)})
    else:
        constants = {"w": rng.normal(0, 1, (7, 4, 1, 1)), "b": rng.normal(0, 1, 7)}
        graph = build("c = Conv (x, w, b); y = Relu (c)", constants)
    images = noise(graph)
    table = observed(graph, images)
    int8 = write_qdq(graph, table, target)
    for x in [*images, images[0] * 3]:  # the last one beyond the range
        expected, allowed = oracle(graph, table, target, x)
        assert np.abs(simulated(int8, x)["y"] - expected).max() <= allowed
        if target.weight_symmetric:
            assert np.abs(run(int8, x)["y"] - expected).max() <= allowed


def test_neighbours_of_full_size_do_not_saturate():
    """All weights and activations at their largest, where 16 bits overflow in an unprotected file."""
    graph = build(GEMM, {"w": np.linspace(0.9, 1, 512).reshape(2, 256), "b": np.zeros(2)})
    x = np.ones((1, 4, 8, 8), np.float32)
    got = run(write_qdq(graph, observed(graph, [x]), CPU), x)["y"]
    assert np.allclose(got, run(graph, x)["y"], rtol=0.01)


def test_numbers_of_a_tiny_layer():
    graph = build(GEMM, {"w": np.array([[1.27, -0.5]]), "b": np.array([0.3])}, (1, 2))
    int8 = write_qdq(graph, pd.DataFrame({"low": [-1.0], "high": [1.55]}, index=["x"]), CPU)
    assert float(int8.constant("f_scale")) == np.float32(0.01) and int(int8.constant("f_zero_point")) == 100
    assert (
        int8.constant("w_codes").tolist() == [[127, -50]]
        and np.allclose(int8.constant("w_scale"), [0.01])
        and int8.constant("y_bias_codes").tolist() == [3000]
    )
    assert np.allclose(run(int8, np.array([[1.0, 2.0]], np.float32))["y"], 1.27 - 0.5 * 1.55 + 0.3, atol=1e-4)


def test_shared_weights_are_stored_once_and_read_apart():
    weights = np.random.default_rng(0).normal(0, 0.4, (4, 4, 1, 1))
    graph = build("a = Conv (x, w); b = Conv (a, w); y = Add (a, b)", {"w": weights})
    int8 = checked(write_qdq(graph, observed(graph, noise(graph)), CPU))
    assert sum(name.startswith("w") and name.endswith("codes") for name in int8.constants) == 1
    assert int8_nodes(int8) == ["Conv_a", "Conv_b"] and "w" not in int8.constants
    half = write_qdq(graph, observed(graph, noise(graph)), CPU, only=["Conv_b"])
    assert int8_nodes(half) == ["Conv_b"] and "w" in half.constants


@names
def test_outputs_read_inside_keep_name_and_type(target):
    rng = np.random.default_rng(0)
    text = """one = Conv (x, w)
        two = Relu (one)
        c = Conv (two, v)
        three = Transpose <perm = [0, 2, 3, 1]> (c)
        four = Sigmoid (two)"""
    graph = build(
        text,
        {"w": rng.normal(0, 0.4, (4, 4, 1, 1)), "v": rng.normal(0, 0.4, (3, 4, 1, 1))},
        outputs=("one", "two", "three", "four"),
    )
    images = noise(graph)
    int8 = checked(write_qdq(graph, observed(graph, images), target))
    before, after = run(graph, images[0]), answer(int8, images[0], target)
    assert list(after) == list(before)
    assert all(
        v.dtype == np.float32 and v.shape == before[k].shape and sqnr(before[k], v) > 25 for k, v in after.items()
    )


def test_float_nodes_and_only_and_what_is_wrong_with_them():
    graph = operator_graph("residual")
    table = observed(graph, noise(graph))
    names = computing(graph, table)
    assert names == ["Conv_c", "Add_a", "Conv_d", "Add_y"]
    assert (
        int8_macs_share(graph, write_qdq(graph, table, CPU)) == 1
        and int8_macs_share(graph, write_qdq(graph, table, CPU, float_nodes=["Conv_c"])) == 0.5
    )
    assert not any(n.op_type == "QuantizeLinear" for n in write_qdq(graph, table, NPU, float_nodes=names).nodes)
    assert not any(n.op_type == "QuantizeLinear" for n in write_qdq(graph, table, NPU, only=[]).nodes)
    alone = write_qdq(graph, table, NPU, only=["Relu_r"])  # stands for the Add in front of it
    assert sum(n.op_type == "QuantizeLinear" for n in alone.nodes) == 3 and int8_nodes(alone) == []
    for wrong in ({"float_nodes": ["Conv_e"]}, {"only": ["Conv_e"]}):
        with pytest.raises(InputError, match="no node 'Conv_e'.*Conv_"):
            write_qdq(graph, table, CPU, **wrong)
    with pytest.raises(InputError, match="no range for tensor 'r'"):
        write_qdq(graph, table.drop("r"), CPU)
    nameless = graph.copy()
    nameless.nodes[0].name = ""
    with pytest.raises(ModelError, match="simplify"):
        write_qdq(nameless, table, CPU)


FLOAT_LAYERS = {
    "Conv": "m = Conv (a, v)",
    "Conv, bias": "m = Conv (a, v, b)",
    "Conv, Relu": "c = Conv (a, v, b); m = Relu (c)",
    "Conv, Relu6": "c = Conv (a, v, b); m = Clip (c, zero, six)",
    "ConvTranspose": "m = ConvTranspose (a, v)",
    "Gemm": "f = Flatten (a); n = Gemm <transB = 1> (f, g, h); m = Reshape (n, shape)",
    "Gemm, no bias": "f = Flatten (a); n = Gemm (f, g); m = Reshape (n, shape)",
}


@pytest.mark.parametrize("case", FLOAT_LAYERS)
def test_a_float_layer_between_codes_stays_float(case):
    """ONNX Runtime quantizes weights of a Conv, ConvTranspose or Gemm between a DQ and a Q by itself where it can."""
    rng = np.random.default_rng(0)
    size = 10.0 ** np.arange(-3, 1).reshape(4, 1, 1, 1)
    constants = {
        "w": rng.normal(0, 0.4, (4, 4, 1, 1)),
        "v": rng.normal(0, 0.4, (4, 4, 1, 1)) * size,
        "b": rng.normal(0, 0.1, 4),
        "g": rng.normal(0, 0.1, (256, 256)),
        "h": rng.normal(0, 1, 256),
        "shape": np.array([1, 4, 8, 8]),
        "zero": 0.0,
        "six": 6.0,
    }
    graph = build(f"a = Conv (x, w); {FLOAT_LAYERS[case]}; y = Conv (m, w)", constants)
    images = noise(graph)
    kept = next(n.name for n in graph.nodes if n.name.startswith(case.split(",")[0]) and n.name != "Conv_a")
    int8 = checked(write_qdq(graph, observed(graph, images), CPU, float_nodes=[kept]))
    assert (
        int8_nodes(int8) == ["Conv_a", "Conv_y"]
        and sqnr(simulated(int8, images[0])["y"], run(int8, images[0])["y"]) > 45
    )


def test_operators_per_target():
    cnn, attention, normal = (
        operator_graph("residual"),
        operator_graph("MatMul of two"),
        operator_graph("LayerNormalization"),
    )
    assert int8_operators(cnn, NPU) is None and int8_operators(attention, XNN) is None
    assert "Add" in int8_operators(cnn, CPU) and int8_operators(attention, CPU) == int8_operators(normal, CPU) == (
        "Conv",
        "ConvTranspose",
        "Gemm",
        "MatMul",
    )
    table = observed(normal, noise(normal))
    assert not any(
        n.op_type == "QuantizeLinear" and n.input[0] in ("x", "y") for n in write_qdq(normal, table, CPU).nodes
    )
    assert any(n.op_type == "QuantizeLinear" and n.input[0] == "x" for n in write_qdq(normal, table, NPU).nodes)
    for target in EVERY:
        for case in OPERATORS:
            graph = operator_graph(case)
            int8 = write_qdq(graph, observed(graph, noise(graph, 1)), target)
            made = {o: n.op_type for n in int8.nodes for o in n.output}
            assert not any(
                made.get(i) == "DequantizeLinear" and int8.producer(i).input[0] in int8.constants
                for n in int8.nodes
                if n.op_type in target.float_operators
                for i in n.input
            )


def test_codes_are_handed_on_with_one_grid():
    graph = operator_graph("shuffle")
    int8 = write_qdq(graph, observed(graph, noise(graph)), NPU)
    scales = {
        n.input[0]: (float(int8.constant(n.input[1])), int(int8.constant(n.input[2])))
        for n in int8.nodes
        if n.op_type == "QuantizeLinear"
    }
    assert scales["c"] == scales["f"] == scales["t"] == scales["r"] and scales["d"] != scales["c"]


def test_a_divisor_is_never_rounded_to_zero():
    graph = build("s = Sigmoid (x); y = Div (x, s)", {})
    x = np.full((1, 4, 8, 8), -9, np.float32)
    table = pd.DataFrame({"low": [-9.0, 0.0, -2e5], "high": [9.0, 1.0, 9.0]}, index=["x", "s", "y"])
    assert np.isfinite(run(write_qdq(graph, table, NPU), x)["y"]).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from(EVERY))
def test_random_networks(seed, target):
    """Chains with branches, pools and shared inputs, some of their nodes in float: valid, finite, near float."""
    rng = np.random.default_rng(seed)
    lines, constants, tensors, channels = [], {}, ["x"], 4
    operators = ["Conv", "Relu", "Add", "Mul", "Sigmoid", "Concat", "MaxPool", "Transpose", "LeakyRelu", "Clip"]
    for k in range(rng.integers(2, 8)):
        op, source, out = rng.choice(operators), str(rng.choice(tensors[-3:])), f"t{k}"
        if op == "Conv":
            constants[f"w{k}"] = rng.normal(0, 0.4, (channels, channels, 1, 1))
            constants[f"b{k}"] = rng.normal(0, 0.1, channels)
            lines.append(f"{out} = Conv ({source}, w{k}, b{k})")
        elif op in ("Add", "Mul"):
            lines.append(f"{out} = {op} ({source}, {rng.choice(tensors)})")
        elif op == "Concat":
            constants[f"v{k}"] = rng.normal(0, 0.3, (channels, 2 * channels, 1, 1))
            lines += [f"c{k} = Concat <axis = 1> ({source}, {rng.choice(tensors)})", f"{out} = Conv (c{k}, v{k})"]
        elif op == "Clip":
            constants |= {f"lo{k}": -1.0, f"hi{k}": float(rng.choice([1, 100]))}
            lines.append(f"{out} = Clip ({source}, lo{k}, hi{k})")
        else:
            attributes = {
                "MaxPool": "<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>",
                "Transpose": "<perm = [0, 1, 3, 2]>",
            }
            lines.append(f"{out} = {op} {attributes.get(op, '')} ({source})")
        tensors.append(out)
    outputs = tuple(dict.fromkeys([tensors[-1], str(rng.choice(tensors[1:]))]))
    graph = build("\n".join(lines), constants, outputs=outputs)
    images = noise(graph, 2, seed)
    table = observed(graph, images)
    names = computing(graph, table)
    int8 = checked(write_qdq(graph, table, target, float_nodes=[n for n in names if rng.random() < 0.3]))
    before, after, simulation = run(graph, images[0]), answer(int8, images[0], target), simulated(int8, images[0])
    assert all(
        np.isfinite(after[k]).all() and after[k].shape == before[k].shape and sqnr(before[k], after[k]) > 10
        for k in outputs
    )
    assert all(sqnr(simulation[k], after[k]) > 20 for k in outputs)


# --- real networks


# Least mean cosine of any output to float: on the NPU and xnnpack, on ort-cpu; least mean cosine of integer kernels to
# what the nodes say (EdgeFace: its residual stream amplifies one code that rounds the other way). Far below what was
# seen: processors round differently.
REAL = {
    "face_detection_yunet_2023mar": (0.85, 0.93, 0.98),
    "edgeface_xxs_q_dequant": (0.3, 0.85, 0.4),
    "rtmonodepth_s_m_640x192": (0.99, 0.99, 0.999),
    "FastestDet_opset13": (0.9, 0.97, 0.99),
    "scrfd_500m_bnkps": (0.97, 0.97, 0.999),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_networks(name, real_data, tmp_path):
    from calib_nb.data.images import decode, find_images
    from calib_nb.quant.observe import observe
    from calib_nb.quant.ranges import ranges

    cv2 = pytest.importorskip("cv2")
    graph = simplify(load_graph(fix_batch(real_data / "models" / f"{name}.onnx", tmp_path / "fixed.onnx")))
    _, _, height, width = graph.shape(graph.inputs[0])
    offset, divisor = (0, 1) if "yunet" in name else (0, 255) if name.startswith(("Fast", "rt")) else (127.5, 127.5)
    folder = real_data / "lfw" / "images"
    files = [folder / p for p in find_images(folder)[::400][:10]]

    def preprocess(bgr):
        return ((cv2.resize(bgr, (width, height)).astype(np.float32) - offset) / divisor).transpose(2, 0, 1)[None]

    table = ranges(observe(graph, files, preprocess, progress=False), "minmax")
    xs = [preprocess(decode(p)) for p in files[:3]]
    npu, cpu, same = REAL[name]
    for target in PROFILES.values():
        int8 = write_qdq(graph, table, replace(target, float_where_faster=False))
        path = int8.save(tmp_path / "int8.onnx")
        assert int8_macs_share(graph, int8) == 1 and path.stat().st_size < 0.65 * graph.model.ByteSize()
        likeness, kernels = [], []
        for x in xs:
            expected, simulation, got = run(graph, x), simulated(int8, x), run(int8, x)
            for k, v in expected.items():
                a, b, c = (t.ravel().astype(np.float64) for t in (v, got[k], simulation[k]))
                likeness.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
                kernels.append(b @ c / np.linalg.norm(b) / np.linalg.norm(c))
        floor = cpu if target is CPU else npu
        assert min(np.mean(np.reshape(likeness, (len(xs), -1)), axis=0)) > floor, (target.name, likeness)
        assert np.mean(kernels) > same
    assert macs(graph).macs.sum() > 0 and len(computing(graph, table)) > 10
