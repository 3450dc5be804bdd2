"""The verification benchmark: its numbers against scikit-learn and by hand, its resumption after a kill, and photos and files that are at fault."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.cli import main
from calib_nb.core.errors import InputError, ModelError
from calib_nb.core.run import sha256_file
from calib_nb.faces.bench import bench, pair_metrics, read_methods, used
from calib_nb.faces.demo import demo_detector, demo_embedder, demo_lfw
from calib_nb.faces.detectors import FaceDetector
from calib_nb.faces.edgeface import edgeface
from calib_nb.faces.embed import Embedder, embed_photos, onnx_file
from calib_nb.faces.verification import accuracy_kfold, kfold_right, kfold_thresholds, read_pairs
from calib_nb.graph.contract import fix_batch


@pytest.fixture(scope="module")
def lfw():
    return demo_lfw()


@pytest.fixture(scope="module")
def small(lfw, tmp_path_factory):
    """Twenty drawn people, with pairs of them alone: (folder of photos, pairs file)."""
    folder = tmp_path_factory.mktemp("small")
    for who in sorted(p.name for p in (lfw / "images").iterdir())[:20]:
        shutil.copytree(lfw / "images" / who, folder / "images" / who)
    people = sorted(p.name for p in (folder / "images").iterdir())
    same = [f"{who}\t{i}\t{i + 1}" for who in people for i in (1, 3)]
    other = [f"{a}\t{i}\t{b}\t{i + 1}" for i in (1, 2) for a, b in zip(people, people[1:] + people[:1])]
    (folder / "pairs.txt").write_text("\n".join([str(len(same)), *same, *other]))
    return folder / "images", folder / "pairs.txt"


DEMO = {"demo": ("yunet", demo_detector())}


def run(small, folder, methods=DEMO, models=None, **options):
    return bench(
        small[0],
        small[1],
        methods,
        models or [demo_embedder()],
        folder,
        progress=False,
        bootstrap=50,
        samples=2,
        worst=1,
        **options,
    )


def scores(draw_same, values):
    same = np.array(draw_same, bool)
    return np.array(values, float)[: len(same)] / 10, same


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.booleans(), min_size=20, max_size=60).filter(lambda s: 0 < sum(s) < len(s)),
    st.lists(st.integers(-10, 10), min_size=60, max_size=60),
)
def test_the_numbers_are_those_of_scikit_learn(draw_same, values):
    from scipy.interpolate import interp1d
    from scipy.optimize import brentq
    from sklearn.metrics import roc_auc_score, roc_curve

    s, same = scores(draw_same, values)
    found = pair_metrics(s, same, np.arange(len(s)) % 10, resamples=5)
    far, tar, _ = roc_curve(same, s, drop_intermediate=False)
    assert np.isclose(found["auc"], roc_auc_score(same, s))
    assert np.isclose(found["tar_at_far_1e2"], tar[far <= 1e-2].max()) and np.isclose(
        found["tar_at_far_1e3"], tar[far <= 1e-3].max()
    )
    curve = interp1d(np.arange(len(far)), np.stack([far, tar]))
    at = brentq(lambda t: curve(t)[0] - 1 + curve(t)[1], 0, len(far) - 1)
    assert np.isclose(found["eer"], curve(at)[0], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.booleans(), min_size=20, max_size=60).filter(lambda s: 0 < sum(s) < len(s)),
    st.lists(st.integers(-10, 10), min_size=60, max_size=60),
)
def test_ten_folds_are_the_official_definition(draw_same, values):
    """Each fold at the threshold that is best on the other nine, tried one by one; of equally good ones the middle."""
    s, same = scores(draw_same, values)
    fold = np.arange(len(s)) % 10
    levels = np.unique(s)[::-1]
    tried = [levels[0] + 1, *((a + b) / 2 for a, b in zip(levels, levels[1:])), levels[-1] - 1]
    right = np.zeros(len(s), bool)
    for k in range(10):
        others = np.array([((s >= t) == same)[fold != k].sum() for t in tried])
        best = np.flatnonzero(others == others.max())
        right[fold == k] = ((s >= tried[best[(len(best) - 1) // 2]]) == same)[fold == k]
    assert np.array_equal(kfold_right(s, same, fold), right) and np.array_equal(
        (s >= kfold_thresholds(s, same, fold)) == same, right
    )
    assert np.allclose(accuracy_kfold(s, same, fold), [right[fold == k].mean() for k in range(10)])
    assert np.isclose(
        pair_metrics(s, same, fold, resamples=5)["accuracy"], np.mean([right[fold == k].mean() for k in range(10)])
    )


def test_ten_folds_by_hand():
    """Ten folds of a pair each way, 0.9 and 0.1, but fold 3 has them at 0.6 and 0.7: its own threshold comes from the others, lies at 0.65 or so, and both are wrong."""
    s, same, fold = np.tile([0.9, 0.1], 10), np.tile([True, False], 10), np.repeat(np.arange(10), 2)
    s[6], s[7] = 0.6, 0.7
    found = pair_metrics(s, same, fold)
    # between 0.9 and 0.1 the others are right anywhere: the three places are above 0.7, between 0.7 and 0.6, below 0.6; the middle one is 0.65
    assert np.isclose(found["accuracy"], 0.9) and np.isclose(
        found["accuracy_se"], np.std([1] * 9 + [0], ddof=1) / np.sqrt(10)
    )
    assert np.isclose(found["auc"], 99 / 100) and np.isclose(found["tar_at_far_1e3"], 0.9)


def test_official_pairs_have_the_folds_of_the_file(small, tmp_path):
    images, file = small
    _, *lines = file.read_text().splitlines()
    same, other = lines[:40], lines[40:]
    folds = [[*same[4 * k : 4 * k + 4], *other[4 * k : 4 * k + 4]] for k in range(10)]
    (tmp_path / "pairs.txt").write_text("\n".join(["10\t4", *(line for fold in folds for line in fold)]))
    official = read_pairs(tmp_path / "pairs.txt", images)
    assert (
        official.table.fold.tolist() == np.repeat(np.arange(10), 8).tolist()
        and official.table.same.tolist() == ([True] * 4 + [False] * 4) * 10
    )
    (tmp_path / "five.txt").write_text("\n".join(["5\t8", *(line for fold in folds for line in fold)]))
    assert read_pairs(tmp_path / "five.txt", images).table.fold.max() == 4
    (tmp_path / "pairs.csv").write_text(
        "name,imagenum1,imagenum2,\n" + "\n".join(line.replace("\t", ",") for fold in folds for line in fold)
    )
    assert read_pairs(tmp_path / "pairs.csv", images).table.equals(official.table)


def test_each_photo_is_seen_and_embedded_once(small, tmp_path, monkeypatch):
    seen, embedded = [], []
    find, call = FaceDetector.find, Embedder.__call__
    monkeypatch.setattr(
        FaceDetector, "find", lambda self, image, order=None: seen.append(1) or find(self, image, order)
    )
    monkeypatch.setattr(
        Embedder, "__call__", lambda self, crops, **o: embedded.append(len(crops)) or call(self, crops, **o)
    )
    result = run(small, tmp_path, batch_size=16, models={"a": demo_embedder(), "b": demo_embedder()})
    photos = len(result.pairs.photos)
    assert len(seen) == photos and sum(embedded) == 2 * photos and max(embedded) == 16
    assert result.main.model.tolist() == ["a", "b"] and result.main.auc[0] == result.main.auc[1] > 0.9
    assert {p.name for p in tmp_path.iterdir()} == {
        "aligned",
        "errors",
        "figures",
        "journals",
        "results.csv",
        "similarities.csv",
        "photos.csv",
        "errors.csv",
        "manifest.json",
    } - ({"errors"} if not result.main.accuracy.lt(1).any() else set())
    times = result.main[
        ["decode_ms", "detect_ms", "detect_p95_ms", "align_ms", "embed_ms", "embed_p95_ms", "rss_peak_mb"]
    ]
    assert (times > 0).all(axis=None) and (result.main.detect_p95_ms >= result.main.detect_ms).all()
    run(small, tmp_path, batch_size=16, models={"a": demo_embedder(), "b": demo_embedder()})
    assert len(seen) == photos
    run(small, tmp_path, batch_size=16, models={"a": demo_embedder(), "b": demo_embedder()}, resume=False)
    assert len(seen) == 2 * photos


def test_a_file_of_fixed_batch_gives_the_same(small, tmp_path):
    fixed = fix_batch(demo_embedder(), tmp_path / "b3.onnx", 3)
    result = run(small, tmp_path / "out", models={"open": demo_embedder(), "three": fixed}, batch_size=7)
    assert np.allclose(result.scored["demo", "open"].similarity, result.scored["demo", "three"].similarity, atol=1e-4)
    flipped = run(small, tmp_path / "flip", flip=True)
    assert not np.allclose(
        flipped.scored["demo", demo_embedder().stem].similarity, result.scored["demo", "open"].similarity, atol=1e-4
    )


def test_a_killed_run_goes_on_where_it_stopped(small, tmp_path):
    command = [
        sys.executable,
        "-m",
        "calib_nb.cli",
        "faces",
        "bench",
        "--lfw-dir",
        small[0],
        "--pairs",
        small[1],
        "--methods",
        f"yunet={demo_detector()}",
        "--model",
        demo_embedder(),
        "--batch-size",
        "4",
        "--num-workers",
        "1",
    ]
    code = "import sys; from calib_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, command[3:]), "--output-dir", str(tmp_path)]
    journal = tmp_path / "journals" / f"yunet-{demo_detector().stem}.jsonl"
    slow = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=slow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while (
        time.monotonic() < until
        and process.poll() is None
        and not (journal.is_file() and journal.read_bytes().count(b"\n") > 8)
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = journal.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert before.count(b"\n") > 8
    resumed = subprocess.run(command, env=slow, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    after = journal.read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 1 + len(read_pairs(small[1], small[0]).photos)
    whole = run(small, tmp_path / "whole", methods=[f"yunet={demo_detector()}"])
    table = pd.read_csv(tmp_path / "results.csv")
    for column in ("faces", "pairs", "accuracy", "auc", "eer", "threshold"):
        assert np.allclose(table[column], whole.table[column], atol=1e-4), column
    assert not list(tmp_path.rglob("*.tmp*"))


def test_what_was_replaced_under_its_name_is_not_taken_from_the_journal(small, tmp_path, monkeypatch):
    """A photo, a detector or a network of other content, of the same name, size and time: all is seen anew; the same content of another time is not."""
    seen, find = [], FaceDetector.find
    monkeypatch.setattr(
        FaceDetector, "find", lambda self, image, order=None: seen.append(1) or find(self, image, order)
    )
    images = Path(shutil.copytree(small[0], tmp_path / "images"))
    detector, network = (Path(shutil.copy2(file, tmp_path / file.name)) for file in (demo_detector(), demo_embedder()))
    lines, few = small[1].read_text().splitlines(), tmp_path / "pairs.txt"
    few.write_text("\n".join(["4", *lines[1:5], *lines[41:45]]))

    def seen_now():
        before = len(seen)
        bench(
            images,
            few,
            {"demo": ("yunet", detector)},
            {"network": network},
            tmp_path / "out",
            progress=False,
            bootstrap=20,
            samples=1,
            worst=1,
        )
        return len(seen) - before

    def replace(file, old, new):
        before, content = file.stat(), file.read_bytes()
        assert old in content and len(old) == len(new)
        file.write_bytes(content.replace(old, new, 1))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)

    pairs = read_pairs(few, images).photos
    photos, photo = len(pairs), images / pairs[0]
    assert seen_now() == photos and seen_now() == 0
    with open(tmp_path / "out" / "journals" / "demo.jsonl") as f:
        assert len(f.readline()) < 4000  # however many photos: a journal's first line is read to a limit
    os.utime(photo, (1, 1))
    assert seen_now() == 0
    for file, old, new in (
        (photo, b"JFIF", b"JFIX"),
        (detector, b"pytorch", b"pytorcH"),
        (network, b"pytorch", b"pytorcH"),
    ):  # of the models, the name of their maker
        replace(file, old, new)
        assert seen_now() == photos and seen_now() == 0, file.name


def test_a_checkpoint_is_exported_to_the_same_bytes_again(tmp_path):
    """The journal knows a .pt file by the ONNX file that is written for it in every run."""
    torch.save(edgeface("xxs").state_dict(), tmp_path / "network.pt")
    first, again = (onnx_file(tmp_path / "network.pt", tmp_path / name).read_bytes() for name in ("a", "b"))
    assert first == again


def test_samples_are_of_the_same_photos_for_every_detector(small, tmp_path, monkeypatch):
    """A second detector that is blind to every other photo: what is laid side by side is what both found."""
    init, find, count = FaceDetector.__init__, FaceDetector.find, []
    blind = Path(shutil.copy(demo_detector(), tmp_path / "blind.onnx"))

    def remember(self, *a, **k):
        init(self, *a, **k)
        self.blind = k["model"] == blind

    def half(self, image, order=None):
        count.append(1)
        return find(self, image, order)[: 0 if self.blind and len(count) % 2 else None]

    monkeypatch.setattr(FaceDetector, "__init__", remember)
    monkeypatch.setattr(FaceDetector, "find", half)
    result = bench(
        *small,
        DEMO | {"blind": ("yunet", blind)},
        [demo_embedder()],
        tmp_path / "out",
        progress=False,
        bootstrap=20,
        samples=5,
        workers=1,
    )
    names = [{p.name for p in (tmp_path / "out" / "aligned" / d).iterdir()} for d in ("demo", "blind")]
    assert result.main.faces[1] <= result.main.faces[0] / 2 + 1 and names[0] == names[1] and len(names[0]) == 5
    found = result.seen["blind"].photos.state
    assert all(found[photo] == "face" for photo in found.index if Path(photo).name in names[0])
    assert cv2.imread(str(tmp_path / "out" / "aligned" / "sheet.jpg")).shape[1] == 5 * 114 + 2


def test_photos_at_fault_are_counted_and_named_and_the_run_goes_on(small, tmp_path, caplog):
    images = Path(shutil.copytree(small[0], tmp_path / "images"))
    who = sorted(p.name for p in images.iterdir())[:5]
    files = [images / name / f"{name}_0001.jpg" for name in who]
    gray = cv2.cvtColor(cv2.imread(str(files[0])), cv2.COLOR_BGR2GRAY)
    cv2.imwrite(str(files[0]), gray)
    rgba = cv2.imencode(".png", cv2.cvtColor(cv2.imread(str(files[1])), cv2.COLOR_BGR2BGRA))[1]
    files[1].write_bytes(rgba.tobytes())  # a PNG with alpha, called .jpg
    files[2].write_text("not a photo")
    cv2.imwrite(str(files[3]), np.zeros((120, 90, 3), np.uint8))
    files[4].unlink()
    file = tmp_path / "pairs.txt"
    file.write_text(small[1].read_text() + "\nhow did this line get here\n")
    result = bench(images, file, DEMO, [demo_embedder()], tmp_path / "out", progress=False, bootstrap=20)
    state = result.seen["demo"].photos.state
    assert [state[f.relative_to(images).as_posix()] for f in files[:4]] == ["face", "face", "unreadable", "no face"]
    assert result.pairs.missing == (files[4].relative_to(images).as_posix(),) and len(result.pairs.malformed) == 1
    exclude, crop = result.table.iloc[0], result.table.iloc[1]
    assert (
        exclude.unreadable == 1
        and exclude.left_out > crop.left_out > 0
        and exclude.pairs + exclude.left_out == len(result.pairs)
    )
    assert (
        "1 photos that pairs name are not there" in caplog.text
        and files[4].name in caplog.text
        and "not a photo" not in caplog.text
    )
    listed = pd.read_csv(tmp_path / "out" / "photos.csv", keep_default_na=False).set_index("photo")
    assert "no image that can be read" in listed.reason[files[2].relative_to(images).as_posix()]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["parameters"]["methods"] == {"demo": ["yunet", sha256_file(demo_detector())]}
    assert manifest["missing"] == list(result.pairs.missing) and len(manifest["malformed"]) == 1
    assert all(len(used(units, "exclude")) == exclude.pairs for units in result.scored.values())


def test_no_face_anywhere_leaves_numbers_out_and_the_table_whole(small, tmp_path):
    images = Path(shutil.copytree(small[0], tmp_path / "images"))
    for file in images.rglob("*.jpg"):
        cv2.imwrite(str(file), np.full((100, 100, 3), 77, np.uint8))
    result = bench(images, small[1], DEMO, [demo_embedder()], tmp_path / "out", progress=False, bootstrap=20)
    assert (
        result.table.faces.tolist() == [0, 0]
        and result.table.pairs[0] == 0
        and np.isnan(result.table.accuracy[0])
        and not np.isnan(result.table.auc[1])
    )
    assert (tmp_path / "out" / "figures" / "roc.png").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--methods": "yunnet"}, "did you mean 'yunet'"),
        ({"--methods": "yunet=nowhere.onnx"}, "no such model: nowhere.onnx"),
        ({"--model": "nowhere.onnx"}, "nowhere.onnx"),
        ({"--model": "DETECTOR"}, "face embedding network"),
        ({"--pairs": "nowhere.txt"}, "no such pairs file"),
        ({"--lfw-dir": "nowhere"}, "no pair has both photos"),
        ({"--undetected": "ignore"}, "unknown policy 'ignore'"),
        ({"--batch-size": "0"}, "batch-size"),
        ({"--methods": "yunet=EMBEDDER"}, "is this a YuNet"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(change, message, small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {
        "--lfw-dir": small[0],
        "--pairs": small[1],
        "--methods": f"yunet={demo_detector()}",
        "--model": demo_embedder(),
        "--output-dir": tmp_path / "out",
    } | change
    options = {
        key: str(value).replace("DETECTOR", str(demo_detector())).replace("EMBEDDER", str(demo_embedder()))
        for key, value in options.items()
    }
    assert main(["faces", "bench", *(word for pair in options.items() for word in pair)]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("calib-nb: ")]
    assert len(error) == 1 and message in error[0]


def test_the_command_says_what_was_left_out(small, tmp_path, capsys):
    pairs = tmp_path / "pairs.txt"
    pairs.write_text(small[1].read_text() + "\nNobody\t1\t2\n")
    assert (
        main(
            [
                "faces",
                "bench",
                "--lfw-dir",
                str(small[0]),
                "--pairs",
                str(pairs),
                "--methods",
                f"yunet={demo_detector()}",
                "--model",
                str(demo_embedder()),
                "--output-dir",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "2 photos that pairs name are not there" in shown and "results.csv" in shown and "yunet-demo" in shown


def test_methods_are_checked_before_anything_runs(tmp_path):
    with pytest.raises(ModelError, match="SHA-256"):
        read_methods(["scrfd"], tmp_path)  # has no public address: file, hash and place are named
    with pytest.raises(InputError, match="each once"):
        read_methods(["yunet", "yunet"], tmp_path)


def test_a_fault_of_the_network_stops_the_run(small):
    class Broken:
        size = 64

        def __call__(self, crops, flip):
            raise ModelError("broken")

    photos = [p.relative_to(small[0]).as_posix() for p in sorted(small[0].rglob("*.jpg"))[:10]]
    with pytest.raises(ModelError, match="broken"):
        embed_photos(
            FaceDetector("yunet", model=demo_detector()),
            small[0],
            photos,
            {"broken": Broken()},
            batch_size=2,
            progress=False,
        )


@pytest.mark.slow
def test_devtest_with_yunet_and_a_checkpoint(real_data, tmp_path):
    models = [real_data / "models" / "edgeface_xxs_q_dequant.onnx", real_data / "models" / "edgeface_xxs_q.pt"]
    result = bench(
        real_data / "lfw" / "images",
        real_data / "lfw" / "pairsDevTest.txt",
        ["yunet"],
        models,
        tmp_path,
        models_dir=real_data / "models",
        progress=False,
    )
    assert (result.main.accuracy >= 0.99).all() and result.main.detection_rate[0] > 0.999
    assert np.allclose(*(units.similarity for units in result.scored.values()), atol=1e-3)


@pytest.mark.slow
def test_devtest_with_the_others_and_their_crops_look_alike(real_data, tmp_path):
    names = ["retinaface", "scrfd", "yolov5_face", "yolov8"]
    result = bench(
        real_data / "lfw" / "images",
        real_data / "lfw" / "pairsDevTest.txt",
        names,
        [real_data / "models" / "edgeface_xxs_q_dequant.onnx"],
        tmp_path,
        models_dir=real_data / "models",
        progress=False,
        samples=40,
    )
    assert (result.main.accuracy >= 0.99).all() and (result.main.detection_rate >= 0.98).all()
    photos = sorted(p.name for p in (tmp_path / "aligned" / "scrfd").iterdir())
    crops = np.stack(
        [[cv2.imread(str(tmp_path / "aligned" / name / photo), 0).ravel() for photo in photos] for name in names]
    ).astype(float)
    crops = (crops - crops.mean(axis=2, keepdims=True)) / crops.std(axis=2, keepdims=True)
    alike = (
        np.einsum("apx,bqx->abpq", crops, crops) / crops.shape[2]
    )  # correlation of every two crops, by detectors and photos
    pairs = ~np.eye(len(names), dtype=bool)
    assert len(photos) == 40 and np.median(np.diagonal(alike, axis1=2, axis2=3)[pairs]) > 0.9
    assert (alike.argmax(axis=3) == np.arange(40))[
        pairs
    ].mean() > 0.99  # what is most like a crop among another detector's is its own photo
