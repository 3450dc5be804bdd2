"""A graph in torch gives what ONNX Runtime gives, operator by operator, and its gradients are right."""

import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from test_backend_suite import FOLDERS, equal, folder_case, image_model, node_cases, outputs_of

from calib_nb.core.errors import InputError, ModelError
from calib_nb.graph.build import conv, linear, network, norm, residual, sequential
from calib_nb.graph.fixed import fix_batch
from calib_nb.graph.linear import rewrite
from calib_nb.graph.model import Graph, load_graph, open_graph
from calib_nb.graph.normal import normal_form
from calib_nb.graph.simplify import simplify
from calib_nb.graph.torch_form import has_torch_form, torch_form
from calib_nb.quant.quantize import observe_graph, plain_graph, range_table
from calib_nb.quant.ranges import ranges
from calib_nb.quant.target import PROFILES
from calib_nb.quant.write import write_qdq

RNG = np.random.default_rng(0)
IMAGE = RNG.normal(0, 1, (1, 4, 7, 8)).astype(np.float32)
W = RNG.normal(0, 1, (6, 4, 3, 2)).astype(np.float32)
slow = pytest.mark.slow


def both(graph, x=IMAGE):
    """(outputs in torch, outputs in ONNX Runtime as the nodes say)."""
    [name] = graph.inputs
    wanted = open_graph(graph, threads=1, optimize=False).run(None, {name: x})
    return [y.detach().numpy() for y in torch_form(graph)(torch.from_numpy(x))], wanted


def check(text, shape=IMAGE.shape, **options):
    """One network is the same in both, shapes included."""
    x = np.resize(IMAGE, shape)
    got, wanted = both(network(text, inputs={"x": shape}, **options), x)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(b[np.isfinite(b)]).max(initial=0)))


# ------------------------------------------------------------------ operators

OF_ONE = [
    *(
        "Relu",
        "LeakyRelu",
        "LeakyRelu <alpha = 0.3>",
        "Elu",
        "Elu <alpha = 0.5>",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
    ),
    *("HardSigmoid <alpha = 0.5, beta = 0.1>", "Tanh", "Softmax", "Softmax <axis = 1>", "LogSoftmax <axis = 1>"),
    *("Erf", "Exp", "Reciprocal", "Abs", "Neg", "Sin", "Cos", "Softplus", "Softsign", "Mish", "Gelu", "Identity"),
    *('Gelu <approximate = "tanh">', "Dropout", "GlobalAveragePool", "GlobalMaxPool", "Flatten", "Flatten <axis = 2>"),
    *("Flatten <axis = 0>", "Transpose", "Transpose <perm = [0, 2, 3, 1]>", "Cast <to = 1>", "Flatten <axis = -1>"),
]


@pytest.mark.parametrize("operator", OF_ONE)
def test_operators_of_one_input(operator):
    name, _, attributes = operator.partition(" ")
    check(f"y = {name} {attributes} (x)", opset=22 if name == "Mish" or name == "Gelu" else 17)


@pytest.mark.parametrize("operator", ["Sqrt", "Log"])
def test_operators_of_positive_numbers(operator):
    check(f"a = Abs (x); y = {operator} (a)")


@pytest.mark.parametrize("operator", ["Add", "Sub", "Mul", "Div", "Min", "Max", "Pow", "PRelu", "Sum"])
def test_operators_of_two_inputs(operator):
    first = "a = Abs (x)" if operator == "Pow" else "a = Identity (x)"
    check(f"{first}; y = {operator} (a, b)", b=RNG.uniform(0.5, 2, (4, 1, 1)))
    check(f"{first}; y = {operator} (a, b)", b=np.float32(3))


