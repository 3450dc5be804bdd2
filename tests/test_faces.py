"""Faces: YuNet against OpenCV, alignment against least squares, metrics against scikit-learn, hostile labels."""

import logging

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from calib_nb.core.errors import InputError, ModelError
from calib_nb.data.images import decode
from calib_nb.faces.align import ARCFACE_TEMPLATE, align, umeyama
from calib_nb.faces.boxes import DetectionTask, landmark_drift, match_boxes, precision_recall, read_boxes
from calib_nb.faces.detect import (
    Faces,
    YuNetDetector,
    box_iou,
    decode_yunet,
    detect_opencv,
    encode_yunet,
    letterbox,
    letterbox_scale,
    suppress,
)
from calib_nb.faces.verification import (
    Pairs,
    VerificationTask,
    accuracy_best_threshold,
    accuracy_kfold,
    cosine_pairs,
    eer,
    hold_out,
    parse_pair,
    read_pairs,
    roc,
    roc_auc,
    tar_at_far,
)  # fmt: skip

# ---------------------------------------------------------------- detection


@st.composite
def scenes(draw):
    """Boxes in separate 80 px tiles of a 320 x 240 input, with landmarks inside."""
    tiles = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=0, max_size=6, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    boxes = np.array(
        [
            [
                80 * c + rng.uniform(4, 20),
                80 * r + rng.uniform(4, 20),
                80 * c + rng.uniform(40, 76),
                80 * r + rng.uniform(40, 76),
            ]
            for c, r in tiles
        ]
    ).reshape(-1, 4)
    points = boxes[:, None, :2] + rng.uniform(0, 1, (len(boxes), 5, 2)) * (boxes[:, None, 2:] - boxes[:, None, :2])
    return boxes, points


@settings(max_examples=40, deadline=None, derandomize=True)
@given(scenes())
def test_decode_undoes_encode(scene):
    boxes, points = scene
    faces = decode_yunet(encode_yunet(boxes, points, (320, 256)), input_size=(320, 256))
    assert len(faces) == len(boxes)
    order, wanted = np.lexsort(faces.boxes[:, :2].T), np.lexsort(boxes[:, :2].T)
    assert np.allclose(faces.boxes[order], boxes[wanted], atol=1e-3) and np.allclose(
        faces.landmarks[order], points[wanted], atol=1e-3
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 60), st.integers(0, 2**32 - 1), st.floats(0.1, 0.9))
def test_suppression_is_opencvs(n, seed, threshold):
    rng = np.random.default_rng(seed)
    corner, size = rng.integers(0, 100, (n, 2)), rng.integers(5, 60, (n, 2))
    scores = rng.permutation(n) / max(1, n) + 0.001
    theirs = cv2.dnn.NMSBoxes(np.hstack([corner, size]).tolist(), scores.tolist(), 0.0, threshold) if n else []
    assert suppress(np.hstack([corner, corner + size]), scores, threshold).tolist() == list(map(int, theirs))


def test_decode_keeps_the_best_and_refuses_what_is_not_yunet():
    outputs = encode_yunet(np.array([[10, 10, 40, 40.0]]), np.zeros((1, 5, 2)), (64, 64))
    assert len(decode_yunet(outputs, input_size=(64, 64), top_k=0)) == 0
    assert len(decode_yunet(outputs, input_size=(64, 64), score_threshold=1.01)) == 0
    with pytest.raises(ModelError, match="kps_16 has nothing"):
        decode_yunet({k: v for k, v in outputs.items() if k != "kps_16"}, input_size=(64, 64))
    with pytest.raises(ModelError, match="is this a YuNet"):
        decode_yunet(outputs, input_size=(96, 64))
    hot = {k: v + 5 if k[:3] in ("cls", "obj") else v for k, v in outputs.items()}
    assert decode_yunet(hot, input_size=(64, 64)).scores.max() == 1  # a quantized sigmoid may say 1.004


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 400), st.integers(1, 400))
def test_letterbox_keeps_everything_and_never_enlarges(w, h):
    photo = np.full((h, w, 3), 200, np.uint8)
    picture, scale = letterbox(photo, (160, 96))
    assert picture.shape == (96, 160, 3) and scale == letterbox_scale(w, h, (160, 96)) <= 1
    filled = picture.any(axis=2)
    assert abs(filled.any(axis=0).sum() - w * scale) <= 1 and abs(filled.any(axis=1).sum() - h * scale) <= 1


