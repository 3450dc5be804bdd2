"""Repairs: exact where they promise it, on drawn and on real graphs; measured where they do not."""

import numpy as np
import onnx
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from calib_nb.core.errors import InputError
from calib_nb.graph.build import network
from calib_nb.graph.fixed import fix_batch
from calib_nb.graph.layers import get_bias, get_weight, layers, set_bias, set_weight
from calib_nb.graph.model import load_graph, run
from calib_nb.graph.simplify import simplify
from calib_nb.quant.adaround import RoundingOptions, adaround
from calib_nb.quant.bias_clip import absorb_bias, bound_ranges, clip_ranges, correct_bias
from calib_nb.quant.equalize import (
    balanced_factors,
    channel_groups,
    equal_factors,
    equalize,
    mirror_channels,
    mirror_signs,
    rescale,
)
from calib_nb.quant.stats import collect
from calib_nb.quant.weights import (
    channel_statistics,
    fake_quantize_weight,
    grid_step,
    quantize_weights,
    walk,
    weight_scale,
    weight_table,
)

EPS = float(np.finfo(np.float32).eps)
FEW = RoundingOptions(iterations=150, rows=512)


def noise(graph, count=1, seed=7):
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 1, graph.shape(graph.inputs[0])).astype(np.float32) for _ in range(count)]


def change(before, after, images=None):
    """Largest change of an output, relative to the largest value of that output."""
    worst = 0.0
    for x in images or noise(before):
        a, b = run(before, x), run(after, x)
        worst = max([worst, *(np.abs(a[k] - b[k]).max() / max(np.abs(a[k]).max(), 1e-12) for k in a)])
    return worst


def float32_error(graph, images=None, copies=3):
    """What float32 cannot tell apart on this graph and this processor: the `change` when each weight moves by one unit.

    Weights and biases move up or down in their last place. A rescaled graph differs from its original by no more
    than the rounding of each weight and another rounding of each sum, which such copies have as well.
    """
    worst = EPS
    for seed in range(copies):
        moved, rng = graph.copy(), np.random.default_rng(seed)
        for layer in layers(moved):
            for get, put in ((get_weight, set_weight), (get_bias, set_bias)):
                value = get(moved, layer)
                if value.any():
                    put(moved, layer, value * (1 + EPS * rng.choice([-1, 1], value.shape)).astype(np.float32))
        worst = max(worst, change(graph, moved, images))
    return worst


def agrees(before, after, images=None):
    """Whether two graphs compute the same, up to a few times what float32 cannot tell apart."""
    return change(before, after, images) <= 10 * float32_error(before, images)


def sizes(rng, n, decades=2.0):
    return 10 ** rng.uniform(-decades / 2, decades / 2, n)


MODELS = [
    "FastestDet_opset13",
    "face_detection_yunet_2023mar",
    "retinaface_mobilenet0.25_FaceDetector_heads",
    "rtmonodepth_s_m_640x192",
    "scrfd_500m_bnkps",
    "yolov5n-0.5-face",
    "yolov8-lite-t-face",
]


# --- the grid


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.sampled_from([None, 0, 1]), st.booleans(), st.sampled_from([4, 8]))
def test_rounding_against_torch(seed, axis, symmetric, bits):
    import torch

    rng = np.random.default_rng(seed)
    w = (rng.normal(0, 1, (5, 7)) * sizes(rng, 5)[:, None]).astype(np.float32)
    scale, zero = weight_scale(w, axis, symmetric=symmetric, bits=bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    tensor = torch.from_numpy(w)
    if axis is None:
        step, point = float(scale.ravel()[0]), int(zero.ravel()[0])
        wanted = torch.fake_quantize_per_tensor_affine(tensor, step, point, low, high).numpy()
    else:
        s, z = torch.from_numpy(scale.ravel().astype(np.float32)), torch.from_numpy(zero.ravel().astype(np.int32))
        wanted = torch.fake_quantize_per_channel_affine(tensor, s, z, axis, low, high).numpy()
    got = fake_quantize_weight(w, axis, symmetric=symmetric, bits=bits)
    # torch divides in float32: what lies within its rounding of the middle between two levels may go either way
    levels = np.abs(w / scale)
    tie = np.abs(levels % 1 - 0.5) <= 4 * EPS * (levels + np.abs(zero) + 1)
    assert (np.isclose(got, wanted, rtol=4 * EPS, atol=4 * EPS * np.abs(w).max()) | tie).all()
    assert (np.abs(got - w) <= scale * (0.5 if symmetric else 1.0) + 4 * EPS * np.abs(w).max()).all()
    again = fake_quantize_weight(got, axis, symmetric=True, bits=bits)
    assert not symmetric or np.allclose(again, got, rtol=0, atol=8 * EPS * np.abs(w).max())


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 300), st.floats(2**-20, 2**10, width=32))
def test_a_grid_in_use_is_found_and_kept(seed, n, step):
    rng = np.random.default_rng(seed)
    levels = rng.integers(-128, 128, n)
    w = levels.astype(np.float32) * np.float32(step)
    assert np.allclose(fake_quantize_weight(w), w, rtol=8 * EPS)
    assert len(set(levels)) < 2 or np.isclose(grid_step(w), np.gcd.reduce(levels) * step, rtol=8 * EPS)


