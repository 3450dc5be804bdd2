"""Exact rewrites on small graphs, exports of PyTorch at several opsets and real models: outputs stay the same."""

import io
import logging
import warnings
from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from calib_nb.graph import linear
from calib_nb.graph.build import network
from calib_nb.graph.fixed import fix_batch
from calib_nb.graph.fuse import channels_last, drop_expand, follow, fuse_gelu
from calib_nb.graph.layers import layers, macs
from calib_nb.graph.linear import REWRITES, flat_gemm, lean_attention, rewrite
from calib_nb.graph.model import Graph, attribute, load_graph, run
from calib_nb.graph.simplify import simplify


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
    with caplog.at_level(logging.WARNING, "calib_nb.graph"):
        new = rewrite(plain)
    assert not [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert_equal_outputs(graph, new)
    assert_whole(new)
    assert macs(new).macs.sum() == macs(plain).macs.sum()
    return new


# ------------------------------------------------------------------ GELU, Expand


GELUS = {
    "torch": "s = Div (x, root); e = Erf (s); p = Add (one, e); m = Mul (x, p); y = Mul (m, half)",
    "half first": "s = Mul (inverse, x); e = Erf (s); p = Add (one, e); m = Mul (half, p); y = Mul (m, x)",
    "half of x": "s = Div (x, root); e = Erf (s); p = Add (one, e); m = Mul (x, half); y = Mul (m, p)",
}


def gelu(form, half=0.5, root=2**0.5):
    constants = {"root": root, "inverse": 1 / root, "one": [1.0], "half": half}
    return network(GELUS[form], inputs={"x": (1, 4, 3, 3)}, **constants)


@pytest.mark.parametrize("form", GELUS)
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
    def normalized(size, outputs=("y",)):
        text = "l = ReduceL2 <axes = [2, 3]> (x); e = Expand (l, size); y = Div (x, e)"
        return network(text, inputs={"x": (1, 4, 3, 3)}, outputs=outputs, size=size)

    graph = normalized([1, 4, 3, 3])
    assert count(drop_expand(graph)) == {"ReduceL2": 1, "Div": 1}
    assert_equal_outputs(graph, drop_expand(graph))
    larger = normalized([2, 4, 3, 3])
    assert count(drop_expand(larger))["Expand"] == 1  # the result has a batch of two because of it
    assert count(drop_expand(normalized([1, 4, 3, 3], outputs=("y", "e"))))["Expand"] == 1


def test_follow_stops_where_a_tensor_has_two_readers_or_is_an_output():
    graph = network("a = Relu (x); b = Neg (a); y = Add (a, b)", inputs={"x": (1, 2)})
    assert follow(graph, "x", "Relu", "Neg") is None and follow(graph, "y", "Relu") is None
    assert [n.op_type for n in follow(graph, "b", "Add")] == ["Add"]


# ------------------------------------------------------------------ channels last


def between_transposes(middle, constants, outputs=("y",), opset=17):
    """Conv, to channels last, LayerNorm, back, `middle` from "n" and the convolution's "c" to "m", Conv."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(0, 1, (4, 3, 3, 3)), "v": rng.normal(0, 1, (4, 4, 1, 1))}
    weights |= {"gamma": rng.normal(0, 1, 4), "beta": rng.normal(0, 1, 4)}
    text = f"""
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        t = Transpose <perm = [0, 2, 3, 1]> (c)
        l = LayerNormalization <axis = -1> (t, gamma, beta)
        n = Transpose <perm = [0, 3, 1, 2]> (l)
        {middle}
        y = Conv (m, v)
    """
    return network(text, inputs={"x": (1, 3, 6, 5)}, outputs=outputs, opset=opset, **weights, **constants)


BACKWARDS = {"start": [-1], "end": [-(2**62)], "axis": [-2], "step": [-1]}
MIDDLES = {
    "sum": ("m = Add (n, c)", {}),
    "two activations": ("r = Relu (n); m = Clip (r, low, high)", {"low": 0.1, "high": 1.5}),
    "prelu": ("m = PRelu (n, slope)", {"slope": np.linspace(-1, 1, 4).reshape(4, 1, 1)}),
    "scale per channel": ("m = Mul (scale, n)", {"scale": np.linspace(1, 2, 4).reshape(1, 4, 1, 1)}),
    "factor along width": ("m = Mul (n, scale)", {"scale": np.linspace(1, 2, 5)}),
    "squeeze and excite": ("p = GlobalAveragePool (n); s = Sigmoid (p); m = Mul (n, s)", {}),
    "spatial attention": ("p = ReduceMax <axes = [1]> (n); m = Mul (n, p)", {}),
    "sum of lengths": ("p = ReduceSum (n, axes); d = Div (n, p); m = Add (d, c)", {"axes": [-1]}),
    "halves": (
        "a = Slice (n, zero, two, axis); b = Slice (n, two, end, axis); m = Concat <axis = -3> (b, a)",
        {"zero": [0], "two": [2], "end": [2**62], "axis": [1]},
    ),
    "split along height": ("a, b = Split <axis = 2> (n, sizes); m = Concat <axis = 2> (b, a)", {"sizes": [2, 4]}),
    "steps backwards": ("m = Slice (n, start, end, axis, step)", BACKWARDS),
    "softmax over width": ("m = Softmax <axis = -1> (n)", {}),
    "resize": ('m = Resize <mode = "nearest"> (n, , scales)', {"scales": np.float32([1, 1, 2, 2])}),
    "pool": ("m = MaxPool <kernel_shape = [2, 2]> (n)", {}),
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
    text = """
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        r = Relu (c)
        d = Conv (r, v)
        s = Add (r, d)
        t = Transpose <perm = [0, 2, 3, 1]> (s)
        y = Reshape (t, shape)
    """
    weights = {"w": rng.normal(0, 1, (4, 3, 3, 3)), "v": rng.normal(0, 1, (4, 4, 1, 1))}
    graph = network(text, inputs={"x": (1, 3, 6, 6)}, shape=[1, -1, 4], **weights)
    assert [n.op_type for n in rewrite(graph).nodes] == [n.op_type for n in graph.nodes]


# ------------------------------------------------------------------ two axes


@settings(max_examples=30, deadline=None, derandomize=True)
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
    first = "a = MatMul (x, w); s = Add (b, a); r = Relu (s)" if bias else "a = MatMul (x, w); r = Relu (a)"
    constants = {"w": rng.normal(0, 1, (3, width)), "v": rng.normal(0, 1, (width, 3))}
    constants |= {"b": rng.normal(0, 1, sizes[bias])} if bias else {}
    text, outputs = f"{first}; q = MatMul (r, v); y = Add (q, x)", ("y", "r") if back else ("y",)
    graph = network(text, inputs={"x": shape}, outputs=outputs, **constants)
    new = flat_gemm(graph)
    assert_equal_outputs(graph, new)
    assert count(new)["Gemm"] == 2 and count(new)["MatMul"] == 0 and all(layer.adder is None for layer in layers(new))


def test_products_of_activations_and_reduced_tensors_keep_their_axes():
    rng = np.random.default_rng(1)
    text = """
        a = MatMul (x, w)
        t = Transpose <perm = [0, 2, 1]> (a)
        p = MatMul (a, t)
        s = Softmax <axis = -1> (p)
        m = MatMul (s, a)
        r = Reshape (m, shape)
        o = MatMul (r, v)
        y = ReduceMean <axes = [1]> (o)
    """
    weights = {"w": rng.normal(0, 1, (3, 4)), "v": rng.normal(0, 1, (2, 3))}
    graph = network(text, inputs={"x": (1, 5, 3)}, shape=[1, 10, 2], **weights)
    new = flat_gemm(graph)
    assert_equal_outputs(graph, new)
    assert count(new)["Gemm"] == 2 and count(new)["MatMul"] == 2


def test_shared_weights_and_tied_names_stay_right():
    text = "a = MatMul (x, w); x_2d = Add (a, b); c = MatMul (x_2d, w); y = Add (c, b)"
    weights = {"w": np.random.default_rng(0).normal(0, 1, (3, 3)), "b": [1.0, 2.0, 3.0]}
    graph = network(text, inputs={"x": (1, 5, 3)}, **weights)
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
        """EdgeNeXt's: depthwise convolution, attention, two linear layers, layer scale, residual sum."""

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


def test_a_rewrite_that_fails_or_changes_outputs_is_left_out_with_a_warning(caplog):
    graph = gelu("torch")

    def alter(g):
        new = g.copy()
        new.set_constant("half", np.float32(0.6))
        return new

    def fail(g):
        raise ValueError("two\nlines")

    with caplog.at_level(logging.WARNING, linear.__name__):
        new = rewrite(graph, (alter, fail, fuse_gelu))
    assert [r.getMessage() for r in caplog.records] == [
        "alter is left out: it would change the outputs",
        "fail is left out: two lines",
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
