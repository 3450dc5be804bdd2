"""Face detectors: decoders on hand-made tensors, hostile weights, every kind of input, and photos of people."""

import logging
import os
import pickle

import cv2
import numpy as np
import PIL.Image
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from calib_nb.core.errors import ImageError, InputError, ModelError
from calib_nb.data.images import decode
from calib_nb.faces.boxes import landmark_drift, match_boxes, read_boxes, score_faces
from calib_nb.faces.decoders import (
    YOLOV5_ANCHORS,
    decode_retinaface,
    decode_scrfd,
    decode_yolov5_face,
    decode_yolov8_face,
    dfl_distance,
    points_from_box,
    retinaface_priors,
)  # fmt: skip
from calib_nb.faces.demo import constant_detector
from calib_nb.faces.detect import (
    Faces,
    OnnxDetector,
    box_iou,
    encode_yunet,
    letterbox,
    letterbox_offset,
    letterbox_scale,
    suppress,
)
from calib_nb.faces.detectors import DETECTORS, FaceDetector, available, read_image
from calib_nb.faces.landmarks import (
    RtmposeFaces,
    box_to_input,
    decode_simcc,
    points_from_106,
    points_from_mesh,
    points_from_six,
)
from calib_nb.faces.mtcnn import (
    Mtcnn,
    cut_crops,
    load_arrays,
    mtcnn_net,
    overlap_of_smaller,
    pyramid_scales,
    regress_boxes,
    square_boxes,
    window_boxes,
)
from calib_nb.graph.build import network

SIZE = (128, 96)


# ---------------------------------------------------------------- decoders: what encodes a face must decode to it


