"""ONNX's own backend suite through load, simplify and quantize: right, or refused in one line for a known reason.

Each case becomes a model of one image: a convolution by one in front, a reshape to the first float input of the case,
and constants for all its other inputs. So every operator of ONNX stands once behind an image and in front of an output.
"""

import functools
import re
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from calib_nb.core.errors import CalibError
from calib_nb.graph.model import load_graph, run
from calib_nb.graph.simplify import simplify
from calib_nb.quant.quantize import quantize_static

DATA = Path(onnx.backend.test.__file__).parent / "data"
FOLDERS = [p for kind in ("pytorch-converted", "pytorch-operator", "simple") for p in sorted((DATA / kind).iterdir())]
PARTS = 24
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
REASONS = (
    "is already quantized",
    "has control flow",
    "no output of .* depends on its input",
    "cannot be raised from opset",
    "ONNX Runtime cannot run the model",
    "ONNX Runtime cannot run node",
    "the model does not run",
    "holds NaN or infinity",
    "gives NaN or infinity",
    "changes when the model is simplified",
)


# --- cases


def read_value(path, kind):
    """What a file of the suite holds, by the type of the input or output."""
    content, which = path.read_bytes(), kind.WhichOneof("value")
    if which == "sequence_type":
        return numpy_helper.to_list(onnx.SequenceProto.FromString(content))
    if which == "optional_type":
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(content))
    return numpy_helper.to_array(onnx.TensorProto.FromString(content))


def folder_case(folder):
    """Name, model, inputs, outputs and relative tolerance of a case that lies in a folder."""
    model, data = onnx.load(folder / "model.onnx"), folder / "test_data_set_0"
    files = [len(list(data.glob(f"{kind}_*.pb"))) for kind in ("input", "output")]
    inputs = [read_value(data / f"input_{k}.pb", model.graph.input[k].type) for k in range(files[0])]
    outputs = [read_value(data / f"output_{k}.pb", model.graph.output[k].type) for k in range(files[1])]
    return folder.name, model, inputs, outputs, 1e-3


@functools.cache
def node_cases():
    """The cases of single operators, which the package makes again."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [(c.name, c.model, *c.data_sets[0], c.rtol) for c in load_model_tests(kind="node")]


def put_in(model, value, given):
    """Make an input of the case a constant, in place; the nodes that build it, or None when it cannot be one."""
    kind = value.type.WhichOneof("value")
    if kind == "sequence_type" and given and all(isinstance(part, np.ndarray) for part in given):
        names = [f"{value.name}_{k}" for k in range(len(given))]
        model.graph.initializer.extend(map(numpy_helper.from_array, given, names))
        return [helper.make_node("SequenceConstruct", names, [value.name])]
    if kind != "tensor_type":
        return None
    tensor = given if isinstance(given, onnx.TensorProto) else numpy_helper.from_array(np.asarray(given))
    model.graph.initializer.append(tensor)
    model.graph.initializer[-1].name = value.name
    return [] if tensor.data_type == value.type.tensor_type.elem_type else None


def image_model(original, inputs):
    """(model of one image, that image) from a case, or None where an input can be no constant or no float32."""
    most, doubles = np.finfo(np.float32).max, [v for v in inputs if isinstance(v, np.ndarray) and v.dtype == np.float64]
    if any((np.abs(v[np.isfinite(v)]) > most).any() for v in doubles):
        return None  # no image holds such values
    model = onnx.ModelProto()
    model.CopyFrom(original)
    values = list(model.graph.input)[: len(inputs)]

    def fits(value, given):
        tensor = value.type.WhichOneof("value") == "tensor_type" and value.type.tensor_type.elem_type in FLOATS
        return tensor and isinstance(given, np.ndarray | np.generic) and np.size(given)

    chosen = next((k for k, pair in enumerate(zip(values, inputs)) if fits(*pair)), None)
    first = [helper.make_node("Conv", ["image", "one"], ["copy"])]
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "one"))
    image = np.ones((1, 1, 1, 1), np.float32)
    for k, (value, given) in enumerate(zip(values, inputs)):
        if k != chosen:
            built = put_in(model, value, given)
            if built is None:
                return None
            first += built
            continue
        given, element = np.asarray(given), value.type.tensor_type.elem_type
        image = given.astype(np.float32).reshape(1, 1, 1, -1)
        model.graph.initializer.append(numpy_helper.from_array(np.array(given.shape, np.int64), "own_shape"))
        own = value.name if element == TensorProto.FLOAT else "reshaped"
        first.append(helper.make_node("Reshape", ["copy", "own_shape"], [own]))
        if element != TensorProto.FLOAT:
            first.append(helper.make_node("Cast", [own], [value.name], to=element))
    if chosen is None:
        model.graph.output.append(helper.make_tensor_value_info("copy", TensorProto.FLOAT, [1, 1, 1, 1]))
    if not any(o.domain in ("", "ai.onnx") for o in model.opset_import):
        model.opset_import.append(helper.make_opsetid("", 17))
    nodes = list(model.graph.node)
    del model.graph.input[:], model.graph.node[:]
    model.graph.input.append(helper.make_tensor_value_info("image", TensorProto.FLOAT, image.shape))
    model.graph.node.extend(first + nodes)
    return model, image


# --- judgement


def equal(got, wanted, tolerance):
    """Whether a result is what the suite expects, whatever type of value it is."""
    if isinstance(wanted, onnx.TensorProto):
        wanted = numpy_helper.to_array(wanted)
    if isinstance(wanted, list | tuple):
        return (
            isinstance(got, list) and len(got) == len(wanted) and all(map(equal, got, wanted, [tolerance] * len(got)))
        )
    if wanted is None:
        return got is None
    got, wanted = np.asarray(got), np.asarray(wanted)
    if got.shape != wanted.shape:
        return False
    if wanted.dtype.kind in "SUO":
        return got.astype(object).tolist() == wanted.astype(object).tolist()
    if wanted.dtype.kind == "c":
        return np.allclose(got, wanted, rtol=tolerance)
    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    return np.allclose(got, wanted, rtol=tolerance, atol=1e-5, equal_nan=True)


def outputs_of(model, image, *, optimize):
    """What ONNX Runtime makes of a model or file, by name."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, {i.name: image for i in session.get_inputs()})))


