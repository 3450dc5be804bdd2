"""The graph folder: exact transformations on small and real models, layouts of weights, costs and aliases."""

import warnings

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from calib_nb.core.errors import ModelError
from calib_nb.graph.build import conv, network, sequential
from calib_nb.graph.fixed import fix_batch
from calib_nb.graph.layers import activations, aliases, get_bias, get_weight, layers, macs, set_bias, set_weight
from calib_nb.graph.model import Graph, attribute, load_graph, open_graph, run
from calib_nb.graph.simplify import fold_constants, fold_scales, plain_gemm, raise_opset, simplify


def noise(graph, seed=7):
    return np.random.default_rng(seed).uniform(-1, 1, graph.shape(graph.inputs[0])).astype(np.float32)


def assert_equal_outputs(before, after, relative=1e-5):
    x = noise(before)
    for name, wanted in run(before, x).items():
        assert np.abs(run(after, x)[name] - wanted).max() <= relative * np.abs(wanted).max(), name


BN = "BatchNormalization <epsilon = 0.001> (c, g, b, m, v)"


def bn(rng, c):
    """The constants of a BatchNormalization over `c` channels."""
    scale, variance = rng.uniform(0.2, 3, c), rng.uniform(0.1, 4, c)
    return {"g": scale, "b": rng.normal(0, 1, c), "m": rng.normal(0, 1, c), "v": variance}


MODELS = [
    "FastestDet_opset13",
    "edgeface_xs_q_dequant",
    "edgeface_xxs_q_dequant",
    "face_detection_yunet_2023mar",
    "retinaface_mobilenet0.25_FaceDetector_heads",
    "rtmonodepth_s_m_640x192",
    "scrfd_500m_bnkps",
    "yolov5n-0.5-face",
    "yolov8-lite-t-face",
]


@pytest.mark.parametrize("name", MODELS)
def test_simplify_keeps_real_models(real_data, tmp_path, name):
    path = real_data / "models" / f"{name}.onnx"
    if "edgeface" in name:
        path = fix_batch(path, tmp_path / "fixed.onnx")
    graph = load_graph(path)
    plain = simplify(graph)
    assert_equal_outputs(graph, plain)
    assert plain.opset >= 13 and len(plain.nodes) <= len(graph.nodes)
    assert all(plain.shape(o) is not None for n in plain.nodes for o in n.output if o)
    assert len({n.name for n in plain.nodes}) == len(plain.nodes)
    assert not {n.op_type for n in plain.nodes} & {
        "Constant",
        "Shape",
        "Identity",
        "Dropout",
        "BatchNormalization",
        "ConstantOfShape",
    }
    assert load_graph(plain.save(tmp_path / "plain.onnx")).outputs == graph.outputs
    found = activations(plain)
    assert len(set(found)) == len(found) and not set(found) & set(aliases(plain))
    assert set(aliases(plain).values()) <= set(activations(plain, fused=False))


def test_dynamic_batch_is_refused_with_the_line_that_fixes_it(real_data):
    with pytest.raises(ModelError, match="fix-batch"):
        load_graph(real_data / "models" / "edgeface_xxs_q_dequant.onnx")


def test_aliases_hold_the_same_values(real_data):
    graph = simplify(load_graph(real_data / "models" / "FastestDet_opset13.onnx"))
    same = aliases(graph)
    values = run(graph, noise(graph), sorted({*same, *same.values()} - set(graph.inputs)))
    for name, source in same.items():
        assert (
            np.array_equal(np.sort(values[name], axis=None), np.sort(values[source], axis=None))
            if source in values
            else True
        )


# --- folding