@st.composite
def one_face(draw):
    """A box and five points in a 128 x 96 input, and a stride."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    stride = draw(st.sampled_from([8, 16, 32]))
    x, y, w, h = rng.uniform(10, 100), rng.uniform(10, 80), rng.uniform(1, 4) * stride, rng.uniform(1, 4) * stride
    box = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    return box, rng.uniform(0, 96, (5, 2)), stride


def cell_of(box, stride):
    column, row = (int(v // stride) for v in (box[:2] + box[2:]) / 2)
    return column, row, row * (SIZE[0] // stride) + column


def logit(p):
    return np.log(p / (1 - p))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(one_face())
def test_scrfd(face):
    box, points, stride = face
    outputs = {
        f"{k}{s}": np.zeros((2 * (SIZE[0] // s) * (SIZE[1] // s), n), np.float32)
        for s in (8, 16, 32)
        for k, n in (("a", 1), ("b", 4), ("c", 10))
    }
    column, row, cell = cell_of(box, stride)
    corner = np.array([column, row]) * stride
    outputs[f"a{stride}"][2 * cell] = 0.8
    outputs[f"b{stride}"][2 * cell] = np.hstack([corner - box[:2], box[2:] - corner]) / stride
    outputs[f"c{stride}"][2 * cell] = ((points - corner) / stride).ravel()
    found = decode_scrfd(outputs, input_size=SIZE)
    assert np.allclose(found.boxes, [box], atol=1e-3) and np.allclose(found.scores, 0.8)
    assert np.allclose(found.landmarks, [points], atol=1e-3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(one_face())
def test_retinaface(face):
    box, points, _ = face
    priors = retinaface_priors(SIZE)
    outputs = {
        "l": np.zeros((1, len(priors), 4), np.float32),
        "c": np.zeros((1, len(priors), 2), np.float32),
        "p": np.zeros((1, len(priors), 10), np.float32),
    }
    k = int(box_iou(np.hstack([priors[:, :2] - priors[:, 2:] / 2, priors[:, :2] + priors[:, 2:] / 2]), box).argmax())
    center, side = priors[k, :2], priors[k, 2:]
    outputs["c"][0, k] = 0.1, 0.9
    outputs["l"][0, k] = np.hstack(
        [((box[:2] + box[2:]) / 2 - center) / side / 0.1, np.log((box[2:] - box[:2]) / side) / 0.2]
    )
    outputs["p"][0, k] = ((points - center) / side / 0.1).ravel()
    found = decode_retinaface(outputs, input_size=SIZE)
    assert np.allclose(found.boxes, [box], atol=1e-2) and np.allclose(found.landmarks, [points], atol=1e-2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(one_face(), st.integers(0, 2))
def test_yolov5_face(face, k):
    box, points, stride = face
    anchor = np.array(YOLOV5_ANCHORS[stride][k])
    column, row, _ = cell_of(box, stride)
    center = ((box[:2] + box[2:]) / 2 / stride - (column, row) + 0.5) / 2
    share = np.sqrt((box[2:] - box[:2]) / anchor) / 2
    assume((share < 1).all() and (share > 0.01).all())  # this anchor can say it
    outputs = {str(s): np.full((1, 48, SIZE[1] // s, SIZE[0] // s), -20, np.float32) for s in (8, 16, 32)}
    values = np.hstack(
        [logit(np.hstack([center, share])), 20, ((points - np.array([column, row]) * stride) / anchor).ravel(), 20]
    )
    outputs[str(stride)][0, 16 * k : 16 * k + 16, row, column] = values
    found = decode_yolov5_face(outputs, input_size=SIZE)
    assert np.allclose(found.boxes, [box], atol=1e-2) and np.allclose(found.landmarks, [points], atol=1e-2)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(one_face(), st.booleans())
def test_yolov8_face(face, plain):
    box, points, stride = face
    column, row, _ = cell_of(box, stride)
    center = (np.array([column, row]) + 0.5) * stride
    reach = np.hstack([center - box[:2], box[2:] - center]) / stride
    assume((reach >= 0).all())
    outputs = {str(s): np.full((1, 80, SIZE[1] // s, SIZE[0] // s), -20, np.float32) for s in (8, 16, 32)}
    for side, distance in enumerate(reach):  # two neighbouring bins whose mean is the distance
        low, part = int(distance), distance % 1
        outputs[str(stride)][0, 16 * side : 16 * side + 16, row, column] = -40
        outputs[str(stride)][0, 16 * side + low, row, column] = np.log(1 - part)
        outputs[str(stride)][0, 16 * side + low + 1, row, column] = np.log(part + 1e-12)
    outputs[str(stride)][0, 64, row, column] = 20
    offsets = (points / stride - (column, row)) / 2
    outputs[str(stride)][0, 65:, row, column] = np.column_stack([offsets, np.zeros(5)]).ravel()
    outputs = {name: value[:, :65] for name, value in outputs.items()} if plain else outputs
    found = decode_yolov8_face(outputs, input_size=SIZE)
    assert np.allclose(found.boxes, [box], atol=1e-2)
    assert np.allclose(found.landmarks, points_from_box(found.boxes) if plain else [points], atol=1e-2)


def test_the_export_of_ultralytics_is_read_too():
    whole = np.zeros((1, 20, 100), np.float32)
    whole[0, :, 3] = [30, 40, 20, 10, 0.9, *np.column_stack([np.arange(10).reshape(5, 2), np.ones(5)]).ravel()]
    found = decode_yolov8_face({"output0": whole}, input_size=SIZE)
    assert np.allclose(found.boxes, [[20, 35, 40, 45]]) and np.allclose(found.landmarks, [np.arange(10).reshape(5, 2)])
    assert len(decode_yolov8_face({"output0": whole * 0}, input_size=SIZE)) == 0


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.floats(0, 15), st.integers(2, 32))
def test_the_mean_of_a_distribution(value, bins):
    value = min(value, bins - 1.001)
    logits = np.full(bins, -80.0)
    logits[int(value)], logits[int(value) + 1] = np.log(1 - value % 1), np.log(value % 1 + 1e-30)
    assert abs(dfl_distance(logits) - value) < 1e-5


@pytest.mark.parametrize(
    "decode_outputs, family",
    [
        (decode_scrfd, "SCRFD"),
        (decode_retinaface, "RetinaFace"),
        (decode_yolov5_face, "YOLOv5-Face"),
        (decode_yolov8_face, "YOLOv8-Face"),
    ],
)
def test_another_models_outputs_are_named(decode_outputs, family):
    for outputs in (
        {},
        {"x": np.zeros((1, 1000), np.float32)},
        encode_yunet(np.zeros((0, 4)), np.zeros((0, 5, 2)), (64, 64)),
    ):
        with pytest.raises(ModelError, match=f"not {family}'s"):
            decode_outputs(outputs, input_size=(64, 64))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 500), st.integers(1, 500), st.booleans())
def test_a_centred_letterbox_comes_back(w, h, enlarge):
    photo = np.full((h, w, 3), 200, np.uint8)
    picture, scale = letterbox(photo, (160, 96), fill=7, centred=True, enlarge=enlarge)
    x, y = letterbox_offset(w, h, (160, 96), enlarge=enlarge)
    filled = (picture != 7).all(axis=2)
    assert picture.shape == (96, 160, 3) and scale == letterbox_scale(w, h, (160, 96), enlarge=enlarge)
    assert filled[:, : max(x, 0)].sum() == 0 and filled[y, x] and abs(filled.any(axis=0).sum() - max(1, w * scale)) <= 1
    assert abs((160 - filled.any(axis=0).sum()) - 2 * x) <= 1 and abs((96 - filled.any(axis=1).sum()) - 2 * y) <= 1


# ---------------------------------------------------------------- MTCNN


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    "evil",
    [
        Evil(os.system, "touch {}"),
        Evil(eval, "open('{}', 'w')"),
        Evil(np.load, "{}"),
        Evil(np.ndarray.tofile, np.zeros(3), "{}"),
        Evil(getattr, np.zeros(3), "tofile"),
    ],
)
def test_a_hostile_pickle_is_refused_before_it_acts(tmp_path, evil):
    mark = tmp_path / "mark"
    evil.call = tuple(a.format(mark) if isinstance(a, str) else a for a in evil.call)
    header = b"\x93NUMPY\x01\x00F\x00{'descr': '|O', 'fortran_order': False, 'shape': (), }               \n"
    for body in (
        pickle.dumps({"w": evil}),
        pickle.dumps(evil),
        pickle.dumps(np.array({"w": evil}, object), protocol=2),
    ):
        (tmp_path / "evil.npy").write_bytes(header + body)
        with pytest.raises(ModelError, match="no dictionary of float arrays: it asks for"):
            load_arrays(tmp_path / "evil.npy")
    assert not mark.exists()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_a_damaged_pickle_is_one_error(tmp_path_factory, noise, at):
    path = tmp_path_factory.mktemp("npy") / "x.npy"
    np.save(path, {"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 2))})
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + noise + whole[at + len(noise) :])
    try:
        assert all(isinstance(v, np.ndarray) for v in load_arrays(path).values())
    except ModelError as e:
        assert "\n" not in str(e)


def test_arrays_come_back_as_they_were(tmp_path):
    state = {"w": np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32), "b": np.zeros(3)}
    np.save(tmp_path / "x.npy", state)
    back = load_arrays(tmp_path / "x.npy")
    assert all(np.array_equal(back[k], state[k]) and back[k].dtype == state[k].dtype for k in state)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
def test_the_cascades_geometry(seed, n):
    rng = np.random.default_rng(seed)
    corner = rng.integers(-20, 60, (n, 2)).astype(float)
    boxes = np.hstack([corner, corner + rng.integers(3, 50, (n, 2))])
    square = square_boxes(boxes)
    sides = square[:, 2:] - square[:, :2] + 1
    assert (sides[:, 0] == sides[:, 1]).all() and (
        np.abs((square[:, :2] + square[:, 2:]) - (boxes[:, :2] + boxes[:, 2:])) <= 2
    ).all()
    assert np.array_equal(regress_boxes(boxes, np.zeros((n, 4))), boxes)
    crops = cut_crops(np.full((40, 50, 3), 200, np.uint8), square, 24)
    assert crops.shape == (n, 3, 24, 24) and crops.min() >= -127.5 / 128 and crops.max() <= 72.5 / 128 + 1e-6
    smaller = overlap_of_smaller(boxes, boxes)
    assert (
        np.allclose(np.diag(smaller), 1)
        and (smaller >= box_iou(boxes, boxes) - 1e-9).all()
        and smaller.max() <= 1 + 1e-9
    )


def test_the_pyramid_and_its_windows():
    scales = pyramid_scales(640, 480, min_face=20)
    assert (
        scales[0] == 0.6
        and np.allclose(np.diff(np.log(scales)), np.log(0.707))
        and 480 * scales[-1] > 12 >= 480 * scales[-1] * 0.707
    )
    boxes, scores, shift = window_boxes(np.zeros((5, 5)), np.zeros((4, 5, 5)), 0.5, 0.6)
    assert boxes.shape == (0, 4) and scores.shape == (0,) and shift.shape == (0, 4)


def test_weights_of_another_stage_are_named(tmp_path):
    for stage in ("pnet", "rnet", "onet"):
        np.save(tmp_path / f"{stage}.npy", {k: v.numpy() for k, v in mtcnn_net("pnet").state_dict().items()})
    with pytest.raises(ModelError, match="not those of rnet"):
        Mtcnn(tmp_path)


# ---------------------------------------------------------------- five of many


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 8))
def test_simcc_finds_the_place(seed, n, k):
    rng = np.random.default_rng(seed)
    truth = np.stack([rng.integers(0, 128, (n, k)), rng.integers(0, 192, (n, k))], axis=-1)
    x, y = np.eye(128)[truth[..., 0]], np.eye(192)[truth[..., 1]] * 0.5
    points, scores = decode_simcc(x, y)
    assert np.array_equal(points * 2, truth) and (scores == 0.5).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.floats(0, 100), st.floats(0, 100), st.floats(1, 80), st.floats(1, 80), st.sampled_from([(256, 256), (192, 256)])
)
def test_a_box_fills_the_input(x, y, w, h, size):
    matrix = box_to_input(np.array([x, y, x + w, y + h]), size)
    assert np.allclose(matrix[:, :2] @ (x + w / 2, y + h / 2) + matrix[:, 2], np.array(size) / 2)
    corners = matrix[:, :2] @ np.array([[x - w / 8, x + w * 9 / 8], [y - h / 8, y + h * 9 / 8]]) + matrix[:, 2:]
    assert (corners > -1e-6).all() and (corners[0] < size[0] + 1e-6).all() and (corners[1] < size[1] + 1e-6).all()
    assert np.isclose(np.ptp(corners, axis=1), size, rtol=1e-6).any()


def test_five_points_turn_with_the_face():
    angle = np.array([[0, -1], [1, 0]])  # a quarter turn
    six = np.random.default_rng(0).uniform(0, 100, (3, 6, 2))
    assert np.allclose(points_from_six(six @ angle.T), points_from_six(six) @ angle.T)
    assert points_from_106(np.zeros((0, 106, 2))).shape == points_from_mesh(np.zeros((0, 478, 2))).shape == (0, 5, 2)


# ---------------------------------------------------------------- the interface


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """A YuNet that always sees 200 faces, at 640 x 640."""
    corner = np.stack(np.meshgrid(np.arange(20) * 32.0 + 4, np.arange(10) * 64.0 + 4), axis=-1).reshape(-1, 2)
    boxes = np.hstack([corner, corner + 24])
    points = np.float32([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]])
    outputs = encode_yunet(boxes, boxes[:, None, :2] + points * 24, (640, 640))
    return constant_detector(tmp_path_factory.mktemp("crowd") / "crowd.onnx", outputs, (640, 640))


@pytest.fixture(scope="module")
def nobody(tmp_path_factory):
    outputs = encode_yunet(np.zeros((0, 4)), np.zeros((0, 5, 2)), (64, 64))
    return constant_detector(tmp_path_factory.mktemp("nobody") / "nobody.onnx", outputs, (64, 64))


def test_two_hundred_faces(crowd):
    detector, photo = FaceDetector("yunet", model=crowd), np.zeros((640, 640, 3), np.uint8)
    faces = detector.detect(photo, "bgr")
    boxes, points = detector.detect_faces(photo, "bgr")
    assert (
        len(faces) == 200
        and boxes.shape == (200, 5)
        and points.shape == (200, 5, 2)
        and boxes.dtype == points.dtype == np.float32
    )
    assert (np.diff(boxes[:, 4]) <= 0).all() and detector.align(photo, "bgr", size=96).shape == (96, 96, 3)


def test_no_face_is_an_answer(nobody):
    detector, photo = FaceDetector("yunet", model=nobody), np.zeros((50, 60, 3), np.uint8)
    boxes, points = detector.detect_faces(photo, "rgb")
    assert detector.detect(photo, "rgb") == [] and boxes.shape == (0, 5) and points.shape == (0, 5, 2)
    assert detector.align(photo, "rgb") is None and detector.align(photo, "rgb", choose="central") is None
    assert detector.align_batch([photo, photo], "rgb", progress=False) == [None, None]


def test_a_very_large_picture(tmp_path, crowd):
    detector = FaceDetector("yunet", model=crowd)
    wide = np.zeros((400, 10_000, 3), np.uint8)
    assert detector.detect_faces(wide, "bgr")[0].max() > 9000  # in its own pixels
    cv2.imwrite(str(tmp_path / "wide.jpg"), wide)
    assert len(detector.detect(tmp_path / "wide.jpg")) == 200
    PIL.Image.new("L", (10_000, 10_000)).save(tmp_path / "huge.png")  # a few kilobytes that claim 100 megapixels
    with pytest.raises(ImageError, match="10000 x 10000 pixels.*at most 64 megapixels"):
        detector.detect(tmp_path / "huge.png")


def test_one_picture_in_every_form(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    PIL.Image.fromarray(rgb).save(tmp_path / "a.png")
    wanted = np.ascontiguousarray(rgb[..., ::-1])
    rgba = np.dstack([rgb, np.full((20, 30), 9, np.uint8)])
    PIL.Image.fromarray(rgba).save(tmp_path / "b.png")
    files = ((tmp_path / "a.png", None), (str(tmp_path / "b.png"), None))
    pil = ((PIL.Image.fromarray(rgb), None), (PIL.Image.fromarray(rgba), None))
    arrays = ((rgb, "rgb"), (rgba, "rgb"), (wanted, "bgr"), (rgb[::1, ::1], "rgb"))
    for image, order in files + pil + arrays:
        assert np.array_equal(read_image(image, order), wanted) and read_image(image, order).flags.c_contiguous
    gray = rgb[..., 0].copy()
    for image in (gray, gray[..., None], PIL.Image.fromarray(gray), PIL.Image.fromarray(gray).convert("P")):
        assert np.array_equal(read_image(image), np.dstack([gray] * 3))
    assert set(np.unique(read_image(PIL.Image.fromarray(gray > 99)))) <= {0, 255}


@pytest.mark.parametrize("image, order, message", [
    (np.zeros((4, 4, 3), np.uint8), None, "never guessed"),
    (np.zeros((4, 4, 4), np.uint8), None, "never guessed"),
    (np.zeros((4, 4, 3), np.uint8), "BGR", "did you mean 'bgr'"),
    (np.zeros((4, 4, 3), np.float32), "bgr", "of float32; expected uint8"),
    (np.zeros((4, 4, 2), np.uint8), "bgr", "expected uint8"),
    (np.zeros((1, 4, 4, 3), np.uint8), "bgr", "expected uint8"),
    (np.zeros((0, 4, 3), np.uint8), "bgr", "expected uint8"),
    (b"bytes", "bgr", "of type bytes"),
])  # fmt: skip
def test_what_is_not_an_image_is_named(image, order, message):
    with pytest.raises(InputError, match=message):
        read_image(image, order)


def test_a_batch_goes_on_past_what_cannot_be_read(tmp_path, crowd, caplog):
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    cv2.imwrite(str(tmp_path / "good.jpg"), np.zeros((64, 64, 3), np.uint8))
    detector, paths = (
        FaceDetector("yunet", model=crowd),
        [tmp_path / n for n in ("good.jpg", "text.jpg", "empty.jpg", "missing.jpg", "good.jpg")],
    )
    with caplog.at_level(logging.WARNING):
        found = detector.detect_batch(paths, progress=False)
    assert [f if f is None else len(f) for f in found] == [200, None, None, None, 200] and len(caplog.records) == 3
    table = detector.benchmark(paths)
    assert (table.error != "").tolist() == [False, True, True, True, False] and table.faces.tolist() == [
        200,
        0,
        0,
        0,
        200,
    ]
    assert (table.detect_ms.notna() == (table.error == "")).all()
    with pytest.raises(InputError, match="never guessed"):  # not a matter of one picture
        detector.detect_batch([np.zeros((4, 4, 3), np.uint8)], progress=False)


@pytest.mark.parametrize("name", ["scrfd", "retinaface", "yolov5_face", "yolov8"])
def test_a_model_of_the_wrong_kind(tmp_path, crowd, name):
    with pytest.raises(ModelError, match="give the file that belongs to this method"):
        FaceDetector(name, model=crowd).detect(np.zeros((64, 64, 3), np.uint8), "bgr")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ModelError, match="not ONNX"):
        FaceDetector(name, model=tmp_path / "text.onnx")
    with pytest.raises(ModelError, match="no such model"):
        FaceDetector(name, model=tmp_path / "none.onnx")


def test_a_network_with_another_input_is_refused(tmp_path):
    network("y = Relu (x)", inputs={"x": (1, 1, 64, 64)}).save(tmp_path / "gray.onnx")
    with pytest.raises(ModelError, match=r"shape \[1, 1, 64, 64\].*is this a face detector"):
        FaceDetector("scrfd", model=tmp_path / "gray.onnx")


def test_thresholds_and_devices(crowd):
    photo = np.zeros((640, 640, 3), np.uint8)
    assert FaceDetector("yunet", model=crowd, score_threshold=1).detect(photo, "bgr") != []
    for options, message in (
        ({"score_threshold": -1}, "expected 0 to 1"),
        ({"device": "tpu"}, "unknown device"),
        ({"model": crowd, "nms_threshold": 1.5}, "expected 0 to 1"),
    ):
        with pytest.raises(InputError, match=message):
            FaceDetector("yunet", **options)
    for name, key in (("mtcnn", "nms_threshold"), ("rtmpose", "score_threshold"), ("mediapipe", "nms_threshold")):
        with pytest.raises(InputError, match=f"{name} has no {key}"):
            FaceDetector(name, **{key: 0.5})
    with pytest.raises(InputError, match="unknown choice"):
        FaceDetector("yunet", model=crowd).align(photo, "bgr", choose="biggest")


def test_the_fallback_is_said_once(crowd, caplog):
    import onnxruntime

    from calib_nb.core import device

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("CUDA is there")
    line = "models of ONNX Runtime run on the CPU: the installed ONNX Runtime has no CUDA"
    for word, level in (("auto", "INFO"), ("cuda", "WARNING")):
        device._log_once.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="calib_nb"):
            for _ in range(3):
                FaceDetector("yunet", word, model=crowd)
        assert [(r.levelname, r.message) for r in caplog.records] == [(level, line)]
    with pytest.raises(InputError, match="device 'cuda!' cannot be used: the installed ONNX Runtime has no CUDA"):
        FaceDetector("yunet", "cuda!", model=crowd)


def test_rtmpose_needs_a_file_and_says_so(tmp_path):
    row = available(tmp_path).set_index("method").loc["rtmpose"]
    assert not row.ready and "no public weights" in row.missing and "model=" in row["get"]
    with pytest.raises(ModelError, match="no public weights"):
        FaceDetector("rtmpose")


def test_rtmpose_on_the_boxes_of_another(tmp_path, crowd):
    """All 106 points in the middle of the input: five points in the middle of every box."""
    middle = np.zeros((1, 106, 128), np.float32)
    middle[..., 64] = 1
    model = constant_detector(tmp_path / "pose.onnx", {"simcc_x": middle, "simcc_y": middle}, (64, 64))
    detector = FaceDetector.__new__(FaceDetector)
    pose = FaceDetector("yunet", model=crowd)
    detector.name, detector._engine = "rtmpose", RtmposeFaces(model, pose._engine)
    boxes, points = detector.detect_faces(np.zeros((640, 640, 3), np.uint8), "bgr")
    assert len(boxes) == 200 and np.allclose(points, ((boxes[:, :2] + boxes[:, 2:4]) / 2)[:, None], atol=1e-3)


def brightest_model(path, size=256, points=106):
    """RTMPose's published shapes: [1,3,256,256] in, simcc_x and simcc_y [1,106,512] out; marks the brightest pixel."""
    text = "bright = ReduceMax <axes = [1], keepdims = 0> (input)"
    for name, axis in (("x", 1), ("y", 2)):
        text += f"""
            {name}_row = ReduceMax <axes = [{axis}], keepdims = 0> (bright)
            {name}_one = Unsqueeze ({name}_row, last)
            {name}_two = Concat <axis = 2> ({name}_one, {name}_one)
            {name}_bins = Reshape ({name}_two, flat)
            simcc_{name} = Expand ({name}_bins, every)"""
    shapes = {"last": [2], "flat": [1, 1, 2 * size], "every": [1, points, 2 * size]}
    inputs, outputs = {"input": (1, 3, size, size)}, ("simcc_x", "simcc_y")
    return network(text, inputs=inputs, outputs=outputs, **shapes).save(path)


