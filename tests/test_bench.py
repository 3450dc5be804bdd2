"""The verification benchmark: numbers by other libraries and by hand, a killed run, images and files with faults."""

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
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.analysis.tasks import task_noise
from calib_nb.cli import main
from calib_nb.core.errors import InputError, ModelError
from calib_nb.core.run import sha256_file
from calib_nb.faces.bench import bench
from calib_nb.faces.demo import demo_detector, demo_embedder, demo_lfw
from calib_nb.faces.detectors import FaceDetector
from calib_nb.faces.edgeface import edgeface
from calib_nb.faces.embed import Embedder, embed_images, onnx_file
from calib_nb.faces.noise import noise_for
from calib_nb.faces.pipelines import read_methods
from calib_nb.faces.scores import pair_metrics, used
from calib_nb.faces.verification import accuracy_kfold, kfold_right, kfold_thresholds, read_pairs
from calib_nb.graph.build import conv, linear, sequential
from calib_nb.graph.fixed import fix_batch
from calib_nb.quant.sensitivity import noise_shares


@pytest.fixture(scope="module")
def lfw():
    return demo_lfw()


@pytest.fixture(scope="module")
def small(lfw, tmp_path_factory):
    """Twenty drawn people, with pairs of them alone: (folder of images, pairs file)."""
    folder = tmp_path_factory.mktemp("small")
    for who in sorted(p.name for p in (lfw / "images").iterdir())[:20]:
        shutil.copytree(lfw / "images" / who, folder / "images" / who)
    people = sorted(p.name for p in (folder / "images").iterdir())
    same = [f"{who}\t{i}\t{i + 1}" for who in people for i in (1, 3)]
    other = [f"{a}\t{i}\t{b}\t{i + 1}" for i in (1, 2) for a, b in zip(people, people[1:] + people[:1])]
    (folder / "pairs.txt").write_text("\n".join([str(len(same)), *same, *other]))
    return folder / "images", folder / "pairs.txt"


CHARTED = (
    "test_each_image_is_looked_at_and_embedded_once",
    "test_no_face_anywhere_leaves_numbers_out_and_the_table_whole",
)


@pytest.fixture(autouse=True)
def no_charts(request, monkeypatch):
    """Leave out the charts, which take most of the time, where a test looks at something else."""
    if request.node.originalname not in CHARTED and not request.node.get_closest_marker("slow"):
        monkeypatch.setattr("calib_nb.faces.bench.save_charts", lambda *_: [])


@pytest.fixture
def looks(monkeypatch):
    """A list with one entry for every image that a detector looks at."""
    entries, find = [], FaceDetector.find
    monkeypatch.setattr(
        FaceDetector, "find", lambda self, image, order=None: entries.append(1) or find(self, image, order)
    )
    return entries


DEMO = {"demo": ("yunet", demo_detector())}
QUICK = {"progress": False, "bootstrap": 20, "samples": 2, "worst": 1}


def run(small, folder, methods=DEMO, models=None, **options):
    return bench(*small, methods, models or [demo_embedder()], folder, **(QUICK | options))


def command(small, folder, **change):
    """Words of `calib-nb faces bench` on the small set."""
    options = {"lfw-dir": small[0], "pairs": small[1], "methods": f"yunet={demo_detector()}", "model": demo_embedder()}
    options |= {"output-dir": folder} | {name.replace("_", "-"): value for name, value in change.items()}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["faces", "bench", *words]


# ---------------------------------------------------------------- numbers

KINDS = st.lists(st.booleans(), min_size=20, max_size=60).filter(lambda kinds: 0 < sum(kinds) < len(kinds))
TENTHS = st.lists(st.integers(-10, 10), min_size=60, max_size=60)


def scores(kinds, tenths):
    same = np.array(kinds, bool)
    return np.array(tenths, float)[: len(same)] / 10, same


