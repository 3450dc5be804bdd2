"""Repairs: exact where they promise it, on made and on real graphs; measured where they do not."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from calib_nb.core.errors import InputError
from calib_nb.graph.contract import fix_batch
from calib_nb.graph.model import Graph, load_graph, run
from calib_nb.graph.simplify import get_bias, get_weight, layers, simplify
from calib_nb.quant.adaround import adaround
from calib_nb.quant.bias_clip import bound_ranges, clip_ranges, correct_bias
from calib_nb.quant.equalize import absorb_bias, channel_groups, equal_factors, equalize, rescale
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

node = helper.make_node


def build(nodes, constants, shape, output="y"):
    """A Graph with input "x" of `shape` and one output, its shapes inferred."""
    tensors = [
        numpy_helper.from_array(np.asarray(v, None if np.asarray(v).dtype.kind in "iub" else np.float32), k)
        for k, v in constants.items()
    ]
    out = onnx.ValueInfoProto(name=output, type=helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    graph = helper.make_graph(
        nodes, "made", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)], [out], tensors
    )
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)).infer()


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


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([None, 0, 1]), st.booleans(), st.sampled_from([4, 8]))
def test_rounding_against_torch(seed, axis, symmetric, bits):
    import torch

    rng = np.random.default_rng(seed)
    w = (rng.normal(0, 1, (5, 7)) * sizes(rng, 5)[:, None]).astype(np.float32)
    scale, zero = weight_scale(w, axis, symmetric=symmetric, bits=bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if axis is None:
        wanted = torch.fake_quantize_per_tensor_affine(
            torch.from_numpy(w), float(scale.ravel()[0]), int(zero.ravel()[0]), low, high
        ).numpy()
    else:
        s, z = torch.from_numpy(scale.ravel().astype(np.float32)), torch.from_numpy(zero.ravel().astype(np.int32))
        wanted = torch.fake_quantize_per_channel_affine(torch.from_numpy(w), s, z, axis, low, high).numpy()
    got = fake_quantize_weight(w, axis, symmetric=symmetric, bits=bits)
    assert (
        np.isclose(got, wanted, rtol=1e-5, atol=1e-6 * np.abs(w).max()).mean() > 0.97
    )  # torch rounds in float32: ties may fall otherwise
    assert (np.abs(got - w) <= scale * (0.5 if symmetric else 1.0) + 1e-6).all()
    again = fake_quantize_weight(got, axis, symmetric=True, bits=bits)
    assert not symmetric or np.allclose(again, got, atol=1e-6 * np.abs(w).max())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 300), st.floats(2**-20, 2**10, width=32))
def test_a_grid_in_use_is_found_and_kept(seed, n, step):
    rng = np.random.default_rng(seed)
    levels = rng.integers(-128, 128, n)
    w = levels.astype(np.float32) * np.float32(step)
    assert np.allclose(fake_quantize_weight(w), w, rtol=1e-5)
    assert len(set(levels)) < 2 or np.isclose(grid_step(w), np.gcd.reduce(levels) * step, rtol=1e-4)


def test_no_grid_is_invented():
    rng = np.random.default_rng(0)
    assert all(grid_step(rng.normal(0, 1, n)) is None for n in (3, 9, 100, 1000) for _ in range(50))
    assert grid_step(np.zeros(9)) is None and grid_step(np.array([128.0, 1.0])) is None
    with pytest.raises(InputError, match="17-bit"):
        weight_scale(np.ones(3), bits=17)


# --- equalization


ACTIVATIONS = {
    "Relu": lambda c: ([("Relu", [], {})], {}),
    "LeakyRelu": lambda c: ([("LeakyRelu", [], {"alpha": 0.1})], {}),
    "PRelu": lambda c: ([("PRelu", ["slope"], {})], {"slope": np.linspace(-0.3, 0.8, c).reshape(c, 1, 1)}),
    "Relu6": lambda c: ([("Clip", ["lo", "hi"], {})], {"lo": 0.0, "hi": 6.0}),
    "Hardtanh": lambda c: ([("Clip", ["lo", "hi"], {})], {"lo": -1.0, "hi": 1.0}),
    "lower": lambda c: ([("Clip", ["lo"], {})], {"lo": -0.5}),
    "upper": lambda c: ([("Clip", ["", "hi"], {})], {"hi": 1.0}),
    "Relu, Min": lambda c: (
        [("Relu", [], {}), ("Min", ["bound"], {})],
        {"bound": np.linspace(0.5, 3, c).reshape(1, c, 1, 1)},
    ),
    "none": lambda c: ([], {}),
    "Relu, MaxPool": lambda c: (
        [("Relu", [], {}), ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [1] * 4})],
        {},
    ),
    "AveragePool": lambda c: (
        [("AveragePool", [], {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [1] * 4, "count_include_pad": 1})],
        {},
    ),
    "Resize": lambda c: (
        [("Resize", ["", "scales"], {"mode": "linear"})],
        {"scales": np.array([1, 1, 2, 2], np.float32)},
    ),
    "Pad": lambda c: ([("Pad", ["pads"], {})], {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}),
}


class Chain:
    """A random chain of layers with uneven channels."""

    def __init__(self, rng, channels=3):
        self.rng, self.nodes, self.constants, self.at, self.channels, self.n = rng, [], {}, "x", channels, 0

    def add(self, op, inputs=(), constants=None, **attributes):
        self.n += 1
        names = {k: f"{k}{self.n}" for k in constants or {}}
        self.constants |= {names[k]: v for k, v in (constants or {}).items()}
        self.nodes.append(node(op, [self.at, *(names.get(i, i) for i in inputs)], [f"t{self.n}"], **attributes))
        self.at = f"t{self.n}"
        return self

    def layer(self, kind):
        rng, c = self.rng, self.channels
        o = c if kind in ("depthwise", "residual") else 2 * int(rng.integers(2, 5))
        groups = {"depthwise": c, "grouped": 2}.get(kind, 1) if c % 2 == 0 or kind == "depthwise" else 1
        shape = (c, o // groups, 3, 3) if kind == "transposed" else (o, c // groups, 3, 3)
        w = rng.normal(0, 0.5, shape) * (
            sizes(rng, c)[:, None, None, None] if kind == "transposed" else sizes(rng, o)[:, None, None, None]
        )
        bias = rng.normal(0, 0.5, o)
        start = self.at
        self.add(
            "ConvTranspose" if kind == "transposed" else "Conv",
            ["w", "b"] if rng.random() < 0.7 else ["w"],
            {"w": w, "b": bias},
            group=groups,
            pads=[1] * 4,
        )
        if kind == "residual":
            self.add("Add", [start])
        self.channels = o
        return self

    def activation(self, name):
        steps, constants = ACTIVATIONS[name](self.channels)
        for op, inputs, attributes in steps:
            self.add(op, inputs, {k: v for k, v in constants.items() if k in inputs}, **attributes)
        return self


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.lists(
        st.tuples(
            st.sampled_from(["plain", "depthwise", "grouped", "transposed", "residual"]),
            st.sampled_from(sorted(ACTIVATIONS)),
        ),
        min_size=2,
        max_size=5,
    ),
    st.sampled_from(["conv", "flat", "pooled"]),
    st.booleans(),
)
def test_equalization_is_exact(seed, kinds, end, with_images):
    rng = np.random.default_rng(seed)
    chain = Chain(rng).layer("plain")
    for kind, activation in kinds:
        chain.layer(kind).activation(activation)
    chain.layer("plain").add("Relu")
    if end == "conv":
        chain.layer("plain")
    else:
        chain.add("GlobalAveragePool") if end == "pooled" else chain.add("MaxPool", kernel_shape=[3, 3], strides=[2, 2])
        chain.add("Flatten")
        width = build(chain.nodes, chain.constants, [1, 3, 8, 8], chain.at).shape(chain.at)[1]
        chain.add("Gemm", ["w", "b"], {"w": rng.normal(0, 1, (5, width)), "b": rng.normal(0, 1, 5)}, transB=1)
    graph = build(chain.nodes, chain.constants, [1, 3, 8, 8], chain.at)
    images = noise(graph, 1)
    even = equalize(graph, images if with_images else ())
    assert change(graph, even, [images[0], 10 * images[0]]) < 1e-4
    assert channel_groups(graph) and "Clip" not in {b.op_type for g in channel_groups(even) for b in g.bounds}
    onnx.checker.check_model(even.model, full_check=True)


@pytest.mark.parametrize("name", MODELS)
def test_equalization_is_exact_on_real_models(real_data, name):
    graph = simplify(load_graph(real_data / "models" / f"{name}.onnx"))
    images = [100 * abs(x) if "yunet" in name else x for x in noise(graph, 1)]
    for even in (equalize(graph), equalize(graph, images)):
        assert change(graph, even, images) < 1e-4
        assert weight_table(even).worst_channel_db.median() > weight_table(graph).worst_channel_db.median()
    assert change(graph, absorb_bias(graph, images), images) < 1e-4


def test_transformers_without_free_channels_stay_as_they_are(real_data, tmp_path):
    graph = simplify(load_graph(fix_batch(real_data / "models" / "edgeface_xxs_q_dequant.onnx", tmp_path / "e.onnx")))
    assert not channel_groups(graph) and change(graph, equalize(graph)) == 0


@pytest.mark.parametrize("between", ["Sigmoid", "Concat", "output", "Softmax", "Mul", "shifted pad", "pixel bound"])
def test_what_is_not_homogeneous_is_left_alone(between):
    rng = np.random.default_rng(0)
    w = {
        "w1": rng.normal(0, 1, (4, 3, 1, 1)) * sizes(rng, 4)[:, None, None, None],
        "w2": rng.normal(0, 1, (2, 8 if between == "Concat" else 4, 1, 1)),
        "k": np.array(0.5),
        "p": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "m": np.ones((1, 4, 8, 8)),
    }
    middle = {"Sigmoid": [node("Sigmoid", ["c"], ["a"])], "Softmax": [node("Softmax", ["c"], ["a"], axis=1)], "Concat": [node("Concat", ["c", "c"], ["a"], axis=1)], "output": [node("Relu", ["c"], ["a"])],
              "Mul": [node("Mul", ["c", "c"], ["a"])], "shifted pad": [node("Pad", ["c", "p", "k"], ["a"])], "pixel bound": [node("Min", ["c", "m"], ["a"])]}[between]  # fmt: skip
    graph = build([node("Conv", ["x", "w1"], ["c"]), *middle, node("Conv", ["a", "w2"], ["y"])], w, [1, 3, 8, 8])
    if between == "output":
        graph.model.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [1, 4, 8, 8]))
    assert channel_groups(graph) == [] and change(graph, equalize(graph)) == 0


@pytest.mark.parametrize("activation", ["Relu", "PRelu", "Clip", "Min", "none"])
def test_matrices_on_the_last_axis_of_four(activation):
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
    middle = {"Relu": ["h"], "PRelu": ["h", "slope"], "Clip": ["h", "lo", "hi"], "Min": ["h", "bound"]}.get(activation)
    nodes = [
        node("MatMul", ["x", "w1"], ["p"]),
        node("Add", ["p", "b1"], ["h"]),
        *([node(activation, middle, ["a"])] if middle else []),
        node("MatMul", ["a" if middle else "h", "w2"], ["y"]),
    ]
    graph = build(nodes, constants, [1, 6, 6, 6])
    images = noise(graph, 3)
    assert (
        len(channel_groups(graph)) == 1
        and change(graph, equalize(graph), images) < 1e-5
        and change(graph, equalize(graph, images), images) < 1e-5
    )
    assert weight_table(equalize(graph)).spread[0] < 0.5 * weight_table(graph).spread[0]


def test_a_convolution_read_by_a_matrix_is_left_alone():
    rng = np.random.default_rng(0)
    graph = build(
        [node("Conv", ["x", "w1"], ["c"]), node("MatMul", ["c", "w2"], ["y"])],
        {"w1": rng.normal(0, 1, (8, 3, 1, 1)), "w2": rng.normal(0, 1, (8, 8))},
        [1, 3, 8, 8],
    )
    assert channel_groups(graph) == []


def test_dead_channels_and_shared_weights():
    rng = np.random.default_rng(0)
    w = rng.normal(0, 1, (6, 6, 1, 1)) * sizes(rng, 6)[:, None, None, None]
    w[2], w[:, 3] = 0, 0
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"]),
        node("Relu", ["c"], ["r"]),
        node("Conv", ["r", "w", "b"], ["d"]),
        node("Relu", ["d"], ["s"]),
        node("Conv", ["s", "w"], ["y"]),
    ]
    graph = build(nodes, {"w": w, "b": rng.normal(0, 1, 6)}, [1, 6, 8, 8])
    even = equalize(graph)
    assert change(graph, even) < 1e-4 and np.isfinite(get_weight(even, layers(even)[0])).all()
    assert equal_factors([np.zeros(3)], [np.ones(3)]).tolist() == [1, 1, 1]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_any_positive_factors_are_exact(seed):
    rng = np.random.default_rng(seed)
    chain = (
        Chain(rng)
        .layer("plain")
        .activation("Relu6")
        .layer("depthwise")
        .activation("Hardtanh")
        .layer("residual")
        .activation("Relu")
        .layer("plain")
    )
    graph = build(chain.nodes, chain.constants, [1, 3, 6, 6], chain.at)
    other = graph.copy()
    for k in range(len(channel_groups(graph))):
        group = channel_groups(other)[k]
        rescale(other, group, sizes(rng, group.channels, 2))
    assert change(graph, other) < 1e-4


def mobile(seed=0, blocks=3, width=16, decades=2.5):
    """A BatchNorm-folded depthwise network with ReLU6 and deliberately unequal channel ranges."""
    rng = np.random.default_rng(seed)
    nodes, w, at, size = [], {}, "x", np.ones(3)
    for k in range(2 * blocks + 1):
        depthwise, c = k % 2 == 1, width if k else 3
        new = sizes(rng, width, decades)
        base = rng.normal(0, 1, (width, 1 if depthwise else c, *((3, 3) if depthwise else (1, 1)))) / (
            3 if depthwise else c**0.5
        )
        reads = size[:, None, None, None] if depthwise else size[None, :, None, None]
        w |= {
            f"w{k}": base * new[:, None, None, None] / reads,
            f"b{k}": rng.normal(0.2, 0.3, width) * new,
            "lo": 0.0,
            "hi": 6.0,
        }
        nodes += [
            node("Conv", [at, f"w{k}", f"b{k}"], [f"c{k}"], group=width if depthwise else 1, pads=[int(depthwise)] * 4),
            node("Clip", [f"c{k}", "lo", "hi"], [f"r{k}"]),
        ]
        at, size = f"r{k}", new
    w |= {"wl": rng.normal(0, 1, (8, width)) / size, "bl": rng.normal(0, 0.1, 8)}
    nodes += [
        node("GlobalAveragePool", [at], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "wl", "bl"], ["y"], transB=1),
    ]
    return build(nodes, w, [1, 3, 12, 12])


def answers(graph, images):
    return np.concatenate([run(graph, x)["y"] for x in images])


@pytest.mark.parametrize("seed", range(3))
def test_per_tensor_collapses_without_equalization_and_comes_back_with_it(seed):
    graph = mobile(seed)
    images = noise(graph, 32)
    wanted = answers(graph, images)
    wanted = wanted - wanted.mean(0)

    def correlation(model):
        got = answers(model, images)
        got = got - got.mean(0)
        return float((got * wanted).sum() / np.sqrt((got**2).sum() * (wanted**2).sum() + 1e-30))

    even = equalize(graph)
    assert correlation(even) > 0.99999
    assert correlation(quantize_weights(graph)) < 0.8
    assert correlation(quantize_weights(even)) > 0.97
    assert correlation(correct_bias(even, quantize_weights(even), images[:16])) > 0.97


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
    end = (
        [node("GlobalAveragePool", ["r"], ["p"]), node("Flatten", ["p"], ["f"]), node("Gemm", ["f", "g"], ["y"])]
        if reader == "Gemm"
        else [node("Conv", ["r", "v"], ["y"], pads=[int(reader == "padded")] * 4)]
    )
    middle = (
        [node("Relu", ["c"], ["q"]), node("Min", ["q", "bound"], ["r"])]
        if reader == "bounded"
        else [node("Relu", ["c"], ["r"])]
    )
    graph = build([node("Conv", ["x", "w", "b"], ["c"]), *middle, *end], constants, [1, 3, 8, 8])
    images = noise(graph, 8)
    absorbed = absorb_bias(graph, images)
    assert change(graph, absorbed, images) < 1e-5
    first = get_bias(absorbed, layers(absorbed)[0])
    if reader == "padded":
        assert np.array_equal(first, get_bias(graph, layers(graph)[0]))
    else:
        assert (first[[0, 1, 5]] < [5, 8, 3]).all() and np.array_equal(first[[2, 4]], [0, -1])
        assert channel_statistics(absorbed, ["c"], images)["c"]["min"][0] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose", "Gemm", "MatMul", "MatMul of four"])
def test_means_agree_after_bias_correction(kind):
    rng = np.random.default_rng(0)
    if "M" in kind or kind == "Gemm":
        shape, constants = (
            [1, 5, 4, 6] if "four" in kind else [1, 6],
            {"w": rng.normal(0, 1, (6, 6)), "v": rng.normal(0, 1, (6, 3))},
        )
    else:
        shape, constants = (
            [1, 6, 8, 8],
            {
                "w": rng.normal(0, 1, (6, 6, 3, 3)),
                "v": rng.normal(0, 1, (6, 3, 3, 3) if kind == "ConvTranspose" else (3, 6, 3, 3)),
            },
        )
    op = kind.split()[0]
    graph = build(
        [node(op, ["x", "w"], ["h"]), node("Relu", ["h"], ["r"]), node(op, ["r", "v"], ["y"])], constants, shape
    )
    images = [x + 0.5 for x in noise(graph, 6)]
    rounded = quantize_weights(graph, bits=3)
    fixed = correct_bias(graph, rounded, images)
    last = ["h", "y"] if op in ("MatMul", "Gemm") else []
    wanted, before, after = (channel_statistics(g, ["h", "y"], images, last=last) for g in (graph, rounded, fixed))
    for name in ("h", "y"):
        assert (
            np.abs(after[name]["mean"] - wanted[name]["mean"]).max()
            < 1e-4
            < 1e-2
            < np.abs(before[name]["mean"] - wanted[name]["mean"]).max()
        )
    assert (
        np.array_equal(get_weight(fixed, layers(fixed)[0]), get_weight(rounded, layers(rounded)[0]))
        and not get_bias(rounded, layers(rounded)[0]).any()
    )
    onnx.checker.check_model(fixed.model, full_check=True)


@pytest.mark.parametrize("name", ["face_detection_yunet_2023mar", "edgeface_xxs_q_dequant"])
def test_a_walk_sees_what_a_run_sees(real_data, tmp_path, name):
    path = real_data / "models" / f"{name}.onnx"
    graph = simplify(load_graph(fix_batch(path, tmp_path / "fixed.onnx") if "edgeface" in name else path))
    images = noise(graph, 2)
    wanted = [run(graph, x, [layer.output for layer in layers(graph)]) for x in images]
    seen = 0
    for step in walk(graph, images):
        for k, out in enumerate(step.outputs()):
            assert np.abs(out - wanted[k][step.layer.output]).max() <= 1e-4 * np.abs(out).max()
        seen += 1
    assert seen == len(layers(graph))


def test_adaptive_rounding_is_never_worse_on_its_rows_and_keeps_the_grid():
    graph = mobile(1, blocks=1, decades=0.5)
    images = noise(graph, 12)
    learned = adaround(graph, images, bits=4, iterations=150, rows=512, progress=False)
    wanted, nearest, got = (answers(g, images) for g in (graph, quantize_weights(graph, bits=4), learned))
    assert np.square(got - wanted).mean() < np.square(nearest - wanted).mean()
    for before, after in zip(layers(graph), layers(learned)):
        w, rounded = get_weight(graph, before), get_weight(learned, after)
        step = np.abs(w).max() / 7
        assert (
            np.allclose(rounded / step, np.rint(rounded / step), atol=1e-3) and np.abs(rounded - w).max() < 1.001 * step
        )
        assert np.array_equal(fake_quantize_weight(rounded, bits=4), rounded) or np.allclose(
            fake_quantize_weight(rounded, bits=4), rounded, atol=1e-5 * step
        )
    assert np.array_equal(
        answers(adaround(graph, images, bits=4, iterations=150, rows=512, progress=False), images[:2]),
        answers(learned, images[:2]),
    )


def test_originals_are_never_changed():
    graph = mobile(0, blocks=1)
    images, before = noise(graph, 3), graph.model.SerializeToString(deterministic=True)
    rounded = quantize_weights(graph)
    after = rounded.model.SerializeToString(deterministic=True)
    (
        equalize(graph, images),
        absorb_bias(graph, images),
        correct_bias(graph, rounded, images),
        adaround(graph, images, iterations=2, rows=16, progress=False),
    )
    assert (
        graph.model.SerializeToString(deterministic=True) == before
        and rounded.model.SerializeToString(deterministic=True) == after
    )


# --- ranges


def test_ranges_are_clipped_and_bounded():
    graph = equalize(mobile(0, blocks=1))
    images = noise(graph, 6)
    tensors = [layer.output for layer in layers(graph)]
    stats = collect((str(k), run(graph, x, tensors)) for k, x in enumerate(images))
    values = np.stack([np.concatenate([v.ravel() for v in (run(graph, x, tensors[:1])[tensors[0]] for x in images)])])[
        0
    ]
    import pandas as pd

    seen = pd.DataFrame(
        {"low": stats.min.min(1), "high": stats.max.max(1)}, index=pd.Index(stats.tensors, name="tensor")
    ).astype(float)
    cut = clip_ranges(seen, stats, sigmas=2)
    assert cut.loc[tensors[0], "high"] == pytest.approx(
        min(values.max(), max(values.mean() + 2 * values.std(), 0)), rel=1e-4
    )
    assert cut.loc[tensors[0], "low"] == pytest.approx(
        max(values.min(), min(values.mean() - 2 * values.std(), 0)), rel=1e-4
    )
    assert clip_ranges(seen, stats, sigmas=1e6).equals(seen)
    bounded = bound_ranges(graph, seen)
    assert (
        (bounded["low"].iloc[:-1] == 0).all()
        and bounded.loc["y"].equals(seen.loc["y"])
        and (bounded["high"] <= seen["high"]).all()
    )
    with pytest.raises(InputError, match="sigmas"):
        clip_ranges(seen, stats, sigmas=0)


def test_no_images_is_an_input_error():
    graph = mobile(0, blocks=1)
    for call in (lambda: absorb_bias(graph, []), lambda: correct_bias(graph, graph, []), lambda: adaround(graph, [])):
        with pytest.raises(InputError, match="no images"):
            call()