def test_no_grid_is_invented():
    rng = np.random.default_rng(0)
    assert all(grid_step(rng.normal(0, 1, n)) is None for n in (3, 9, 100, 1000) for _ in range(50))
    assert grid_step(np.zeros(9)) is None and grid_step(np.array([128.0, 1.0])) is None
    with pytest.raises(InputError, match="17-bit"):
        weight_scale(np.ones(3), bits=17)


# --- equalization


POOL = "<kernel_shape = [3, 3], strides = [1, 1], pads = [1, 1, 1, 1]>"
SUM_POOL = POOL.replace(">", ", count_include_pad = 1>")
# operator, further inputs, attributes; and the constants for c channels
ACTIVATIONS = {
    "Relu": ([("Relu", "", "")], lambda c: {}),
    "LeakyRelu": ([("LeakyRelu", "", "<alpha = 0.1>")], lambda c: {}),
    "PRelu": ([("PRelu", "slope", "")], lambda c: {"slope": np.linspace(-0.3, 0.8, c).reshape(c, 1, 1)}),
    "Relu6": ([("Clip", "lo hi", "")], lambda c: {"lo": 0.0, "hi": 6.0}),
    "Hardtanh": ([("Clip", "lo hi", "")], lambda c: {"lo": -1.0, "hi": 1.0}),
    "lower": ([("Clip", "lo", "")], lambda c: {"lo": -0.5}),
    "upper": ([("Clip", '"" hi', "")], lambda c: {"hi": 1.0}),
    "Relu, Min": (
        [("Relu", "", ""), ("Min", "bound", "")],
        lambda c: {"bound": np.linspace(0.5, 3, c).reshape(1, c, 1, 1)},
    ),
    "none": ([], lambda c: {}),
    "Relu, MaxPool": ([("Relu", "", ""), ("MaxPool", "", POOL)], lambda c: {}),
    "AveragePool": ([("AveragePool", "", SUM_POOL)], lambda c: {}),
    "Resize": ([("Resize", '"" scales', '<mode = "linear">')], lambda c: {"scales": np.float32([1, 1, 2, 2])}),
    "Pad": ([("Pad", "pads", "")], lambda c: {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}),
}


