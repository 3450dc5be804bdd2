"""The data side of the depth task: layout, table against NumPy, split, copied set, figures and commands."""

import json
import os
import shutil
import time
from pathlib import Path

import cv2
import forked
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calib_nb.core.errors import ImageError, InputError
from calib_nb.core.parallel import current_engine
from calib_nb.core.run import read_json
from calib_nb.data.dataset import LINKS
from calib_nb.data.images import encode_png
from calib_nb.depth.analyze import analyze, describe, match
from calib_nb.depth.copy import copy_set
from calib_nb.depth.demo_drawings import POOL, REGIMES, SAMPLE_FAULTS, cached_ncdb, demo_ncdb
from calib_nb.depth.metadata import (
    METADATA_COLUMNS,
    count_values,
    depth_statistics,
    load_metadata,
    metadata,
    save_metadata,
)
from calib_nb.depth.ncdb import (
    DEPTH_VARIANTS,
    check_entry,
    decode_depth,
    depth_variants,
    guess_scale,
    locate_file,
    read_depth,
    read_split,
)
from calib_nb.depth.split import DEPTH_RANGES, RATIOS, SPLIT_STRATEGIES, split_pool, write_split

STATISTICS = {
    "mean_depth": np.mean,
    "median_depth": np.median,
    "min_depth": np.min,
    "max_depth": np.max,
    "std_depth": np.std,
    "p50": lambda v: np.percentile(v, 50),
    "p90": lambda v: np.percentile(v, 90),
    "p95": lambda v: np.percentile(v, 95),
}


@pytest.fixture(scope="module")
def drawn():
    """The shared demo set: its root, one row per frame, and the metadata of its sound training frames."""
    data = cached_ncdb()
    return data.root, data.truth, metadata(data.root, progress=False)


def write_frame(root: Path, scene: str, name: str, depth: np.ndarray, variant: str = "depth_maps") -> dict:
    for kind, pixels in (("image_a6", np.zeros((*depth.shape, 3), np.uint8)), (variant, depth)):
        (root / scene / kind).mkdir(parents=True, exist_ok=True)
        (root / scene / kind / f"{name}.png").write_bytes(encode_png(pixels))
    return {"dataset_root": scene, "new_filename": name}


def table_of(depths, scenes=("indoor", "outdoor_near", "outdoor_far")) -> pd.DataFrame:
    names = [f"frame_{i:04d}" for i in range(len(depths))]
    return pd.DataFrame(
        {
            "dataset_root": "s",
            "filename": names,
            "image_path": [f"s/image_a6/{n}.png" for n in names],
            "mean_depth": np.asarray(depths, float),
            "scene_type": [scenes[i % len(scenes)] for i in range(len(depths))],
        }
    )


# --- the drawn set


def test_the_drawn_set_is_a_pool_like_the_guides(drawn):
    root, truth, found = drawn
    sound = truth[truth["fault"] == ""]
    assert len(sound) == 160 and all(
        REGIMES[r.regime][0] < r.mean_depth < REGIMES[r.regime][1] for r in sound.itertuples()
    )
    counts = sound["regime"].value_counts()
    assert counts["mid"] >= counts["near"] > counts["far"] >= counts["very_far"] > 0
    assert set(sound.groupby("split")["regime"].nunique()) == {4} and set(truth["variant"]) == set(DEPTH_VARIANTS)
    dense = found.table.merge(sound[sound["variant"] == "newest_synthetic_depth_maps"], on=["dataset_root", "filename"])
    assert len(dense) > 5 and np.allclose(
        dense["mean_depth_x"], dense["mean_depth_y"], rtol=1e-3
    )  # rounding to 1/256 m