OTHERS = {
    "Pow of a whole number": ("y = Pow (x, b)", dict(b=np.float32(3))),
    "many": ("a = Max (x, b, c); z = Min (a, x); y = Sum (z, x, a)", dict(b=np.zeros((7, 1)), c=0.5)),
    "Clip": ("y = Clip (x, a, b)", dict(a=-0.5, b=0.5)),
    "Clip above": ("y = Clip (x, , b)", dict(b=0.5)),
    "Clip below": ("y = Clip (x, a)", dict(a=0.5)),
    "Clip nothing": ("y = Clip (x)", {}),
    "MatMul": ("y = MatMul (x, b)", dict(b=W[:, :, 0, 0].repeat(2, 1).T.copy())),
    "MatMul of a vector": ("y = MatMul (x, b)", dict(b=np.arange(8.0))),
    "MatMul of itself": ("a = Transpose <perm = [0, 1, 3, 2]> (x); y = MatMul (x, a)", {}),
    "Concat": ("a = Relu (x); y = Concat <axis = -2> (x, a, x)", {}),
    "Split": ("y, z = Split <axis = 1> (x)", dict(outputs=("z", "y"))),
    "Split in three": ("a, b, y = Split <axis = -1, num_outputs = 3> (x)", dict(outputs=("y", "a", "b"), opset=18)),
    "Split by sizes": ("a, y = Split <axis = 1> (x, n)", dict(n=[1, 3], outputs=("a", "y"))),
    "Reshape": ("y = Reshape (x, n)", dict(n=[0, 2, -1, 8])),
    "Reshape to nothing known": ("y = Reshape (x, n)", dict(n=[-1])),
    "Squeeze": ("y = Squeeze (x, n)", dict(n=[0])),
    "Unsqueeze": ("y = Unsqueeze (x, n)", dict(n=[-1, 1])),
    "Expand": ("a = ReduceMean <axes = [1]> (x); y = Expand (a, n)", dict(n=[2, 4, 1, 1])),
    "Slice": ("y = Slice (x, a, b)", dict(a=[0, 1, 2, -3], b=[9, 3, 2**60, -1])),
    "Slice back": ("y = Slice (x, a, b, n, s)", dict(a=[-1, 6], b=[-(2**60), 1], n=[1, -2], s=[-1, -2])),
    "Slice in steps": ("y = Slice (x, a, b, n, s)", dict(a=[1, 0], b=[7, 100], n=[3, 2], s=[3, 2])),
    "Gather one": ("y = Gather <axis = 1> (x, n)", dict(n=np.int64(-1))),
    "Gather many": ("y = Gather <axis = 2> (x, n)", dict(n=[[0, -1, 3], [1, 1, 2]])),
    "Pad": ("y = Pad (x, n, v)", dict(n=[0, 1, 0, 2, 0, 0, 3, -1], v=1.5)),
    "Pad by reflection": ('y = Pad <mode = "reflect"> (x, n)', dict(n=[0, 1, 0, 2, 0, 0, 3, 1])),
    "Pad by the edge": ('y = Pad <mode = "edge"> (x, n)', dict(n=[0, 1, 0, 2, 0, 0, 3, 1])),
    "Pad some axes": ("y = Pad (x, n, , m)", dict(n=[1, 2, 0, 3], m=[-1, 1], opset=18)),
    "LayerNormalization": ("y = LayerNormalization (x, a, b)", dict(a=np.arange(8.0), b=np.arange(8.0))),
    "LayerNormalization of images": (
        "y = LayerNormalization <axis = 1, epsilon = 0.1> (x, a)",
        dict(a=W.ravel()[:56].reshape(7, 8)),
    ),
    "BatchNormalization": (
        "y = BatchNormalization <epsilon = 0.1> (x, a, b, c, d)",
        dict(a=[1.0, -1, 2, 3], b=[0.1, 0.2, 0.3, 0.4], c=[0.5, 0, 0, 1], d=[1.0, 2, 3, 4]),
    ),
    "InstanceNormalization": ("y = InstanceNormalization (x, a, b)", dict(a=[1.0, -1, 2, 3], b=[0.1, 0.2, 0.3, 0.4])),
    "Constant": ("a = Constant <value_float = 0.5> (); b = Constant <value_floats = [1.0]> (); y = Sum (x, a, b)", {}),
    "Gelu of ONNX Runtime": ("y = com.microsoft.Gelu (x)", {}),
}  # fmt: skip


@pytest.mark.parametrize("text, options", OTHERS.values(), ids=list(OTHERS))
def test_other_operators(text, options):
    check(text, **options)