class Chain:
    """A random chain of layers with uneven channels, as text for `network`."""

    def __init__(self, rng, channels=3):
        self.rng, self.lines, self.constants, self.at, self.channels = rng, [], {}, "x", channels

    def add(self, op, inputs="", attributes="", **constants):
        n, reads = len(self.lines), inputs.split()
        self.constants |= {f"{k}{n}": v for k, v in constants.items()}
        reads = [f"{name}{n}" if name in constants else name for name in reads]
        self.lines.append(f"t{n} = {op} {attributes} ({', '.join([self.at, *reads])})")
        self.at = f"t{n}"
        return self

    def layer(self, kind):
        rng, c = self.rng, self.channels
        o = c if kind in ("depthwise", "residual") else 2 * int(rng.integers(2, 5))
        groups = {"depthwise": c, "grouped": 2}.get(kind, 1) if c % 2 == 0 or kind == "depthwise" else 1
        transposed, start = kind == "transposed", self.at
        shape = (c, o // groups, 3, 3) if transposed else (o, c // groups, 3, 3)
        w = rng.normal(0, 0.5, shape) * sizes(rng, c if transposed else o)[:, None, None, None]
        bias = rng.normal(0, 0.5, o)
        op, attributes = "ConvTranspose" if transposed else "Conv", f"<pads = [1, 1, 1, 1], group = {groups}>"
        self.add(op, "w b" if rng.random() < 0.7 else "w", attributes, w=w, b=bias)
        if kind == "residual":
            self.add("Add", start)
        self.channels = o
        return self

    def activation(self, name):
        steps, constants = ACTIVATIONS[name]
        values = constants(self.channels)
        for op, inputs, attributes in steps:
            self.add(op, inputs, attributes, **{k: v for k, v in values.items() if k in inputs.split()})
        return self

    def graph(self, size=8):
        return network("\n".join(self.lines), inputs={"x": (1, 3, size, size)}, **self.constants)


KINDS = ["plain", "depthwise", "grouped", "transposed", "residual"]


def random_chain(seed, kinds, end):
    rng = np.random.default_rng(seed)
    chain = Chain(rng).layer("plain")
    for kind, activation in kinds:
        chain.layer(kind).activation(activation)
    chain.layer("plain").add("Relu")
    if end == "conv":
        return chain.layer("plain").graph()
    if end == "pooled":
        chain.add("GlobalAveragePool").add("Flatten")
    else:
        chain.add("MaxPool", "", "<kernel_shape = [3, 3], strides = [2, 2]>").add("Flatten")
    width = chain.graph().shape(chain.at)[1]
    return chain.add("Gemm", "w b", "<transB = 1>", w=rng.normal(0, 1, (5, width)), b=rng.normal(0, 1, 5)).graph()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(sorted(ACTIVATIONS))), min_size=2, max_size=5),
    st.sampled_from(["conv", "flat", "pooled"]),
    st.booleans(),
)
@example(
    795,
    [
        ("depthwise", "AveragePool"),
        ("residual", "AveragePool"),
        ("plain", "Relu, MaxPool"),
        ("residual", "LeakyRelu"),
        ("residual", "Relu, Min"),
    ],
    "conv",
    False,
)
def test_equalization_is_exact(seed, kinds, end, with_images):
    graph = random_chain(seed, kinds, end)
    images = noise(graph, 1)
    balance = (None, 1.0, 0.25)[seed % 3] if with_images else None
    even = equalize(graph, images if with_images else (), balance=balance)
    assert agrees(graph, even, [images[0], 10 * images[0]])
    assert channel_groups(graph) and "Clip" not in {b.op_type for g in channel_groups(even) for b in g.bounds}
    onnx.checker.check_model(even.model, full_check=True)


@pytest.mark.parametrize("name", MODELS)
def test_equalization_is_exact_on_real_models(real_data, name):
    graph = simplify(load_graph(real_data / "models" / f"{name}.onnx"))
    images = [100 * abs(x) if "yunet" in name else x for x in noise(graph, 1)]
    own = max(10 * float32_error(graph, images, copies=2), 1e-4)
    assert change(graph, equalize(graph, images, balance=0.5), images) <= own
    for even in (equalize(graph), equalize(graph, images)):
        assert change(graph, even, images) <= own
        assert weight_table(even).worst_channel_db.median() > weight_table(graph).worst_channel_db.median()
    assert change(graph, absorb_bias(graph, images), images) <= own


def test_transformers_without_free_channels_stay_as_they_are(real_data, tmp_path):
    graph = simplify(load_graph(fix_batch(real_data / "models" / "edgeface_xxs_q_dequant.onnx", tmp_path / "e.onnx")))
    assert not channel_groups(graph) and change(graph, equalize(graph)) == 0


HELD = {
    "Sigmoid": "a = Sigmoid (c)",
    "Softmax": "a = Softmax <axis = 1> (c)",
    "Concat": "a = Concat <axis = 1> (c, c)",
    "output": "a = Relu (c)",
    "Mul": "a = Mul (c, c)",
    "shifted pad": "a = Pad (c, p, k)",
    "pixel bound": "a = Min (c, m)",
}


