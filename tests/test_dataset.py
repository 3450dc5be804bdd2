"""Writing a calibration set: whole or absent, the same bytes twice, no name lost, nothing replaced that is not ours."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import forked
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.core.errors import InputError
from calib_nb.core.run import read_json, sha256_folder
from calib_nb.data import dataset, score
from calib_nb.data.dataset import JOURNAL, PrepareOptions, check_output, place, prepare, write_set
from calib_nb.data.demo_images import graded_images, odd_files, paint_scene
from calib_nb.data.duplicates import leaks
from calib_nb.data.images import find_images
from calib_nb.data.sample import select_images
from calib_nb.data.set_files import SET_FILES, is_calibration_set, plot_distribution, set_names


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "photos"
    graded_images(folder)
    odd_files(folder / "odd")
    return folder


@pytest.fixture
def no_card(monkeypatch):
    """Leave out the card, whose figure takes most of the time, where a test looks at something else."""
    monkeypatch.setattr(dataset, "write_card", lambda *_: None)


def run(*arguments, **options):
    return prepare(*arguments, **{"num_samples": 12, "progress": False, **options})


# --- names


@settings(derandomize=True, deadline=None)
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40).map(
            lambda s: s.strip("/") + "x.jpg"
        ),
        min_size=1,
        max_size=30,
        unique=True,
    )
)
def test_names_are_safe_and_never_collide(paths):
    names = set_names(paths)
    assert list(names) == paths
    assert len({name.casefold() for name in names.values()}) == len(paths)
    for name in names.values():
        assert (
            "/" not in name
            and name.endswith(".jpg")
            and name[0] not in ".-"
            and len(name.encode()) <= 255
            and name.isprintable()
            and " " not in name
        )
    assert set_names(paths[::-1]) == names


def test_names_are_readable():
    assert set_names(["a/0001.JPG", "b/0001.JPG"]) == {"a/0001.JPG": "a_0001.jpg", "b/0001.JPG": "b_0001.jpg"}
    assert set_names(["synced/scene_001/frame_0001.png"]) == {
        "synced/scene_001/frame_0001.png": "synced_scene_001_frame_0001.png"
    }
    same = set_names(["a_b/c.jpg", "a/b_c.jpg", "A/B_C.jpg", "d.jpg"])
    assert same["d.jpg"] == "d.jpg" and all("-" in same[p] for p in list(same)[:3])


def test_same_file_names_in_two_folders_are_two_images(tmp_path, no_card):
    for i, folder in enumerate(["a_b", "a", "c"]):
        name = "b_photo.jpg" if folder == "a" else "photo.jpg"
        (tmp_path / "in" / folder).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "in" / folder / name), paint_scene(i))
    made = run(tmp_path / "in", tmp_path / "out", strategy="random")
    assert made.images["name"].is_unique and len(find_images(made.path)) == 3
    for row in made.images.itertuples():
        assert (made.path / row.name).read_bytes() == (tmp_path / "in" / row.path).read_bytes()


# --- the set


def test_a_set_holds_what_it_says(photos, tmp_path):
    made = run(photos, tmp_path / "set")
    analysis = read_json(made.path / "calibration_analysis.json")
    names = list(made.images["name"])
    assert find_images(made.path) == sorted(names) and len(names) == 12
    assert sorted(p.name for p in made.path.iterdir()) == sorted([*names, *SET_FILES])
    assert (made.path / "image_list.txt").read_text().splitlines() == [str(made.path / n) for n in names]
    assert [row["name"] for row in read_json(made.path / "calibration_metadata.json")] == names
    assert all(
        Path(row["original_path"]).read_bytes() == Path(row["copied_path"]).read_bytes()
        for row in read_json(made.path / "calibration_metadata.json")
    )
    assert analysis["counts"] == {"found": 71, "unusable": 4, "chosen": 12} and len(analysis["left_out"]) == 4
    quality = made.pool["quality"].dropna()
    assert analysis["statistics"]["pool"]["quality"]["median"] == pytest.approx(np.median(quality), abs=1e-4)
    assert analysis["statistics"]["selection"]["quality"]["std"] == pytest.approx(
        np.std(made.images["quality"], ddof=1), abs=1e-4
    )
    assert [i["quality"] for i in analysis["images"]] == pytest.approx(list(made.images["quality"]), abs=1e-4)
    assert analysis["parameters"]["seed"] == 42 and analysis["parameters"]["quality_threshold"] == 40
    card = (made.path / "README.md").read_text()
    assert "12 images, chosen from 71" in card and "x truncated" in card and "contact_sheet.svg" in card
    assert not list(tmp_path.glob(".*"))  # neither journal nor partial folder is left


def test_same_arguments_same_bytes(photos, tmp_path):
    first = sha256_folder(run(photos, tmp_path / "set", workers=2).path)
    time.sleep(1.1)  # a time in seconds would differ now
    import matplotlib

    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red"}):  # whatever the user's notebook has set
        assert sha256_folder(run(photos, tmp_path / "set", workers=1).path) == first
    assert sha256_folder(run(photos, tmp_path / "set", seed=43).path) != first


@pytest.mark.parametrize("link", ["copy", "hardlink", "symlink"])
def test_links(photos, tmp_path, link, no_card):
    made = run(photos, tmp_path / "set", link=link)
    for row in made.images.itertuples():
        target, source = made.path / row.name, photos / row.path
        assert target.read_bytes() == source.read_bytes()
        assert target.is_symlink() == (link == "symlink") and target.samefile(source) == (link != "copy")
    assert is_calibration_set(made.path)
    run(photos, tmp_path / "set", link="copy")  # replacing links leaves the sources alone
    assert len(find_images(photos)) == 71
    assert all((photos / path).stat().st_size > 0 for path in made.images["path"])


def test_a_link_that_the_system_refuses_names_the_way_out(photos, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(InputError, match="Invalid cross-device link; use --link copy"):
        run(photos, tmp_path / "set", link="hardlink")
    assert not (tmp_path / "set").exists()


def test_copies_where_the_system_call_is_missing_or_stops_early(photos, tmp_path, monkeypatch):
    source = photos / "scene_00/blur_0.jpg"
    for number, call in enumerate(
        [
            lambda *_: 0,
            lambda f, t, n: (_ for _ in ()).throw(OSError(errno.EOPNOTSUPP, "no")),
            lambda f, t, n: os.sendfile(t, f, None, min(n, 999)),
        ]
    ):
        monkeypatch.setattr(os, "copy_file_range", call)
        place(source, tmp_path / f"{number}.jpg")
        assert (tmp_path / f"{number}.jpg").read_bytes() == source.read_bytes()
    monkeypatch.delattr(os, "copy_file_range")
    place(source, tmp_path / "none.jpg")
    assert (tmp_path / "none.jpg").read_bytes() == source.read_bytes()


def test_every_strategy_and_few_candidates(photos, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "write_card", lambda *_: None)
        for strategy in ("stratified", "balanced", "quotas", "random"):
            made = run(photos, tmp_path / "set", strategy=strategy, dedupe=strategy == "random")
            assert 0 < len(made.images) <= 12
    made = run(photos, tmp_path / "all", num_samples=500)
    assert (
        len(made.images) < 71
        and "images chosen, not 500" in made.warnings[0]
        and made.warnings[0] in (made.path / "README.md").read_text()
    )
    with pytest.raises(InputError, match="images chosen, not 500"):
        run(photos, tmp_path / "strict", num_samples=500, strict=True)
    assert not (tmp_path / "strict").exists()


def test_one_image_makes_a_set(tmp_path):
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in" / "only.png"), paint_scene(0))
    assert len(run(tmp_path / "in", tmp_path / "out").images) == 1  # its standard deviation is null, not NaN
    assert read_json(tmp_path / "out" / "calibration_analysis.json")["statistics"]["pool"]["quality"]["std"] is None


def test_validation_images_are_never_chosen(photos, tmp_path, no_card):
    (tmp_path / "validation").mkdir()
    for path in find_images(photos)[:60:7]:
        (tmp_path / "validation" / path.replace("/", "_")).write_bytes((photos / path).read_bytes())
    made = run(photos, tmp_path / "set", strategy="random", num_samples=30, against=tmp_path / "validation")
    copied = {p.read_bytes() for p in (tmp_path / "validation").iterdir()}
    assert not any((made.path / name).read_bytes() in copied for name in made.images["name"])
    assert (made.pool["error"] == "stands in the validation folder too").sum() >= 9


def test_copies_that_no_hash_finds_are_never_chosen(tmp_path, no_card):
    for folder in ("pool", "validation"):
        (tmp_path / folder).mkdir()
    for k in range(6):
        cv2.imwrite(str(tmp_path / "pool" / f"{k}.png"), paint_scene(k, height=150, width=200))
    cv2.imwrite(str(tmp_path / "validation" / "cut.jpg"), paint_scene(2, height=150, width=200)[12:, :182])
    cv2.imwrite(str(tmp_path / "validation" / "mirror.jpg"), paint_scene(4, height=150, width=200)[:, ::-1])
    hashed = leaks(tmp_path / "pool", tmp_path / "validation", progress=False)
    made = run(tmp_path / "pool", tmp_path / "set", strategy="random", against=tmp_path / "validation")
    left_out = made.pool.path[made.pool["error"] == "stands in the validation folder too"]
    assert set(left_out) == {"2.png", "4.png"} > set(hashed.calibration) and len(made.images) == 4


def test_write_set_from_a_table(photos, tmp_path):
    pool = run(photos, tmp_path / "first").pool
    made = write_set(
        select_images(pool, "quotas", 9),
        pool,
        photos,
        tmp_path / "second",
        parameters={"strategy": "quotas", "why": "by hand"},
    )
    assert len(find_images(made.path)) == 9
    assert read_json(made.path / "calibration_analysis.json")["parameters"]["why"] == "by hand"
    vanished = select_images(pool, "random", 5)
    vanished.rows.loc[0, "path"] = "scene_00/gone.jpg"
    with pytest.raises(InputError, match="could not be written: No such file"):
        write_set(vanished, pool, photos, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_the_figure_shows_shares(photos, tmp_path):
    made = run(photos, tmp_path / "set")
    from matplotlib.figure import Figure

    ax = plot_distribution(made.pool, made.images, "quality", Figure().subplots())
    assert sum(bar.get_height() for bar in ax.containers[0]) == pytest.approx(1)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["pool: 67", "chosen: 12"]


# --- options


def test_options_by_name_and_as_one_object_are_the_same(photos, tmp_path, no_card):
    by_name = run(photos, tmp_path / "a", strategy="random", dedupe=True, quality_threshold=30)
    as_object = run(
        photos, tmp_path / "b", strategy="random", options=PrepareOptions(dedupe=True, quality_threshold=30)
    )
    assert by_name.images.equals(as_object.images) and by_name.parameters == as_object.parameters
    mixed = run(photos, tmp_path / "c", strategy="random", options=PrepareOptions(dedupe=True), quality_threshold=30)
    assert mixed.parameters == by_name.parameters


def test_options_of_the_strategy_are_recorded(photos, tmp_path, no_card):
    made = run(photos, tmp_path / "set", strategy="stratified", column="luma_std", ratios=None)
    assert made.parameters["options"] == {"column": "luma_std"}


# --- what may be replaced


def test_only_sets_of_ours_are_replaced(photos, tmp_path, no_card):
    made = run(photos, tmp_path / "set")
    run(photos, tmp_path / "set", seed=1)
    (made.path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else .*use --overwrite"):
        run(photos, tmp_path / "set")
    assert (made.path / "notes.txt").read_text() == "mine"
    run(photos, tmp_path / "set", overwrite=True)
    assert not (made.path / "notes.txt").exists()
    (tmp_path / "empty").mkdir()
    assert run(photos, tmp_path / "empty").path.is_dir()
    for content in (
        "",
        "[]",
        '{"format": 1}',
        '{"format": "calib_nb calibration set, version 1"}',
        '{"images": 3}',
        '{"images": [{"name": []}]}',
    ):
        (tmp_path / "fake").mkdir(exist_ok=True)
        (tmp_path / "fake" / "calibration_analysis.json").write_text(content)
        assert not is_calibration_set(tmp_path / "fake")
        with pytest.raises(InputError, match="holds something else"):
            check_output(photos, tmp_path / "fake")


def test_dangerous_places_are_refused_always(photos, tmp_path, monkeypatch):
    (tmp_path / "home" / "work").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home" / "work")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for output, message in [
        ("/", "is or holds"),
        (tmp_path / "home", "home folder"),
        (tmp_path / "link", "home folder"),
        (tmp_path / "home" / "work", "working folder"),
        (".", "working folder"),
        (photos, "source folder"),
        (photos.parent, "source folder"),
        (photos / "chosen", "inside the source"),
        (photos / "scene_00/blur_0.jpg", "inside the source"),
    ]:
        with pytest.raises(InputError, match=message):
            run(photos, output, overwrite=True)
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "1.jpg").write_bytes((photos / "scene_00/blur_0.jpg").read_bytes())
    with pytest.raises(InputError, match="validation folder"):
        run(photos, tmp_path / "v", against=tmp_path / "v", overwrite=True)
    assert len(find_images(photos)) == 71


def test_a_wrong_request_writes_nothing(photos, tmp_path):
    (tmp_path / "none").mkdir()
    for arguments, message in [
        ({"strategy": "qualitymix"}, "unknown strategy"),
        ({"link": "reflink"}, "unknown link"),
        ({"column": "quality"}, "unknown option 'column'"),
        ({"lnik": "symlink"}, "unknown option 'lnik'.*did you mean 'link'"),
        ({"num_samples": -1}, "whole number"),
    ]:
        with pytest.raises(InputError, match=message):
            run(photos, tmp_path / "out", **arguments)
    with pytest.raises(InputError, match="no image under"):
        run(tmp_path / "none", tmp_path / "out")
    with pytest.raises(InputError, match="no such folder"):
        run(tmp_path / "nowhere", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["none"]


# --- faults


PREPARE = """
import sys
from calib_nb.data.dataset import prepare
prepare(sys.argv[1], sys.argv[2], num_samples=20, seed=int(sys.argv[3]), workers=2, progress=False)
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many") / "photos"
    folder.mkdir()
    scenes = [cv2.resize(paint_scene(i), (400, 300)) for i in range(12)]
    for i in range(160):
        cv2.imwrite(str(folder / f"{i:04d}.jpg"), np.roll(scenes[i % 12], i * 3, axis=1))
    return folder


