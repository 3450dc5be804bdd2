"""Exact rewrites: made graphs, exports of PyTorch at several opsets, real models. Whatever a graph looks like, its outputs stay and nothing is refused."""

import io
import logging
import warnings
from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from calib_nb.graph import linear
from calib_nb.graph.contract import fix_batch
from calib_nb.graph.fuse import channels_last, drop_expand, follow, fuse_gelu
from calib_nb.graph.linear import REWRITES, flat_gemm, lean_attention, rewrite
from calib_nb.graph.model import Graph, attribute, load_graph, run
from calib_nb.graph.simplify import layers, macs, simplify

node = helper.make_node


def build(nodes, constants, shape, outputs=("y",), opset=17):
    """A Graph with input "x" of `shape`, its shapes inferred."""
    tensors = [
        numpy_helper.from_array(np.asarray(v, None if np.asarray(v).dtype.kind in "iub" else np.float32), k)
        for k, v in constants.items()
    ]
    out = [
        onnx.ValueInfoProto(name=name, type=helper.make_tensor_type_proto(TensorProto.FLOAT, None)) for name in outputs
    ]
    graph = helper.make_graph(
        nodes, "made", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)], out, tensors
    )
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)).infer()


def count(graph):
    return Counter(n.op_type for n in graph.nodes)


def assert_equal_outputs(before, after, relative=1e-5):
    x = np.random.default_rng(7).uniform(-1, 1, before.shape(before.inputs[0])).astype(np.float32)
    found = run(after, x)
    assert before.outputs == after.outputs
    for name, wanted in run(before, x).items():
        assert (
            found[name].shape == wanted.shape and np.abs(found[name] - wanted).max() <= relative * np.abs(wanted).max()
        ), name


def assert_whole(graph):
    """What others rely on: a valid model, unique names, shapes everywhere."""
    onnx.checker.check_model(graph.model, full_check=True)
    names = [n.name for n in graph.nodes]
    assert all(names) and len(set(names)) == len(names)
    assert all(graph.shape(out) is not None for n in graph.nodes for out in n.output if out)