@pytest.mark.parametrize("between", HELD)
def test_what_is_not_homogeneous_is_left_alone(between):
    rng = np.random.default_rng(0)
    constants = {
        "w1": rng.normal(0, 1, (4, 3, 1, 1)) * sizes(rng, 4)[:, None, None, None],
        "w2": rng.normal(0, 1, (2, 8 if between == "Concat" else 4, 1, 1)),
        "k": 0.5,
        "p": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "m": np.ones((1, 4, 8, 8)),
    }
    graph = network(f"c = Conv (x, w1); {HELD[between]}; y = Conv (a, w2)", **constants)
    if between == "output":
        graph.model.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [1, 4, 8, 8]))
    assert channel_groups(graph) == [] and change(graph, equalize(graph)) == 0


@pytest.mark.parametrize("middle", ["Relu (h)", "PRelu (h, slope)", "Clip (h, lo, hi)", "Min (h, bound)", "none"])
def test_matrices_on_the_last_axis_of_four(middle):
    rng = np.random.default_rng(0)
    constants = {
        "w1": rng.normal(0, 1, (6, 6)) * sizes(rng, 6),
        "b1": rng.normal(0, 1, 6),
        "w2": rng.normal(0, 1, (6, 6)),
        "slope": np.linspace(0, 1, 6),
        "lo": 0.0,
        "hi": 3.0,
        "bound": np.linspace(1, 2, 6),
    }
    end = "y = MatMul (h, w2)" if middle == "none" else f"a = {middle}; y = MatMul (a, w2)"
    graph = network(f"p = MatMul (x, w1); h = Add (p, b1); {end}", inputs={"x": (1, 6, 6, 6)}, **constants)
    images = noise(graph, 3)
    assert len(channel_groups(graph)) == 1
    assert agrees(graph, equalize(graph), images) and agrees(graph, equalize(graph, images), images)
    assert weight_table(equalize(graph)).spread[0] < 0.5 * weight_table(graph).spread[0]


def test_a_convolution_read_by_a_matrix_is_left_alone():
    rng = np.random.default_rng(0)
    weights = {"w1": rng.normal(0, 1, (8, 3, 1, 1)), "w2": rng.normal(0, 1, (8, 8))}
    assert channel_groups(network("c = Conv (x, w1); y = MatMul (c, w2)", **weights)) == []


def test_dead_channels_and_shared_weights():
    rng = np.random.default_rng(0)
    w = rng.normal(0, 1, (6, 6, 1, 1)) * sizes(rng, 6)[:, None, None, None]
    w[2], w[:, 3] = 0, 0
    text = "c = Conv (x, w, b); r = Relu (c); d = Conv (r, w, b); s = Relu (d); y = Conv (s, w)"
    graph = network(text, inputs={"x": (1, 6, 8, 8)}, w=w, b=rng.normal(0, 1, 6))
    even = equalize(graph)
    assert agrees(graph, even) and np.isfinite(get_weight(even, layers(even)[0])).all()
    assert equal_factors([np.zeros(3)], [np.ones(3)]).tolist() == [1, 1, 1]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_any_positive_factors_are_exact(seed):
    rng = np.random.default_rng(seed)
    chain = Chain(rng).layer("plain").activation("Relu6").layer("depthwise").activation("Hardtanh")
    graph = chain.layer("residual").activation("Relu").layer("plain").graph(size=6)
    other = graph.copy()
    for k in range(len(channel_groups(graph))):
        group = channel_groups(other)[k]
        rescale(other, group, sizes(rng, group.channels, 2))
    assert agrees(graph, other)


def width(ends, signs):
    low, high = (np.where(signs < 0, -end, other) for end, other in (ends[::-1], ends))
    return max(high.max(), 0) - min(low.min(), 0)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 7))
def test_no_other_signs_make_one_tensor_narrower(seed, n):
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.normal(0, 1, (2, n)) * sizes(rng, n, 1), axis=0)
    signs = mirror_signs([tuple(ends)])
    every = np.array(np.meshgrid(*[[-1, 1]] * n)).reshape(n, -1).T
    assert set(signs) <= {-1, 1} and width(ends, signs) <= min(width(ends, other) for other in every) * (1 + 1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(2, 4))