LAYERS = ["Conv", "depthwise", "grouped", "ConvTranspose", "grouped ConvTranspose", "Gemm", "Gemm transB", "MatMul"]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(LAYERS), st.booleans(), st.integers(0, 1000))
def test_batchnorm_goes_into_any_layer(kind, with_bias, seed):
    rng, bias = np.random.default_rng(seed), ", bias" if with_bias else ""
    if kind.startswith(("Gemm", "MatMul")):
        transposed = kind.endswith("transB")
        shape, out, w = (1, 4), 6, (6, 4) if transposed else (4, 6)
        text = f"c = Gemm <alpha = 0.5, beta = 2.0, transB = {int(transposed)}> (x, w{bias})"
        if kind == "MatMul":
            text = "p = MatMul (x, w); c = " + ("Add (bias, p)" if with_bias else "Identity (p)")
        expected = ["MatMul", "Add"] if kind == "MatMul" else ["Gemm"]
    else:
        op = "ConvTranspose" if "Transpose" in kind else "Conv"
        groups = {"depthwise": 4, "grouped": 2, "grouped ConvTranspose": 2}.get(kind, 1)
        shape, out = (1, 4, 7, 7), 4 if kind == "depthwise" else 6
        w = (4, out // groups, 3, 3) if op == "ConvTranspose" else (out, 4 // groups, 3, 3)
        text = f"c = {op} <group = {groups}, pads = [1, 1, 1, 1], strides = [2, 2]> (x, w{bias})"
        expected = [op]
    constants = {"w": rng.normal(0, 1, w), "bias": rng.normal(0, 1, out), **bn(rng, out)}
    graph = network(f"{text}; y = {BN}", inputs={"x": shape}, **constants)
    plain = simplify(graph)
    assert [n.op_type for n in plain.nodes] == expected
    assert_equal_outputs(graph, plain)


@pytest.mark.parametrize(
    "op, first, folds",
    [
        ("Mul", False, True),
        ("Mul", True, True),
        ("Div", False, True),
        ("Div", True, False),
        ("Sub", False, True),
        ("Sub", True, True),
        ("Add", True, True),
    ],
)
@pytest.mark.parametrize("form", ["scalar", "channel", "pixel"])
def test_constant_factors_go_into_the_weights(op, first, folds, form):
    rng = np.random.default_rng(0)
    value = rng.uniform(0.5, 2, {"scalar": (), "channel": (6, 1, 1), "pixel": (1, 1, 8, 8)}[form])
    text = f"c = Conv (x, w, b); y = {op} ({'k, c' if first else 'c, k'})"
    graph = network(text, w=rng.normal(0, 1, (6, 3, 1, 1)), b=rng.normal(0, 1, 6), k=value)
    plain = simplify(graph)
    assert [n.op_type for n in plain.nodes] == (["Conv"] if folds and form != "pixel" else ["Conv", op])
    assert [n.op_type for n in simplify(graph, scales=False).nodes] == ["Conv", op]
    assert_equal_outputs(graph, plain)


def test_nothing_is_folded_where_the_result_is_read_twice():
    rng = np.random.default_rng(0)
    text = f"c = Conv (x, w); n = {BN}; y = Add (n, c)"
    graph = network(text, w=rng.normal(0, 1, (6, 3, 1, 1)), **bn(rng, 6))
    assert [n.op_type for n in simplify(graph).nodes] == ["Conv", "BatchNormalization", "Add"]


def test_shared_weights_part_when_one_layer_changes():
    rng = np.random.default_rng(0)
    text = f"c = Conv (x, w); n = {BN}; y = Conv (n, w)"
    graph = network(text, w=rng.normal(0, 1, (3, 3, 1, 1)), **bn(rng, 3))
    plain = simplify(graph)
    assert len({layer.weight for layer in layers(plain)}) == 2
    assert_equal_outputs(graph, plain)


def test_an_output_keeps_its_name_when_its_node_goes():
    graph = network("c = Conv (x, w); r = Relu (c); y = Identity (r)", w=np.ones((3, 3, 1, 1)))
    plain = simplify(graph)
    assert plain.outputs == ["y"] and [n.op_type for n in plain.nodes] == ["Conv", "Relu"]
    assert [n.op_type for n in fold_constants(network("y = Identity (x)")).nodes] == ["Identity"]


def test_random_and_constant_outputs_stay():
    graph = network("r = RandomNormal <shape = [1, 3, 8, 8], seed = 1.0> (); y = Add (x, r)")
    assert [n.op_type for n in fold_constants(graph).nodes] == ["RandomNormal", "Add"]
    assert run(fold_constants(network("y = Mul (k, k)", k=np.ones(3))))["y"].tolist() == [1, 1, 1]


# --- patterns of real exports, opset 11 to 21


def torch_patterns():
    """A torch network with what exporters write in several ways: LayerNorm, GELU, attention, softmax, PReLU, resize."""
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.PReLU(8))
            self.depth = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU6())
            self.group = nn.Sequential(nn.Conv2d(8, 16, 1, groups=2), nn.SiLU(), nn.Hardswish())
            self.up = nn.ConvTranspose2d(16, 8, 2, 2)
            self.norm, self.q, self.k, self.v = (
                nn.LayerNorm(24),
                nn.Linear(24, 24),
                nn.Linear(24, 24, bias=False),
                nn.Linear(24, 24),
            )
            self.mlp, self.gamma = (
                nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24)),
                nn.Parameter(torch.rand(24)),
            )
            self.head = nn.Sequential(nn.Linear(24, 10), nn.BatchNorm1d(10))

        def forward(self, x):
            x = self.stem(x)
            x = torch.cat([self.depth(x) + x, self.group(x)], 1)
            x = (
                x
                + nn.functional.interpolate(nn.functional.avg_pool2d(x, 2), scale_factor=2, mode="nearest")
                + torch.cat([self.up(nn.functional.max_pool2d(x[:, 8:], 2)), x[:, :16]], 1)
            )
            t = self.norm(x.flatten(2).transpose(1, 2))
            a = torch.softmax(self.q(t) @ self.k(t).transpose(1, 2) / 24**0.5, -1) @ self.v(t)
            t = t + a
            t = t + self.gamma * self.mlp(t)
            return self.head(t.mean(1))

    torch.manual_seed(0)
    net = Net()
    net.train()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(8, 3, 16, 16))
    return net.eval()