def test_rtmpose_finds_a_point_where_it_is_in_the_photo(tmp_path):
    """Boxes of any place, size and shape, also over the edge: from the photo to the input, through SimCC, and back."""
    pose, rng = RtmposeFaces(brightest_model(tmp_path / "pose.onnx"), None), np.random.default_rng(0)
    for _ in range(30):
        w, h = rng.uniform(30, 300, 2)
        x, y = rng.uniform(-20, 150, 2)
        point = np.clip((x, y) + rng.uniform(0.1, 0.9, 2) * (w, h), 8, 290)
        photo = np.zeros((300, 300, 3), np.uint8)
        cv2.circle(photo, tuple(int(v) for v in np.round(point)), 5, (255, 255, 255), -1)
        photo = cv2.GaussianBlur(photo, (0, 0), 3)
        box = np.float32(
            [min(x, point[0] - 5), min(y, point[1] - 5), max(x + w, point[0] + 5), max(y + h, point[1] + 5)]
        )
        found = pose.points(photo, box[None])
        assert found.shape == (1, 106, 2) and np.abs(found - point).max() < 1.5 + 1.25 * max(w, h) / 256


def test_rtmpose_on_the_boxes_of_the_published_yunet(real_data, tmp_path):
    model = brightest_model(tmp_path / "pose.onnx")
    detector, boxes = (
        FaceDetector("rtmpose", models=real_data / "models", model=model),
        FaceDetector("yunet", models=real_data / "models"),
    )
    photo = decode(next((real_data / "faces_multi" / "office").glob("*.jpg")))
    found, wanted = detector.find(photo, "bgr"), boxes.find(photo, "bgr")
    assert (
        len(found) == len(wanted) > 1
        and np.array_equal(found.boxes, wanted.boxes)
        and np.array_equal(found.scores, wanted.scores)
    )
    widened = (wanted.boxes[:, 2:] - wanted.boxes[:, :2]).max(axis=1) * 1.25
    assert (
        np.abs(found.landmarks - (wanted.boxes[:, None, :2] + wanted.boxes[:, None, 2:]) / 2).max(axis=(1, 2))
        <= widened / 2 + 1
    ).all()