@settings(max_examples=60, deadline=None, derandomize=True)
@given(KINDS, TENTHS)
def test_the_numbers_are_those_of_scikit_learn(kinds, tenths):
    from scipy.interpolate import interp1d
    from scipy.optimize import brentq
    from sklearn.metrics import roc_auc_score, roc_curve

    s, same = scores(kinds, tenths)
    values = pair_metrics(s, same, np.arange(len(s)) % 10, resamples=5)
    far, tar, _ = roc_curve(same, s, drop_intermediate=False)
    assert np.isclose(values["auc"], roc_auc_score(same, s))
    assert np.isclose(values["tar_at_far_1e2"], tar[far <= 1e-2].max())
    assert np.isclose(values["tar_at_far_1e3"], tar[far <= 1e-3].max())
    curve = interp1d(np.arange(len(far)), np.stack([far, tar]))
    at = brentq(lambda t: curve(t)[0] - 1 + curve(t)[1], 0, len(far) - 1)
    assert np.isclose(values["eer"], curve(at)[0], atol=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(KINDS, TENTHS)
def test_ten_folds_are_the_official_definition(kinds, tenths):
    """Each fold at the threshold that is best on the other nine, tried one by one; of equally good ones the middle."""
    s, same = scores(kinds, tenths)
    fold = np.arange(len(s)) % 10
    levels = np.unique(s)[::-1]
    thresholds = [levels[0] + 1, *((a + b) / 2 for a, b in zip(levels, levels[1:])), levels[-1] - 1]
    right = np.zeros(len(s), bool)
    for k in range(10):
        others = np.array([((s >= t) == same)[fold != k].sum() for t in thresholds])
        best = np.flatnonzero(others == others.max())
        right[fold == k] = ((s >= thresholds[best[(len(best) - 1) // 2]]) == same)[fold == k]
    by_fold = [right[fold == k].mean() for k in range(10)]
    assert np.array_equal(kfold_right(s, same, fold), right)
    assert np.array_equal((s >= kfold_thresholds(s, same, fold)) == same, right)
    assert np.allclose(accuracy_kfold(s, same, fold), by_fold)
    assert np.isclose(pair_metrics(s, same, fold, resamples=5)["accuracy"], np.mean(by_fold))


def test_ten_folds_by_hand():
    """Ten folds with a pair of each kind, at 0.9 and 0.1, but fold 3 has them at 0.6 and 0.7: both are wrong.

    Between 0.9 and 0.1 the other folds are right anywhere. The three places there are above 0.7, between 0.7 and 0.6,
    and below 0.6; the middle one is 0.65.
    """
    s, same, fold = np.tile([0.9, 0.1], 10), np.tile([True, False], 10), np.repeat(np.arange(10), 2)
    s[6], s[7] = 0.6, 0.7
    values = pair_metrics(s, same, fold)
    assert np.isclose(values["accuracy"], 0.9)
    assert np.isclose(values["accuracy_se"], np.std([1] * 9 + [0], ddof=1) / np.sqrt(10))
    assert np.isclose(values["auc"], 99 / 100) and np.isclose(values["tar_at_far_1e3"], 0.9)


def test_official_pairs_have_the_folds_of_the_file(small, tmp_path):
    images, file = small
    _, *lines = file.read_text().splitlines()
    same, other = lines[:40], lines[40:]
    folds = [[*same[4 * k : 4 * k + 4], *other[4 * k : 4 * k + 4]] for k in range(10)]
    lines = [line for fold in folds for line in fold]
    (tmp_path / "pairs.txt").write_text("\n".join(["10\t4", *lines]))
    official = read_pairs(tmp_path / "pairs.txt", images)
    assert official.table.fold.tolist() == np.repeat(np.arange(10), 8).tolist()
    assert official.table.same.tolist() == ([True] * 4 + [False] * 4) * 10
    (tmp_path / "five.txt").write_text("\n".join(["5\t8", *lines]))
    assert read_pairs(tmp_path / "five.txt", images).table.fold.max() == 4
    with_commas = [line.replace("\t", ",") for line in lines]
    (tmp_path / "pairs.csv").write_text("\n".join(["name,imagenum1,imagenum2,", *with_commas]))
    assert read_pairs(tmp_path / "pairs.csv", images).table.equals(official.table)


# ---------------------------------------------------------------- one run


def test_each_image_is_looked_at_and_embedded_once(small, tmp_path, looks, monkeypatch):
    batches, call = [], Embedder.__call__
    monkeypatch.setattr(
        Embedder, "__call__", lambda self, crops, **o: batches.append(len(crops)) or call(self, crops, **o)
    )
    models = {"a": demo_embedder(), "b": demo_embedder()}
    result = run(small, tmp_path, batch_size=16, models=models)
    count, table = len(result.pairs.photos), result.main
    assert len(looks) == count and sum(batches) == 2 * count and max(batches) == 16
    assert table.model.tolist() == ["a", "b"] and table.auc[0] == table.auc[1] > 0.9
    tables = {"results.csv", "similarities.csv", "photos.csv", "errors.csv", "manifest.json"}
    written = {"aligned", "figures", "journals", *tables} | ({"errors"} if table.accuracy.lt(1).any() else set())
    assert {p.name for p in tmp_path.iterdir()} == written
    costs = ["decode_ms", "detect_ms", "detect_p95_ms", "align_ms", "embed_ms", "embed_p95_ms", "rss_peak_mb"]
    assert (table[costs] > 0).all(axis=None) and (table.detect_p95_ms >= table.detect_ms).all()
    run(small, tmp_path, batch_size=16, models=models)
    assert len(looks) == count
    run(small, tmp_path, batch_size=16, models=models, resume=False)
    assert len(looks) == 2 * count


def test_a_file_of_fixed_batch_gives_the_same(small, tmp_path):
    fixed = fix_batch(demo_embedder(), tmp_path / "b3.onnx", 3)
    result = run(small, tmp_path / "out", models={"open": demo_embedder(), "three": fixed}, batch_size=7)
    plain = result.scored["demo", "open"].similarity
    assert np.allclose(plain, result.scored["demo", "three"].similarity, atol=1e-4)
    flipped = run(small, tmp_path / "flip", flip=True).scored["demo", demo_embedder().stem].similarity
    assert not np.allclose(flipped, plain, atol=1e-4)


@pytest.mark.slow
def test_a_killed_run_continues_where_it_stopped(small, tmp_path):
    words = [*command(small, tmp_path), "--batch-size", "4", "--num-workers", "1"]
    code = "import sys; from calib_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    journal = tmp_path / "journals" / f"yunet-{demo_detector().stem}.jsonl"
    process = forked.start_script(code, *words)
    until = time.monotonic() + 60
    while time.monotonic() < until and process.is_alive():
        if journal.is_file() and journal.read_bytes().count(b"\n") > 8:
            break
        time.sleep(0.002)
    forked.kill(process)
    before = journal.read_bytes()
    before = before[: before.rfind(b"\n") + 1]
    assert before.count(b"\n") > 8
    resumed = forked.script(code, *words)
    assert resumed.returncode == 0, resumed.stderr
    after = journal.read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 1 + len(read_pairs(small[1], small[0]).photos)
    whole, table = run(small, tmp_path / "whole", methods=[f"yunet={demo_detector()}"]), tmp_path / "results.csv"
    for column in ("faces", "pairs", "accuracy", "auc", "eer", "threshold"):
        assert np.allclose(pd.read_csv(table)[column], whole.table[column], atol=1e-4), column
    assert not list(tmp_path.rglob("*.tmp*"))


def test_a_file_that_was_replaced_under_its_name_is_not_taken_from_the_journal(small, tmp_path, looks):
    """An image, a detector or a network of other content, of the same name, size and time, makes all be done again."""
    images = Path(shutil.copytree(small[0], tmp_path / "images"))
    detector, network = (Path(shutil.copy2(file, tmp_path / file.name)) for file in (demo_detector(), demo_embedder()))
    lines, few = small[1].read_text().splitlines(), tmp_path / "pairs.txt"
    few.write_text("\n".join(["4", *lines[1:5], *lines[41:45]]))

    def looks_now():
        before = len(looks)
        run((images, few), tmp_path / "out", {"demo": ("yunet", detector)}, {"network": network}, samples=1)
        return len(looks) - before

    def replace(file, old, new):
        before, content = file.stat(), file.read_bytes()
        assert old in content and len(old) == len(new)
        file.write_bytes(content.replace(old, new, 1))
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)

    paths = read_pairs(few, images).photos
    count, image = len(paths), images / paths[0]
    assert looks_now() == count and looks_now() == 0
    with open(tmp_path / "out" / "journals" / "demo.jsonl") as f:
        assert len(f.readline()) < 4000  # however many images: a journal's first line is read to a limit
    os.utime(image, (1, 1))
    assert looks_now() == 0
    maker = b"pytorch", b"pytorcH"  # in the models, the name of their maker
    for file, old, new in ((image, b"JFIF", b"JFIX"), (detector, *maker), (network, *maker)):
        replace(file, old, new)
        assert looks_now() == count and looks_now() == 0, file.name


def test_a_checkpoint_is_exported_to_the_same_bytes_again(tmp_path):
    """The journal knows a .pt file by the ONNX file that is written for it in every run."""
    torch.save(edgeface("xxs").state_dict(), tmp_path / "network.pt")
    first, again = (onnx_file(tmp_path / "network.pt", tmp_path / name).read_bytes() for name in ("a", "b"))
    assert first == again


def test_samples_are_of_the_same_images_for_every_detector(small, tmp_path, monkeypatch):
    """A second detector that is blind to every other image: what is laid side by side is what both found."""
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
    result = run(small, tmp_path / "out", DEMO | {"blind": ("yunet", blind)}, samples=5, worst=10, workers=1)
    names = [{p.name for p in (tmp_path / "out" / "aligned" / d).iterdir()} for d in ("demo", "blind")]
    assert result.main.faces[1] <= result.main.faces[0] / 2 + 1 and names[0] == names[1] and len(names[0]) == 5
    state = result.seen["blind"].photos.state
    assert all(state[path] == "face" for path in state.index if Path(path).name in names[0])
    assert cv2.imread(str(tmp_path / "out" / "aligned" / "sheet.jpg")).shape[1] == 5 * 114 + 2


# ---------------------------------------------------------------- faults


def test_images_with_faults_are_counted_and_named_and_the_run_continues(small, tmp_path, caplog):
    images = Path(shutil.copytree(small[0], tmp_path / "images"))
    who = sorted(p.name for p in images.iterdir())[:5]
    files = [images / name / f"{name}_0001.jpg" for name in who]
    paths = [f.relative_to(images).as_posix() for f in files]
    cv2.imwrite(str(files[0]), cv2.cvtColor(cv2.imread(str(files[0])), cv2.COLOR_BGR2GRAY))
    rgba = cv2.imencode(".png", cv2.cvtColor(cv2.imread(str(files[1])), cv2.COLOR_BGR2BGRA))[1]
    files[1].write_bytes(rgba.tobytes())  # a PNG with alpha, called .jpg
    files[2].write_text("only words")
    cv2.imwrite(str(files[3]), np.zeros((120, 90, 3), np.uint8))
    files[4].unlink()
    file = tmp_path / "pairs.txt"
    file.write_text(small[1].read_text() + "\nhow did this line get here\n")
    result = run((images, file), tmp_path / "out")
    state = result.seen["demo"].photos.state
    assert [state[path] for path in paths[:4]] == ["face", "face", "unreadable", "no face"]
    assert result.pairs.missing == (paths[4],) and len(result.pairs.malformed) == 1
    exclude, crop = result.table.iloc[0], result.table.iloc[1]
    assert exclude.unreadable == 1 and exclude.left_out > crop.left_out > 0
    assert exclude.pairs + exclude.left_out == len(result.pairs)
    assert all(len(used(units, "exclude")) == exclude.pairs for units in result.scored.values())
    assert "images of pairs that do not exist: 1" in caplog.text and files[4].name in caplog.text
    assert "only words" not in caplog.text
    listed = pd.read_csv(tmp_path / "out" / "photos.csv", keep_default_na=False).set_index("photo")
    assert "not an image that can be read" in listed.reason[paths[2]]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["parameters"]["methods"] == {"demo": ["yunet", sha256_file(demo_detector())]}
    assert manifest["missing"] == list(result.pairs.missing) and len(manifest["malformed"]) == 1


def test_no_face_anywhere_leaves_numbers_out_and_the_table_whole(small, tmp_path):
    images = Path(shutil.copytree(small[0], tmp_path / "images"))
    for file in images.rglob("*.jpg"):
        cv2.imwrite(str(file), np.full((100, 100, 3), 77, np.uint8))
    table = run((images, small[1]), tmp_path / "out").table
    assert table.faces.tolist() == [0, 0] and table.pairs[0] == 0
    assert np.isnan(table.accuracy[0]) and not np.isnan(table.auc[1])
    assert (tmp_path / "out" / "figures" / "roc.png").is_file()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": "yunnet"}, "did you mean 'yunet'"),
        ({"methods": "yunet=nowhere.onnx"}, "no such model: nowhere.onnx"),
        ({"model": "nowhere.onnx"}, "nowhere.onnx"),
        ({"model": demo_detector()}, "face embedding network"),
        ({"pairs": "nowhere.txt"}, "no such pairs file"),
        ({"lfw_dir": "nowhere"}, "no pair has both images"),
        ({"undetected": "ignore"}, "unknown policy 'ignore'"),
        ({"batch_size": "0"}, "batch-size"),
        ({"methods": f"yunet={demo_embedder()}"}, "is this a YuNet"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value.split(".")[0],
)
def test_bad_input_is_one_line_and_exit_code_2(change, message, small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command(small, tmp_path / "out", **change)) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("calib-nb: ")]
    assert len(error) == 1 and message in error[0]


def test_the_command_says_what_was_left_out(small, tmp_path, capsys):
    pairs = tmp_path / "pairs.txt"
    pairs.write_text(small[1].read_text() + "\nNobody\t1\t2\n")
    assert main(command(small, tmp_path / "out", pairs=pairs)) == 0
    shown = capsys.readouterr().out
    assert "images of pairs that do not exist: 2" in shown and "results.csv" in shown and "yunet-demo" in shown


def test_methods_are_checked_before_anything_runs(tmp_path):
    with pytest.raises(ModelError, match="SHA-256"):
        read_methods(["scrfd"], tmp_path)  # has no public address: file, hash and place are named
    with pytest.raises(InputError, match="each once"):
        read_methods(["yunet", "yunet"], tmp_path)


def test_an_unknown_option_names_the_nearest(small, tmp_path):
    with pytest.raises(InputError, match="did you mean 'batch_size'"):
        run(small, tmp_path / "out", batchsize=8)
    assert not (tmp_path / "out").exists()


def test_a_fault_of_the_network_stops_the_run(small):
    class Broken:
        size = 64

        def __call__(self, crops, flip):
            raise ModelError("broken")

    paths = [p.relative_to(small[0]).as_posix() for p in sorted(small[0].rglob("*.jpg"))[:10]]
    detector = FaceDetector("yunet", model=demo_detector())
    with pytest.raises(ModelError, match="broken"):
        embed_images(detector, small[0], paths, {"broken": Broken()}, batch_size=2, progress=False)


# ---------------------------------------------------------------- the task


def test_only_a_yunet_is_measured_by_its_faces(tmp_path):
    classifier = sequential(conv(4), "Relu", linear(10), shape=(1, 3, 8, 8)).save(tmp_path / "classifier.onnx")
    shown = {measure(demo_detector()).text(4.0) for measure in (task_noise, noise_for)}
    assert shown == {"2 px"}
    assert task_noise(demo_embedder()) is task_noise(classifier) is noise_for(classifier) is noise_shares


# ---------------------------------------------------------------- published models on LFW


@pytest.mark.slow
def test_devtest_with_yunet_and_a_checkpoint(real_data, tmp_path):
    models_dir, lfw = real_data / "models", real_data / "lfw"
    models = [models_dir / "edgeface_xxs_q_dequant.onnx", models_dir / "edgeface_xxs_q.pt"]
    few = {"models_dir": models_dir, "progress": False}
    result = bench(lfw / "images", lfw / "pairsDevTest.txt", ["yunet"], models, tmp_path, **few)
    assert (result.main.accuracy >= 0.99).all() and result.main.detection_rate[0] > 0.999
    assert np.allclose(*(units.similarity for units in result.scored.values()), atol=1e-3)


@pytest.mark.slow
def test_devtest_with_the_others_and_their_crops_look_alike(real_data, tmp_path):
    """By correlation, the crop that is most like one of another detector is that of the same image."""
    names, models_dir, lfw = ["retinaface", "scrfd", "yolov5_face", "yolov8"], real_data / "models", real_data / "lfw"
    models = [models_dir / "edgeface_xxs_q_dequant.onnx"]
    few = {"models_dir": models_dir, "progress": False, "samples": 40}
    result = bench(lfw / "images", lfw / "pairsDevTest.txt", names, models, tmp_path, **few)
    assert (result.main.accuracy >= 0.99).all() and (result.main.detection_rate >= 0.98).all()
    files = sorted(p.name for p in (tmp_path / "aligned" / "scrfd").iterdir())
    crops = [[cv2.imread(str(tmp_path / "aligned" / name / file), 0).ravel() for file in files] for name in names]
    crops = np.array(crops, float)
    crops = (crops - crops.mean(axis=2, keepdims=True)) / crops.std(axis=2, keepdims=True)
    alike = np.einsum("apx,bqx->abpq", crops, crops) / crops.shape[2]
    others = ~np.eye(len(names), dtype=bool)
    assert len(files) == 40 and np.median(np.diagonal(alike, axis1=2, axis2=3)[others]) > 0.9
    assert (alike.argmax(axis=3) == np.arange(40))[others].mean() > 0.99