@pytest.fixture(scope="module")
def pattern_files(tmp_path_factory):
    import torch

    net, folder, x = (
        torch_patterns(),
        tmp_path_factory.mktemp("patterns"),
        torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for opset in (11, 13, 17, 20):
            torch.onnx.export(
                net,
                (x,),
                str(folder / f"{opset}.onnx"),
                input_names=["x"],
                opset_version=opset,
                dynamo=False,
                do_constant_folding=False,
                training=torch.onnx.TrainingMode.EVAL,
            )
    onnx.save(onnx.version_converter.convert_version(onnx.load(folder / "20.onnx"), 21), folder / "21.onnx")
    return folder, x.numpy(), net(x).detach().numpy()


@pytest.mark.parametrize("opset", [11, 13, 17, 20, 21])
@pytest.mark.parametrize("target", [13, 17])
def test_patterns_of_exports(pattern_files, opset, target):
    folder, x, wanted = pattern_files
    graph = load_graph(folder / f"{opset}.onnx")
    plain = simplify(graph, opset=target)
    assert plain.opset == max(opset, target)
    assert_equal_outputs(graph, plain)
    (got,) = run(plain, x).values()
    assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert not {n.op_type for n in plain.nodes} & {"BatchNormalization", "Constant", "Identity", "Shape"}
    assert sum(layer.op == "MatMul" and layer.adder is not None for layer in layers(plain)) >= 2


def test_macs_of_a_torch_network(pattern_files):
    """Against hooks on the torch modules, and the two products of attention by hand."""
    import torch
    from torch import nn

    net, total = torch_patterns(), []

    def count(module, args, out):
        if isinstance(module, nn.Conv2d):
            total.append(out.numel() * module.in_channels // module.groups * module.kernel_size[0] ** 2)
        elif isinstance(module, nn.ConvTranspose2d):
            total.append(args[0].numel() * module.out_channels * module.kernel_size[0] ** 2)
        elif isinstance(module, nn.Linear):
            total.append(args[0].numel() * module.out_features)

    for module in net.modules():
        module.register_forward_hook(count)
    net(torch.zeros(1, 3, 16, 16))
    table = macs(simplify(load_graph(pattern_files[0] / "17.onnx"), scales=False))
    assert table.macs.sum() == sum(total) + 2 * 64 * 64 * 24


def test_macs_by_hand():
    graph = network(
        """
        c = Conv <group = 2, strides = [2, 2]> (x, w)
        u = ConvTranspose <group = 2> (c, t)
        s = Transpose <perm = [0, 1, 3, 2]> (u)
        y = MatMul (u, s)
        """,
        inputs={"x": (1, 4, 9, 9)},
        w=np.ones((6, 2, 3, 3)),
        t=np.ones((6, 1, 2, 2)),
    )
    table = macs(graph).set_index("op")
    assert (
        table.macs["Conv"] == 6 * 4 * 4 * 2 * 9
        and table.macs["ConvTranspose"] == 6 * 4 * 4 * 1 * 4
        and table.macs["MatMul"] == 2 * 5 * 5 * 5
    )
    assert table.parameters.tolist() == [108, 24, 0, 0]


# --- layouts


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.sampled_from(["Conv", "ConvTranspose", "Gemm", "GemmB", "MatMul"]), st.integers(1, 3), st.integers(0, 100))
def test_weights_and_bias_per_output_channel(kind, groups, seed):
    """Scaling a channel's weights and bias scales that channel of the output, whatever the layout."""
    rng = np.random.default_rng(seed)
    if kind.startswith("Conv"):
        i, o = 2 * groups, 3 * groups
        w, shape = (o, 2, 3, 3) if kind == "Conv" else (i, 3, 3, 3), (1, i, 5, 5)
        text = f"y = {kind} <group = {groups}> (x, w)"
    else:
        o, w, shape = 6, (6, 4) if kind == "GemmB" else (4, 6), (1, 4)
        text = f"y = {kind} (x, w)" if kind != "GemmB" else "y = Gemm <transB = 1> (x, w)"
    graph = network(text, inputs={"x": shape}, w=rng.normal(0, 1, w))
    (layer,) = layers(graph)
    assert (
        get_weight(graph, layer).shape[:2] == (o, 2 if kind.startswith("Conv") else 4)
        and not get_bias(graph, layer).any()
    )
    changed = graph.copy()
    factor, shift = rng.uniform(0.5, 2, o).astype(np.float32), rng.normal(0, 1, o).astype(np.float32)
    (layer,) = layers(changed)
    weight = get_weight(changed, layer)
    set_weight(changed, layer, weight)
    assert_equal_outputs(graph, changed, 0)
    set_weight(changed, layer, weight * factor.reshape(-1, *[1] * (weight.ndim - 1)))
    layer = set_bias(changed, layer, shift)
    assert np.array_equal(get_bias(changed, layer), shift) and layers(changed)[0] == layer
    x, along = noise(graph), (1, -1) + (1,) * (len(shape) - 2)
    assert np.allclose(
        run(changed, x)["y"], run(graph, x)["y"] * factor.reshape(along) + shift.reshape(along), atol=1e-4
    )


def test_gemm_without_alpha_and_beta():
    rng = np.random.default_rng(0)
    constants = {"w": rng.normal(0, 1, (4, 6)), "b": rng.normal(0, 1, (1, 1))}
    graph = network("y = Gemm <alpha = 0.3, beta = 0.7> (x, w, b)", inputs={"x": (1, 4)}, **constants)
    changed = graph.copy()
    plain_gemm(changed)
    assert_equal_outputs(graph, changed)
    assert attribute(changed.nodes[0], "alpha", 1) == 1 and get_bias(changed, layers(changed)[0]).shape == (6,)


def test_fold_scales_returns_how_many():
    graph = network("c = Conv (x, w); d = Mul (c, k); y = Add (d, k)", w=np.ones((2, 3, 1, 1)), k=3.0)
    assert fold_scales(graph, ("BatchNormalization",)) == 0 and fold_scales(graph) == 2


# --- refusals and edges


def test_refusals(tmp_path):
    graph = sequential(conv(2, 1))
    text = "q = QuantizeLinear (x, s, z); y = DequantizeLinear (q, s, z)"
    onnx.save(network(text, s=np.float32(1), z=np.uint8(0)).model, tmp_path / "q.onnx")
    with pytest.raises(ModelError, match="already quantized"):
        load_graph(tmp_path / "q.onnx")
    new = graph.copy()
    new.model.opset_import[0].version = 99
    onnx.save(new.model, tmp_path / "new.onnx")
    with pytest.raises(ModelError, match="opset 99"):
        load_graph(tmp_path / "new.onnx")
    with pytest.raises(ModelError, match="cannot be raised from opset 11"):
        raise_opset(unknown_operator(), 13)
    with pytest.raises(ModelError, match="cannot run"):
        open_graph(graph, ["not there"])


def unknown_operator():
    ends = [helper.make_tensor_value_info(name, 1, shape) for name, shape in (("x", [1, 3, 4, 4]), ("y", None))]
    constant = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "s")
    graph = helper.make_graph([helper.make_node("Unheard", ["x", "s"], ["y"])], "g", ends[:1], ends[1:], [constant])
    return Graph(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)]))


def test_external_data_is_taken_in(tmp_path):
    graph = sequential(conv(64, 5))
    onnx.save(graph.copy().model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    loaded = load_graph(tmp_path / "m.onnx")
    assert_equal_outputs(graph, loaded, 0)
    loaded.save(tmp_path / "whole.onnx")
    (tmp_path / "m.data").unlink()
    assert_equal_outputs(graph, load_graph(tmp_path / "whole.onnx"), 0)


def test_the_original_is_never_changed(pattern_files):
    graph = load_graph(pattern_files[0] / "17.onnx")
    before = graph.model.SerializeToString(deterministic=True)
    simplify(graph)
    assert graph.model.SerializeToString(deterministic=True) == before