@pytest.mark.parametrize("attributes", ["", "<transB = 1>", "<alpha = 0.5, beta = 2.0, transA = 1>"])
def test_gemm(attributes):
    a = (5, 3) if "transA" in attributes else (3, 5)
    b = RNG.normal(0, 1, (4, 5) if "transB" in attributes else (5, 4))
    check(f"y = Gemm {attributes} (x, b)", a, b=b)
    check(f"y = Gemm {attributes} (x, b, c)", a, b=b, c=np.arange(4.0))


@pytest.mark.parametrize("operator", ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2"])
def test_reductions(operator):
    check(f"y = {operator} (x)")
    for axes, keep in (([1], 1), ([-1, 2], 0)):
        if operator == "ReduceSum":
            check(f"y = {operator} <keepdims = {keep}> (x, n)", n=axes)
        else:
            check(f"y = {operator} <axes = {axes}, keepdims = {keep}> (x)")
        check(f"y = {operator} <keepdims = {keep}> (x, n)", n=axes, opset=18)


@settings(max_examples=20)
@drawn(st.data())
def test_convolutions_and_pools_of_any_form(data):
    any_window(data)


@slow
@settings(max_examples=1000)
@drawn(st.data())
def test_many_convolutions_and_pools(data):
    any_window(data)


def any_window(data):
    """A convolution or pool is the same in both, whatever its kernel, strides, dilations and padding."""
    kernel = data.draw(st.tuples(*[st.integers(1, 3)] * 2))
    stride, dilation = (data.draw(st.tuples(*[st.integers(1, 3)] * 2)) for _ in range(2))
    pads = [data.draw(st.integers(0, k - 1)) for k in kernel * 2]
    auto = data.draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    own = f"pads = {pads}" if auto == "NOTSET" else f'auto_pad = "{auto}"'
    kind = data.draw(st.sampled_from(["Conv", "ConvTranspose", "MaxPool", "AveragePool"]))
    stride = tuple(map(min, stride, kernel)) if auto.startswith("SAME") else stride  # no negative padding
    dilation = (1, 1) if kind == "AveragePool" or auto.startswith("SAME") else dilation
    common = f"{own}, strides = {list(stride)}"
    common += "" if kind == "AveragePool" else f", dilations = {list(dilation)}"
    if kind.startswith("Conv"):
        group = data.draw(st.sampled_from([1, 2, 4]))
        if kind == "ConvTranspose":
            common = f"pads = {pads}, strides = {list(stride)}, dilations = {list(dilation)}"
            common += f", output_padding = {[data.draw(st.integers(0, s - 1)) for s in stride]}"
        shape = (4, 8 // group, *kernel) if kind == "ConvTranspose" else (8, 4 // group, *kernel)
        weight = np.resize(W, shape)
        check(f"y = {kind} <{common}, group = {group}> (x, w, b)", w=weight, b=np.arange(8.0))
        return
    ceil = data.draw(st.integers(0, 1)) if auto == "NOTSET" else 0
    common += f", kernel_shape = {list(kernel)}, ceil_mode = {ceil}"
    common += f", count_include_pad = {data.draw(st.integers(0, 1))}" if kind == "AveragePool" else ""
    check(f"y = {kind} <{common}> (x)", opset=19)


def test_one_and_three_axes():
    w = np.resize(W, (6, 2, 3))
    check("y = Conv <group = 2, pads = [2, 0], dilations = [2]> (x, w)", (1, 4, 9), w=w)
    check("y = MaxPool <kernel_shape = [3], strides = [2], ceil_mode = 1> (x)", (1, 4, 8))
    check("y = Conv <pads = [1, 0, 1, 0, 1, 1]> (x, w)", (1, 2, 4, 4, 4), w=np.resize(W, (3, 2, 2, 2, 3)))
    check("y = AveragePool <kernel_shape = [2, 2, 2], pads = [1, 0, 1, 0, 1, 1]> (x)", (1, 2, 4, 4, 4))


MODES = [("linear", "floor"), *(("nearest", k) for k in ("round_prefer_floor", "floor", "ceil"))]
COORDINATES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")


@settings(max_examples=30)
@drawn(st.sampled_from(COORDINATES), st.sampled_from(MODES), st.tuples(*[st.integers(1, 17)] * 2), st.booleans())
def test_every_resize_in_the_table(where, mode, sides, by_scales):
    text = f'<coordinate_transformation_mode = "{where}", mode = "{mode[0]}", nearest_mode = "{mode[1]}">'
    if by_scales:
        scales = np.array([1, 1, sides[0] / 7 + 0.01, sides[1] / 8 + 0.01], np.float32)
        check(f"y = Resize {text} (x, , scales)", scales=scales)
    else:
        check(f"y = Resize {text} (x, , , sizes)", sizes=[1, 4, *sides])


# ------------------------------------------------------------------ quantizers


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.uint16])
@pytest.mark.parametrize("domain", ["", "com.microsoft."])
def test_codes_are_those_of_onnx_runtime(kind, domain):
    middle = kind(int(np.iinfo(kind).max) // 3)
    ends = np.iinfo(kind)
    values = [0.5, 1.5, 2.5, -0.5, -1.5, 3.49, ends.min - 0.4, ends.max + 0.6, 1e9, -1e9]
    x = (0.25 * np.float32(values)).reshape(1, -1)
    text = f"q = {domain}QuantizeLinear (x, s, z); y = {domain}DequantizeLinear (q, s, z)"
    graph = network(text, inputs={"x": x.shape}, opset=21, s=0.25, z=middle)
    got, wanted = both(graph, x)
    assert np.array_equal(got[0], wanted[0])


@pytest.mark.parametrize("axis", [1, -1, 0])
def test_scales_of_channels(axis):
    shape = (2, 4, 5, 3)
    x = np.resize(IMAGE, shape)
    size = shape[axis]
    text = f"q = QuantizeLinear <axis = {axis}> (x, s, z); y = DequantizeLinear <axis = {axis}> (q, s, z)"
    scales = np.linspace(0.01, 0.05, size)
    graph = network(text, inputs={"x": shape}, s=scales, z=np.arange(size).astype(np.int8))
    got, wanted = both(graph, x)
    assert np.array_equal(got[0], wanted[0])


def test_codes_pass_what_only_moves_them():
    text = """q = QuantizeLinear (x, s, z)
    a = MaxPool <kernel_shape = [2, 2], pads = [1, 1, 0, 0]> (q)
    b = Transpose <perm = [0, 2, 3, 1]> (a)
    y = DequantizeLinear (b, s, z)"""
    got, wanted = both(network(text, s=0.02, z=np.uint8(100), inputs={"x": IMAGE.shape}))
    assert np.array_equal(got[0], wanted[0])


@pytest.mark.parametrize("block", [0, 2, 3])
def test_four_bit_weights_of_blocks(block):
    codes = onnx.helper.make_tensor("codes", onnx.TensorProto.INT4, (6, 4), RNG.integers(-8, 8, 24))
    rows = -(-6 // block) if block else 1
    scales = RNG.uniform(0.1, 1, (rows, 4)) if block else RNG.uniform(0.1, 1, 4)
    zero = onnx.numpy_helper.from_array(np.zeros((6, 4), np.int8), "codes")
    attributes = f"<axis = 0, block_size = {block}>" if block else "<axis = 1>"
    text = f"w = DequantizeLinear {attributes} (codes, s); y = MatMul (x, w)"
    graph = network(text, inputs={"x": (2, 6)}, opset=21, s=scales, codes=onnx.numpy_helper.to_array(zero))
    graph.constants["codes"].CopyFrom(codes)
    got, wanted = both(graph.infer(), np.resize(IMAGE, (2, 6)))
    np.testing.assert_allclose(got[0], wanted[0], rtol=1e-5)


def test_gradients_go_straight_through_inside_the_range_only():
    graph = network("q = QuantizeLinear (x, s, z); y = DequantizeLinear (q, s, z)", inputs={"x": (1, 6)}, s=0.5,
                    z=np.uint8(10))  # fmt: skip
    form = torch_form(graph)
    scale = form.constants["s"] = torch.tensor(0.5, requires_grad=True)
    x = torch.tensor([[-5.01, -4.9, 0.3, 122.4, 122.6, 1e9]], requires_grad=True)
    form(x)[0].sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 1, 0, 0]]
    inside = [-4.9, 0.3, 122.4]  # Esser et al. 2020: the rounding error inside, the end of the range outside
    wanted = -10 + sum(np.round(v / 0.5) - v / 0.5 for v in inside) + 245 + 245
    assert float(scale.grad) == pytest.approx(wanted, abs=1e-3)