def test_tensors_that_share_their_signs_are_no_wider_together(seed, count):
    rng = np.random.default_rng(seed)
    several = [tuple(np.sort(rng.normal(0, 1, (2, 5)), axis=0)) for _ in range(count)]
    signs = mirror_signs(several)
    narrower = [width(ends, signs) / width(ends, np.ones(5)) for ends in several]
    assert np.prod(narrower) <= 1 + 1e-12


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 10**6),
    st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(sorted(ACTIVATIONS))), min_size=2, max_size=5),
    st.sampled_from(["conv", "flat", "pooled"]),
)
def test_mirrored_networks_compute_the_same_and_no_range_grows_alone(seed, kinds, end):
    graph = random_chain(seed, kinds, end)
    images = noise(graph, 2)
    turned = mirror_channels(graph, images)
    assert agrees(graph, turned, [images[0], 10 * images[0]])
    assert [n.op_type for n in turned.nodes] == [n.op_type for n in graph.nodes]
    onnx.checker.check_model(turned.model, full_check=True)
    assert change(turned, mirror_channels(turned, images), images[:1]) == 0  # nothing is left to turn


@pytest.mark.parametrize("middle", ["Relu", "LeakyRelu <alpha = 0.1>", "Clip", "GlobalMaxPool", "none"])
def test_only_linear_tensors_are_mirrored(middle):
    rng = np.random.default_rng(0)
    push = np.where(np.arange(8) % 2, 3.0, -3.0)
    constants = {"w1": rng.normal(0, 0.3, (8, 3, 1, 1)), "w2": rng.normal(0, 1, (8, 1, 3, 3)), "push": push}
    name, _, rest = middle.partition(" ")
    between = "a = Identity (c)" if middle == "none" else f"a = {name} {rest} (c)"
    text = f"c = Conv (x, w1, push); {between}; y = Conv <group = 8, pads = [1, 1, 1, 1]> (a, w2)"
    graph = simplify(network(text, **constants))
    images = noise(graph, 4)
    turned = mirror_channels(graph, images)
    bias = get_bias(turned, layers(turned)[0])
    assert np.array_equal(bias, np.abs(push) if middle == "none" else push)
    assert change(graph, turned, images) == 0


@pytest.mark.parametrize("name", MODELS)
def test_mirrored_real_models_compute_the_same(real_data, name):
    graph = simplify(load_graph(real_data / "models" / f"{name}.onnx"))
    images = [100 * abs(x) if "yunet" in name else x for x in noise(graph, 1)]
    turned = mirror_channels(graph, images)
    assert change(graph, turned, images) <= max(10 * float32_error(graph, images, copies=2), 1e-6)
    if "yunet" in name:  # a pointwise layer stands in front of every depthwise one
        before, after = (channel_statistics(g, [k.output for k in layers(g)], images) for g in (graph, turned))
        ratio = [np.ptp(after[k][["min", "max"]]) / np.ptp(before[k][["min", "max"]]) for k in before]
        assert max(ratio) < 1 + 1e-5 and sum(r < 0.95 for r in ratio) >= 15


def mobile(seed=0, blocks=3, width=16, decades=2.5):
    """A depthwise network with ReLU6 and deliberately unequal channel ranges, as folded BatchNorms leave them."""
    rng, lines, weights, at, size = np.random.default_rng(seed), [], {"lo": 0.0, "hi": 6.0}, "x", np.ones(3)
    for k in range(2 * blocks + 1):
        depthwise, c = k % 2 == 1, width if k else 3
        new = sizes(rng, width, decades)
        shape = (width, 1, 3, 3) if depthwise else (width, c, 1, 1)
        base = rng.normal(0, 1, shape) / (3 if depthwise else c**0.5)
        reads = size[:, None, None, None] if depthwise else size[None, :, None, None]
        weights |= {f"w{k}": base * new[:, None, None, None] / reads, f"b{k}": rng.normal(0.2, 0.3, width) * new}
        pad, group = int(depthwise), width if depthwise else 1
        lines.append(f"c{k} = Conv <group = {group}, pads = [{pad}, {pad}, {pad}, {pad}]> ({at}, w{k}, b{k})")
        lines.append(f"r{k} = Clip (c{k}, lo, hi)")
        at, size = f"r{k}", new
    weights |= {"wl": rng.normal(0, 1, (8, width)) / size, "bl": rng.normal(0, 0.1, 8)}
    lines.append(f"p = GlobalAveragePool ({at}); f = Flatten (p); y = Gemm <transB = 1> (f, wl, bl)")
    return network("\n".join(lines), inputs={"x": (1, 3, 12, 12)}, **weights)