def rewritten(graph, caplog):
    """`rewrite` of the simplified graph, which must leave out nothing."""
    plain = simplify(graph)
    with caplog.at_level(logging.WARNING, "calib_nb.quant"):
        new = rewrite(plain)
    assert not [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert_equal_outputs(graph, new)
    assert_whole(new)
    assert macs(new).macs.sum() == macs(plain).macs.sum()
    return new


# ------------------------------------------------------------------ GELU, Expand


def gelu(form, half=0.5, root=2**0.5):
    final = {
        "torch": [node("Mul", ["x", "p"], ["m"]), node("Mul", ["m", "half"], ["y"])],
        "half first": [node("Mul", ["half", "p"], ["m"]), node("Mul", ["m", "x"], ["y"])],
        "half of x": [node("Mul", ["x", "half"], ["m"]), node("Mul", ["m", "p"], ["y"])],
    }[form]
    scaled = node("Mul", ["inverse", "x"], ["s"]) if form == "half first" else node("Div", ["x", "root"], ["s"])
    return build(
        [scaled, node("Erf", ["s"], ["e"]), node("Add", ["one", "e"], ["p"]), *final],
        {"root": root, "inverse": 1 / root, "one": [1.0], "half": half},
        (1, 4, 3, 3),
    )


@pytest.mark.parametrize("form", ["torch", "half first", "half of x"])
def test_gelu_is_found_in_every_order(form):
    graph = gelu(form)
    new = fuse_gelu(graph)
    assert count(new) == {"Gelu": 1} and new.opset == 20
    assert_equal_outputs(graph, new, 1e-6)


@pytest.mark.parametrize("half, root", [(0.4, 2**0.5), (0.5, 2.0)])
def test_what_only_looks_like_gelu_stays(half, root):
    graph = gelu("torch", half, root)
    assert fuse_gelu(graph).model == graph.model


def test_a_gelu_whose_inside_is_read_elsewhere_keeps_that():
    graph = gelu("torch")
    graph.model.graph.output.append(helper.make_tensor_value_info("e", TensorProto.FLOAT, (1, 4, 3, 3)))
    graph.changed()
    new = fuse_gelu(graph)
    assert_equal_outputs(graph, new)


def test_expand_goes_only_where_it_repeats_for_arithmetic():
    parts = {"a": np.ones((1, 4, 1, 1)), "two": np.array([2, 4, 3, 3]), "same": np.array([1, 4, 3, 3])}
    feeding = [
        node("ReduceL2", ["x"], ["l"], axes=[2, 3]),
        node("Expand", ["l", "same"], ["e"]),
        node("Div", ["x", "e"], ["y"]),
    ]
    graph = build(feeding, parts, (1, 4, 3, 3))
    assert count(drop_expand(graph)) == {"ReduceL2": 1, "Div": 1}
    assert_equal_outputs(graph, drop_expand(graph))
    larger = build(
        [
            node("ReduceL2", ["x"], ["l"], axes=[2, 3]),
            node("Expand", ["l", "two"], ["e"]),
            node("Div", ["x", "e"], ["y"]),
        ],
        parts,
        (1, 4, 3, 3),
    )
    assert count(drop_expand(larger))["Expand"] == 1  # the result has a batch of two because of it
    given_out = build(feeding, parts, (1, 4, 3, 3), outputs=("y", "e"))
    assert count(drop_expand(given_out))["Expand"] == 1


def test_follow_stops_where_a_tensor_has_two_readers_or_is_an_output():
    graph = build([node("Relu", ["x"], ["a"]), node("Neg", ["a"], ["b"]), node("Add", ["a", "b"], ["y"])], {}, (1, 2))
    assert (
        follow(graph, "x", "Relu", "Neg") is None
        and [n.op_type for n in follow(graph, "b", "Add")] == ["Add"]
        and follow(graph, "y", "Relu") is None
    )


# ------------------------------------------------------------------ channels last


def between_transposes(middle, constants, outputs=("y",), opset=17):
    """Conv, to channels last, LayerNorm, back, `middle` from "n" and the convolution's "c" to "m", Conv."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(0, 1, (4, 3, 3, 3)),
        "v": rng.normal(0, 1, (4, 4, 1, 1)),
        "gamma": rng.normal(0, 1, 4),
        "beta": rng.normal(0, 1, 4),
    }
    head = [
        node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("Transpose", ["c"], ["t"], perm=[0, 2, 3, 1]),
        node("LayerNormalization", ["t", "gamma", "beta"], ["l"], axis=-1),
        node("Transpose", ["l"], ["n"], perm=[0, 3, 1, 2]),
    ]
    return build(
        [*head, *middle, node("Conv", ["m", "v"], ["y"])], {**weights, **constants}, (1, 3, 6, 5), outputs, opset
    )


MIDDLES = {
    "sum": ([node("Add", ["n", "c"], ["m"])], {}),
    "two activations": (
        [node("Relu", ["n"], ["r"]), node("Clip", ["r", "low", "high"], ["m"])],
        {"low": 0.1, "high": 1.5},
    ),
    "prelu": ([node("PRelu", ["n", "slope"], ["m"])], {"slope": np.linspace(-1, 1, 4).reshape(4, 1, 1)}),
    "scale per channel": ([node("Mul", ["scale", "n"], ["m"])], {"scale": np.linspace(1, 2, 4).reshape(1, 4, 1, 1)}),
    "factor along width": ([node("Mul", ["n", "scale"], ["m"])], {"scale": np.linspace(1, 2, 5)}),
    "squeeze and excite": (
        [node("GlobalAveragePool", ["n"], ["p"]), node("Sigmoid", ["p"], ["s"]), node("Mul", ["n", "s"], ["m"])],
        {},
    ),
    "spatial attention": ([node("ReduceMax", ["n"], ["p"], axes=[1]), node("Mul", ["n", "p"], ["m"])], {}),
    "sum of lengths": (
        [node("ReduceSum", ["n", "axes"], ["p"]), node("Div", ["n", "p"], ["d"]), node("Add", ["d", "c"], ["m"])],
        {"axes": np.array([-1])},
    ),
    "halves": (
        [
            node("Slice", ["n", "zero", "two", "axis"], ["a"]),
            node("Slice", ["n", "two", "end", "axis"], ["b"]),
            node("Concat", ["b", "a"], ["m"], axis=-3),
        ],
        {"zero": np.array([0]), "two": np.array([2]), "end": np.array([2**62]), "axis": np.array([1])},
    ),
    "split along height": (
        [node("Split", ["n", "sizes"], ["a", "b"], axis=2), node("Concat", ["b", "a"], ["m"], axis=2)],
        {"sizes": np.array([2, 4])},
    ),
    "steps backwards": (
        [node("Slice", ["n", "start", "end", "axis", "step"], ["m"])],
        {"start": np.array([-1]), "end": np.array([-(2**62)]), "axis": np.array([-2]), "step": np.array([-1])},
    ),
    "softmax over width": ([node("Softmax", ["n"], ["m"], axis=-1)], {}),
    "resize": ([node("Resize", ["n", "", "scales"], ["m"], mode="nearest")], {"scales": np.float32([1, 1, 2, 2])}),
    "pool": ([node("MaxPool", ["n"], ["m"], kernel_shape=[2, 2])], {}),
}


@pytest.mark.parametrize("outputs", [("y",), ("y", "n"), ("y", "t"), ("y", "m", "l")], ids="-".join)
@pytest.mark.parametrize("case", MIDDLES)
def test_channels_last_changes_no_value(case, outputs):
    graph = between_transposes(*MIDDLES[case], outputs)
    new = channels_last(graph)
    assert_equal_outputs(graph, new)
    assert_whole(rewrite(new))


@pytest.mark.parametrize(
    "case",
    ["sum", "two activations", "prelu", "scale per channel", "squeeze and excite", "halves", "split along height"],
)
def test_transposes_move_to_the_convolutions(case):
    new = channels_last(between_transposes(*MIDDLES[case]))
    for turn in (n for n in new.nodes if n.op_type == "Transpose"):
        assert "Conv" in [
            n.op_type for n in (new.producer(turn.input[0]), *new.consumers(turn.output[0])) if n is not None
        ]


def test_a_plain_convolutional_network_stays_as_it_is():
    rng = np.random.default_rng(0)
    nodes = [node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]), node("Relu", ["c"], ["r"]), node("Conv", ["r", "v"], ["d"]), node("Add", ["r", "d"], ["s"]), node("Transpose", ["s"], ["t"], perm=[0, 2, 3, 1]),
             node("Reshape", ["t", "shape"], ["y"])]  # fmt: skip
    graph = build(
        nodes,
        {"w": rng.normal(0, 1, (4, 3, 3, 3)), "v": rng.normal(0, 1, (4, 4, 1, 1)), "shape": np.array([1, -1, 4])},
        (1, 3, 6, 6),
    )
    assert [n.op_type for n in rewrite(graph).nodes] == [n.op_type for n in graph.nodes]


# ------------------------------------------------------------------ two axes


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    width=st.integers(1, 5),
    bias=st.sampled_from([None, "1d", "full", "number", "positions"]),
    back=st.booleans(),
)
def test_linear_layers_of_any_rank_become_gemm(seed, shape, width, bias, back):
    rng, shape = np.random.default_rng(seed), (1, *shape, 3)
    sizes = {
        "1d": (width,),
        "full": (1,) * (len(shape) - 1) + (width,),
        "number": (1,),
        "positions": (*shape[:-1], width),
    }
    nodes = [node("MatMul", ["x", "w"], ["a"])] + ([node("Add", ["b", "a"], ["s"])] if bias else [])
    nodes += [
        node("Relu", ["s" if bias else "a"], ["r"]),
        node("MatMul", ["r", "v"], ["q"]),
        node("Add", ["q", "x"], ["y"]),
    ]
    constants = {"w": rng.normal(0, 1, (3, width)), "v": rng.normal(0, 1, (width, 3))} | (
        {"b": rng.normal(0, 1, sizes[bias])} if bias else {}
    )
    graph = build(nodes, constants, shape, outputs=("y", "r") if back else ("y",))
    new = flat_gemm(graph)
    assert_equal_outputs(graph, new)
    assert count(new)["Gemm"] == 2 and count(new)["MatMul"] == 0 and all(layer.adder is None for layer in layers(new))


def test_products_of_activations_and_reduced_tensors_keep_their_axes():
    rng = np.random.default_rng(1)
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Transpose", ["a"], ["t"], perm=[0, 2, 1]), node("MatMul", ["a", "t"], ["p"]), node("Softmax", ["p"], ["s"], axis=-1), node("MatMul", ["s", "a"], ["m"]),
             node("Reshape", ["m", "shape"], ["r"]), node("MatMul", ["r", "v"], ["o"]), node("ReduceMean", ["o"], ["y"], axes=[1])]  # fmt: skip
    graph = build(
        nodes, {"w": rng.normal(0, 1, (3, 4)), "v": rng.normal(0, 1, (2, 3)), "shape": np.array([1, 10, 2])}, (1, 5, 3)
    )
    new = flat_gemm(graph)
    assert_equal_outputs(graph, new)
    assert count(new)["Gemm"] == 2 and count(new)["MatMul"] == 2


def test_shared_weights_and_tied_names_stay_right():
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Add", ["a", "b"], ["x_2d"]),
        node("MatMul", ["x_2d", "w"], ["c"]),
        node("Add", ["c", "b"], ["y"]),
    ]
    graph = build(nodes, {"w": np.random.default_rng(0).normal(0, 1, (3, 3)), "b": [1.0, 2.0, 3.0]}, (1, 5, 3))
    assert_equal_outputs(graph, flat_gemm(graph))
    assert_whole(rewrite(graph))


# ------------------------------------------------------------------ exports of PyTorch


def exported(module, shape, opset):
    import torch

    buffer = io.BytesIO()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), torch.randn(shape), buffer, opset_version=opset, dynamo=False, input_names=["x"]
        )
    return Graph(onnx.load_from_string(buffer.getvalue())).infer()


def networks():
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Attention(nn.Module):
        """Between positions as in ViT, or between channels as in XCiT, in two ways of writing it."""

        def __init__(self, channels, heads, kind, unbind):
            super().__init__()
            self.kind = kind
            self.qkv, self.proj, self.heads, self.unbind = (
                nn.Linear(channels, 3 * channels),
                nn.Linear(channels, channels),
                heads,
                unbind,
            )
            self.temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)

        def forward(self, x):
            b, n, c = x.shape
            qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads)
            qkv = qkv.permute(2, 0, 3, 4, 1) if self.kind == "channels" else qkv.permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0) if self.unbind else (qkv[0], qkv[1], qkv[2])
            if self.kind == "positions":
                return self.proj(
                    (((q @ k.transpose(-2, -1)) * 0.5).softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, c)
                )
            mixed = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature).softmax(
                dim=-1
            ) @ v
            return self.proj(mixed.permute(0, 3, 1, 2).reshape(b, n, c))

    class Block(nn.Module):
        """EdgeNeXt's: depthwise convolution, attention over channels (or positions), two linear layers, layer scale, residual sum."""

        def __init__(self, channels=8, attention=None, unbind=True):
            super().__init__()
            self.conv, self.first, self.second = (
                nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
                nn.Linear(channels, 16),
                nn.Linear(16, channels),
            )
            self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
            self.attention = Attention(channels, 2, attention, unbind) if attention else None
            self.gamma = nn.Parameter(torch.rand(channels))

        def forward(self, x):
            b, c, h, w = x.shape
            y = self.conv(x)
            if self.attention is not None:
                y = y.reshape(b, c, h * w).permute(0, 2, 1)
                y = (y + self.attention(self.norms[0](y))).reshape(b, h, w, c)
            else:
                y = y.permute(0, 2, 3, 1)
            y = self.gamma * self.second(F.gelu(self.first(self.norms[1](y))))
            return x + y.permute(0, 3, 1, 2)

    class Residual(nn.Module):
        def __init__(self, width, activation):
            super().__init__()
            self.a = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                activation,
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
            )
            self.activation = activation

        def forward(self, x):
            return self.activation(x + self.a(x))

    class Pyramid(nn.Module):
        """Grouped convolution, PReLU, Resize, Concat, a head turned channels last: what detectors are made of."""

        def __init__(self):
            super().__init__()
            self.stem, self.down, self.head = (
                nn.Conv2d(3, 8, 3, 2, 1),
                nn.Conv2d(8, 8, 3, 2, 1, groups=4),
                nn.Conv2d(16, 6, 1),
            )
            self.first, self.second = nn.PReLU(8), nn.Hardswish()

        def forward(self, x):
            large = self.first(self.stem(x))
            up = F.interpolate(self.second(self.down(large)), scale_factor=2.0, mode="nearest")
            y = self.head(torch.cat([large, up], 1)).permute(0, 2, 3, 1)
            return y.reshape(1, -1, 6).sigmoid()

    def picture(*parts):
        return nn.Sequential(nn.Conv2d(3, 8, 4, 4), *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    return {
        "resnet": lambda: nn.Sequential(
            nn.Conv2d(3, 8, 7, 2, 3),
            nn.MaxPool2d(3, 2, 1),
            Residual(8, nn.ReLU()),
            Residual(8, nn.PReLU(8)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 5),
        ),
        "pyramid": Pyramid,
        "convnext": lambda: picture(Block(), Block()),
        "edgenext": lambda: picture(Block(), Block(attention="channels"), Block()),
        "xcit": lambda: picture(Block(attention="channels", unbind=False)),
        "transformer": lambda: picture(Block(attention="positions")),
        "mobile": lambda: picture(nn.ReLU6(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.SiLU(), nn.LeakyReLU()),
    }


@pytest.mark.parametrize("opset", [11, 17, 20])
@pytest.mark.parametrize("name", ["resnet", "pyramid", "convnext", "edgenext", "xcit", "transformer", "mobile"])
def test_exports_of_every_age_are_rewritten(name, opset, caplog):
    pytest.importorskip("torch")
    graph = exported(networks()[name](), (1, 3, 32, 32), opset)
    new = rewritten(graph, caplog)
    assert not [layer for layer in layers(new) if layer.op == "MatMul"]
    if name in ("resnet", "pyramid", "mobile"):
        assert count(new) == count(simplify(graph))
    else:
        assert count(new)["Gelu"] >= 1 and count(new)["Erf"] == 0
    if name in ("edgenext", "xcit"):
        assert (
            count(new)["ReduceL2"] == 1 and count(new)["Squeeze"] == count(new)["Expand"] == count(new)["Gather"] == 0
        )


def test_an_attention_that_differs_a_little_is_left_alone():
    pytest.importorskip("torch")
    graph = drop_expand(simplify(exported(networks()["edgenext"](), (1, 3, 32, 32), 17)))
    assert count(lean_attention(graph))["ReduceL2"] == 1
    softmax = next(n for n in graph.nodes if n.op_type == "Softmax")
    del softmax.attribute[:]
    softmax.attribute.append(helper.make_attribute("axis", 2))  # over queries instead of keys
    assert attribute(softmax, "axis") == 2 and count(lean_attention(graph))["ReduceL2"] == 2


# ------------------------------------------------------------------ the whole


def test_a_rewrite_that_fails_or_lies_is_left_out_with_a_warning(caplog):
    graph = gelu("torch")

    def lies(g):
        new = g.copy()
        new.set_constant("half", np.float32(0.6))
        return new

    def fails(g):
        raise ValueError("two\nlines")

    with caplog.at_level(logging.WARNING, linear.__name__):
        new = rewrite(graph, (lies, fails, fuse_gelu))
    assert [r.getMessage() for r in caplog.records] == [
        "lies is left out: it would change the outputs",
        "fails is left out: two lines",
    ]
    assert count(new) == {"Gelu": 1} and count(graph)["Erf"] == 1


@pytest.mark.parametrize("opset", [13, 21])
def test_opsets_on_both_sides_of_gelu(opset, caplog):
    graph = gelu("torch")
    graph.model.opset_import[0].version = opset
    assert rewritten(graph, caplog).opset == max(opset, 20)


MODELS = [
    "FastestDet_opset13",
    "face_detection_yunet_2023mar",
    "retinaface_mobilenet0.25_FaceDetector_heads",
    "rtmonodepth_s_m_640x192",
    "scrfd_500m_bnkps",
    "yolov5n-0.5-face",
    "yolov8-lite-t-face",
]


@pytest.mark.parametrize("name", MODELS)
def test_detectors_and_depth_stay_as_they_are(real_data, name, caplog):
    graph = load_graph(real_data / "models" / f"{name}.onnx")
    assert count(rewritten(graph, caplog)) == count(simplify(graph))


@pytest.mark.parametrize("name, linear", [("xxs", 31), ("xs", 43)])
def test_edgeface_is_rewritten_whole(real_data, tmp_path, name, linear, caplog):
    path = fix_batch(real_data / "models" / f"edgeface_{name}_q_dequant.onnx", tmp_path / "fixed.onnx")
    graph = load_graph(path)
    plain, new = simplify(graph), rewritten(graph, caplog)
    assert (
        count(plain)["Gemm"] == 1
        and count(new)["Gemm"] == linear
        and count(new)["Erf"] == 0
        and len(new.nodes) < 0.8 * len(plain.nodes)
    )
    assert all(
        len(new.shape(n.input[0])) == 2 for n in new.nodes if n.op_type in ("Gemm", "LayerNormalization", "Gelu")
    )
    assert not [n for n in new.nodes if n.op_type == "MatMul" and n.input[1] in new.constants]
    assert count(new)["Mul"] == 3  # the temperatures: layer scale is in the weights since simplify
    turns = {False: 0, True: 0}
    for g, which in ((plain, False), (channels_last(plain), True)):
        near = [(g.producer(n.input[0]), *g.consumers(n.output[0])) for n in g.nodes if n.op_type == "Transpose"]
        turns[which] = sum(not any(n is not None and n.op_type == "Conv" for n in pair) for pair in near)
    assert turns[True] < turns[False] / 3
    before, after = (prepared(g, tmp_path)["Transpose"] for g in (plain, new))
    assert after < 0.6 * before


def prepared(graph, folder):
    """Operators that ONNX Runtime really runs on this machine."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "prepared.onnx"), 3
    ort.InferenceSession(graph.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(folder / "prepared.onnx").graph.node)


def test_the_list_of_rewrites_is_in_an_order_that_works():
    assert REWRITES.index(drop_expand) < REWRITES.index(lean_attention) < REWRITES.index(flat_gemm) and REWRITES.index(
        channels_last
    ) < REWRITES.index(flat_gemm)