def int8_of(graph, target, images):
    device = rewrite(plain_graph(graph, PROFILES[target]))
    seen = observe_graph(device, images, lambda x: x, progress=False, threads=1)
    return write_qdq(device, range_table(device, ranges(seen, "minmax")), PROFILES[target])


@pytest.mark.parametrize("target", list(PROFILES))
def test_written_graphs(target):
    layers = (conv(6, stride=2), norm(), "HardSwish", residual(conv(6), "Relu"), "GlobalAveragePool", linear(5))
    images = list(RNG.normal(0, 1, (4, 1, 3, 8, 8)).astype(np.float32))
    int8 = int8_of(sequential(*layers), target, images)
    got, wanted = both(int8, images[0])
    step = np.ptp(wanted[0]) / 20  # a sum on the edge between two codes may fall to the other
    assert has_torch_form(int8) and np.abs(got[0] - wanted[0]).max() <= step


# ------------------------------------------------------------------ gradients


def test_gradients_are_those_of_finite_differences():
    text = """a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, w, b)
    c = Gelu (a); d = AveragePool <kernel_shape = [2, 2], pads = [1, 0, 0, 1]> (c)
    e = ReduceL2 <keepdims = 1> (d, ones); f = Div (d, e); g = LayerNormalization (f, s, b2)
    h = Resize <mode = "linear"> (g, , , sizes); y = ReduceMean <keepdims = 0> (h, all)"""
    graph = network(text, opset=20, w=np.resize(W, (2, 3, 3, 3)), b=[0.1, 0.2], ones=[1], s=np.arange(1, 3.0),
                    b2=np.ones(2), sizes=[1, 2, 4, 3], all=[1, 2, 3], inputs={"x": (1, 3, 6, 4)})  # fmt: skip
    form = torch_form(graph)
    x = torch.from_numpy(np.resize(IMAGE, (1, 3, 6, 4))).double().requires_grad_()
    learned = {name: form.constants[name].double().requires_grad_() for name in ("w", "b", "s", "b2")}

    def loss(x, *values):
        form.constants |= dict(zip(learned, values))
        return form(x)[0]

    assert torch.autograd.gradcheck(loss, (x, *learned.values()), atol=1e-4)