def test_depth_can_be_learnt_from_the_pictures(drawn):
    """The nearest patches of other scenes, by place, colour and texture, predict depth far better than a constant."""
    root, truth, _ = drawn
    sound = truth[(truth["fault"] == "") & truth["variant"].isin(["newest_depth_maps", "newest_synthetic_depth_maps"])]

    def patches(rows):
        features, depths = [], []
        for row in rows.itertuples():
            picture = cv2.imread(str(root / row.dataset_root / "image_a6" / f"{row.filename}.png")).astype(np.float32)
            depth = (
                cv2.imread(str(root / row.dataset_root / row.variant / f"{row.filename}.png"), cv2.IMREAD_UNCHANGED)
                / 256
            )
            edges = np.abs(cv2.Laplacian(picture.mean(-1), -1))
            cells = [cv2.resize(x, (12, 8), interpolation=cv2.INTER_AREA) for x in (picture, edges, picture**2)]
            place = np.broadcast_to(np.arange(8.0)[:, None], (8, 12))
            features.append(
                np.dstack(
                    [cells[0], cells[1], np.sqrt(np.maximum(cells[2] - cells[0] ** 2, 0)).mean(-1), 12 * place]
                ).reshape(96, -1)
            )
            depths.append(depth[4::8, 4::8].ravel())
        features, depths = np.concatenate(features), np.concatenate(depths)
        return features[depths > 0], depths[depths > 0]

    (known, known_depth), (asked, wanted) = (
        patches(sound[sound["split"] == split_pool]) for split_pool in ("train", "val")
    )
    scale = known.std(0)
    distance = (
        ((asked / scale) ** 2).sum(1)[:, None] + ((known / scale) ** 2).sum(1) - 2 * (asked / scale) @ (known / scale).T
    )
    predicted = np.exp(np.median(np.log(known_depth)[np.argpartition(distance, 9, axis=1)[:, :9]], axis=1))
    error, constant = (np.mean(np.abs(d - wanted) / wanted) for d in (predicted, np.median(known_depth)))
    assert error < 0.6 * constant, (error, constant)


# --- reading


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([3, 255, 256, 5000, 65535]),
    st.floats(0, 1),
)
def test_statistics_are_numpys(seed, height, width, largest, holes):
    rng = np.random.default_rng(seed)
    raw = (rng.integers(1, largest + 1, (height, width)) * (rng.random((height, width)) >= holes * 0.9)).astype(
        np.uint16
    )
    raw[0, 0] = largest
    valid = raw[raw > 0] / guess_scale(largest)
    found = depth_statistics(count_values(raw), guess_scale(largest))
    assert list(found) == list(STATISTICS)
    for name, oracle in STATISTICS.items():
        assert np.isclose(found[name], oracle(valid), rtol=1e-6, atol=1e-9), name


def test_huge_maps_are_counted_exactly():
    raw = np.full((4097, 4096), 700, np.uint16)  # more equal pixels than a float32 can count
    assert count_values(raw)[700] == raw.size


def test_metres_are_guessed_from_the_largest_number_or_stated(tmp_path):
    for numbers, metres in (([0, 255], [0, 255]), ([0, 256], [0, 1]), ([0, 65535], [0, 65535 / 256])):
        (tmp_path / "d.png").write_bytes(encode_png(np.array([numbers], np.uint16)))
        assert np.allclose(read_depth(tmp_path / "d.png"), [metres]) and np.allclose(
            read_depth(tmp_path / "d.png", scale=1000), np.array([numbers]) / 1000
        )
    (tmp_path / "eight.png").write_bytes(encode_png(np.array([[0, 9]], np.uint8)))
    assert read_depth(tmp_path / "eight.png").tolist() == [[0, 9]]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_depth_map_never_gives_other_numbers(tmp_path, data):
    raw = (np.arange(48 * 64).reshape(48, 64) * 7 % 60000).astype(np.uint16)
    good = encode_png(raw)
    at = data.draw(st.integers(0, len(good) - 1))
    bad = (
        good[:at]
        if data.draw(st.booleans())
        else good[:at] + bytes([good[at] ^ data.draw(st.integers(1, 255))]) + good[at + 1 :]
    )
    (tmp_path / "bad.png").write_bytes(bad)
    with pytest.raises(ImageError) as refused:
        decode_depth(tmp_path / "bad.png")
    assert refused.value.reason in ("empty", "truncated", "unreadable", "unsupported", "too_large")


@given(
    st.one_of(
        st.none(),
        st.integers(),
        st.text(),
        st.lists(st.text()),
        st.dictionaries(
            st.sampled_from(["dataset_root", "new_filename", "other"]),
            st.one_of(
                st.text(),
                st.integers(),
                st.none(),
                st.sampled_from(["..", "../..", "a/../../b", "/etc", "", " ", "a\0b", "C:/x", "\ud800"]),
            ),
        ),
    )
)
def test_an_entry_that_passes_stays_below_the_root(entry):
    root, name, reason = check_entry(entry)
    if not reason:
        path = os.path.normpath(f"/base/{root}/image_a6/{name}.png")
        assert path.startswith("/base/") and os.path.basename(path) == f"{name}.png" and root.encode() and name.encode()


