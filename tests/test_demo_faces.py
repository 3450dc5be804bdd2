"""Drawn faces: exact, repeatable, in LFW's layout, whole or absent; the models trained on them keep their contracts."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import onnx
import pytest

from calib_nb.core.errors import InputError
from calib_nb.data.images import decode
from calib_nb.faces.boxes import match_boxes, read_boxes
from calib_nb.faces.demo import (
    DetectorTraining,
    EmbedderTraining,
    constant_detector,
    demo_detector,
    demo_embedder,
    demo_lfw,
)
from calib_nb.faces.demo_drawings import (
    LANDMARKS,
    draw_face,
    draw_face_scene,
    draw_styles,
    drawn_faces,
    drawn_pairs,
    drawn_scenes,
)
from calib_nb.faces.detect import YUNET_OUTPUTS, YuNetDetector, box_iou, encode_yunet
from calib_nb.faces.verification import read_pairs


def test_the_folder_is_lfw_and_its_pairs_are_all_there(tmp_path):
    table = drawn_faces(tmp_path / "lfw", identities=8, per_identity=3, size=96)
    assert len(table) == 24 and {f"{n}_{a}" for n in LANDMARKS for a in "xy"} <= set(table.columns)
    pairs = read_pairs(tmp_path / "lfw" / "pairsDevTest.txt", tmp_path / "lfw" / "images")
    assert pairs.missing == pairs.malformed == () and pairs.table.same.mean() == 0.5
    named = {photo.split("/")[0] for photo in pairs.photos}
    assert named < set(table.identity) and len(named) == 6  # a quarter of the people is in no pair
    assert decode(tmp_path / "lfw" / "images" / table.path[0]).shape == (96, 96, 3)
    assert not pairs.table.duplicated(["first", "second"]).any()


def test_same_seed_same_bytes_other_seed_other_people(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        drawn_faces(tmp_path / name, identities=3, per_identity=2, size=64, seed=seed)
    files = {
        name: {
            p.relative_to(tmp_path / name).as_posix(): p.read_bytes()
            for p in (tmp_path / name).rglob("*")
            if p.is_file()
        }
        for name in "abc"
    }
    assert files["a"] == files["b"] and files["a"] != files["c"]


@pytest.mark.parametrize("radius", [12, 40])
def test_landmarks_and_box_lie_where_the_face_was_drawn(radius):
    for seed, style in enumerate(draw_styles(12, seed=3)):
        before = np.full((200, 200, 3), 128, np.uint8)
        canvas = before.copy()
        box, points = draw_face(canvas, style, (100, 100), radius, np.random.default_rng(seed))
        assert (points > box[:2]).all() and (points < box[2:]).all()
        assert points[0, 0] < points[1, 0] and points[3, 0] < points[4, 0] and points[2, 1] > points[:2, 1].max()
        y, x = np.nonzero((canvas != before).any(axis=2))
        assert (
            x.min() <= box[0] + 2 and x.max() >= box[2] - 2 and abs(y.max() - box[3]) <= max(3, radius)
        )  # long hair may hang lower


def test_nobody_hides_anybody_in_a_scene():
    for seed in range(20):
        _, boxes, _ = draw_face_scene(draw_styles(6, seed), np.random.default_rng(seed))
        overlap = box_iou(boxes, boxes) - np.eye(len(boxes))
        assert overlap.max(initial=0) < 0.05 and len(boxes) >= 3


def test_scenes_are_read_back_as_boxes(tmp_path):
    table = drawn_scenes(tmp_path / "s", 5, size=(160, 120))
    read = read_boxes(tmp_path / "s")
    assert read.path.tolist() == [f"ub/images/{p}" for p in table.path]
    assert np.allclose(read[["x1", "y1", "x2", "y2"]], table[["x1", "y1", "x2", "y2"]])


def test_pairs_cannot_be_asked_for_more_than_there_are():
    text = drawn_pairs({"Ann": 2, "Bob": 2}, per_identity=50)
    assert text.splitlines()[0] == "2"  # one matched pair each


def test_a_folder_with_something_in_it_is_not_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="not empty"):
        drawn_faces(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_a_killed_drawing_leaves_no_folder(tmp_path):
    call = f"drawn_faces({str(tmp_path / 'x')!r}, identities=4000, size=250)"
    code = f"from calib_nb.faces.demo_drawings import drawn_faces; {call}"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".x.partial/images/*/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "x").exists() and list(tmp_path.glob(".x.partial/images/*/*.jpg"))
    drawn_faces(tmp_path / "x", identities=2, per_identity=1, size=48)
    assert len(list((tmp_path / "x" / "images").iterdir())) == 2 and not (tmp_path / ".x.partial").exists()


QUICK_DETECTOR = DetectorTraining(photos=4, steps=2)
QUICK_EMBEDDER = EmbedderTraining(people=3, photos=2, steps=2, batch=4)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of this test alone."""
    monkeypatch.setenv("CALIB_NB_CACHE", str(tmp_path))
    return tmp_path


