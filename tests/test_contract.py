"""Reading ONNX files: what they promise, what is refused, and the copy with a fixed batch."""

import contextlib
import time

import numpy as np
import onnx
import onnxruntime
import pytest

from calib_nb.core.errors import ModelError
from calib_nb.graph.build import network
from calib_nb.graph.contract import BoundedSession, open_session, read_contract, single_input
from calib_nb.graph.fixed import fix_batch


def conv_graph(shape=("n", 3, 16, 16), **inputs):
    """A convolution and a ReLU on "image"; further `inputs` by name and shape."""
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3))
    text = "y = Conv <pads = [1, 1, 1, 1]> (image, w); out = Relu (y)"
    return network(text, inputs={"image": shape, **inputs}, w=weight)


def conv(path, shape=("n", 3, 16, 16), **inputs):
    return conv_graph(shape, **inputs).save(path)


def test_every_truncation_is_refused_or_still_a_model(tmp_path):
    whole = conv(tmp_path / "m.onnx").read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / "cut.onnx").write_bytes(whole[:length])
        with contextlib.suppress(ModelError):
            read_contract(tmp_path / "cut.onnx")
    for length in (0, 1, 10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.onnx").write_bytes(whole[:length])
        with pytest.raises(ModelError):
            read_contract(tmp_path / "cut.onnx")


def test_flipped_bytes_never_give_a_traceback(tmp_path):
    whole = bytearray(conv(tmp_path / "m.onnx").read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            damaged[at] = int(rng.integers(0, 256))
        (tmp_path / "bad.onnx").write_bytes(damaged)
        with contextlib.suppress(ModelError):
            read_contract(tmp_path / "bad.onnx").table()


def test_foreign_files(tmp_path):
    for name, content, message in (
        ("a.pt", b"PK\x03\x04abc", "PyTorch"),
        ("b.tflite", b"\x1c\0\0\0TFL3", "TFLite"),
        ("c.jpg", b"\xff\xd8\xff\xe0", "JPEG"),
        ("d.json", b"{}", "JSON"),
        ("e", bytes(100), "not ONNX"),
        ("f", b"", "empty"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=message):
            read_contract(tmp_path / name)
    with pytest.raises(ModelError, match="no such model"):
        read_contract(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="not a file"):
        read_contract(tmp_path)


@pytest.mark.parametrize("first", [b"\0", b"\x08"])
def test_a_huge_file_is_refused_at_once(tmp_path, first):
    with open(tmp_path / "huge.onnx", "wb") as f:
        f.write(first)
        f.truncate(3 * 2**30)
    with pytest.raises(ModelError, match="GiB|not ONNX"):
        read_contract(tmp_path / "huge.onnx")


def test_external_weights_must_be_there_whole_and_near(tmp_path):
    model = conv_graph().model
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    assert read_contract(tmp_path / "m.onnx").external_data == ("w.bin",)
    weights = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(weights[:-1])
    with pytest.raises(ModelError, match="'w.bin' of .* is cut short"):
        read_contract(tmp_path / "m.onnx")
    (tmp_path / "w.bin").unlink()
    with pytest.raises(ModelError, match="is missing"):
        read_contract(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    for location in ("../w.bin", "/etc/passwd"):
        model.graph.initializer[0].external_data[0].value = location
        (tmp_path / "out.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(ModelError, match="outside its folder"):
            read_contract(tmp_path / "out.onnx")


def test_initializers_listed_as_inputs_do_not_count(tmp_path):
    path = conv(tmp_path / "m.onnx", (1, 3, 16, 16), w=(4, 3, 3, 3))
    assert single_input(read_contract(path)).name == "image" and read_contract(path).parameters == 108


def test_quantized_models_are_recognised(tmp_path):
    from onnxruntime.quantization import QuantFormat, quantize_dynamic, quantize_static
    from onnxruntime.quantization.calibrate import CalibrationDataReader

    class Reader(CalibrationDataReader):
        items = [{"image": np.ones((1, 3, 16, 16), np.float32)}]

        def get_next(self):
            return self.items.pop() if self.items else None

    path = conv(tmp_path / "m.onnx", (1, 3, 16, 16))
    assert not read_contract(path).quantized
    quantize_static(path, tmp_path / "qdq.onnx", Reader(), quant_format=QuantFormat.QDQ)
    Reader.items = [{"image": np.ones((1, 3, 16, 16), np.float32)}]
    quantize_static(path, tmp_path / "op.onnx", Reader(), quant_format=QuantFormat.QOperator)
    quantize_dynamic(path, tmp_path / "dynamic.onnx")
    assert all(read_contract(tmp_path / f"{n}.onnx").quantized for n in ("qdq", "op", "dynamic"))


@pytest.mark.parametrize(
    "shape, message",
    [
        (("n", 3, 16, 16), "expected batch 1; run: calib-nb fix-batch --model"),
        ((4, 3, 16, 16), "batch 1"),
        ((1, 3, "h", "w"), "--input-size WIDTH HEIGHT"),
        ((1, 3, 16), "1, C, H, W"),
    ],
)
def test_open_shapes_are_refused_with_the_line_that_fixes_them(tmp_path, shape, message):
    path = network("out = Relu (image)", inputs={"image": shape}).save(tmp_path / "my model.onnx")
    with pytest.raises(ModelError, match=message) as caught:
        single_input(read_contract(path))
    if "run:" in str(caught.value):
        assert f"--model '{path}'" in str(caught.value)  # quoted for the shell


@pytest.mark.parametrize("batch", ["n", "", 8])
def test_fix_batch_gives_the_same_answer(tmp_path, batch):
    path = conv(tmp_path / "m.onnx", (batch or "?", 3, 16, 16))
    fixed = fix_batch(path, tmp_path / "b1.onnx")
    assert single_input(read_contract(fixed)).shape == (1, 3, 16, 16) and read_contract(fixed).outputs[0].shape == (
        1,
        4,
        16,
        16,
    )
    onnx.checker.check_model(onnx.load(fixed), full_check=True)
    image = np.random.default_rng(1).normal(size=(1, 3, 16, 16)).astype(np.float32)
    feed = {"image": image.repeat(8, 0) if batch == 8 else image}
    assert np.allclose(
        open_session(path).run(None, feed)[0][:1], open_session(fixed).run(None, {"image": image})[0], atol=1e-6
    )


def test_fix_batch_refuses_a_graph_that_computes_with_its_batch(tmp_path):
    fixed = network("out = Reshape (image, s)", inputs={"image": (8, 3, 4, 4)}, s=[8, -1])
    fixed.save(tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="export it|export the model"):
        fix_batch(tmp_path / "m.onnx", tmp_path / "b1.onnx")
    total = network("out = ReduceSum <keepdims = 0> (image)", inputs={"image": (2, 3, 4, 4)})
    mean = total.save(tmp_path / "mean.onnx")
    with pytest.raises(ModelError, match="changes when the shape is fixed"):
        fix_batch(mean, tmp_path / "b1.onnx")
    assert not (tmp_path / "b1.onnx").exists()
    with pytest.raises(ModelError, match="another name"):
        fix_batch(mean, mean)


def test_sessions_have_the_threads_that_were_asked_for(tmp_path):
    session = open_session(conv(tmp_path / "m.onnx"), threads=1)
    assert session.get_session_options().intra_op_num_threads == 1 and session.get_providers() == [
        "CPUExecutionProvider"
    ]
    unknown = tmp_path / "u.onnx"
    onnx.save(network("out = NoSuchOperator (image)", inputs={"image": ("n",)}).model, unknown)
    with pytest.raises(ModelError, match="ONNX Runtime cannot open"):
        open_session(unknown)
    assert onnxruntime.__version__


def test_real_models(real_data, tmp_path):
    models = real_data / "models"
    yunet = read_contract(models / "face_detection_yunet_2023mar.onnx")
    assert (
        str(single_input(yunet)) == "input float32 [1, 3, 640, 640]"
        and len(yunet.outputs) == 12
        and yunet.parameters == 53121
    )
    face = models / "edgeface_xxs_q_dequant.onnx"
    with pytest.raises(ModelError, match="fix-batch"):
        single_input(read_contract(face))
    fixed = fix_batch(face, tmp_path / "b1.onnx")
    assert read_contract(fixed).outputs[0].shape == (1, 512)
    with pytest.raises(ModelError, match="PyTorch"):
        read_contract(models / "edgeface_xxs_q.pt")


def endless(scan: str = "") -> onnx.ModelProto:
    """A Loop that never ends; with `scan` it keeps a megabyte of every round."""
    kept, result = (", float[s] big", ", all") if scan else ("", "")
    step = (
        f"body (int64 i, bool on, float[1] a) => (bool more, float[1] b{kept}) {{ more = Identity (on) b = Add (a, a) "
    )
    step += "n = Constant <value = int64[1] {262144}> () big = Expand (a, n) }" if scan else "}"
    text = f"""<ir_version: 8, opset_import: ["" : 17]> net (float[n, 3, 4, 4] x) => (float[1] y) {{
        start = Constant <value = float[1] {{1.0}}> ()
        yes = Constant <value = bool {{1}}> ()
        y{result} = Loop <body = {step}> ("", yes, start)
    }}"""
    return onnx.parser.parse_model(text)


@pytest.mark.parametrize("seconds, memory, scan", [(0.3, 2**40, ""), (600, 2**28, "yes")], ids=["time", "memory"])
def test_a_loop_that_never_ends_is_ended(tmp_path, seconds, memory, scan):
    onnx.save(endless(scan), tmp_path / "m.onnx")
    session = open_session(tmp_path / "m.onnx")
    assert isinstance(session, BoundedSession) and session.get_inputs()[0].name == "x"
    bounded = BoundedSession(session.session, seconds=seconds, memory=memory)
    start = time.monotonic()
    with pytest.raises(ModelError, match="a loop of the model took more than") as caught:
        bounded.run(None, {"x": np.zeros((1, 3, 4, 4), np.float32)})
    assert time.monotonic() - start < 300 and "\n" not in str(caught.value)


def test_a_loop_that_ends_is_as_it_was(tmp_path):
    """Its results and its own errors are those of ONNX Runtime."""
    model = endless()
    model.graph.node[2].input[0] = "three"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(3), "three"))
    onnx.save(model, tmp_path / "m.onnx")
    session = open_session(tmp_path / "m.onnx")
    assert session.run(["y"], {"x": np.zeros((1, 3, 4, 4), np.float32)})[0].tolist() == [8]
    with pytest.raises(Exception, match="Got invalid dimensions"):
        session.run(None, {"x": np.zeros((1, 3, 5, 4), np.float32)})
    onnx.save(conv_graph().model, tmp_path / "plain.onnx")
    assert type(open_session(tmp_path / "plain.onnx")) is onnxruntime.InferenceSession