def test_variants_by_argument_by_environment_and_by_rank(tmp_path, monkeypatch):
    entry = write_frame(tmp_path, "s", "f", np.full((4, 4), 512, np.uint16), "new_depth_maps")
    write_frame(tmp_path, "s", "f", np.full((4, 4), 1024, np.uint16), "depth_maps")
    (tmp_path / "train_split.json").write_text(json.dumps([entry]))

    def mean(**options):
        return metadata(tmp_path, progress=False, **options).table["mean_depth"].tolist()

    assert mean() == [2] and mean(variants=["depth_maps", "new_depth_maps"]) == [4]
    monkeypatch.setenv("NCDB_DEPTH_VARIANT", "depth_maps")
    assert mean() == [4] and mean(variants="new_depth_maps") == [2] and depth_variants() == ("depth_maps",)


# --- the table


def test_every_planted_fault_is_listed_and_nothing_else_is_lost(drawn):
    root, truth, found = drawn
    assert tuple(found.table.columns) == METADATA_COLUMNS and found.rejected.empty and found.doubtful.empty
    wanted = truth[truth["split"] == "train"]
    assert list(zip(found.table["dataset_root"], found.table["filename"])) == list(
        zip(wanted["dataset_root"], wanted["filename"])
    )
    faulty = metadata(root, "faulty_split.json", progress=False)
    usable = truth[(truth["split"] == "faulty") & ~truth["fault"].isin(SAMPLE_FAULTS)]
    assert faulty.table["filename"].tolist()[3:] == usable["filename"].tolist()  # after three sound frames
    reasons = {
        "unreadable depth": "unsupported depth",
        "depth in colour": "unsupported depth",
        "no name": "empty name",
    }
    assert sorted(faulty.rejected["reason"]) == sorted(
        [reasons.get(fault, fault) for fault in SAMPLE_FAULTS] + ["duplicate"]
    )
    assert (faulty.rejected["detail"] != "").all() and not faulty.rejected["detail"].str.contains(str(root)).any()
    assert faulty.rejected.index.is_unique
    assert len(faulty.table) + len(faulty.rejected) == len(read_json(root / "faulty_split.json"))
    assert faulty.doubtful["filename"].tolist() == truth.loc[truth["fault"] == "whole metres", "filename"].tolist()
    with pytest.raises(InputError, match="not a list"):
        metadata(root, "not_a_list.json", progress=False)


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "not valid JSON"),
        ("", "empty"),
        ("[]", "lists nothing"),
        ('"text"', "not a list"),
        ("3", "not a list"),
        ("null", "not a list"),
    ],
)
def test_a_split_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / "train_split.json").write_text(content)
    with pytest.raises(InputError, match=message):
        metadata(tmp_path, progress=False)


def test_nothing_outside_the_root_is_opened(tmp_path):
    secret = write_frame(tmp_path / "secret", "s", "f", np.full((4, 4), 999, np.uint16))
    root = tmp_path / "root"
    inside = write_frame(root, "s", "inside", np.full((4, 4), 999, np.uint16))
    (root / "linked").symlink_to(tmp_path / "secret" / "s")
    (root / "s/image_a6/out.png").symlink_to(tmp_path / "secret/s/image_a6/f.png")
    shutil.copy(root / "s/depth_maps/inside.png", root / "s/depth_maps/out.png")
    (root / "s/image_a6/deep.png").write_bytes((root / "s/image_a6/inside.png").read_bytes())
    (root / "s/depth_maps/deep.png").symlink_to(tmp_path / "secret/s/depth_maps/f.png")
    (root / "s/image_a6/round.png").symlink_to("round.png")
    (root / "alias").symlink_to("s")
    entries = [
        inside,
        {"dataset_root": "linked", "new_filename": "f"},
        {"dataset_root": "s", "new_filename": "out"},
        {"dataset_root": "s", "new_filename": "deep"},
        {"dataset_root": "s", "new_filename": "round"},
        {"dataset_root": "s", "new_filename": "x" * 300},
        secret | {"dataset_root": "../secret/s"},
        secret | {"dataset_root": str(tmp_path / "secret/s")},
        {"dataset_root": "alias", "new_filename": "inside"},
    ]
    (root / "train_split.json").write_text(json.dumps(entries))
    found = metadata(root, progress=False)
    assert found.table["dataset_root"].tolist() == ["s", "alias"]
    assert found.rejected["reason"].tolist() == [
        *["outside the data set"] * 3,
        *["no image"] * 2,
        "outside the data set",
        "absolute path",
    ]
    with pytest.raises(ImageError, match="points outside"):
        locate_file(root, "../secret/s/image_a6/f.png")