def answers(graph, images):
    return np.concatenate([run(graph, x)["y"] for x in images])


def correlation(model, graph, images):
    """Of the answers with those of the float graph, their means aside."""
    got, wanted = (a - a.mean(0) for a in (answers(model, images), answers(graph, images)))
    return float((got * wanted).sum() / np.sqrt((got**2).sum() * (wanted**2).sum() + 1e-30))


@pytest.mark.parametrize("seed", range(3))
def test_per_tensor_collapses_without_equalization_and_comes_back_with_it(seed):
    graph = mobile(seed)
    images = noise(graph, 32)
    even = equalize(graph)
    assert correlation(even, graph, images) > 0.99999
    assert correlation(quantize_weights(graph), graph, images) < 0.8
    assert correlation(quantize_weights(even), graph, images) > 0.97
    assert correlation(correct_bias(even, quantize_weights(even), images[:16]), graph, images) > 0.97


# --- absorption, bias, rounding


@pytest.mark.parametrize("reader", ["Conv", "padded", "Gemm", "bounded"])
def test_high_biases_are_absorbed(reader):
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(0, 0.2, (6, 3, 1, 1)),
        "b": np.array([5, 8, 0, 0.1, -1, 3.0]),
        "v": rng.normal(0, 1, (4, 6, 3, 3)),
        "g": rng.normal(0, 1, (6, 4)),
        "bound": np.linspace(5, 9, 6).reshape(1, 6, 1, 1),
    }
    pad = int(reader == "padded")
    conv = f"y = Conv <pads = [{pad}, {pad}, {pad}, {pad}]> (r, v)"
    end = "p = GlobalAveragePool (r); f = Flatten (p); y = Gemm (f, g)" if reader == "Gemm" else conv
    middle = "q = Relu (c); r = Min (q, bound)" if reader == "bounded" else "r = Relu (c)"
    graph = network(f"c = Conv (x, w, b); {middle}; {end}", **constants)
    images = noise(graph, 8)
    absorbed = absorb_bias(graph, images)
    assert agrees(graph, absorbed, images)
    first = get_bias(absorbed, layers(absorbed)[0])
    if reader == "padded":
        assert np.array_equal(first, get_bias(graph, layers(graph)[0]))
    else:
        assert (first[[0, 1, 5]] < [5, 8, 3]).all() and np.array_equal(first[[2, 4]], [0, -1])
        least = channel_statistics(absorbed, ["c"], images)["c"]["min"][0]
        assert least == pytest.approx(0, abs=16 * EPS * 8), "a few roundings of the largest bias"


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose", "Gemm", "MatMul", "MatMul of four"])
def test_means_agree_after_bias_correction(kind):
    rng, op = np.random.default_rng(0), kind.split()[0]
    if op in ("Gemm", "MatMul"):
        shape = (1, 5, 4, 6) if "four" in kind else (1, 6)
        weights = {"w": rng.normal(0, 1, (6, 6)), "v": rng.normal(0, 1, (6, 3))}
    else:
        shape, last = (1, 6, 8, 8), (6, 3, 3, 3) if op == "ConvTranspose" else (3, 6, 3, 3)
        weights = {"w": rng.normal(0, 1, (6, 6, 3, 3)), "v": rng.normal(0, 1, last)}
    graph = network(f"h = {op} (x, w); r = Relu (h); y = {op} (r, v)", inputs={"x": shape}, **weights)
    images = [x + 0.5 for x in noise(graph, 6)]
    rounded = quantize_weights(graph, bits=3)
    corrected = correct_bias(graph, rounded, images)
    last = ["h", "y"] if op in ("MatMul", "Gemm") else []
    tables = (channel_statistics(g, ["h", "y"], images, last=last) for g in (graph, rounded, corrected))
    wanted, before, after = tables
    for name in ("h", "y"):
        errors = [np.abs(t[name]["mean"] - wanted[name]["mean"]).max() for t in (before, after)]
        reach = max(np.abs(wanted[name][["min", "max"]]).max())
        assert errors[0] > 1e-2 and errors[1] <= 200 * EPS * reach, "sums of up to 54 products, rounded twice"
    first = layers(rounded)[0]
    assert np.array_equal(get_weight(corrected, layers(corrected)[0]), get_weight(rounded, first))
    assert not get_bias(rounded, first).any()
    onnx.checker.check_model(corrected.model, full_check=True)


