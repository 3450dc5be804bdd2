"""Files that other people's tools write in their own way: each gives what its plain form gives, or one clear line."""

import warnings

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import TensorProto, helper, numpy_helper

from calib_nb.core.errors import ModelError
from calib_nb.graph.build import network
from calib_nb.graph.contract import model_digest, model_mb, read_contract
from calib_nb.graph.fixed import fix_batch, require_runs
from calib_nb.graph.linear import rewrite
from calib_nb.graph.model import Graph, load_graph, open_graph, run
from calib_nb.graph.normal import normal_form, open_shapes, sort_nodes
from calib_nb.graph.simplify import difference, first_difference, float_variants, simplify
from calib_nb.quant.quantize import quantize_static

IMAGES = [np.full((1, 1, 3), k, np.uint8) for k in range(4)]


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.5, shape).astype(np.float32)


def tensor_of(image):
    """A network input that differs from image to image."""
    return drawn(1, 3, 8, 8, seed=int(image[0, 0, 0]))


def plain_model():
    """Two convolutions, each with a ReLU."""
    text = "c = Conv <dilations = [1, 1]> (x, w); a = Relu (c); d = Conv <strides = [1, 1]> (a, k); y = Relu (d)"
    return network(text, w=drawn(8, 3, 3, 3), k=drawn(4, 8, 1, 1)).model


def write(folder, model):
    path = folder / "model.onnx"
    path.write_bytes((model.model if isinstance(model, Graph) else model).SerializeToString())
    return path


def quantized(path, profile="ort-cpu"):
    """The outputs of the INT8 file on the first image, by name."""
    output = path.with_name("int8.onnx")
    quantize_static(path, IMAGES, tensor_of, output, profile=profile, progress=False)
    return run(Graph(onnx.load(output)), tensor_of(IMAGES[0]))


# --- names, order, functions, versions, types


def _named_as_outputs(model):
    for node in model.graph.node:
        node.name = node.output[0]


def _named_alike(model):
    for node in model.graph.node:
        node.name = "node"


def _named_as_a_weight(model):
    for node in model.graph.node:
        node.name = "w"


def _reversed(model):
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)


def _reversed_and_named_as_outputs(model):
    _named_as_outputs(model)
    _reversed(model)


def _with_functions(model):
    body = [helper.make_node("Conv", ["X", "W"], ["t"]), helper.make_node("Relu", ["t"], ["Y"])]
    calls = [helper.make_node("Block", i, o, domain="mine") for i, o in ((["x", "w"], ["a"]), (["a", "k"], ["y"]))]
    outer = helper.make_function("mine", "Outer", ["X", "W"], ["Y"], [calls[0]], [helper.make_opsetid("mine", 1)])
    outer.node[0].input[:], outer.node[0].output[:] = ["X", "W"], ["Y"]
    calls[0].op_type = "Outer"  # a function that calls a function
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(calls)
    model.functions.extend(
        [helper.make_function("mine", "Block", ["X", "W"], ["Y"], body, [helper.make_opsetid("", 17)]), outer]
    )
    model.opset_import.append(helper.make_opsetid("mine", 1))


def _sparse(model):
    for weight in list(model.graph.initializer):
        values = numpy_helper.to_array(weight)
        sparse = onnx.SparseTensorProto(dims=values.shape)
        sparse.values.CopyFrom(numpy_helper.from_array(values.ravel(), weight.name))
        places = np.argwhere(np.ones(values.shape)) if weight.name == "w" else np.arange(values.size)
        sparse.indices.CopyFrom(numpy_helper.from_array(places.astype(np.int64), f"{weight.name}_places"))
        model.graph.sparse_initializer.append(sparse)
    del model.graph.initializer[:]


def _constant_as_output(model):
    model.graph.output.append(helper.make_tensor_value_info("k", TensorProto.FLOAT, [4, 8, 1, 1]))


def _image_as_output(model):
    model.graph.output.append(model.graph.input[0])


def _other_domain_name(model):
    model.opset_import[0].domain = "ai.onnx"
    for node in model.graph.node:
        node.domain = "ai.onnx"