def test_the_detector_keeps_yunets_contract(cache):
    graph = onnx.load(demo_detector(settings=QUICK_DETECTOR))
    onnx.checker.check_model(graph)
    assert tuple(o.name for o in graph.graph.output) == YUNET_OUTPUTS and graph.opset_import[0].version == 17
    assert [d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 160, 160]


def test_the_embedder_takes_any_batch(cache):
    shape = onnx.load(demo_embedder(settings=QUICK_EMBEDDER)).graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param == "batch" and [d.dim_value for d in shape[1:]] == [3, 64, 64]


def test_models_and_pictures_are_made_once_for_each_setting(cache):
    path = demo_detector(settings=QUICK_DETECTOR)
    stamp = path.stat().st_mtime_ns
    assert demo_detector(settings=QUICK_DETECTOR) == path and path.stat().st_mtime_ns == stamp
    assert demo_detector(settings=replace(QUICK_DETECTOR, steps=3)) != path
    assert demo_lfw(identities=4, per_identity=2) == demo_lfw(identities=4, per_identity=2)
    assert demo_lfw(identities=4, per_identity=2) != demo_lfw(identities=4, per_identity=3)
    assert [p.suffix for p in sorted(cache.rglob("*.onnx"))] == [".onnx", ".onnx"]


def test_the_same_training_makes_the_same_file(tmp_path):
    paths = [demo_embedder(tmp_path / name, replace(QUICK_EMBEDDER, steps=3)) for name in "ab"]
    weights = [[onnx.numpy_helper.to_array(t) for t in onnx.load(p).graph.initializer] for p in paths]
    assert all(np.array_equal(x, y) for x, y in zip(*weights, strict=True))


def test_a_constant_detector_answers_the_same_for_every_image(tmp_path):
    box, points = np.array([[10, 10, 40, 50.0]]), np.full((1, 5, 2), 20.0)
    path = constant_detector(tmp_path / "one.onnx", encode_yunet(box, points, (64, 64)), (64, 64))
    detector, rng = YuNetDetector(path), np.random.default_rng(0)
    for _ in range(3):
        faces = detector.detect(rng.integers(0, 256, (64, 64, 3), np.uint8))
        assert np.allclose(faces.boxes, box, atol=1e-4) and np.allclose(faces.landmarks, points, atol=1e-4)


@pytest.mark.slow
def test_the_demo_detector_sees_faces_that_it_was_not_trained_on():
    detector, people, rng = YuNetDetector(demo_detector()), draw_styles(400, seed=77), np.random.default_rng(77)
    hits = found = labelled = 0
    for i in range(100):
        photo, boxes, _ = draw_face_scene(people[4 * i : 4 * i + 1 + i % 4], rng)
        faces = detector.detect(photo)
        hits, found, labelled = hits + len(match_boxes(faces.boxes, boxes)), found + len(faces), labelled + len(boxes)
    assert hits / labelled >= 0.88 and hits / found >= 0.9
