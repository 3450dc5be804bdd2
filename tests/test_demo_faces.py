"""Drawn faces: exact, repeatable, in LFW's layout, whole or absent; the models trained on them keep their contracts."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import pytest

from calib_nb.core.errors import InputError
from calib_nb.data.images import decode
from calib_nb.faces.boxes import match_boxes, read_boxes
from calib_nb.faces.demo import DetectorTraining, EmbedderTraining, demo_detector, demo_embedder, demo_lfw
from calib_nb.faces.demo_drawings import (
    LANDMARKS,
    draw_face,
    draw_face_scene,
    draw_styles,
    drawn_faces,
    drawn_pairs,
    drawn_scenes,
)
from calib_nb.faces.detect import YUNET_OUTPUTS, YuNetDetector, box_iou
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
    code = f"from calib_nb.faces.demo_drawings import drawn_faces; drawn_faces({str(tmp_path / 'x')!r}, identities=4000, size=250)"
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".x.partial/images/*/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "x").exists() and list(tmp_path.glob(".x.partial/images/*/*.jpg"))
    drawn_faces(tmp_path / "x", identities=2, per_identity=1, size=48)
    assert len(list((tmp_path / "x" / "images").iterdir())) == 2 and not (tmp_path / ".x.partial").exists()


def test_models_keep_the_contract_and_are_made_once(tmp_path):
    detector = demo_detector(tmp_path, DetectorTraining(photos=4, steps=2))
    embedder = demo_embedder(tmp_path, EmbedderTraining(people=3, photos=2, steps=2, batch=4))
    graph = onnx.load(detector)
    onnx.checker.check_model(graph)
    assert tuple(o.name for o in graph.graph.output) == YUNET_OUTPUTS and graph.opset_import[0].version == 17
    assert [d.dim_value for d in graph.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 160, 160]
    shape = onnx.load(embedder).graph.input[0].type.tensor_type.shape.dim
    assert shape[0].dim_param == "batch" and [d.dim_value for d in shape[1:]] == [3, 64, 64]
    stamp = detector.stat().st_mtime_ns
    assert (
        demo_detector(tmp_path, DetectorTraining(photos=4, steps=2)) == detector
        and detector.stat().st_mtime_ns == stamp
    )
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".onnx", ".onnx"]
    assert demo_lfw(tmp_path, identities=4, per_identity=2) == demo_lfw(tmp_path, identities=4, per_identity=2)


def test_the_same_training_makes_the_same_file(tmp_path):
    a, b = (demo_embedder(tmp_path / name, EmbedderTraining(people=3, photos=2, steps=3, batch=4)) for name in "ab")
    weights = [[onnx.numpy_helper.to_array(t) for t in onnx.load(p).graph.initializer] for p in (a, b)]
    assert all(np.array_equal(x, y) for x, y in zip(*weights, strict=True))


@pytest.mark.slow
def test_the_demo_detector_finds_drawn_faces_that_it_has_not_seen():
    detector, people, rng = YuNetDetector(demo_detector()), draw_styles(400, seed=77), np.random.default_rng(77)
    hits = found = labelled = 0
    for i in range(100):
        photo, boxes, _ = draw_face_scene(people[4 * i : 4 * i + 1 + i % 4], rng)
        faces = detector.detect(photo)
        hits, found, labelled = hits + len(match_boxes(faces.boxes, boxes)), found + len(faces), labelled + len(boxes)
    assert hits / labelled >= 0.88 and hits / found >= 0.9
