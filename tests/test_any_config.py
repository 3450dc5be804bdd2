"""A config for any model, and what the vendor's own samples do."""

import json
import os
import stat
import sys

import cv2
import numpy as np
import pytest

from calib_nb.core.errors import ConfigError, InputError
from calib_nb.data.preprocess import Preprocess
from calib_nb.graph.build import conv, sequential
from calib_nb.npu.compile import DxComOptions, compile_model
from calib_nb.npu.config import load_config
from calib_nb.npu.validate import validate

RGB, FIT = {"convertColor": {"form": "BGR2RGB"}}, {"resize": {"width": 64, "height": 48}}
DIV, HALF = {"div": {"x": 255}}, {"normalize": {"mean": [0.5] * 3, "std": [0.5] * 3}}
IMAGENET = {"normalize": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}
CHW, BATCH = {"transpose": {"axis": [2, 0, 1]}}, {"expandDim": {"axis": 0}}
SHORT = {"resize": {"mode": "torchvision", "size": 64, "interpolation": "BILINEAR"}}
PER_CHANNEL = [{"subtract": {"x": [123.675, 116.28, 103.53]}}, {"div": {"x": [58.395, 57.12, 57.375]}}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    (folder / "images").mkdir()
    for i in range(3):
        cv2.imwrite(str(folder / "images" / f"{i}.jpg"), np.full((40, 60, 3), 90 * i, np.uint8))
    sequential(conv(2, 3), shape=(1, 3, 48, 64)).save(folder / "m.onnx")
    return folder


def sample(place, steps, **more) -> dict:
    loader = {"dataset_path": str(place / "images"), "file_extensions": ["jpg"], "preprocessings": steps}
    shape = {"inputs": {"x": [1, 3, 48, 64]}, "calibration_method": "ema", "calibration_num": 3}
    return shape | {"default_loader": loader} | more


# What public samples of DX-COM hold: each must pass there.
SAMPLES = {
    "no layout": [RGB, FIT, DIV, HALF],
    "no layout, no arithmetic": [FIT],
    "transpose alone": [RGB, FIT, DIV, CHW],
    "means of 0..1 on undivided values": [RGB, FIT, HALF, CHW, BATCH],
    "ImageNet on undivided values, no layout": [RGB, FIT, IMAGENET],
    "numbers per channel": [RGB, FIT, *PER_CHANNEL, CHW, BATCH],
    "short side by torchvision": [SHORT, {"centercrop": {"width": 64, "height": 48}}, RGB, DIV, CHW, BATCH],
    "one mean for all channels": [FIT, DIV, RGB, {"normalize": {"mean": 0.456, "std": [0.225]}}, CHW, BATCH],
}


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_of_the_vendor_are_no_errors(name, place):
    switches = {"enhanced_scheme": {"DXQ-P0": False, "DXQ-P3": True}}
    for more in ({}, switches, {"num_samples": 4}, {"train_batchsize": 2, "calibration_method": "minmax"}):
        raw = sample(place, SAMPLES[name], **more)
        found = validate(raw, place / "m.onnx", target="dx-com")
        assert [str(f) for f in found if f.level == "error"] == []
        strict = [f.where for f in validate(raw, place / "m.onnx") if f.level == "error"]
        assert strict or not set(more) & {"num_samples", "train_batchsize"}


FAULTS = {
    "transpose missing though expandDim is there": (sample, [RGB, FIT, DIV, BATCH], {}),
    "another size": (sample, [RGB, {"resize": {"width": 32, "height": 32}}, DIV], {}),
    "div after normalize": (sample, [RGB, FIT, HALF, DIV, CHW, BATCH], {}),
    "means of 0..255 on divided values": (
        sample,
        [RGB, FIT, DIV, {"normalize": {"mean": [123] * 3, "std": [58] * 3}}, CHW, BATCH],
        {},
    ),
    "a contradicting conversion": (sample, [{"convertColor": {"form": "RGB2BGR"}}, FIT, CHW, BATCH], {}),
    "two numbers for three channels": (sample, [FIT, {"div": {"x": [1, 2]}}, CHW, BATCH], {}),
    "too many images": (sample, [FIT, CHW, BATCH], {"calibration_num": 9}),
    "batch 2": (sample, [FIT, CHW, BATCH], {"inputs": {"x": [2, 3, 48, 64]}}),
    "kl": (sample, [FIT, CHW, BATCH], {"calibration_method": "kl"}),
    "an unknown key": (sample, [FIT, CHW, BATCH], {"num_sample": 3}),
    "a key of the samples that is no number": (sample, [FIT, CHW, BATCH], {"num_samples": "many"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_real_fault_stays_an_error(name, place):
    make, steps, more = FAULTS[name]
    assert [f for f in validate(make(place, steps, **more), place / "m.onnx", target="dx-com") if f.level == "error"]


def test_numbers_per_channel_equal_a_normalisation(place):
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    mean, std = PER_CHANNEL[0]["subtract"]["x"], PER_CHANNEL[1]["div"]["x"]
    for layout in ([], [CHW], [CHW, BATCH]):
        a = Preprocess.from_list([*layout, *PER_CHANNEL])
        b = Preprocess.from_list([*layout, {"normalize": {"mean": mean, "std": std}}])
        assert np.allclose(a(image), b(image), atol=1e-6) and np.allclose(a.value_range(), b.value_range())
        assert np.array_equal(a.denormalize(a(image)), image) and Preprocess.from_list(a.to_list()) == a


def test_a_method_is_held_against_the_version(place):
    raw = sample(place, [FIT, CHW, BATCH], calibration_method="percentile")
    levels = {t: [f.level for f in validate(raw, target=t)] for t in ("dx-com", "dx-com:2.5", "dx-com:2.4", "npu")}
    assert levels == {"dx-com": ["warning"], "dx-com:2.5": [], "dx-com:2.4": ["error"], "npu": ["warning"]}
    with pytest.raises(InputError, match="dx-com:two"):
        validate(raw, target="dx-com:two")


def test_options_go_on_and_added_nodes_come_back(place, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "dxcom"
    program.parent.mkdir()
    body = "import sys\na = sys.argv\nopen(a[a.index('-o') + 1] + '/m.dxnn', 'w').write(' '.join(a[1:]))\n"
    program.write_text(f"#!{sys.executable}\n{body}print('Added nodes:\\n - Transpose_0\\n - Div_1')\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "c.json").write_text(json.dumps(sample(place, SAMPLES["no layout"])))
    options = DxComOptions(opt_level=0, float64_calibration=True, compile_input_nodes="a,b")
    made = compile_model(place / "m.onnx", tmp_path / "c.json", tmp_path / "out", options=options)
    assert made.added == ("Transpose_0", "Div_1") and "take transpose, div out of the host's code" in str(made)
    line = (tmp_path / "out" / "m.dxnn").read_text()
    assert line.endswith("--float64_calibration --compile_input_nodes a,b --opt_level 0")
    (tmp_path / "m.qxnn").write_text("x")
    again = DxComOptions(checkpoint=tmp_path / "m.qxnn", use_q_pro=True)
    resumed = compile_model(None, None, tmp_path / "again", options=again)
    assert resumed.exit_code == 0 and "--checkpoint" in (tmp_path / "again" / "m.dxnn").read_text()
    raw = sample(place, SAMPLES["no layout"], enhanced_scheme={"DXQ-P1": True})
    (tmp_path / "c.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="exclude one another"):
        compile_model(place / "m.onnx", tmp_path / "c.json", tmp_path / "no", options=DxComOptions(use_q_pro=True))
    assert load_config(tmp_path / "c.json").num_samples is None
    with pytest.raises(ConfigError):
        load_config(place / "none.json")


def shell(line: str):
    from typer.testing import CliRunner

    from calib_nb.commands.npu import app

    return CliRunner().invoke(app, line.split())


def test_an_open_batch_gets_its_copy_beside_the_config(place, tmp_path):
    from calib_nb.graph.build import network

    graph = network("s = Sub (x, m); y = Relu (s)", inputs={"x": ("n", 3, 48, 64)}, m=np.float32(0.45))
    (tmp_path / "models").mkdir()
    graph.save(tmp_path / "models" / "open.onnx")
    network("y = Relu (x)", inputs={"x": (1, 3, 48, 64)}).save(tmp_path / "models" / "shut.onnx")
    line = f"config --model {tmp_path}/models/open.onnx --dataset-path {place}/images --output-path {tmp_path}/c.json"
    refused = shell(f"{line} --calibration-num 3")
    assert f"add --fix-batch, which writes {tmp_path}/open_b1.onnx" in str(refused.exception)
    assert not (tmp_path / "c.json").exists()
    for typed, message in (("--input-name z", "'x', not 'z'"), ("--input-size 9 9", "64x48 pixels, not 9x9")):
        assert message in str(shell(f"{line.replace('open.onnx', 'shut.onnx')} --scale 255 {typed}").exception)
    made = shell(f"{line} --calibration-num 3 --fix-batch")
    assert made.exit_code == 0, made.exception
    assert (tmp_path / "open_b1.onnx").exists() and not (tmp_path / "models" / "open_b1.onnx").exists()
    assert load_config(tmp_path / "c.json").preprocess.value_range() == (0, 1)


def test_a_gray_model_and_channels_last(tmp_path, place):
    from calib_nb.graph.build import network
    from calib_nb.npu.input_probe import InputAnswers, propose_config, propose_input

    network("y = Relu (x)", inputs={"x": (1, 1, 48, 64)}).save(tmp_path / "gray.onnx")
    network("y = Relu (x)", inputs={"x": (1, 48, 64, 3)}).save(tmp_path / "last.onnx")
    image = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)
    for name, shape in (("gray", (1, 1, 48, 64)), ("last", (1, 48, 64, 3))):
        proposal = propose_input(tmp_path / f"{name}.onnx")
        assert proposal.values == "" and "cannot be told" in str(proposal)
        config = propose_config(
            tmp_path / f"{name}.onnx", place / "images", answers=InputAnswers(scale=255), calibration_num=3
        )
        assert config.preprocess(image).shape == shape
        assert [
            f for f in validate(config, tmp_path / f"{name}.onnx") if f.level == "error" and "3, H" not in f.fix
        ] == []


@pytest.mark.slow
def test_what_real_models_give_away(real_data):
    from calib_nb.npu.input_probe import check_preset, propose_input

    images = sorted((real_data / "coco" / "val").rglob("*.jpg"))[:8]
    wanted = {
        "edgeface_xxs_q_dequant": ("RGB", "edgeface"),
        "face_detection_yunet_2023mar": ("BGR", "yunet"),
        "scrfd_500m_bnkps": ("RGB", "scrfd"),
        "retinaface_mobilenet0.25_FaceDetector_heads": ("BGR", "retinaface"),
        "yolov5n-0.5-face": ("RGB", "yolov5-face"),
        "yolov8-lite-t-face": ("RGB", "yolov8-face"),
        "rtmonodepth_s_m_640x192": ("", "unit"),
        "vww_mobilenet_v1_0.25_96": ("", "unit"),
        "person_mobilenet_v2_0.35_128": ("", ""),  # the likeliest is right, and not far enough ahead to be written
    }
    for name, (color, values) in wanted.items():
        proposal = propose_input(real_data / "models" / f"{name}.onnx", images if "mobilenet_v" in name else ())
        assert (proposal.color, proposal.values) == (color, values), f"{name}: {proposal}"
    assert propose_input(real_data / "models" / "person_mobilenet_v2_0.35_128.onnx", images).likely[0] == "signed"
    depth = propose_input(real_data / "models" / "rtmonodepth_s_m_640x192.onnx")
    assert "wants 0..1" in check_preset("depth", depth)[0].what


NETWORKS = {"yolov5_face": "yolov5-face", "yolov8": "yolov8-face", "scrfd": "scrfd", "retinaface": "retinaface"}


@pytest.mark.parametrize("method", NETWORKS)
def test_a_preset_is_its_detectors_own_preprocessing(method):
    """Value by value; on other sizes the image lies where the detector puts it when that is the middle."""
    from calib_nb.data.preprocess import PRESETS, preset
    from calib_nb.faces.detect import letterbox
    from calib_nb.faces.detectors import DETECTORS

    own, chain = DETECTORS[method], preset(NETWORKS[method], (64, 64))
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(chain(picture), own.preprocess(picture))
    assert own.placing.get("fill", 0) == PRESETS[NETWORKS[method]].border
    if own.placing.get("centred"):
        wide = np.repeat(rng.integers(0, 256, (40, 1, 3), dtype=np.uint8), 128, axis=1)
        placed, _ = letterbox(wide, (64, 64), **own.placing)
        assert np.array_equal(chain(wide), own.preprocess(placed))


def test_presets_of_the_detectors_that_make_their_own_tensors(monkeypatch):
    """What reaches the network of MTCNN, RTMPose and YuNet, on an image of the network's own size."""
    from types import SimpleNamespace

    from calib_nb.data.preprocess import preset
    from calib_nb.faces import detect, landmarks, mtcnn

    picture, fed = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8), []

    class Session:
        """Keeps what it is fed."""

        def __init__(self, outputs):
            self.outputs = outputs

        def get_inputs(self):
            return [SimpleNamespace(name="x", shape=[1, 3, 64, 64])]

        def get_outputs(self):
            return [SimpleNamespace(name=name) for name in self.outputs]

        def run(self, names, feed):
            fed.append(np.asarray(feed["x"]))
            raise InterruptedError

    monkeypatch.setattr(landmarks, "open_session", lambda *a: Session(["simcc_x", "simcc_y"]))
    pose = landmarks.RtmposeFaces("face.onnx", None)
    monkeypatch.setattr(landmarks, "box_to_input", lambda box, size: np.float32([[1, 0, 0], [0, 1, 0]]))
    with pytest.raises(InterruptedError):
        pose.points(picture, np.float32([[0, 0, 64, 64]]))
    assert np.array_equal(fed.pop(), preset("rtmpose", (64, 64))(picture))

    monkeypatch.setattr(detect, "open_session", lambda *a: Session(detect.YUNET_OUTPUTS))
    with pytest.raises(InterruptedError):
        detect.YuNetDetector("yunet.onnx").detect(picture)
    assert np.array_equal(fed.pop(), preset("yunet", (64, 64))(picture))

    crop = picture[:48, :48]
    (tensor,) = mtcnn.cut_crops(np.ascontiguousarray(crop[..., ::-1]), np.float64([[0, 0, 47, 47]]), 48)
    assert np.allclose(tensor, preset("mtcnn")(crop)[0], atol=1e-6)


@pytest.mark.slow
def test_presets_of_fastestdet_and_mediapipe_are_those_of_their_files(real_data):
    from calib_nb.data.preprocess import PRESETS, preset
    from calib_nb.npu.input_probe import propose_input
    from calib_nb.tags.evaluate import open_tagger

    picture = np.random.default_rng(2).integers(0, 256, (352, 352, 3), dtype=np.uint8)
    file = real_data / "models" / "FastestDet_opset13.onnx"
    assert np.array_equal(open_tagger(file).preprocess(picture), preset("fastestdet")(picture))
    assert propose_input(file).preset == "fastestdet"
    tflite = (real_data / "models" / "mediapipe" / "face_detection_short_range.tflite").read_bytes()
    at = tflite.index(np.float32(127.5).tobytes())  # the mean, and the deviation, of its metadata
    assert tflite.count(np.float32(127.5).tobytes()) >= 2 and np.int32([1, 128, 128, 3]).tobytes() in tflite, at
    assert PRESETS["mediapipe"].size == (128, 128) and preset("mediapipe").value_range() == (-1, 1)