def _weights_as_inputs(model):
    model.ir_version = 3
    for weight in model.graph.initializer:
        model.graph.input.insert(0, helper.make_tensor_value_info(weight.name, TensorProto.FLOAT, weight.dims))


def _opset(version):
    def change(model):
        model.opset_import[0].version = version

    change.__name__ = f"_opset_{version}"
    return change


def _newest_format(model):
    model.ir_version = onnx.IR_VERSION


ODD = [
    *(_named_as_outputs, _named_alike, _named_as_a_weight, _reversed, _reversed_and_named_as_outputs, _with_functions),
    *(_sparse, _constant_as_output, _image_as_output, _other_domain_name, _weights_as_inputs),
    *map(_opset, (7, 8, 24, 25, 28)),
    _newest_format,
]


@pytest.mark.parametrize("change", ODD, ids=lambda change: change.__name__.strip("_"))
def test_an_odd_file_is_the_network_that_it_was(tmp_path, change):
    plain = plain_model()
    wanted = {k: run(Graph(plain), tensor_of(i))["y"] for k, i in enumerate(IMAGES)}
    odd = plain_model()
    change(odd)
    path = write(tmp_path, odd)
    simple = simplify(load_graph(path))
    assert [n.op_type for n in simple.nodes if n.op_type != "Identity"] == ["Conv", "Relu"] * 2
    for k, image in enumerate(IMAGES):
        assert np.allclose(run(simple, tensor_of(image))["y"], wanted[k], atol=1e-5)
    for profile in ("ort-cpu", "per-tensor-npu"):
        outputs = quantized(path, profile)
        assert np.abs(outputs["y"] - wanted[0]).max() < 0.1 * wanted[0].max()
    if change is _constant_as_output:
        assert np.array_equal(outputs["k"], drawn(4, 8, 1, 1))
    if change is _image_as_output:
        assert np.abs(outputs["x"] - tensor_of(IMAGES[0])).max() < 0.05


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_other_float_types_become_float32(tmp_path, kind, caplog):
    element = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "float64": TensorProto.DOUBLE}[kind]
    model = plain_model()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.elem_type = element
    del model.graph.value_info[:]
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight)
        weight.CopyFrom(helper.make_tensor(weight.name, element, values.shape, values.ravel()))
    path = write(tmp_path, model)
    graph = load_graph(path)
    load_graph(path)
    assert [r.getMessage() for r in caplog.records] == [f"{path}: {kind} is computed as float32"]
    assert all(graph.is_float(name) for name in ("x", "c", "y", "w"))
    image = tensor_of(IMAGES[0])
    wanted = run(Graph(plain_model()), image)["y"]
    share = {"float16": 2**-9, "bfloat16": 2**-6, "float64": 1e-6}[kind]
    assert np.abs(run(graph, image)["y"] - wanted).max() < share * wanted.max()
    assert np.abs(quantized(path)["y"] - wanted).max() < 0.1 * wanted.max()