def killed_when(ready, source, output, seed) -> bool:
    """Start a run and kill it -9 as soon as `ready` says so; False when it ended before."""
    process = forked.start_script(PREPARE, source, output, seed)
    while process.is_alive():
        if ready():
            break
        time.sleep(0.0005)
    return forked.kill(process) == -signal.SIGKILL


def test_kill_9_leaves_the_old_set_or_none_and_the_next_run_goes_on(many, tmp_path, monkeypatch):
    output, partial = tmp_path / "set", tmp_path / ".set.partial"
    journal = partial / JOURNAL

    def scored():
        return journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0

    moments = [
        lambda: scored() >= 40,
        lambda: scored() >= 110,
        lambda: any(partial.glob("*.jpg")),
        (partial / "calibration_analysis.json").exists,
    ]
    assert any([killed_when(ready, many, output, 42) for ready in moments])
    if not output.exists():  # a slow poll may miss the last moment
        known, calls = scored(), []
        assert known > 80
        measure = score.measure_quality
        monkeypatch.setattr(score, "measure_quality", lambda *a: calls.append(1) or measure(*a))
        run(many, output, num_samples=20)
        assert len(calls) == 160 - known
    first = sha256_folder(output)
    for ready in [partial.exists, *moments[1::2], (partial / "README.md").exists]:
        killed_when(ready, many, output, 7)
        assert output.exists() and (
            sha256_folder(output) == first or read_json(output / "calibration_analysis.json")["parameters"]["seed"] == 7
        )
        assert is_calibration_set(output)
    made = run(many, output, num_samples=20, seed=7)
    assert len(find_images(made.path)) == 20 and not list(tmp_path.glob(".*"))
    fresh = run(many, tmp_path / "fresh" / "set", num_samples=20, seed=7)
    assert (fresh.path / "image_filenames.txt").read_bytes() == (made.path / "image_filenames.txt").read_bytes()
    assert fresh.images.equals(made.images)


