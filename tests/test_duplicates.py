"""Near-duplicates: planted copies are found, different photos are not; groups agree with a plain computation."""

import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.core.errors import InputError
from calib_nb.data.demo_images import paint_scene
from calib_nb.data.duplicates import (
    MAX_DISTANCE,
    group_near,
    hash_images,
    keep_one_per_group,
    leaks,
    near_duplicates,
    near_pairs,
)
from calib_nb.data.images import decode, find_images

COPIES = {
    "quality_30": lambda x: cv2.imdecode(cv2.imencode(".jpg", x, [cv2.IMWRITE_JPEG_QUALITY, 30])[1], cv2.IMREAD_COLOR),
    "half": lambda x: cv2.resize(x, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA),
    "double": lambda x: cv2.resize(x, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC),
    "brighter": lambda x: cv2.convertScaleAbs(x, alpha=1.1, beta=5),
}


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


@given(st.integers(0, 40), st.integers(0, 30), st.integers(0, 256), st.integers(0, 2**31))
@settings(derandomize=True, max_examples=50, deadline=None)
def test_pairs_agree_with_counting_bits_one_by_one(n, m, limit, seed):
    rng = np.random.default_rng(seed)
    a, b = (pd.DataFrame(rng.integers(0, 2**64, (k, 4), dtype=np.uint64)) for k in (n, m))
    found = {(i, j): d for i, j, d in near_pairs(a, b, max_distance=limit).itertuples(index=False)}
    by_hand = {
        (i, j): sum((int(x) ^ int(y)).bit_count() for x, y in zip(a.loc[i], b.loc[j]))
        for i in range(n)
        for j in range(m)
    }
    assert found == {pair: d for pair, d in by_hand.items() if d <= limit}


@given(st.lists(st.integers(0, 255), min_size=1, max_size=30), st.integers(0, 3))
@settings(derandomize=True, max_examples=50, deadline=None)
def test_groups_are_the_connected_components(words, limit):
    networkx = pytest.importorskip("networkx")

    hashes = pd.DataFrame({"bits": np.array(words, np.uint64)}, index=[f"{i:02d}" for i in range(len(words))])
    groups = group_near(hashes, list(hashes.index)[::-1], max_distance=limit)
    graph = networkx.Graph()
    graph.add_nodes_from(range(len(words)))
    graph.add_edges_from(
        (i, j) for i, x in enumerate(words) for j, y in enumerate(words[:i]) if (x ^ y).bit_count() <= limit
    )
    expected = {frozenset(f"{i:02d}" for i in component) for component in networkx.connected_components(graph)}
    assert {frozenset(group.index) for _, group in groups.groupby(groups)} == expected


def test_many_equal_frames_fit_in_memory():
    hashes = pd.DataFrame(np.zeros((6000, 4), np.uint64), index=[f"{i:05d}" for i in range(6000)])
    assert group_near(hashes, list(hashes.index)).nunique() == 1


def test_planted_copies_are_found_and_scenes_kept_apart(tmp_path):
    for i in range(8):
        scene = paint_scene(i)
        write(tmp_path / f"{i}/original.jpg", scene)
        for kind, change in COPIES.items():
            write(tmp_path / f"{i}/{kind}.jpg", change(scene))
    (tmp_path / "0/broken.jpg").write_bytes(b"\xff\xd8\xff")
    groups = near_duplicates(tmp_path, find_images(tmp_path), progress=False)
    together = groups.drop("0/broken.jpg").groupby(lambda path: path[0]).unique()
    assert (together.str.len() == 1).all() and groups.nunique() == 9


def test_the_best_of_a_group_stays_whatever_the_order():
    table = pd.DataFrame({"path": list("abcdef"), "quality": [1.0, 5.0, 5.0, np.nan, 2.0, 9.0]})
    groups = pd.Series({"a": 0, "b": 0, "c": 0, "d": 1, "e": 1})
    assert keep_one_per_group(table, groups)["path"].tolist() == ["b", "e", "f"]
    assert keep_one_per_group(table[::-1], groups)["path"].tolist() == ["f", "e", "b"]


def test_leaks_are_named_once_with_their_kind(tmp_path):
    for i in range(6):
        write(tmp_path / f"calibration/{i}.jpg", paint_scene(i))
    write(tmp_path / "validation/a.jpg", COPIES["quality_30"](paint_scene(2)))
    write(tmp_path / "validation/b.jpg", COPIES["half"](paint_scene(2)))
    shutil.copy(tmp_path / "calibration/3.jpg", tmp_path / "validation/other_name.jpg")
    write(tmp_path / "validation/new.jpg", paint_scene(20))
    found = leaks(tmp_path / "calibration", tmp_path / "validation", progress=False)
    assert found["calibration"].tolist() == ["2.jpg", "3.jpg"] and found["kind"].tolist() == ["near", "exact"]
    assert found.loc[1, "validation"] == "other_name.jpg" and 0 <= found.loc[0, "distance"] <= MAX_DISTANCE
    with pytest.raises(InputError, match="no such folder"):
        leaks(tmp_path / "calibration", tmp_path / "missing", progress=False)


def test_an_unreadable_file_can_leak_only_by_its_bytes(tmp_path):
    for side in ("calibration", "validation"):
        write(tmp_path / side / f"{side}.jpg", paint_scene(len(side)))
        (tmp_path / side / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    assert leaks(tmp_path / "calibration", tmp_path / "validation", progress=False)["calibration"].tolist() == [
        "broken.jpg"
    ]


def test_real_photos_give_no_false_alarm_and_their_copies_are_found(real_data, tmp_path):
    names = find_images(real_data / "lfw" / "images")
    groups = near_duplicates(real_data / "lfw" / "images", names, progress=False)
    assert len(names) - groups.nunique() <= 0.01 * len(names)
    planted = names[::50]
    for path in planted:
        for kind, change in COPIES.items():
            write(tmp_path / f"{kind}/{path}", change(decode(real_data / "lfw" / "images" / path)))
    hashes = hash_images(real_data / "lfw" / "images", names, progress=False)
    for kind in COPIES:
        found = near_pairs(hash_images(tmp_path / kind, planted, progress=False), hashes)
        right = [(planted[i], names[j]) for i, j in zip(found["left"], found["right"])]
        assert sum(a == b for a, b in right) == len(planted) and all(a == b for a, b in right), kind