def test_a_converted_float16_file_loads(tmp_path):
    """With casts at its ends, and nodes that the converter leaves out of order."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    wanted = run(Graph(plain_model()), tensor_of(IMAGES[0]))["y"]
    for keep in (True, False):
        path = write(tmp_path, convert_float_to_float16(plain_model(), keep_io_types=keep))
        simple = simplify(load_graph(path))
        assert [n.op_type for n in simple.nodes] == ["Conv", "Relu"] * 2
        assert np.abs(run(simple, tensor_of(IMAGES[0]))["y"] - wanted).max() < 5e-3 * wanted.max()


def test_an_upsample_of_opset_7_is_a_resize(tmp_path):
    old = network("y = Conv (x, w)", w=drawn(2, 3, 1, 1), opset=7).model
    old.graph.node[0].output[0] = "c"
    old.graph.node.append(helper.make_node("Upsample", ["c"], ["y"], mode="nearest", scales=[1.0, 1.0, 2.0, 2.0]))
    old.graph.output[0].type.tensor_type.ClearField("shape")
    simple = simplify(load_graph(write(tmp_path, old)))
    image = tensor_of(IMAGES[0])
    twice = run(Graph(network("y = Conv (x, w)", w=drawn(2, 3, 1, 1)).model), image)["y"].repeat(2, 2).repeat(2, 3)
    assert np.allclose(run(simple, image)["y"], twice, atol=1e-6)


def test_what_has_no_normal_form_is_one_line(tmp_path):
    def refused(model, match):
        with pytest.raises(ModelError, match=match) as caught:
            load_graph(write(tmp_path, model))
        assert "\n" not in str(caught.value)

    circle = plain_model()
    circle.graph.node[0].input[0] = "y"
    refused(circle, "waits for its own result")
    twice = plain_model()
    twice.graph.node[2].output[0] = "a"
    refused(twice, "tensor 'a' is made by two nodes")
    blind = plain_model()
    blind.graph.node[0].input[0] = "w"
    refused(blind, "no output of .* depends on its input 'x'")
    bare = plain_model()
    bare.opset_import[0].domain = "mine"
    refused(bare, "names no version of the standard operators")
    large = plain_model()
    _sparse(large)
    large.graph.sparse_initializer[0].dims[:] = [2**20, 2**20]
    refused(large, "has 2 GiB or more")
    endless = plain_model()
    _with_functions(endless)
    endless.functions[0].node[0].op_type, endless.functions[0].node[0].domain = "Outer", "mine"
    with pytest.raises(ModelError) as caught:  # two functions that call each other
        load_graph(write(tmp_path, endless))
    assert "\n" not in str(caught.value)


def test_nodes_in_order_stay_where_they_are():
    graph = network("b = Relu (x); a = Abs (x); y = Add (a, b)").model.graph
    before = graph.SerializeToString()
    sort_nodes(graph)
    assert graph.SerializeToString() == before


def test_the_normal_form_leaves_the_model_alone():
    for change in ODD:
        model = plain_model()
        change(model)
        before = model.SerializeToString(deterministic=True)
        normal_form(model)
        assert model.SerializeToString(deterministic=True) == before


# --- shapes that depend on the image, sequences, empty tensors


def test_shapes_that_depend_on_the_image_stay_open(tmp_path):
    text = """
        c = Conv (x, w)
        r = Relu (c)
        z = NonZero (r)
        t = Transpose <perm = [1, 0]> (z)
        v = GatherND (r, t)
        h = Mul (v, two)
        s = Shape (c)
        e = Reshape (r, s)
        y = Conv (e, k)
    """
    model = network(text, w=drawn(8, 3, 3, 3), two=np.float32(2), k=drawn(2, 8, 1, 1), outputs=("y", "h"))
    path = write(tmp_path, model)
    graph = load_graph(path)
    assert open_shapes(graph) == {"z", "t", "v", "h"} and graph.shape("e") == (1, 8, 6, 6)
    assert not graph.is_float("h") and graph.is_float("e")
    counts = set()
    for k, image in enumerate(IMAGES):
        wanted = run(Graph(model.model), tensor_of(image))
        counts.add(len(wanted["h"]))
        assert np.allclose(run(simplify(graph), tensor_of(image))["h"], wanted["h"], atol=1e-5), k
    assert len(counts) > 1
    for profile in ("ort-cpu", "per-tensor-npu"):
        outputs = quantized(path, profile)
        wanted = run(Graph(model.model), tensor_of(IMAGES[0]))
        assert np.abs(outputs["y"] - wanted["y"]).max() < 0.1 * np.abs(wanted["y"]).max()
        assert outputs["h"].ndim == 1 and outputs["h"].size
    written = read_contract(tmp_path / "int8.onnx")
    assert isinstance({o.name: o.shape for o in written.outputs}["h"][0], str)


@pytest.mark.parametrize(
    "tail",
    ["y = ArgMax <axis = 1> (c)", "r = Relu (c); y = NonZero (r)", "y = Cast <to = 8> (c)"],
    ids=["classes", "places", "texts"],
)
def test_a_network_whose_outputs_are_no_floats_is_quantized(tmp_path, tail):
    from calib_nb.quant.recipe import auto

    model = network(f"c = Conv (x, w); {tail}", w=drawn(4, 3, 3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        recipe = auto(write(tmp_path, model), IMAGES, tensor_of, tmp_path / "q.onnx", steps=("clip",), progress=False)
    assert recipe.model.int8_share == 1
    kind = onnx.load(recipe.model.path).graph.output[0].type.tensor_type.elem_type
    assert kind == (TensorProto.STRING if "Cast" in tail else TensorProto.INT64)


@pytest.mark.parametrize(
    "text, constants",
    [
        ("c = Conv (x, w); s = SequenceConstruct (c, c); y = ConcatFromSequence <axis = 1> (s)", {}),
        (
            "c = Conv (x, w); s = SplitToSequence <axis = 1> (c, n); e = SequenceAt (s, o); y = Relu (e)",
            {"n": 2, "o": 1},
        ),
        ("c = Conv (x, w); e = Slice (c, o, o, a); y = Concat <axis = 1> (c, e)", {"o": [0], "a": [1]}),
        ("c = Conv (x, w); m = ReduceMean <keepdims = 0> (c); y = Mul (c, m)", {}),
        ("c = Conv (x, w); y = Mul (c, o)", {"o": np.float32(0)}),
        (
            "c = Conv (x, w); a = Clip (c, o, h); y = Conv (a, v)",
            {"o": np.float32([0]), "h": np.float32([1]), "v": "1x1"},
        ),
    ],
    ids=["sequence", "split to sequence", "empty", "0-d", "times zero", "bounds of one element"],
)
def test_unusual_tensors_pass(tmp_path, text, constants):
    values = {k: drawn(2, 4, 1, 1) if isinstance(v, str) else np.asarray(v) for k, v in constants.items()}
    model = network(text, w=drawn(4, 3, 3, 3), **values)
    image, path = tensor_of(IMAGES[0]), write(tmp_path, model)
    wanted = onnx.reference.ReferenceEvaluator(model.model).run(None, {"x": image})[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.allclose(run(rewrite(simplify(load_graph(path))), image)["y"], wanted, atol=1e-5)
        for profile in ("ort-cpu", "per-tensor-npu"):
            assert np.abs(quantized(path, profile)["y"] - wanted).max() <= 0.1 * np.abs(wanted).max() + 1e-6


def test_a_dropout_in_training_is_not_taken_for_none(tmp_path):
    text = "c = Conv (x, w); y = Dropout <seed = 1> (c, ratio, training)"
    constants = dict(w=drawn(4, 3, 1, 1), ratio=np.float32(0.5))
    kept = network(text, training=np.array(True), **constants)
    dropped = network(text, training=np.array(False), **constants)
    assert [n.op_type for n in simplify(load_graph(write(tmp_path, kept))).nodes] == ["Conv", "Dropout"]
    assert [n.op_type for n in simplify(load_graph(write(tmp_path, dropped))).nodes] == ["Conv"]


def test_a_division_by_zero_is_no_warning(tmp_path):
    divisor = np.ones((1, 4, 1, 1), np.float32)
    divisor[0, 0] = 0
    norm = dict(scale=np.ones(4), shift=np.zeros(4), mean=np.zeros(4), var=np.zeros(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for text, constants in (
            ("c = Conv (x, w); y = Div (c, d)", {"d": divisor}),
            ("c = Conv (x, w); y = BatchNormalization <epsilon = 0.0> (c, scale, shift, mean, var)", norm),
        ):
            graph = load_graph(write(tmp_path, network(text, w=drawn(4, 3, 1, 1), **constants)))
            assert not np.isfinite(run(simplify(graph), np.ones((1, 3, 8, 8), np.float32))["y"]).all()


# --- convolutions of one and three dimensions, under the whole recipe


@pytest.mark.parametrize(
    "text, constants",
    [
        (
            """
            c = Conv <pads = [1, 1, 1, 1]> (x, w)
            g = GlobalAveragePool (c)
            l = Reshape (g, row)
            u = Conv <pads = [1, 1]> (l, k)
            s = Sigmoid (u)
            f = Reshape (s, back)
            m = Mul (c, f)
            y = Conv (m, v)
            """,
            {"row": [1, 1, 8], "k": (1, 1, 3), "back": [1, 8, 1, 1], "v": (4, 8, 1, 1)},
        ),
        (
            """
            c = Conv (x, w)
            u = Unsqueeze (c, a)
            d = Conv <pads = [0, 1, 1, 0, 1, 1]> (u, k)
            r = Relu (d)
            y = Conv (r, v)
            """,
            {"a": [2], "k": (6, 8, 1, 3, 3), "v": (4, 6, 1, 1, 1)},
        ),
        (
            "c = Conv (x, w); l = Reshape (c, row); d = ConvTranspose (l, k); r = Relu (d); y = ConvTranspose (r, v)",
            {"row": [1, 8, 36], "k": (8, 6, 3), "v": (6, 4, 3)},
        ),
    ],
    ids=["ECA attention", "3-D", "transposed 1-D"],
)
def test_convolutions_of_other_dimensions_under_auto(tmp_path, text, constants):
    from calib_nb.quant.recipe import auto

    values = {k: drawn(*v) if isinstance(v, tuple) else np.array(v) for k, v in constants.items()}
    model = network(text, w=drawn(8, 3, 3, 3), **values)
    path, wanted = write(tmp_path, model), run(model, tensor_of(IMAGES[0]))["y"]
    steps = ("equalize", "bias")  # those that look at channels
    for profile in ("ort-cpu", "per-tensor-npu"):
        recipe = auto(path, IMAGES, tensor_of, tmp_path / "q.onnx", profile=profile, steps=steps, progress=False)
        assert recipe.model.int8_share == 1 and len(recipe.steps) >= 2
        int8 = run(Graph(onnx.load(recipe.model.path)), tensor_of(IMAGES[0]))["y"]
        assert np.abs(int8 - wanted).max() < 0.1 * np.abs(wanted).max()


# --- equal up to what float32 does


def test_the_measure_of_equality_is_float32_itself():
    """A sigmoid in its far tail, as in text detectors: the map's maximum is 1e-5, float32's own steps are 1e-8."""
    norm = dict(s=drawn(8) + 1, b=drawn(8), m=drawn(8), v=np.abs(drawn(8)) + 0.5)
    text = "c = Conv (x, w); n = BatchNormalization (c, s, b, m, v); r = Relu (n); d = Conv (r, k, z); y = Sigmoid (d)"
    for bias in (-8, -16, -60, -100):
        graph = network(text, w=drawn(8, 3, 3, 3), k=drawn(1, 8, 1, 1), z=np.float32([bias]), **norm)
        assert [n.op_type for n in simplify(graph).nodes] == ["Conv", "Relu", "Conv", "Sigmoid"]


def test_a_wrong_graph_is_seen_in_the_tail_too():
    text = "d = Conv (x, k, z); y = Sigmoid (d)"
    right, wrong = (network(text, k=drawn(1, 3, 1, 1), z=np.float32([bias])) for bias in (-8, -8.1))
    image = tensor_of(IMAGES[0])
    results = [run(g, image) for g in (right, wrong)]
    assert first_difference(*results, 1e-4, lambda: float_variants(right, image)) == "y"
    assert first_difference(results[0], run(right, image), 1e-4) == ""


def test_difference_of_what_nodes_may_return():
    assert difference(None, None) == 0 and difference(None, np.ones(1)) == np.inf
    assert difference([], []) == 0 and difference([np.ones(2)], [np.ones(3)]) == np.inf
    assert difference(np.array([np.inf, 1]), np.array([np.inf, 1.5])) == 0.5
    assert difference(np.array([np.inf]), np.array([-np.inf])) == np.inf
    assert difference(np.array([True]), np.array([False])) == 1


# --- weights beside the file; sizes that cannot be


def test_weights_beside_the_file_count(tmp_path):
    def save(model, name):
        onnx.save(model, tmp_path / name, save_as_external_data=True, location=f"{name}.data", size_threshold=0)
        return tmp_path / name

    first = save(plain_model(), "a.onnx")
    contract = read_contract(first)
    data = (tmp_path / "a.onnx.data").stat().st_size
    assert contract.weight_bytes == data >= 4 * contract.parameters == 4 * (8 * 3 * 9 + 4 * 8)
    assert model_mb(first) == (first.stat().st_size + data) / 1e6
    before, file = model_digest(first), first.read_bytes()
    weights = bytearray((tmp_path / "a.onnx.data").read_bytes())
    weights[5] ^= 1
    (tmp_path / "a.onnx.data").write_bytes(weights)
    assert first.read_bytes() == file and model_digest(first) != before
    inside = write(tmp_path, plain_model())
    assert model_digest(inside) != before and read_contract(inside).weight_bytes == 0


def test_weights_beside_the_file_may_lie_in_attributes(tmp_path):
    model = network("k = Constant <value_floats = [1.0]> (); y = Add (x, k)").model
    values = numpy_helper.from_array(np.ones(64, np.float32), "v")
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.append(helper.make_attribute("value", values))
    onnx.save(
        model,
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
        convert_attribute=True,
    )
    assert read_contract(tmp_path / "m.onnx").external_data == ("m.data",)
    (tmp_path / "m.data").unlink()
    with pytest.raises(ModelError, match="'m.data' of .* is missing"):
        read_contract(tmp_path / "m.onnx")


def test_a_size_that_the_network_cannot_compute_with(tmp_path, real_data):
    """YuNet wants sides that 32 divides: no rule says so, its own run does."""
    model = onnx.load(real_data / "models" / "face_detection_yunet_2023mar.onnx")
    for width, height, runs in ((512, 384, True), (500, 375, False), (496, 368, False)):
        for dim, side in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], (height, width)):
            dim.dim_value = side
        for output in model.graph.output:
            output.type.tensor_type.ClearField("shape")
        path = write(tmp_path, model)
        if runs:
            require_runs(path)
        else:
            with pytest.raises(ModelError, match=f"not {width}x{height}"):
                require_runs(path)


def test_fix_batch_of_lists_and_texts(tmp_path):
    text = "s = SplitToSequence <axis = 1> (x, n); t = Cast <to = 8> (x); c = Conv (x, w)"
    model = network(text, inputs={"x": ("batch", 3, 4, 4)}, n=np.array(1), w=drawn(2, 3, 1, 1), outputs=("s", "t", "c"))
    fixed = fix_batch(write(tmp_path, model), tmp_path / "b1.onnx")
    outputs = open_graph(Graph(onnx.load(fixed))).run(None, {"x": np.ones((1, 3, 4, 4), np.float32)})
    assert len(outputs[0]) == 3 and outputs[1].dtype == object and outputs[2].shape == (1, 2, 4, 4)


def test_sizes_and_hashes_of_a_quantized_model_count_the_weights_beside_it(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(plain_model(), path, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    models = []
    for k in range(2):
        weights = bytearray((tmp_path / "m.onnx.data").read_bytes())
        weights[3] ^= k
        (tmp_path / "m.onnx.data").write_bytes(weights)
        models.append(quantize_static(path, IMAGES, tensor_of, tmp_path / "q.onnx", progress=False))
    assert models[0].model_sha256 != models[1].model_sha256 == model_digest(path)
    assert models[0].float_size_mb * 1e6 == path.stat().st_size + (tmp_path / "m.onnx.data").stat().st_size


def test_a_float16_model_is_compared_with_its_int8_model(tmp_path):
    from onnxruntime.transformers.float16 import convert_float_to_float16

    from calib_nb.graph.contract import Float32Session, open_session

    half = convert_float_to_float16(plain_model(), keep_io_types=False)
    path = write(tmp_path, half)
    session = open_session(path)
    assert isinstance(session, Float32Session) and session.get_inputs()[0].type == "tensor(float16)"
    (outputs,), image = session.run(None, {"x": tensor_of(IMAGES[0])}), tensor_of(IMAGES[0])
    wanted = run(Graph(plain_model()), image)["y"]
    assert outputs.dtype == np.float32 and np.abs(outputs - wanted).max() < 5e-3 * wanted.max()
    require_runs(path)
    for value, name in ((half.graph.input[0], "n"), (half.graph.output[0], "n")):
        value.type.tensor_type.shape.dim[0].dim_param = name
    fixed = fix_batch(write(tmp_path, half), tmp_path / "b1.onnx")
    assert read_contract(fixed).inputs[0].shape == (1, 3, 8, 8)