@pytest.mark.parametrize("name", ["face_detection_yunet_2023mar", "edgeface_xxs_q_dequant"])
def test_a_walk_sees_what_a_run_sees(real_data, tmp_path, name):
    path = real_data / "models" / f"{name}.onnx"
    graph = simplify(load_graph(fix_batch(path, tmp_path / "fixed.onnx") if "edgeface" in name else path))
    images = noise(graph, 2)
    wanted = [run(graph, x, [layer.output for layer in layers(graph)]) for x in images]
    visits = list(layers(graph))
    for visit, layer in zip(walk(graph, images), visits, strict=True):
        assert visit.layer.output == layer.output
        for k, out in enumerate(visit.outputs()):
            # pieces are fused in other ways than the whole, and differ by float32 rounding through all layers
            assert np.abs(out - wanted[k][layer.output]).max() <= 1e-4 * np.abs(out).max()


def test_adaptive_rounding_is_never_worse_on_its_rows_and_keeps_the_grid():
    graph = mobile(1, blocks=1, decades=0.5)
    images = noise(graph, 12)
    learned = adaround(graph, images, bits=4, options=FEW, progress=False)
    wanted, nearest, got = (answers(g, images) for g in (graph, quantize_weights(graph, bits=4), learned))
    assert np.square(got - wanted).mean() < np.square(nearest - wanted).mean()
    for before, after in zip(layers(graph), layers(learned)):
        w, rounded = get_weight(graph, before), get_weight(learned, after)
        step = np.abs(w).max() / 7
        assert np.allclose(rounded / step, np.rint(rounded / step), rtol=0, atol=64 * EPS)
        assert np.abs(rounded - w).max() < 1.001 * step
        assert np.allclose(fake_quantize_weight(rounded, bits=4), rounded, rtol=0, atol=64 * EPS * step)
    again = adaround(graph, images, bits=4, options=FEW, progress=False)
    assert np.array_equal(answers(again, images[:2]), answers(learned, images[:2]))


def test_originals_are_never_changed():
    graph = mobile(0, blocks=1)
    images, before = noise(graph, 3), graph.model.SerializeToString(deterministic=True)
    rounded = quantize_weights(graph)
    after = rounded.model.SerializeToString(deterministic=True)
    equalize(graph, images)
    absorb_bias(graph, images)
    correct_bias(graph, rounded, images)
    adaround(graph, images, options=RoundingOptions(iterations=2, rows=16), progress=False)
    assert graph.model.SerializeToString(deterministic=True) == before
    assert rounded.model.SerializeToString(deterministic=True) == after


# --- ranges


def test_ranges_are_clipped_and_bounded():
    graph = equalize(mobile(0, blocks=1))
    images = noise(graph, 6)
    tensors = [layer.output for layer in layers(graph)]
    stats = collect((str(k), run(graph, x, tensors)) for k, x in enumerate(images))
    first = tensors[0]
    values = np.concatenate([run(graph, x, [first])[first].ravel() for x in images]).astype(float)
    full = pd.DataFrame({"low": stats.min.min(1), "high": stats.max.max(1)}, stats.tensors, dtype=float)
    cut = clip_ranges(full, stats, sigmas=2)
    ends = [values.mean() + sign * 2 * values.std() for sign in (-1, 1)]
    slack = 32 * EPS * np.abs(values).max()  # means and deviations are kept in float32
    assert cut.loc[first, "high"] == pytest.approx(min(values.max(), max(ends[1], 0)), abs=slack)
    assert cut.loc[first, "low"] == pytest.approx(max(values.min(), min(ends[0], 0)), abs=slack)
    assert clip_ranges(full, stats, sigmas=1e6).equals(full)
    bounded = bound_ranges(graph, full)
    assert (bounded["low"].iloc[:-1] == 0).all() and (bounded["high"] <= full["high"]).all()
    assert bounded.loc["y"].equals(full.loc["y"])
    with pytest.raises(InputError, match="sigmas"):
        clip_ranges(full, stats, sigmas=0)


