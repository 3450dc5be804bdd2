"""Quantizing: what is written is checked, repeatable, whole or absent; refusals are one line."""

import logging
import os
import signal
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib_nb.core.errors import ImageError, InputError, ModelError
from calib_nb.core.run import sha256_file
from calib_nb.graph import build
from calib_nb.graph.contract import open_session, read_contract
from calib_nb.graph.fixed import fix_batch
from calib_nb.quant.quantize import images_digest, quantize_static, read_history
from calib_nb.quant.ranges import RANGE_METHODS
from calib_nb.quant.target import PROFILES, Profile, profile


def network(path, *, opset=17, shape=(1, 3, 16, 16), bias=0.0):
    """Conv, BatchNorm, ReLU, pooling, MatMul with drawn weights, as a file with input "input" and output "output"."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.normal(0, 0.3, (8, 3, 3, 3)),
        "g": rng.uniform(0.5, 2, 8),
        "b": np.full(8, bias),
        "m": rng.normal(0, 0.1, 8),
        "v": rng.uniform(0.5, 2, 8),
        "f": rng.normal(0, 0.3, (8, 5)),
    }
    text = """c = Conv (input, w)
        n = BatchNormalization (c, g, b, m, v)
        r = Relu (n)
        p = GlobalAveragePool (r)
        h = Flatten (p)
        output = MatMul (h, f)"""
    return build.network(text, inputs={"input": shape}, opset=opset, **weights).save(path)


def scale(bgr):
    return (bgr.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]


@pytest.fixture(scope="module")
def images():
    return list(np.random.default_rng(1).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8))


@pytest.fixture
def model(tmp_path):
    return network(tmp_path / "float.onnx")


def run(path, image):
    return open_session(path).run(None, {"input": scale(image)})[0].ravel()


@pytest.mark.parametrize("target", PROFILES)
@pytest.mark.parametrize("method", RANGE_METHODS)
@pytest.mark.parametrize("opset", [11, 17])
def test_every_profile_and_method_comes_close_to_float(tmp_path, images, target, method, opset):
    model = network(tmp_path / "float.onnx", opset=opset)
    before = sha256_file(model)
    result = quantize_static(
        model, images, scale, tmp_path / "int8.onnx", profile=target, method=method, progress=False
    )
    assert sha256_file(model) == before
    assert read_contract(result.path).quantized and result.images == 12
    onnx.checker.check_model(str(result.path), full_check=True)
    expected, got = run(model, images[0]), run(result.path, images[0])
    share = 0.1 if method in ("ema", "iqr") else 0.05  # these two leave the extremes of some images out on purpose
    assert np.abs(expected - got).max() < share * np.abs(expected).max()


@pytest.mark.parametrize("target", PROFILES)
def test_the_file_has_what_the_profile_says(tmp_path, model, images, target):
    facts = profile(target)
    proto = onnx.load(
        quantize_static(model, images, scale, tmp_path / "int8.onnx", profile=target, progress=False).path
    )
    values = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    conv = next(n for n in proto.graph.node if n.op_type == "Conv")
    producer = {n.output[0]: n for n in proto.graph.node}
    activation, weight = (producer[name] for name in conv.input[:2])
    weight_scale, weight_zero, weight_values = (values[weight.input[k]] for k in (1, 2, 0))
    assert weight_scale.size == (8 if facts.weight_per_channel else 1) and weight_values.dtype == np.int8
    assert not facts.weight_symmetric or not weight_zero.any()
    assert facts.weight_levels[0] <= weight_values.min() and weight_values.max() <= facts.weight_levels[1]
    assert np.abs(weight_values.astype(int)).max() >= 64, (
        "at most one bit is given away, to sums that must not saturate"
    )
    assert (
        values[activation.input[2]].dtype == (np.int8 if facts.activation_signed else np.uint8)
        and values[activation.input[1]].size == 1
    )


def test_minmax_is_the_observed_range(tmp_path, model, images):
    proto = onnx.load(quantize_static(model, images, scale, tmp_path / "int8.onnx", progress=False).path)
    values = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    first = next(n for n in proto.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "input")
    x = np.stack([scale(p) for p in images])
    low, high = min(x.min(), 0), max(x.max(), 0)
    steps = 254 if low == -high else 255  # the pixels of a range around zero would lie halfway between two codes
    assert np.isclose(values[first.input[1]], (high - low) / steps, rtol=1e-6)


def test_equal_inputs_give_equal_bytes_in_every_process(tmp_path, model, images):
    np.save(tmp_path / "images.npy", np.stack(images))
    code = """if True:
        import sys, numpy as np
        from calib_nb.quant.quantize import quantize_static
        def scale(bgr):
            return (bgr.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]
        images = list(np.load(sys.argv[2]))
        quantize_static(sys.argv[1], images, scale, sys.argv[3], method="kl", progress=False)"""
    digests = set()
    for seed in ("1", "2"):
        output = tmp_path / f"{seed}.onnx"
        command = [sys.executable, "-c", code, model, tmp_path / "images.npy", output]
        subprocess.run(list(map(str, command)), check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        digests.add(sha256_file(output))
    assert len(digests) == 1


def test_history_is_in_the_file(tmp_path, model, images):
    result = quantize_static(
        model, images, scale, tmp_path / "int8.onnx", profile="xnnpack", method="percentile", progress=False
    )
    history = read_history(result.path)
    assert history["profile"] == "xnnpack" and history["method"] == "percentile" and history["images"] == "12"
    assert (
        history["images_sha256"] == images_digest(images)
        and history["model_sha256"] == sha256_file(model)
        and "onnxruntime" in history["versions"]
    )


def test_paths_and_arrays_are_alike(tmp_path, model, images):
    import cv2

    paths = [tmp_path / f"{k}.png" for k in range(12)]
    for path, image in zip(paths, images, strict=True):
        cv2.imwrite(str(path), image)
    a, b = (
        onnx.load(quantize_static(model, images, scale, tmp_path / "int8.onnx", progress=False).path)
        for images in (paths, images)
    )
    assert a.graph == b.graph
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(ImageError, match="0.png"):
        quantize_static(model, paths, scale, tmp_path / "bad.onnx", progress=False)
    assert not (tmp_path / "bad.onnx").exists()


def refuse(match, error, *arguments, **options):
    output = arguments[3]
    with pytest.raises(error, match=match) as caught:
        quantize_static(*arguments, progress=False, **options)
    assert "\n" not in str(caught.value) and not output.exists()


def test_models_that_cannot_be_quantized_are_refused(tmp_path, model, images):
    out = tmp_path / "out.onnx"
    int8 = quantize_static(model, images, scale, tmp_path / "int8.onnx", progress=False).path
    refuse("already quantized", ModelError, int8, images, scale, out)
    refuse("fix-batch", ModelError, network(tmp_path / "open.onnx", shape=("N", 3, 16, 16)), images, scale, out)
    two = build.network("y = Add (a, b)", inputs={"a": (1, 3, 16, 16), "b": (1, 3, 16, 16)})
    refuse("has 2 inputs", ModelError, two.save(tmp_path / "two.onnx"), images, scale, out)
    refuse("no such model", ModelError, tmp_path / "none.onnx", images, scale, out)
    refuse("NaN|infinity", ModelError, network(tmp_path / "nan.onnx", bias=np.nan), images, scale, out)
    (tmp_path / "text.onnx").write_text("hello")
    refuse("text.onnx", ModelError, tmp_path / "text.onnx", images, scale, out)
    onnx.save(onnx.load(model), tmp_path / "external.onnx", save_as_external_data=True, size_threshold=0)
    assert (
        quantize_static(tmp_path / "external.onnx", images, scale, tmp_path / "whole.onnx", progress=False).int8_share
        == 1
    )
    build.network("output = Exp (input)", inputs={"input": (1, 3, 16, 16)}).save(tmp_path / "exp.onnx")
    refuse("no operator of exp.onnx can be quantized", ModelError, tmp_path / "exp.onnx", images, scale, out)


def test_other_bad_input_is_refused(tmp_path, model, images):
    out = tmp_path / "out.onnx"
    refuse("did you mean 'minmax'", InputError, model, images, scale, out, method="min_max")
    refuse("did you mean 'ort-cpu'", InputError, model, images, scale, out, profile="ort_cpu")
    refuse("no calibration images", InputError, model, [], scale, out)
    refuse("no such image", InputError, model, ["nowhere.png"], scale, out)
    refuse(
        "gives float32 \\[1, 3, 8, 8\\]; expected float32 \\[1, 3, 16, 16\\]",
        InputError,
        model,
        [p[:8, :8] for p in images],
        scale,
        out,
    )
    refuse("gives NaN", InputError, model, images, lambda p: scale(p) * np.float32(np.nan), out)
    refuse(
        "4- or 8-bit weights, 8- or 16-bit",
        InputError,
        model,
        images,
        scale,
        out,
        profile=Profile("five", True, True, False, False, weight_bits=5),
    )
    with pytest.raises(InputError, match="another file than the model"):
        quantize_static(model, images, scale, model)


def test_nothing_is_printed_and_logging_is_left_alone(tmp_path, model, images, capfd):
    root = logging.getLogger()
    before = (list(root.handlers), list(root.filters), root.level)
    quantize_static(model, images, scale, tmp_path / "int8.onnx", method="percentile", progress=False)
    assert capfd.readouterr() == ("", "") and (list(root.handlers), list(root.filters), root.level) == before


def test_a_kill_leaves_no_half_file(tmp_path, model, images):
    np.save(tmp_path / "images.npy", np.stack(images))
    code = """if True:
        import sys, time, numpy as np
        sys.path.insert(0, sys.argv[3])
        from test_quantize import quantize_static, scale
        def slow(bgr):
            print("fed", flush=True)
            if fed:
                time.sleep(600)  # until the kill comes
            fed.append(1)
            return scale(bgr)
        fed = []
        quantize_static(sys.argv[1], list(np.load(sys.argv[2])), slow, sys.argv[4], progress=False)"""
    folder = tmp_path / "out"
    folder.mkdir()
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            code,
            str(model),
            str(tmp_path / "images.npy"),
            os.path.dirname(__file__),
            str(folder / "int8.onnx"),
        ],
        stdout=subprocess.PIPE,
    )
    for _ in range(2):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(folder.iterdir()) == [] and read_contract(model).quantized is False


def test_real_face_models(real_data, tmp_path):
    from calib_nb.data.images import find_images
    from calib_nb.data.preprocess import preset

    faces = [real_data / "lfw/images" / p for p in find_images(real_data / "lfw/images")[:10]]
    edgeface = fix_batch(real_data / "models/edgeface_xxs_q_dequant.onnx", tmp_path / "edgeface.onnx")
    result = quantize_static(edgeface, faces, preset("edgeface"), tmp_path / "edgeface_int8.onnx", progress=False)
    assert result.size_mb < 0.4 * result.float_size_mb and "LayerNormalization" in {
        n.op_type for n in onnx.load(result.path).graph.node
    }
    yunet = real_data / "models/face_detection_yunet_2023mar.onnx"  # opset 11, uint8 preprocessing
    result = quantize_static(
        yunet,
        faces,
        preset("yunet", size=(640, 640)),
        tmp_path / "yunet_int8.onnx",
        profile="per-tensor-npu",
        progress=False,
    )
    assert read_contract(result.path).opset >= 13 and len(read_contract(result.path).outputs) == 12