def test_the_table_survives_its_file(drawn, tmp_path):
    root, _, found = drawn
    faulty = metadata(root, "faulty_split.json", progress=False)
    save_metadata(faulty, tmp_path / "f.csv")
    assert len(pd.read_csv(tmp_path / "f.rejected.csv")) == len(faulty.rejected) == 14
    saved = load_metadata(save_metadata(found, tmp_path / "m.csv"))
    pd.testing.assert_frame_equal(saved, found.table)
    (tmp_path / "words.csv").write_text(
        (tmp_path / "m.csv").read_text().replace(str(found.table["mean_depth"][0]), "deep", 1)
    )
    with pytest.raises(InputError, match="numbers"):
        load_metadata(tmp_path / "words.csv")


KILLED = """
import sys, time
import calib_nb.depth.metadata as m
from pathlib import Path
whole = m.measure_sample
def slow(*a):
    with open(sys.argv[3], "a") as f:
        f.write(a[-1][0] + a[-1][1] + "\\n")
    time.sleep(0.02)  # so that a batch has one frame
    while len(sys.argv) > 5 and Path(sys.argv[3]).read_bytes().count(b"\\n") > 20:
        time.sleep(0.01)  # until the kill comes
    return whole(*a)
m.measure_sample = slow
found = m.metadata(sys.argv[1], journal=sys.argv[2], workers=2, progress=False)
m.save_metadata(found, sys.argv[4])
"""


def test_a_killed_run_goes_on_and_ends_the_same(drawn, tmp_path):
    root, _, found = drawn
    words = [root, *(tmp_path / name for name in ("journal", "seen", "m.csv"))]
    process = forked.start_script(KILLED, *words, "stop")
    while process.is_alive() and not (tmp_path / "journal").is_file():
        time.sleep(0.02)
    until = time.monotonic() + 120
    while time.monotonic() < until and (tmp_path / "journal").read_bytes().count(b"\n") < 12:
        time.sleep(0.01)
    forked.kill(process)
    assert not (tmp_path / "m.csv").exists()
    kept = (tmp_path / "journal").read_bytes().count(b"\n") - 1
    (tmp_path / "seen").write_text("")
    assert forked.script(KILLED, *words).returncode == 0
    pd.testing.assert_frame_equal(load_metadata(tmp_path / "m.csv"), found.table)
    computed = (tmp_path / "seen").read_text().split()
    entries = len(read_split(root / "train_split.json").entries)
    assert kept >= 11 and len(computed) <= entries - kept + 1  # a torn last line is measured again


def test_a_split_of_millions_of_frames_is_read(tmp_path):
    entry = '{"dataset_root": "synced_data/%s", "new_filename": "%d"}'
    text = ",\n".join([entry % (scene, k) for scene in ("a", "./a", "b") for k in range(3)])
    (tmp_path / "split.json").write_text("[" + text + " " * 70_000_000 + "]")  # as large as one of a million frames
    split = read_split(tmp_path / "split.json")
    assert split.entries.to_numpy().tolist() == [[f"synced_data/{scene}", str(k)] for scene in "ab" for k in range(3)]
    assert split.rejected.detail.tolist() == [f"same as entry {k}" for k in range(3)]
    assert split.entries.dataset_root[0] is split.entries.dataset_root[2]


def test_a_changed_file_is_measured_again(tmp_path):
    entry = write_frame(tmp_path, "s", "f", np.full((4, 4), 512, np.uint16))
    (tmp_path / "train_split.json").write_text(json.dumps([entry]))
    assert metadata(tmp_path, journal=tmp_path / "j", progress=False).table["mean_depth"][0] == 2
    write_frame(tmp_path, "s", "f", np.full((4, 4), 1024, np.uint16))
    os.utime(tmp_path / "s/depth_maps/f.png", ns=(1, 1))
    assert metadata(tmp_path, journal=tmp_path / "j", progress=False).table["mean_depth"][0] == 4
    assert metadata(tmp_path, journal=tmp_path / "j", scale=512, progress=False).table["mean_depth"][0] == 2