# ------------------------------------------------------------------ the contract


def test_given_tensors_stand_for_what_nodes_compute():
    text = "w = DequantizeLinear (codes, s, z); a = MatMul (x, w); b, c = Split <axis = 1> (a); y = Add (b, c)"
    graph = network(text, inputs={"x": (1, 2)}, codes=np.full((2, 4), 100, np.int8), s=0.01, z=np.int8(0))
    form, x = torch_form(graph), torch.tensor([[1.0, 2.0]])
    weight = torch.eye(2).repeat(1, 2).requires_grad_()
    [y] = form(x, given={"w": weight})
    assert y.tolist() == [[2, 4]] and form(x)[0].tolist() == [[6, 6]]
    y.sum().backward()
    assert weight.grad.tolist() == [[1, 1, 1, 1], [2, 2, 2, 2]]
    half = form(x, given={"c": torch.zeros(1, 2)})  # the other output of its node is still computed
    assert half[0].tolist() == [[3, 3]]
    form.constants["s"] = torch.tensor(0.02)
    assert form(x)[0].tolist() == [[12, 12]]
    assert form.constants["codes"].dtype == torch.int8 and form.constants["s"].dtype == torch.float32
    with pytest.raises(InputError, match="no tensor 'ww'; did you mean 'w'"):
        form(x, given={"ww": weight})
    with pytest.raises(InputError, match=r"shape \[2, 2\]; expected \[1, 2\]"):
        form(torch.zeros(2, 2))