def test_nothing_is_downloaded_by_a_look(tmp_path, monkeypatch):
    monkeypatch.setattr("calib_nb.faces.detectors.fetch_model", lambda *a, **k: pytest.fail("it tried"))
    table = available(tmp_path)
    assert (
        table.method.tolist() == list(DETECTORS)
        and (table.loc[~table.ready, "missing"] != "").all()
        and (table.loc[~table.ready, "get"] != "").all()
    )


# ---------------------------------------------------------------- photos of people

PHOTOS = 100
# precision and recall on faces_multi at IoU 0.5; mediapipe_simple on its folder ub
BARS = {
    "yunet": (0.90, 0.95),
    "scrfd": (0.95, 0.95),
    "retinaface": (0.92, 0.96),
    "yolov5_face": (0.93, 0.95),
    "yolov8": (0.95, 0.93),
    "mtcnn": (0.94, 0.70),
    "mediapipe": (0.90, 0.55),
    "mediapipe_simple": (0.86, 0.75),
}


def build(name, real_data, **options):
    if DETECTORS[name].runs_on == "mediapipe":
        pytest.importorskip("mediapipe", reason="the extra mediapipe is not installed")
    return FaceDetector(name, models=real_data / "models", **options)


def lfw_photos(real_data):
    photos = sorted((real_data / "lfw" / "images").glob("*/*.jpg"))
    return [photos[i] for i in sorted(np.random.default_rng(0).permutation(len(photos))[:PHOTOS])]