def test_no_images_is_an_input_error():
    graph = mobile(0, blocks=1)
    for call in (lambda: absorb_bias(graph, []), lambda: correct_bias(graph, graph, []), lambda: adaround(graph, [])):
        with pytest.raises(InputError, match="no images"):
            call()


@pytest.mark.parametrize("balance", [1.0, 0.5, 0.25])
def test_the_largest_activation_stays(balance):
    """What grows a little grows with every sweep, and some quantizers know no scale below 1e-5."""
    rng = np.random.default_rng(5)
    reaches = np.exp(rng.normal(0, 1.5, (3, 16)))
    factors = balanced_factors(*([reach] for reach in reaches), balance)
    assert (reaches[0] / factors).max() == pytest.approx(reaches[0].max()) and np.ptp(np.log(factors)) > 1
    silent = balanced_factors([np.where(np.arange(16), reaches[0], 0)], [reaches[1]], [reaches[2]], balance)
    assert np.isfinite(silent).all() and np.abs(np.log(silent)).max() < np.log(256)
    without = balanced_factors([np.zeros(16)], [reaches[1]], [reaches[2]], balance)
    assert (reaches[1] / without).max() == pytest.approx(reaches[1].max())


def largest_weights(graph):
    return np.array([np.abs(get_weight(graph, layer)).max() for layer in layers(graph)])


@pytest.mark.parametrize("balance", [1.0, 0.5, 0.25])
def test_dead_channels_let_no_weight_run_away(balance):
    """Training with weight decay leaves channels of 1e-26; factors of the others grew to 1e8 beside them."""
    rng, lines, weights, at, gone = np.random.default_rng(0), [], {}, "x", np.zeros(3, bool)
    for k in range(17):
        depthwise, c = k % 2 == 1, 32 if k else 3
        weight = rng.normal(0, 1, (32, 1, 3, 3)) / 3 if depthwise else rng.normal(0, 1, (32, c, 1, 1)) / c**0.5
        dead = rng.random(32) < min(0.05 * k, 0.5)
        weight[dead] *= 1e-26
        weight[gone if depthwise else (slice(None), gone)] *= 1e-10
        weights |= {f"w{k}": weight, f"b{k}": np.where(dead, -0.1, rng.normal(0.2, 0.3, 32))}
        pad, group = int(depthwise), 32 if depthwise else 1
        lines.append(f"c{k} = Conv <group = {group}, pads = [{pad}, {pad}, {pad}, {pad}]> ({at}, w{k}, b{k})")
        lines.append(f"r{k} = Relu (c{k})")
        at, gone = f"r{k}", dead
    weights["wl"] = rng.normal(0, 1, (4, 32))
    lines.append(f"p = GlobalAveragePool ({at}); f = Flatten (p); y = Gemm <transB = 1> (f, wl)")
    graph = network("\n".join(lines), inputs={"x": (1, 3, 12, 12)}, **weights)
    images = noise(graph, 4)
    even = equalize(graph, images, balance=balance)
    assert (np.abs(np.log10(largest_weights(even) / largest_weights(graph))) < 3).all()


@pytest.mark.parametrize("balance", [1.0, 0.5, 0.25])
def test_dead_channels_of_a_real_network_let_no_weight_run_away(real_data, balance):
    graph = simplify(load_graph(real_data / "models" / "vww_mobilenet_v1_0.25_96.onnx"))
    rng = np.random.default_rng(0)
    images = [rng.uniform(-1, 1, graph.shape(graph.inputs[0])).astype(np.float32) for _ in range(8)]
    even = equalize(graph, images, balance=balance)
    assert (np.abs(np.log10(largest_weights(even) / largest_weights(graph))) < 3).all()