# --- the split


def test_the_numbers_of_the_guide():
    depths = np.concatenate([np.linspace(*DEPTH_RANGES[name], count, endpoint=False) for name, count in POOL.items()])
    chosen = split_pool(table_of(depths))
    assert (
        chosen.plan["available"].tolist() == [1823, 2456, 492, 85]
        and chosen.plan["taken"].tolist() == [75, 120, 75, 30]
        and not chosen.warnings
    )
    ten = split_pool(table_of(np.concatenate([depths[depths < 15], depths[depths >= 15][:10]])))
    assert (
        len(ten.rows) == 300
        and ten.plan["taken"].tolist() == [75, 140, 75, 10]
        and ten.plan["note"].tolist() == ["", "20 in place of very_far", "", "20 too few"]
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.lists(
        st.one_of(st.floats(0, 300), st.sampled_from([0.0, 3.0, 8.0, 15.0, 100.0, float("nan"), float("inf")])),
        min_size=1,
        max_size=150,
    ),
    st.integers(1, 200),
    st.sampled_from(SPLIT_STRATEGIES),
    st.integers(0, 1000),
)
def test_any_pool_gives_an_exact_plan_without_doubles(depths, target, strategy, seed):
    table = table_of(depths)
    if strategy != "random" and table["mean_depth"].isna().all():
        return
    chosen = split_pool(table, strategy, target, seed=seed)
    usable = len(table) if strategy == "random" else int(table["mean_depth"].notna().sum())
    assert len(chosen.rows) == min(target, usable) == chosen.plan["taken"].sum()
    assert not chosen.rows.duplicated(["dataset_root", "filename"]).any() and set(chosen.rows["filename"]) <= set(
        table["filename"]
    )
    assert chosen.plan["available"].sum() == len(table)  # no row of the pool is lost
    if strategy == "stratified":
        plan = chosen.plan.set_index("bin").loc[list(RATIOS)]
        assert plan["wanted"].sum() == target and (abs(plan["wanted"] - target * pd.Series(RATIOS)) < 1).all()
        assert (plan["taken"] >= plan[["wanted", "available"]].min(axis=1)).all()
        others = plan.drop("mid")
        assert (
            plan["taken"]["mid"] == plan["available"]["mid"] or (others["taken"] <= others["wanted"]).all()
        )  # mid gives before the others do
    assert split_pool(table.sample(frac=1, random_state=1), strategy, target, seed=seed).rows.equals(chosen.rows)


def test_a_split_file_leads_back_to_every_row(drawn, tmp_path):
    root, _, found = drawn
    for strategy in SPLIT_STRATEGIES:
        chosen = split_pool(found.table, strategy, 30).rows
        rows, missing = match(found.table, write_split(chosen, tmp_path / "s.json"))
        assert missing.empty and rows[list(METADATA_COLUMNS)].equals(chosen[list(METADATA_COLUMNS)])


# --- the set and the figures


@pytest.mark.parametrize("link", LINKS)
def test_the_set_is_whole_and_made_of_the_same_bytes(drawn, tmp_path, link):
    root, _, found = drawn
    rows = split_pool(found.table, target_size=20).rows
    made = copy_set(root, write_split(rows, tmp_path / "s.json"), tmp_path / "set", link=link)
    images = sorted((tmp_path / "set").glob("*.png"))
    assert (
        len(images) == 20 and (tmp_path / "set/image_filenames.txt").read_text().split() == made.images["name"].tolist()
    )
    assert (tmp_path / "set/image_list.txt").read_text().split("\n")[:-1] == [
        str((tmp_path / "set").resolve() / name) for name in made.images["name"]
    ]
    for row in read_json(tmp_path / "set/calibration_metadata.json"):
        assert (
            Path(row["copied_path"]).read_bytes() == Path(row["original_path"]).read_bytes()
            and Path(row["name"]).name
            == f"{Path(row['original_path']).parents[1].name}_{Path(row['original_path']).name}"
        )
    assert all(p.is_symlink() == (link == "symlink") for p in images) and all(
        (p.stat().st_nlink > 1) == (link == "hardlink") for p in images if link != "symlink"
    )
    copy_set(root, tmp_path / "s.json", tmp_path / "set", link=link)  # an earlier set of ours is replaced
    (tmp_path / "set/thesis.txt").write_text("three years")
    with pytest.raises(InputError, match="holds something else"):
        copy_set(root, tmp_path / "s.json", tmp_path / "set", link=link)