@pytest.mark.slow
@pytest.mark.parametrize("name", BARS)
def test_labelled_faces_are_found(real_data, name):
    truth, detector = read_boxes(real_data / "faces_multi"), build(name, real_data)
    if name == "mediapipe_simple":
        truth = truth[truth.path.str.startswith("ub/")]
    scores = score_faces({path: detector.find(real_data / "faces_multi" / path) for path in truth.path.unique()}, truth)
    assert scores["precision"] >= BARS[name][0] and scores["recall"] >= BARS[name][1], scores


@pytest.fixture(scope="module")
def portraits(real_data):
    """(photo, its faces by SCRFD) of a hundred LFW photos."""
    detector = build("scrfd", real_data)
    return [(photo, detector.find(photo, "bgr")) for photo in map(decode, lfw_photos(real_data))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, agreement",
    {
        "yunet": 0.13,
        "retinaface": 0.07,
        "yolov5_face": 0.07,
        "yolov8": 0.09,
        "mtcnn": 0.07,
        "mediapipe": 0.07,
        "mediapipe_simple": 0.13,
    }.items(),
)
def test_the_face_of_a_portrait_is_found_and_its_points_agree(real_data, portraits, name, agreement):
    """The median distance of the five points from SCRFD's, as a share of the eye distance."""
    detector = build(name, real_data)
    found = [detector.find(photo, "bgr") for photo, _ in portraits]
    assert sum(map(bool, map(len, found))) >= 98 * PHOTOS // 100
    drifts = [landmark_drift(faces, reference, iou=0.3) for faces, (_, reference) in zip(found, portraits)]
    assert np.median(np.concatenate([drift.landmark_px / drift.eye_px for drift in drifts])) < agreement