def test_a_wrong_model_is_refused(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"not a model")
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(ModelError):
        YuNetDetector(tmp_path / "x.onnx")
    with pytest.raises(ModelError, match="OpenCV cannot use x.onnx"):
        detect_opencv(tmp_path / "x.onnx", [tmp_path / "a.png"], progress=False)


def test_our_yunet_is_opencvs_on_photos(real_data):
    model = real_data / "models" / "face_detection_yunet_2023mar.onnx"
    detector, faces = YuNetDetector(model), 0
    photos = sorted((real_data / "faces_multi" / "ub" / "images").glob("*.jpg"))[:20]
    for photo in photos:
        padded = letterbox(decode(photo), detector.input_size)[0]
        yn = cv2.FaceDetectorYN.create(str(model), "", detector.input_size, 0.7, 0.3, 5000)
        found = yn.detect(padded)[1]
        theirs = np.zeros((0, 15)) if found is None else found
        ours = detector.detect(padded)
        assert len(ours) == len(theirs)
        order = match_boxes(ours.boxes, np.hstack([theirs[:, :2], theirs[:, :2] + theirs[:, 2:4]]), 0.9)
        assert len(order) == len(ours)
        assert (
            np.abs(
                ours.boxes[order[:, 0]] - np.hstack([theirs[:, :2], theirs[:, :2] + theirs[:, 2:4]])[order[:, 1]]
            ).max(initial=0)
            < 0.5
        )
        assert np.abs(ours.landmarks[order[:, 0]] - theirs[order[:, 1], 4:14].reshape(-1, 5, 2)).max(initial=0) < 0.5
        assert np.abs(ours.scores[order[:, 0]] - theirs[order[:, 1], 14]).max(initial=0) < 1e-3
        faces += len(ours)
    assert faces >= 20


def test_yunet_finds_the_labelled_people(real_data):
    truth = read_boxes(real_data / "faces_multi")
    assert len(truth) == 131 and truth.path.nunique() == 61
    photos = [real_data / "faces_multi" / path for path in dict.fromkeys(truth.path)]
    found = detect_opencv(real_data / "models" / "face_detection_yunet_2023mar.onnx", photos, progress=False)
    boxes = {path: rows[["x1", "y1", "x2", "y2"]].to_numpy() for path, rows in truth.groupby("path", sort=False)}
    hits = sum(len(match_boxes(f.boxes, b)) for f, b in zip(found, boxes.values()))
    scores = precision_recall(hits, sum(map(len, found)) - hits, len(truth) - hits)
    assert scores["precision"] > 0.93 and scores["recall"] > 0.93


# ---------------------------------------------------------------- labels and matching


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 2**32 - 1))
def test_matches_are_one_to_one_and_overlap(n, m, seed):
    rng = np.random.default_rng(seed)
    a, b = (np.hstack([c := rng.integers(0, 20, (k, 2)), c + rng.integers(5, 20, (k, 2))]) for k in (n, m))
    matches = match_boxes(a, b)
    assert len(set(matches[:, 0])) == len(set(matches[:, 1])) == len(matches)
    iou = box_iou(a, b)
    assert all(iou[i, j] >= 0.5 for i, j in matches)
    free = [i for i in range(n) if i not in matches[:, 0]]
    left = [j for j in range(m) if j not in matches[:, 1]]
    assert not len(left) or not len(free) or iou[np.ix_(free, left)].max(initial=0) < 0.5  # nothing matchable is left


def test_drift_is_measured_in_pixels_and_ignores_lost_faces():
    boxes = np.array([[0, 0, 20, 20], [100, 100, 140, 140.0]])
    reference = Faces(boxes, np.array([0.9, 0.8]), np.zeros((2, 5, 2)))
    moved = Faces(boxes[:1], np.array([0.9]), np.full((1, 5, 2), 1.0))
    drift = landmark_drift(moved, reference)
    assert drift.face_px.tolist() == [20] and np.allclose(drift.landmark_px, np.sqrt(2))