def test_the_set_serves_the_next_step(drawn, tmp_path, monkeypatch):
    from calib_nb.npu.config import config_images, generate_config

    root, _, found = drawn
    made = copy_set(
        root, write_split(split_pool(found.table, target_size=10).rows, tmp_path / "s.json"), tmp_path / "set"
    )
    config = generate_config("depth", str(made.path), input_name="image", input_size=(96, 64), calibration_num=10)
    assert sorted(p.name for p in config_images(config)) == sorted(made.images["name"])


def test_an_image_that_is_broken_is_not_copied(drawn, tmp_path):
    root, truth, _ = drawn
    for fault in ("no image", "truncated image"):
        row = truth[truth["fault"] == fault].iloc[0]
        write_split(pd.DataFrame([row]), tmp_path / "s.json")
        with pytest.raises(InputError, match="1 of 1 entries"):
            copy_set(root, tmp_path / "s.json", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_the_figures_match_by_scene_and_name(drawn, tmp_path):
    root, _, found = drawn
    assert found.table["filename"].duplicated().any()  # every scene has a frame_0001
    rows = split_pool(found.table, target_size=25).rows
    write_split(rows, tmp_path / "s.json")
    done = analyze(root, found.table, tmp_path / "s.json", tmp_path / "out")
    assert (
        done.chosen[list(METADATA_COLUMNS)].equals(rows[list(METADATA_COLUMNS)])
        and done.statistics["selection"]["samples"] == 25
    )
    assert done.statistics["selection"]["depth_m"]["mean_depth"]["mean"] == pytest.approx(rows["mean_depth"].mean())
    for name in ("overview.png", "relations.png", "samples.png"):
        picture = cv2.imread(str(tmp_path / "out" / name))
        assert min(picture.shape[:2]) > 300 and picture.std() > 10
    one = split_pool(found.table, target_size=1).rows  # a standard deviation of one frame is none
    alone, _ = match(found.table, write_split(one, tmp_path / "one.json"))
    assert describe(alone)["depth_m"]["mean_depth"]["std"] is None


# --- the commands, and real pairs


def calib_nb(*arguments, cwd=None):
    plain = {"TQDM_DISABLE": "1", "COLUMNS": "120", "NO_COLOR": "1", "FORCE_COLOR": ""}
    return forked.calib_nb(*arguments, cwd=cwd, env=os.environ | plain)


def chain(root: Path, cwd: Path, size: int) -> None:
    steps = [
        ["metadata", "--dataset-root", root, "--output", "m.csv"],
        ["split", "--metadata", "m.csv", "--target-size", size, "--output", "s.json"],
        ["copy", "--dataset-root", root, "--calibration-split", "s.json", "--output-dir", "set"],
        [
            "analyze",
            "--dataset-root",
            root,
            "--metadata",
            "m.csv",
            "--calibration-split",
            "s.json",
            "--output-dir",
            "seen",
        ],
    ]
    for step in steps:
        done = calib_nb("depth", *step, cwd=cwd)
        assert done.returncode == 0, done.stderr
    assert (
        len(list((cwd / "set").glob("*.png"))) == size
        and len(list((cwd / "seen").iterdir())) == 4
        and not list(cwd.glob(".*.journal"))
    )


def test_the_chain_from_a_shell(drawn, tmp_path):
    chain(drawn[0], tmp_path, 20)
    for wrong in (
        ["split", "--metadata", "m.csv", "--stratgy", "random"],
        [
            "copy",
            "--dataset-root",
            drawn[0],
            "--calibration-split",
            drawn[0] / "not_a_list.json",
            "--output-dir",
            "never",
        ],
    ):
        done = calib_nb("depth", *wrong, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr


def test_real_pairs(real_data):
    root = real_data / "ncdb_real"
    if not root.is_dir():
        pytest.skip("real depth pairs: ncdb_real/ is not in CALIB_NB_DATA")
    total = 0
    for name in ("train_split.json", "val_split.json"):
        found = metadata(root, name, progress=False)
        total += len(found.table)
        assert found.rejected.empty and found.doubtful.empty
        for row in found.table.iloc[::5].itertuples():
            raw = cv2.imread(str(root / row.depth_path), cv2.IMREAD_UNCHANGED)
            valid = raw[raw > 0].astype(np.float32) / 256
            for column, oracle in STATISTICS.items():
                assert np.isclose(getattr(row, column), oracle(valid.astype(np.float64)), rtol=1e-6), column
            assert (row.valid_pixels, row.total_pixels, row.height, row.width) == (valid.size, raw.size, *raw.shape)
    assert total == 136


def linked(source: Path, root: Path) -> list[dict]:
    """The real pairs under a root of their own, linked so that a file may be replaced; the entries of both splits."""

    def link(file, copy):
        try:
            os.link(file, copy)
        except OSError:  # another file system
            shutil.copyfile(file, copy)

    shutil.copytree(source / "synced_data", root / "synced_data", copy_function=link)
    return [entry for name in ("train", "val") for entry in read_json(source / f"{name}_split.json")]


def test_faults_among_real_pairs_are_listed_and_nothing_else_is_lost(real_data, tmp_path):
    if not (real_data / "ncdb_real").is_dir():
        pytest.skip("real depth pairs: ncdb_real/ is not in CALIB_NB_DATA")
    root = tmp_path / "ncdb"
    entries = linked(real_data / "ncdb_real", root)
    (root / "all.json").write_text(json.dumps(entries))
    sound = metadata(root, "all.json", progress=False)
    assert len(sound.table) == len(entries) == 136 and sound.rejected.empty

    def replace(k: int, content) -> None:
        file = root / sound.table["depth_path"][k]
        whole = file.read_bytes()
        file.unlink()  # the link, and not what it leads to
        if content is not None:
            file.write_bytes(
                content(
                    whole, cv2.imread(str(real_data / "ncdb_real" / sound.table["depth_path"][k]), cv2.IMREAD_UNCHANGED)
                )
            )

    broken = {
        3: ("no depth", None),
        20: ("size mismatch", lambda _, raw: encode_png(raw[:-1])),
        50: ("truncated depth", lambda whole, _: whole[: len(whole) // 2]),
        90: ("no valid pixel", lambda _, raw: encode_png(np.zeros_like(raw))),
    }
    for k, (_, content) in broken.items():
        replace(k, content)
    words = [
        {**entries[0], "dataset_root": "../../elsewhere"},
        {**entries[0], "dataset_root": "/etc"},
        entries[7],
        {**entries[0], "new_filename": ""},
    ]
    (root / "all.json").write_text(json.dumps(entries + words))
    found = metadata(root, "all.json", workers=2, progress=False)
    said = {k: reason for k, (reason, _) in broken.items()} | dict(
        zip(range(136, 140), ("outside the data set", "absolute path", "duplicate", "empty name"))
    )
    assert found.rejected["reason"].to_dict() == said
    pd.testing.assert_frame_equal(found.table, sound.table.drop(list(broken)).reset_index(drop=True))


@pytest.mark.slow
def test_the_chain_on_real_pairs(real_data, tmp_path):
    if not (real_data / "ncdb_real").is_dir():
        pytest.skip("real depth pairs: ncdb_real/ is not in CALIB_NB_DATA")
    chain(real_data / "ncdb_real", tmp_path, 40)


def test_help_teaches_and_loads_nothing_heavy():
    answers = forked.helps("depth", *(f"depth {command}" for command in ("metadata", "split", "copy", "analyze")))
    for status, text, loaded in answers.values():
        assert (status, loaded) == (0, []) and "Example: calib-nb depth" in text, text[-300:]


def test_frames_are_drawn_here_whatever_cluster_is_in_use(tmp_path, monkeypatch):
    class Here(Exception):
        """Drawing has begun."""

    def elsewhere(workers):
        raise AssertionError("a function that writes was sent to a cluster")

    def draw(*scene):
        raise Here

    monkeypatch.setattr("calib_nb.depth.demo_drawings._write_scene", draw)
    token = current_engine.set(elsewhere)
    try:
        with pytest.raises(Here):
            demo_ncdb(tmp_path / "set", 40, size=(32, 32), broken=False, progress=False)
        assert current_engine.get() is elsewhere and not (tmp_path / "set").exists()
    finally:
        current_engine.reset(token)