@pytest.mark.slow
def test_scrfd_finds_the_face_of_a_portrait(portraits):
    assert sum(len(faces) > 0 for _, faces in portraits) >= 98 * PHOTOS // 100


def test_opencv_and_onnx_runtime_see_the_same_yunet(real_data):
    """The published file in both, on photos that fit its input: pad them as OpenCV would."""
    model = real_data / "models" / "face_detection_yunet_2023mar.onnx"
    ours, theirs = FaceDetector("yunet", model=model), FaceDetector("yunet", models=real_data / "models")
    for photo in sorted((real_data / "faces_multi" / "office").glob("*.jpg")):
        picture = letterbox(decode(photo), (640, 640))[0]
        a, b = ours.find(picture, "bgr"), theirs.find(picture, "bgr")
        pairs = match_boxes(a.boxes, b.boxes, 0.9)
        assert (
            len(a) == len(b) == len(pairs)
            and np.abs(a.landmarks[pairs[:, 0]] - b.landmarks[pairs[:, 1]]).max(initial=0) < 0.5
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", BARS)
def test_odd_shapes_hold_no_face(real_data, name):
    detector, rng = build(name, real_data), np.random.default_rng(0)
    for shape in ((1, 1, 3), (2, 3, 3), (1, 10_000, 3), (10_000, 1, 3)):
        boxes, points = detector.detect_faces(rng.integers(0, 256, shape, np.uint8), "bgr")
        assert boxes.shape == (0, 5) and points.shape == (0, 5, 2)


def test_published_weights_of_mtcnn_load(real_data):
    weights = load_arrays(real_data / "models" / "mtcnn" / "pnet.npy")
    assert weights["features.conv1.weight"].shape == (10, 3, 3, 3)


def test_all_that_have_their_files_are_ready(real_data):
    table = available(real_data / "models").set_index("method")
    assert (
        table.loc[["yunet", "scrfd", "retinaface", "yolov5_face", "yolov8", "mtcnn"], "ready"].all()
        and not table.ready["rtmpose"]
    )


@pytest.mark.parametrize("kind, file", [("mediapipe", "text.task"), ("mediapipe_simple", "text.tflite")])
def test_a_file_that_mediapipe_cannot_use(tmp_path, kind, file):
    pytest.importorskip("mediapipe", reason="the extra mediapipe is not installed")
    (tmp_path / file).write_text("hello")
    with pytest.raises(ModelError, match="MediaPipe cannot use"):
        FaceDetector(kind, model=tmp_path / file)


def test_a_missing_mediapipe_is_named(tmp_path, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "mediapipe" else found(name, *a))
    with pytest.raises(ModelError, match=r"not installed; pip install 'calib-nb\[mediapipe\]'"):
        FaceDetector("mediapipe")
    row = available(tmp_path).set_index("method").loc["mediapipe"]
    assert "package mediapipe" in row.missing and "pip install" in row["get"]


@pytest.mark.slow
def test_int8_runs_in_the_same_place(real_data, tmp_path):
    """A published detector quantized here stays a detector behind the same word."""
    from calib_nb.quant.quantize import quantize_static

    photos = [decode(p) for p in lfw_photos(real_data)[:12]]
    method = DETECTORS["retinaface"]
    int8 = quantize_static(
        real_data / "models" / "retinaface_mobilenet0.25_FaceDetector_heads.onnx",
        [letterbox(p, (640, 640), **method.placing)[0] for p in photos[:8]],
        method.preprocess,
        tmp_path / "int8.onnx",
        progress=False,
    )
    before, after = FaceDetector("retinaface", models=real_data / "models"), FaceDetector("retinaface", model=int8.path)
    assert isinstance(after._engine, OnnxDetector)
    for photo in photos[8:]:
        a, b = before.find(photo, "bgr"), after.find(photo, "bgr")
        assert len(match_boxes(b.boxes, a[:1].boxes, 0.5)) == 1


def test_suppression_takes_another_measure():
    boxes = np.array([[0, 0, 10, 10], [2, 2, 5, 5], [20, 20, 30, 30]], float)
    assert suppress(boxes, np.array([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 1, 2]
    assert suppress(boxes, np.array([0.9, 0.8, 0.7]), 0.5, overlap=overlap_of_smaller).tolist() == [0, 2]


def test_a_chosen_face():
    faces = Faces(
        np.float32([[0, 0, 50, 50], [40, 40, 60, 60]]), np.float32([0.8, 0.9]), np.zeros((2, 5, 2), np.float32)
    )
    assert faces.largest().scores == np.float32(0.8) and faces.central((100, 100)).scores == np.float32(0.9)
    assert np.allclose(faces.moved(3, -2).moved(-3, 2).boxes, faces.boxes)