def test_a_full_disk_is_one_line_and_leaves_the_old_set(photos, tmp_path):
    first = sha256_folder(run(photos, tmp_path / "set").path)
    code = f"""
import resource
from calib_nb.core.errors import InputError
from calib_nb.data.dataset import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
try:
    prepare({str(photos)!r}, {str(tmp_path / "set")!r}, num_samples=12, seed=5, progress=False)
except InputError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "could not be written: File too large" in done.stdout and done.stdout.count("\n") == 1, done
    assert sha256_folder(tmp_path / "set") == first
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_two_runs_at_once_do_not_mix(photos, tmp_path, no_card):
    with (
        dataset.building((tmp_path / "set").resolve(), "copy"),
        pytest.raises(InputError, match="another run is writing"),
    ):
        run(photos, tmp_path / "set")
    run(photos, tmp_path / "set", overwrite=True)


@pytest.mark.slow
def test_real_photos_twice(real_data, tmp_path):
    source = real_data / "lfw" / "images"
    made = prepare(source, tmp_path / "set", progress=False)
    first = sha256_folder(made.path)
    assert len(made.images) == 100 and made.images["name"].str.match(r"^[A-Z]\S+_\d{4}\.jpg$").all()
    prepare(source, tmp_path / "set", progress=False)
    assert sha256_folder(made.path) == first
    assert len(prepare(source, tmp_path / "one_each", dedupe=True, progress=False).images) == 100