def runtime_agrees(model, image, got):
    """Whether ONNX Runtime itself gives this on the file as it is: then the suite's value is not ours to keep."""
    try:
        results = outputs_of(model, image, optimize=False)
    except Exception:  # noqa: BLE001 ONNX Runtime's own exceptions share no base
        return False
    return all(equal(got[name], value, 1e-4) for name, value in results.items())


def refusal(error):
    """ "" for an error of one line with a known reason; else what is wrong with it."""
    text = str(error)
    known = any(re.search(reason, text) for reason in REASONS)
    return "" if known and "\n" not in text else f"refused without a known reason: {text}"


def fault(case, folder, refused):
    """What is wrong with the product on one case, or ""; a refusal goes to the list `refused`."""
    _, original, inputs, outputs, tolerance = case
    if (adapted := image_model(original, inputs)) is None:
        return ""
    model, image = adapted
    path = folder / "case.onnx"
    path.write_bytes(model.SerializeToString())
    half = {v.type.tensor_type.elem_type for v in (*original.graph.input, *original.graph.output)}
    tolerance = 2e-2 if TensorProto.BFLOAT16 in half else max(tolerance, 5e-3 if TensorProto.FLOAT16 in half else 1e-3)
    try:
        got = run(simplify(load_graph(path)), image)
        for name, wanted in zip([o.name for o in original.graph.output], outputs):
            if not equal(got[name], wanted, tolerance) and not runtime_agrees(model, image, got):
                return f"output '{name}' of the simplified graph is wrong"
    except CalibError as e:
        refused.append(str(e))
        return refusal(e)
    for profile in ("ort-cpu", "per-tensor-npu"):
        try:
            images = [np.zeros((1, 1, 3), np.uint8)]
            quantize_static(path, images, lambda _: image, folder / "int8.onnx", profile=profile, progress=False)
        except CalibError as e:
            refused.append(str(e))
            if wrong := refusal(e):
                return wrong
            continue
        plain, fast = (outputs_of(folder / "int8.onnx", image, optimize=o) for o in (False, True))
        for name, value in plain.items():
            if isinstance(value, np.ndarray) and value.dtype == np.float32 and value.shape == fast[name].shape:
                finite = np.isfinite(value)
                step = 0.05 * np.abs(value[finite]).max(initial=1e-6)  # kernels may round a code the other way
                if np.abs(value[finite] - fast[name][finite]).max(initial=0) > step:
                    return f"{profile}: ONNX Runtime's integer kernels give another '{name}' than the nodes say"
    return ""


def judged(case, folder, refused):
    """The fault of a case with its name, raw errors included."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", RuntimeWarning)
            wrong = fault(case, folder, refused)
    except Exception as e:  # noqa: BLE001 any error of another family is what this looks for
        wrong = f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
    return f"{case[0]}: {wrong}" if wrong else ""


@pytest.mark.parametrize("folder", FOLDERS[::7], ids=lambda folder: folder.name)
def test_a_case_is_right_or_refused(folder, tmp_path):
    assert judged(folder_case(folder), tmp_path, []) == ""


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_case_is_right_or_refused(part, tmp_path):
    cases = [*map(folder_case, FOLDERS[part::PARTS]), *node_cases()[part::PARTS]]
    refusals = [[] for _ in cases]
    assert [wrong for case, own in zip(cases, refusals) if (wrong := judged(case, tmp_path, own))] == []
    # Two in nine are refused: quantized already, loops, not a number, operators that this ONNX Runtime does not have.
    assert len(cases) > 60 and sum(map(bool, refusals)) < len(cases) / 2