@pytest.mark.parametrize("text, message", [
    ('[{"iname": "../../x.jpg", "bbox": [1, 2, 3, 4]}]', "points outside"),
    ('[{"iname": "a.jpg", "bbox": [1, 2, 3]}]', "is not a box"),
    ('[{"iname": "a.jpg", "bbox": [1, 2, 0, 4]}]', "no area"),
    ('[{"iname": "a.jpg", "bbox": [1, 2, 1e999, 4]}]', "no area"),
    ('[{"iname": "a.jpg", "bbox": "wide"}]', "is not a box"),
    ('{"iname": "a.jpg"}', "does not list boxes"),
    ('[{"iname": "a.jpg", "bbox": [1, 2, 3, 4]}]', "no labelled images"),
    ("", "not valid JSON"),
])  # fmt: skip
def test_bad_boxes_are_named(tmp_path, text, message):
    (tmp_path / "ground-truth.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_boxes(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_refused_in_any_encoding(tmp_path, encoding):
    entities = f'<!ENTITY a "{"x" * 99}"><!ENTITY b "{"&a;" * 99}">'
    bomb = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE d [{entities}]><dataset>&b;</dataset>'
    (tmp_path / "x.xml").write_bytes(bomb.encode(encoding))
    with pytest.raises(InputError, match="DOCTYPE"):
        read_boxes(tmp_path)


def test_absent_images_are_named_not_scored(tmp_path, caplog):
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((8, 8, 3), np.uint8))
    box = "<box top='1' left='1' width='3' height='3'/>"
    (tmp_path / "x.xml").write_text(f"<d><image file='a.jpg'>{box}</image><image file='b.jpg'>{box}</image></d>")
    with caplog.at_level(logging.WARNING):
        assert read_boxes(tmp_path).path.tolist() == ["a.jpg"]
    assert "b.jpg" in caplog.text


def test_detection_task_counts_what_float_and_int8_found(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((128, 128, 3), np.uint8))
    box, points = np.array([[10, 10, 50, 50.0], [60, 60, 100, 100.0]]), np.zeros((2, 5, 2))
    truth = pd.DataFrame([["a.png", *b] for b in box * 2], columns=["path", "x1", "y1", "x2", "y2"])
    task = DetectionTask(tmp_path, truth.assign(path="a.png"), input_size=(64, 64))
    assert (
        task.load(task.samples[0]).shape == (1, 3, 64, 64)
        and task.load(task.samples[0]).dtype == np.float32
        and task.scales == [0.5]
    )
    task = DetectionTask(
        tmp_path, pd.DataFrame([["a.png", *b] for b in box], columns=truth.columns), input_size=(128, 128)
    )
    both, one = encode_yunet(box, points, (128, 128)), encode_yunet(box[:1], points[:1] + 3, (128, 128))
    units = task.units([one], [both])
    assert units[["hits", "false_alarms", "misses"]].iloc[0].tolist() == [1, 0, 1] and np.isclose(
        units.landmark_px[0], np.hypot(3, 3)
    )
    assert task.metrics(units)["f1"] == pytest.approx(2 / 3)


# ---------------------------------------------------------------- alignment


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_umeyama_finds_an_exact_similarity(n, seed):
    rng = np.random.default_rng(seed)
    source, angle, scale, shift = (
        rng.normal(size=(n, 2)),
        rng.uniform(-np.pi, np.pi),
        rng.uniform(0.1, 10),
        rng.normal(size=2) * 50,
    )
    linear = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    assert np.allclose(umeyama(source, source @ linear.T + shift), np.column_stack([linear, shift]), atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_umeyama_is_the_least_squares_solution(seed):
    rng = np.random.default_rng(seed)
    source = rng.normal(size=(5, 2))
    target = source @ rng.normal(size=(2, 2)) + rng.normal(size=(5, 2)) * 0.3
    rows = np.vstack(
        [
            np.column_stack([source[:, 0], -source[:, 1], np.ones(5), np.zeros(5)]),
            np.column_stack([source[:, 1], source[:, 0], np.zeros(5), np.ones(5)]),
        ]
    )
    (a, b, x, y), *_ = np.linalg.lstsq(rows, target.T.ravel(), rcond=None)
    ours = umeyama(source, target)
    assert np.allclose(
        ours, [[a, -b, x], [b, a, y]], atol=1e-8
    )  # rotations with scale are a linear space in 2-D, so both are the optimum
    assert np.linalg.det(ours[:, :2]) >= 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(3, 8), st.booleans())