UNKNOWN = {
    "Hardmax": "y = Hardmax (x)",
    "mode cubic": 'y = Resize <mode = "cubic"> (x, , , n)',
    "antialias": 'y = Resize <mode = "linear", antialias = 1> (x, , , n)',
    "coordinates half_pixel_symmetric": (
        'y = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel_symmetric"> (x, , , n)'
    ),
    "'i' is read": "y, i = MaxPool <kernel_shape = [2, 2]> (x); j = Cast <to = 1> (i)",
    "is no constant": "i = ArgMax (x); j = Relu (x); y = Gather (j, i)",
    "not known to be float32": "i = ArgMax (x); y = Abs (i)",
    "'a' is not known": "a = Cast <to = 11> (x); y = Cast <to = 1> (a)",
    "nearest_mode": 'y = Resize <nearest_mode = "round_prefer_ceil"> (x, , , n)',
}


@pytest.mark.parametrize("reason", UNKNOWN)
def test_what_has_no_form_is_named(reason):
    graph = network(UNKNOWN[reason], n=[1, 3, 9, 9], opset=19)
    assert not has_torch_form(graph)
    with pytest.raises(ModelError, match="has no form in torch.*; simplify") as caught:
        torch_form(graph)
    assert reason in str(caught.value) or "not in the table" in str(caught.value)


def test_graphs_of_open_size_and_two_inputs_are_refused():
    open_graph_ = network("y = Relu (x)", inputs={"x": ("n", 3)})
    two = network("y = Add (x, z)", inputs={"x": (1, 3), "z": (1, 3)})
    for graph in (open_graph_, two):
        with pytest.raises(ModelError, match="one input of known shape"):
            torch_form(graph)


@slow
def test_torch_is_imported_when_it_is_used():
    code = "import sys, calib_nb.graph.torch_form; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------ ONNX's own cases


def own_cases(cases):
    """(how many have a form, which of them are wrong) of cases of ONNX's backend suite."""
    count, wrong = 0, []
    for name, original, inputs, outputs, tolerance in cases:
        if (adapted := image_model(original, inputs)) is None:
            continue
        model, image = adapted
        try:
            results = outputs_of(model, image, optimize=False)
            form = torch_form(Graph(normal_form(model)[0]).infer())
        except Exception:  # noqa: BLE001, S112 neither ONNX Runtime nor torch has a form; its errors share no base
            continue
        count += 1
        got = [y.numpy() for y in form(torch.from_numpy(image))]
        as_wanted = all(equal(a, b, max(tolerance, 1e-3)) for a, b in zip(got, outputs))
        if not as_wanted and not all(equal(a, b, 1e-4) for a, b in zip(got, results.values())):
            wrong.append(name)
    return count, wrong


@pytest.mark.filterwarnings("ignore")
def test_a_share_of_onnxs_own_cases():
    count, wrong = own_cases(map(folder_case, FOLDERS[::16]))
    assert count >= 3 and wrong == []


@slow
@pytest.mark.filterwarnings("ignore")
def test_all_of_onnxs_own_cases():
    count, wrong = own_cases([*map(folder_case, FOLDERS), *node_cases()])
    assert wrong == [] and count > 400


# ------------------------------------------------------------------ real models

MODELS = ("FastestDet_opset13", "edgeface_xxs_q_dequant", "face_detection_yunet_2023mar", "scrfd_500m_bnkps",
          "person_mobilenet_v2_0.35_128", "retinaface_mobilenet0.25_FaceDetector_heads", "yolov5n-0.5-face",
          "rtmonodepth_s_m_640x192", "vww_mobilenet_v1_0.25_96", "yolov8-lite-t-face")  # fmt: skip


@slow
@pytest.mark.parametrize("name", MODELS)
def test_real_models(real_data, tmp_path, name):
    path = real_data / "models" / f"{name}.onnx"
    if name.startswith("edgeface"):
        path = fix_batch(path, tmp_path / "fixed.onnx")
    graph = simplify(load_graph(path))
    x = RNG.uniform(0, 1, graph.shape(graph.inputs[0])).astype(np.float32)
    with torch.no_grad():
        got, wanted = both(rewrite(graph), x)
    for a, b in zip(got, wanted, strict=True):
        assert np.abs(a - b).max() <= max(1e-4 * np.abs(b).max(), 1e-5)