def test_umeyama_is_scikit_images_similarity_transform(seed, n, mirrored):
    """Five points in a photo against the template, and any others, also where a reflection would fit better."""
    from skimage.transform import SimilarityTransform

    rng = np.random.default_rng(seed)
    cases = [
        (rng.uniform(0, 250, (5, 2)), ARCFACE_TEMPLATE),
        (source := rng.normal(size=(n, 2)) * 40, source * (-1 if mirrored else 1, 1) + rng.normal(size=(n, 2)) * 5),
    ]
    for source, target in cases:
        assert np.allclose(
            umeyama(source, target), SimilarityTransform.from_estimate(source, target).params[:2], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("points", [np.ones((5, 2)), np.full((5, 2), np.nan), np.ones((1, 2)), np.zeros((5, 3))])
def test_points_without_a_transform_are_refused(points):
    with pytest.raises(InputError):
        umeyama(points, points)


def test_alignment_puts_points_on_the_template():
    rng, angle = np.random.default_rng(0), 0.4
    linear = 1.7 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    points = ARCFACE_TEMPLATE @ linear.T + (40, 10)
    photo = rng.integers(0, 60, (300, 300, 3), dtype=np.uint8)
    for x, y in points:
        cv2.circle(photo, (round(x), round(y)), 5, (255, 255, 255), -1)
    for size in (112, 56):
        crop = align(photo, points, size)
        assert crop.shape == (size, size, 3)
        for x, y in ARCFACE_TEMPLATE * size / 112:
            assert crop[round(y), round(x)].min() > 200


# ---------------------------------------------------------------- verification

scores = st.lists(st.tuples(st.integers(-20, 20).map(lambda v: v / 20), st.booleans()), min_size=4, max_size=80).filter(
    lambda rows: {y for _, y in rows} == {True, False}
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(scores)
def test_metrics_agree_with_scikit_learn_and_brute_force(rows):
    s, y = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    assert roc_auc(s, y) == pytest.approx(roc_auc_score(y, s))
    far, tar, _ = roc_curve(y, s, drop_intermediate=False)
    assert np.allclose(roc(s, y), (far, tar))
    thresholds = [*np.unique(s), 2]
    best, threshold = accuracy_best_threshold(s, y)
    assert best == pytest.approx(max(((s >= t) == y).mean() for t in thresholds)) and (
        (s >= threshold) == y
    ).mean() == pytest.approx(best)
    for limit in (0, 0.1, 0.5):
        assert tar_at_far(s, y, limit) == pytest.approx(
            max((s[y] >= t).mean() for t in thresholds if (s[~y] >= t).mean() <= limit)
        )
    rate = eer(s, y)
    at = (
        np.interp(rate, far[np.r_[True, np.diff(far) > 0]], tar[np.r_[True, np.diff(far) > 0]])
        if len(set(far)) > 1
        else 0
    )
    assert 0 <= rate <= 1 and (at <= 1 - rate + 1e-9 or rate == 0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(scores.filter(lambda rows: len(rows) >= 8), st.integers(2, 5))
def test_kfold_never_looks_at_its_own_fold(rows, folds):
    s, y = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    fold = np.arange(len(s)) % folds
    ours = accuracy_kfold(s, y, fold)
    cuts = np.concatenate([[2], (np.unique(s)[::-1][:-1] + np.unique(s)[::-1][1:]) / 2, [-2]])
    for k in range(folds):
        others = [((s[fold != k] >= t) == y[fold != k]).sum() for t in cuts]
        best = np.flatnonzero(np.array(others) == max(others))
        assert ours[k] == pytest.approx(((s[fold == k] >= cuts[best[(len(best) - 1) // 2]]) == y[fold == k]).mean())
    assert np.allclose(accuracy_kfold(s[::-1], y[::-1], fold[::-1]), ours)


def test_metrics_refuse_what_cannot_be_scored():
    for s, y in (([0.1, np.nan], [True, False]), ([0.1, 0.2], [True, True]), ([], [])):
        with pytest.raises(InputError, match="cannot be scored"):
            roc_auc(s, y)
    with pytest.raises(InputError, match="two folds"):
        accuracy_kfold([0.1, 0.2], [True, False], [0, 0])


def lfw_folder(folder, people):
    for name, count in people.items():
        (folder / name).mkdir(parents=True)
        for i in range(1, count + 1):
            (folder / name / f"{name}_{i:04d}.jpg").write_bytes(b"x")
    return folder


def test_official_layouts_are_read(tmp_path):
    images = lfw_folder(tmp_path / "i", {"A_B": 12, "C": 2, "D-E": 1})
    matched, mismatched = [f"A_B\t{i}\t{i + 1}" for i in range(1, 11)], [f"A_B\t{i}\tC\t1" for i in range(1, 11)]
    (tmp_path / "dev.txt").write_text("\n".join(["10", *matched, *mismatched]) + "\n")
    pairs = read_pairs(tmp_path / "dev.txt", images)
    assert len(pairs) == 20 and pairs.table.fold.tolist() == [*range(10)] * 2
    assert pairs.table.iloc[0].tolist() == ["A_B/A_B_0001.jpg", "A_B/A_B_0002.jpg", True, 0]
    folds = "\n".join(f"{m}\n{n}" for m, n in zip(matched, mismatched))
    (tmp_path / "pairs.txt").write_text(f"10\t1\n{folds}\n")
    again = read_pairs(tmp_path / "pairs.txt", images)
    assert again.table.groupby("fold").same.agg(["sum", "count"]).eq([1, 2]).all().all()


def test_what_is_missing_or_malformed_is_named(tmp_path, caplog):
    images = lfw_folder(tmp_path / "i", {"A": 2, "B": 1})
    (tmp_path / "p.txt").write_text("2\nA 1 2\nA 1 3\nA 1 B 1\n../../etc/passwd 1 2\n\nA one B 1\n")
    pairs = read_pairs(tmp_path / "p.txt", images)
    assert len(pairs) == 2 and pairs.missing == ("A/A_0003.jpg",)
    assert [m.split(":")[0] for m in pairs.malformed] == ["line 5", "line 7"]
    (tmp_path / "short.txt").write_text("2\nA 1 2\nA 1 B 1\n")
    with caplog.at_level(logging.WARNING):
        read_pairs(tmp_path / "short.txt", images)
    assert "promises 2 pairs" in caplog.text
    for text, message in (
        ("", "begins with"),
        ("hello\n", "begins with"),
        ("1\nX 1 2\nX 1 Y 2\n", "no pair has both images"),
    ):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(InputError, match=message):
            read_pairs(tmp_path / "bad.txt", images)
    with pytest.raises(InputError, match="no such pairs file"):
        read_pairs(tmp_path / "none.txt", images)


@pytest.mark.parametrize("line", ["A 1", "A 1 2 3 4", "A x 2", "/A 1 2", ".. 1 2", "A\\B 1 2", "A 1 A 1"])
def test_a_line_that_is_not_a_pair(line):
    with pytest.raises(ValueError):
        parse_pair(line)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), wanted=st.integers(1, 12))
def test_held_out_people_are_in_no_scored_pair(tmp_path_factory, seed, wanted):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("h")
    people = {f"P{i}": int(rng.integers(1, 4)) for i in range(12)}
    images, names, rows = lfw_folder(folder / "i", people), [f"P{i}" for i in range(12)], []
    rows += [(f"{n}/{n}_0001.jpg", f"{n}/{n}_0002.jpg", True, 0) for n in names if people[n] > 1]
    rows += [
        (f"{a}/{a}_0001.jpg", f"{b}/{b}_0001.jpg", False, 0)
        for a, b in (rng.choice(names, 2, replace=False) for _ in range(10))
    ]
    pairs = Pairs(pd.DataFrame(rows, columns=["first", "second", "same", "fold"]), images)
    try:
        kept, pool = hold_out(pairs, wanted, seed)
    except InputError:
        return
    held = {p.split("/")[0] for p in pool}
    assert len(pool) >= wanted and len(set(pool)) == len(pool) and not held & {p.split("/")[0] for p in kept.photos}
    assert hold_out(pairs, wanted, seed)[1] == pool


def test_hold_out_takes_the_unnamed_first_and_gives_up_few_pairs(tmp_path):
    images = lfw_folder(
        tmp_path / "i", {"Free": 5, **{f"M{i}": 2 for i in range(6)}, **{f"X{i}": 1 for i in range(12)}}
    )
    rows = [(f"M{i}/M{i}_0001.jpg", f"M{i}/M{i}_0002.jpg", True, 0) for i in range(6)]
    rows += [(f"X{2 * i}/X{2 * i}_0001.jpg", f"X{2 * i + 1}/X{2 * i + 1}_0001.jpg", False, 0) for i in range(6)]
    pairs = Pairs(pd.DataFrame(rows, columns=["first", "second", "same", "fold"]), images)
    kept, pool = hold_out(pairs, 5)
    assert len(kept) == 12 and {p.split("/")[0] for p in pool} == {"Free"}
    kept, pool = hold_out(pairs, 13)  # eight more photos cost four pairs: two of each kind
    assert len(pool) == 13 and len(kept) == 8 and kept.table.same.sum() == 4


def test_lfw_devtest_holds_out_a_hundred_photos_for_few_pairs(real_data):
    pairs = read_pairs(real_data / "lfw" / "pairsDevTest.txt", real_data / "lfw" / "images")
    assert len(pairs) == 1000 and pairs.missing == pairs.malformed == () and len(pairs.photos) == 1549
    kept, pool = hold_out(pairs, 100)
    assert len(pool) >= 100 and len(kept) >= 945 and abs(2 * kept.table.same.sum() - len(kept)) <= 2


def test_the_task_scores_pairs_and_keeps_floats_threshold():
    crops = {name: np.full((8, 8, 3), i, np.uint8) for i, name in enumerate("abcd")}
    table = pd.DataFrame(
        {"first": list("abac"), "second": list("bcxd"), "same": [True, False, True, False], "fold": [0, 1, 0, 0]}
    )
    task = VerificationTask(crops, table, preprocess=lambda crop: np.float32(crop.transpose(2, 0, 1)[None]))
    assert task.left_out == 1 and task.photos == list("abcd") and len(task.samples) == 4
    good = [{"e": np.array([v])} for v in ([1, 0], [1, 0.1], [0, 1], [1, 0.0])]
    shifted = [{"e": np.array([v])} for v in ([1, 0], [0.2, 1.0], [0.9, 1], [0, 1.0])]
    units = task.units(shifted, good)
    assert len(units) == 3 and np.allclose(
        units.reference, cosine_pairs(dict(zip("abcd", (g["e"] for g in good))), task.pairs)
    )
    values = task.metrics(units)
    assert set(values) == {"accuracy", "accuracy_kfold", "accuracy_float_threshold", "auc", "eer", "tar_at_far_1e2"}
    assert values["accuracy_float_threshold"] <= values["accuracy"]
    assert task.metrics(task.units(good, good))["accuracy"] == 1
    with pytest.raises(InputError, match="no pairs"):
        VerificationTask({}, table)


@pytest.mark.slow
def test_edgeface_is_as_good_as_published_on_lfw_devtest(real_data):
    from calib_nb.graph.contract import open_session

    pairs = read_pairs(real_data / "lfw" / "pairsDevTest.txt", real_data / "lfw" / "images")
    found = detect_opencv(
        real_data / "models" / "face_detection_yunet_2023mar.onnx",
        [pairs.images / p for p in pairs.photos],
        progress=False,
    )
    crops = {
        p: align(decode(pairs.images / p), f.central((250, 250)).landmarks[0])
        for p, f in zip(pairs.photos, found)
        if len(f)
    }
    assert len(crops) == 1549
    task, session = (
        VerificationTask(crops, pairs.table),
        open_session(real_data / "models" / "edgeface_xxs_q_dequant.onnx"),
    )
    outputs = [{"embedding": session.run(None, {"input": task.load(crop)})[0]} for crop in task.samples]
    values = task.metrics(task.units(outputs, outputs))
    assert values["accuracy"] >= 0.99 and values["accuracy_kfold"] >= 0.988 and values["auc"] > 0.995
