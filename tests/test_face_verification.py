"""Verification sets in one file: InsightFace's numbers by another library, hostile pickles, killed runs."""

import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.interpolate import interp1d
from sklearn.model_selection import KFold
from sklearn.preprocessing import normalize

from calib_nb.cli import main
from calib_nb.core.errors import CalibError, InputError
from calib_nb.data.images import encode_png
from calib_nb.faces.bin_scores import insightface_scores, verify_bin
from calib_nb.faces.bin_sets import read_bin, write_bin
from calib_nb.faces.demo import demo_detector, demo_embedder, demo_lfw
from calib_nb.faces.detectors import FaceDetector
from calib_nb.faces.embed import Embedder, see_image
from calib_nb.faces.search import identify
from calib_nb.faces.templates import (
    TEMPLATE_MODES,
    TemplateSet,
    draw_templates,
    pair_scores,
    tar_at_fars,
    template_vectors,
)
from calib_nb.faces.vectors import VectorFile
from calib_nb.faces.verification import accuracy_kfold, cosine_pairs, read_pairs


class Python2Pickler(pickle._Pickler):
    """Writes bytes and truth values as Python 2 did."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, data):
        if self.proto == 0:
            text = "".join(chr(b) if 32 <= b < 127 and b not in b"'\\" else f"\\x{b:02x}" for b in data)
            self.write(b"S'" + text.encode() + b"'\n")
        elif len(data) < 256:
            self.write(b"U" + bytes([len(data)]) + data)
        else:
            self.write(b"T" + len(data).to_bytes(4, "little") + data)
        self.memoize(data)

    dispatch[bytes] = save_bytes


def as_python_2(value, protocol: int) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol).dump(value)
    return file.getvalue()


def by_scikit_learn(embeddings, same, folds):
    """Accuracy of each part as InsightFace's description says: every threshold by itself, KFold for the parts."""
    unit, thresholds = normalize(embeddings), np.arange(0, 4, 0.01)
    distance = np.sum(np.square(unit[0::2] - unit[1::2]), 1)
    accuracy = []
    for train, test in KFold(folds).split(distance):
        right = [np.mean((distance[train] < threshold) == same[train]) for threshold in thresholds]
        accuracy.append(np.mean((distance[test] < thresholds[np.argmax(right)]) == same[test]))
    return np.mean(accuracy), np.std(accuracy)


@pytest.mark.parametrize("pairs", [37, 6000])
@pytest.mark.parametrize("closer", [0.0, 0.8, 3.0])
def test_the_published_accuracy_is_that_of_scikit_learns_folds_to_the_last_digit(pairs, closer):
    rng = np.random.default_rng(pairs)
    same = rng.random(pairs) < 0.5
    first = rng.normal(size=(pairs, 32))
    second = rng.normal(size=(pairs, 32)) + closer * first * same[:, None]
    second[: pairs // 20] = first[: pairs // 20]  # distances of exactly 0
    embeddings = np.stack([first, second], axis=1).reshape(-1, 32) * rng.uniform(1, 30, (2 * pairs, 1))
    scores = insightface_scores(embeddings, same)
    assert (scores["insightface_accuracy"], scores["insightface_std"]) == by_scikit_learn(embeddings, same, 10)


def on_a_circle(distances) -> np.ndarray:
    """Embeddings of pairs with these squared distances."""
    angles = np.arccos(1 - np.asarray(distances) / 2)
    return np.stack([np.array([[1, 0]] * len(angles)), np.stack([np.cos(angles), np.sin(angles)], 1)], 1).reshape(-1, 2)


def test_val_is_scipys_where_scipy_does_not_refuse():
    """One pair of two people between each two thresholds, in each part: rates rise at every one."""
    rng = np.random.default_rng(0)
    steps = np.arange(3999) * 0.001 + 0.0005
    parts = [np.concatenate([rng.permutation(steps), rng.uniform(0, 0.02, 50)]) for _ in range(3)]
    same = np.tile(np.arange(4049) >= 3999, 3)
    distance, grid = np.concatenate(parts), np.arange(0, 4, 0.001)
    scores, values = insightface_scores(on_a_circle(distance), same, folds=3), []
    for train, test in KFold(3).split(distance):
        rate = np.searchsorted(np.sort(distance[train][~same[train]]), grid) / (~same[train]).sum()
        threshold = interp1d(rate, grid, kind="slinear")(1e-3)
        accept = distance[test] < threshold
        values.append([accept[same[test]].mean(), accept[~same[test]].mean()])
    assert np.allclose([scores["val"], scores["val_far"]], np.mean(values, axis=0), atol=1e-12)
    assert np.isclose(scores["val_std"], np.std(values, axis=0)[0]) and 0 < scores["val"] < 1


def test_val_where_several_thresholds_have_one_rate():
    """Two thousand pairs of two people at distance 2 and one at 1: 1e-3 lies between rates 1 / 1800 and 1."""
    distance = np.tile([0.5] + [2.0005] * 200, 10)
    distance[201 * 4 + 7] = 1.0005
    same = np.tile([True] + [False] * 200, 10)
    with pytest.raises(ValueError, match="duplicates"):
        interp1d([0, 0, 1], [0, 1, 2], kind="slinear")
    scores = insightface_scores(on_a_circle(distance), same)
    assert scores["val"] == 1 and scores["val_far"] == pytest.approx(1 / 2000)
    far = insightface_scores(on_a_circle(np.tile([3.0, 2.0005], 50)), np.tile([True, False], 50))
    assert far["val"] == 0 and far["val_far"] == 0


IMAGES = [b"one", b"\xff\xd8\x00'\\\n" * 60, b"", b"last"]


@pytest.mark.parametrize("protocol", range(6))
def test_every_pickle_of_python_3_is_read_as_pickle_reads_it(protocol, tmp_path):
    arrays = [np.frombuffer(image, np.uint8) for image in IMAGES]
    for images in (IMAGES, tuple(IMAGES), arrays, [IMAGES[0], arrays[1], *IMAGES[2:]]):
        for same in ([True, False], np.array([True, False]), [np.True_, np.False_], [1, 0], np.array([1, 0], np.uint8)):
            for value in ((images, same), [images, same]):
                (tmp_path / "x.bin").write_bytes(pickle.dumps(value, protocol))
                result = read_bin(tmp_path / "x.bin")
                assert [bytes(image) for image in result.images] == IMAGES and result.same.tolist() == [True, False]


@pytest.mark.parametrize("protocol", range(3))
def test_every_pickle_of_python_2_is_read_as_pickle_reads_it(protocol, tmp_path):
    value = (IMAGES * 300, [True, False] * 300)
    data = as_python_2(value, protocol)
    assert pickle.loads(data, encoding="bytes") == value
    (tmp_path / "x.bin").write_bytes(data)
    result = read_bin(tmp_path / "x.bin")
    assert (list(result.images), result.same.tolist()) == value


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


TEXT = b"X\x40\x00\x00\x00" + b"a" * 64 + b"\x94X\x06\x00\x00\x00latin1\x94c_codecs\nencode\n\x94"
HOSTILE = {
    "a command": pickle.dumps(([Call(os.system, "touch hostile")], [True])),
    "a command in an old pickle": b"(cos\nsystem\n(S'touch hostile'\ntR.",
    "an object": b"(i__main__\nHostile\n.",
    "a function of numpy": pickle.dumps(([Call(np.zeros, 10**9)], [True])),
    "a type": b"\x80\x02cnumpy\ndtype\nX\x02\x00\x00\x00O8\x85R.",
    "a length of 2**63": b"\x80\x04\x8e" + b"\xff" * 8 + b".",
    "a memo at 2**31": b"\x80\x02]r\xff\xff\xff\x7f.",
    "a number of 5,000 digits": b"I" + b"9" * 5000 + b"\n.",
    "marks in marks": b"(" * 100_000 + b".",
    "lists in lists": b"]" + b"]a" * 5_000 + b".",
    "tuples in tuples": b")" + b"\x85" * 5_000 + b".",
    "a list in itself": b"]q\x00h\x00a.",
    "a list that is both": b"]q\x00h\x00h\x00\x86.",
    "a text again and again": b"\x80\x04(" + TEXT + b"h\x02h\x00h\x01\x86R" * 3_000 + b"l.",
    "nothing": b"",
    "only an end": b".",
    "a mark that is not there": b"t.",
    "an array of another length": pickle.dumps(np.zeros(4, np.uint8), 2).replace(b"K\x04\x85", b"K\x05\x85"),
    "an array as long as a text": b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R(K\x01X\x01\x00\x00\x00a"
    b"\x8a\x04\xff\xff\xff\x7f\x86cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R\x89C\x01atb.",
    "an image of three axes": pickle.dumps(([np.zeros((2, 2, 3), np.uint8)] * 2, [True])),
    "labels of numbers": pickle.dumps(([b"a", b"b"], [2])),
    "labels of texts": pickle.dumps(([b"a", b"b"], ["1"])),
    "one image too many": pickle.dumps(([b"a"] * 3, [True])),
    "no images": pickle.dumps(([], [])),
    "a text file": b"name\tone\ttwo\n" * 10,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_line_and_runs_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.bin").write_bytes(HOSTILE[name])
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(InputError, match="is no verification set") as refused:
        read_bin(tmp_path / "x.bin")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - start < 5 and peak < 50e6 and len(str(refused.value)) < 500
    assert os.listdir(tmp_path) == ["x.bin"]


PNG = encode_png(np.zeros((4, 4, 3), np.uint8))
WHOLE = [as_python_2(([PNG] * 3 + [b"x"], [True, False]), protocol) for protocol in range(3)]
WHOLE += [pickle.dumps(([PNG, np.frombuffer(PNG, np.uint8)], np.array([True])), protocol) for protocol in range(6)]
STEPS = [b"(", b")", b"]", b"t", b"l", b"a", b"e", b"R", b"b", b"0", b"1", b".", b"\x94", b"\x93", b"h\x00", b"q\x00"]
STEPS += [b"N", b"I01\n", b"K\xff", b"\x8a\xff", b"X\xff\xff\xff\x7f", b"cos\nsystem\n", b"cnumpy\ndtype\n", b"S'a'\n"]


@st.composite
def damaged(draw) -> bytes:
    """A whole file, with steps put in, left out or doubled, and cut."""
    data = draw(st.sampled_from(WHOLE))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        end = at + draw(st.sampled_from((0, 1, 2, 8, 100)))
        token = draw(st.sampled_from(STEPS) | st.binary(min_size=1, max_size=4))
        kind = draw(st.sampled_from(("put", "replace", "drop", "double", "cut")))
        middle = {"put": token + data[at:end], "replace": token, "double": 2 * data[at:end]}.get(kind, b"")
        data = data[:at] + middle + (b"" if kind == "cut" else data[end:])
    return data


@pytest.mark.parametrize("cases", [30, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_damaged_file_is_a_set_or_one_line(cases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    @settings(max_examples=cases, suppress_health_check=list(HealthCheck))
    @given(damaged())
    def check(data):
        (tmp_path / "x.bin").write_bytes(data)
        start = time.process_time()
        try:
            bins = read_bin(tmp_path / "x.bin")
            for k in range(len(bins.images)):
                bins.crop(k, 8)
        except CalibError as e:
            assert len(str(e)) < 10_000
        assert time.process_time() - start < 5 and os.listdir(tmp_path) == ["x.bin"]

    check()


def crops_of(folder, pairs, detector, size):
    photos = sorted({*pairs["first"], *pairs["second"]})
    return {photo: see_image(detector, folder / photo, [size])[1][size] for photo in photos}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Forty pairs of drawn people as a file."""
    folder = tmp_path_factory.mktemp("bin")
    pairs = read_pairs(demo_lfw() / "pairsDevTest.txt", demo_lfw() / "images")
    table = pairs.table.groupby(["fold", "same"]).head(2)
    crops = crops_of(pairs.images, table, FaceDetector("yunet", model=demo_detector()), 64)
    return write_bin(folder / "drawn.bin", crops, table)


@pytest.fixture(scope="module")
def whole(drawn):
    """The scores of a run that was not stopped."""
    return verify_bin(drawn, demo_embedder(), batch_size=2, progress=False)


KILLED = """
import sys, time
import calib_nb.faces.embed as embed
run = embed.Embedder._run
def slow(self, x):
    time.sleep(600 if len(ran) == 12 else 0)  # until the kill comes
    ran.append(1)
    return run(self, x)
ran, embed.Embedder._run = [], slow
from calib_nb.faces.bin_scores import verify_bin
verify_bin(*sys.argv[1:3], store=sys.argv[3], batch_size=2, workers=1, progress=False)
"""


def test_kill_9_loses_no_row_and_the_next_run_goes_on(drawn, whole, tmp_path, monkeypatch):
    store, network = tmp_path / "x.rows", demo_embedder()
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(drawn), str(network), str(store)])
    row = 4 * 2 * 64
    while process.poll() is None and (not store.exists() or store.stat().st_size < 256 + 6 * row):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    left = (store.stat().st_size - 256) // row
    with open(store, "ab") as f:
        f.write(b"half a row")
    embedded, prepare = [], Embedder.prepare
    monkeypatch.setattr(Embedder, "prepare", lambda self, crops: embedded.extend(crops) or prepare(self, crops))
    again = verify_bin(drawn, network, store=store, batch_size=2, progress=False)
    images = len({bytes(image) for image in read_bin(drawn).images})
    assert 6 <= left < images and len(embedded) == 2 * (images - left) + 1  # both sides, and one for the width
    assert {name: again[name] for name in list(whole)[3:]} == pytest.approx(
        {n: whole[n] for n in list(whole)[3:]}, abs=1e-4
    )


def test_rows_of_another_network_are_not_used(drawn, whole, tmp_path):
    first = VectorFile(tmp_path / "x.rows", 128, "another")
    first.add(np.zeros((3, 128)))
    first.close()
    assert verify_bin(drawn, demo_embedder(), store=tmp_path / "x.rows", batch_size=2, progress=False) == whole


@pytest.mark.slow
def test_a_file_made_of_lfw_gives_the_numbers_of_its_folder(real_data, tmp_path):
    lfw = read_pairs(real_data / "lfw" / "pairsDevTest.txt", real_data / "lfw" / "images")
    detector = FaceDetector("yunet", model=real_data / "models" / "face_detection_yunet_2023mar.onnx")
    crops = crops_of(lfw.images, lfw.table, detector, 112)
    network = Embedder(real_data / "models" / "edgeface_xxs_q_dequant.onnx")
    scores = verify_bin(write_bin(tmp_path / "devtest.bin", crops, lfw.table), network)
    photos = list(crops)
    vectors = dict(zip(photos, np.vstack([network([crops[photo]], flip=True) for photo in photos])))
    similarity, same = cosine_pairs(vectors, lfw.table), lfw.table["same"].to_numpy()
    assert scores["accuracy"] == accuracy_kfold(similarity, same, lfw.table["fold"].to_numpy()).mean()
    assert scores["pairs"] == 1000 and scores["accuracy"] > 0.98


def templates_by_loops(rows, faces, mode):
    """Templates as the field describes them: media by media, template by template."""
    image, mirror = np.hsplit(rows.astype(float), 2)
    each = {"F0": image, "F1": np.hstack([image, mirror]), "F2": image + mirror}[mode[4:]]
    each = normalize(each) if "N0" in mode else each
    each = each * faces.scores[:, None] if "D1" in mode else each
    vectors = []
    for template in np.unique(faces.templates):
        mine = faces.templates == template
        media = [each[mine & (faces.medias == medium)].mean(axis=0) for medium in np.unique(faces.medias[mine])]
        vectors.append(np.sum(media, axis=0))
    return normalize(vectors)


def random_templates(folder, photos=9000, templates=300, pairs=20_000, seed=0) -> TemplateSet:
    """A set of which only text files are there; a medium may be in several templates, and rows are in no order."""
    rng = np.random.default_rng(seed)
    faces = TemplateSet(
        "ijbc",
        folder,
        [f"{k}.jpg" for k in range(photos)],
        np.zeros((photos, 5, 2), np.float32),
        rng.uniform(0.3, 1, photos).astype(np.float32),
        np.concatenate([np.arange(templates), rng.integers(0, templates, photos - templates)]) * 7 + 3,
        rng.integers(0, photos // 3, photos) * 5,
    )
    (folder / "meta").mkdir(parents=True)
    chosen = np.column_stack([rng.integers(0, templates, (pairs, 2)) * 7 + 3, rng.random(pairs) < 0.1])
    np.savetxt(faces.meta("template_pair_label.txt"), chosen, fmt="%d")
    return faces


@pytest.mark.parametrize("mode", TEMPLATE_MODES)
def test_templates_are_those_of_plain_loops(mode, tmp_path):
    faces = random_templates(tmp_path, photos=600, templates=40, pairs=10)
    rows = np.random.default_rng(1).normal(size=(600, 2 * 8)).astype(np.float32)
    ids, vectors = template_vectors(rows, faces, mode)
    assert np.array_equal(ids, np.unique(faces.templates))
    assert np.allclose(vectors, templates_by_loops(rows, faces, mode), atol=1e-12)


def test_scores_and_rates_of_parts_are_those_of_the_whole(tmp_path):
    """More images and pairs than one part has, small whole numbers as embeddings: many scores are equal."""
    faces = random_templates(tmp_path)
    rows = np.random.default_rng(2).integers(-1, 2, (9000, 2 * 3)).astype(np.float32)
    faces.templates[:] = np.arange(9000) // 30 * 7 + 3
    ids, vectors = template_vectors(rows, faces, "N1D0F0")
    vectors = np.round(vectors, 1)
    genuine, impostor = pair_scores(faces, ids, vectors, progress=False)
    pairs = np.loadtxt(faces.meta("template_pair_label.txt"), dtype=int)
    place = {template: k for k, template in enumerate(ids.tolist())}
    scores = np.array([vectors[place[a]] @ vectors[place[b]] for a, b, _ in pairs.tolist()])
    assert np.allclose(np.concatenate([genuine, impostor]), np.concatenate([scores[pairs[:, 2] == k] for k in (1, 0)]))
    far = [1e-6, 1e-4, 1e-3, 0.01, 0.05, 0.1, 0.5, 1.0]
    genuine, impostor = np.round(genuine, 2), np.round(impostor, 2)
    rates = tar_at_fars(genuine, impostor, far)
    thresholds = np.unique(np.concatenate([genuine, impostor, [np.inf]]))
    for row in rates.itertuples():
        allowed = [np.mean(genuine >= t) for t in thresholds if np.mean(impostor >= t) <= row.far]
        assert row.tar == max(allowed) and row.false_accepts == (impostor > row.threshold).sum() <= row.far * len(
            impostor
        )
    assert len(np.unique(impostor)) < 300  # of 18,000


def test_rates_are_exact_where_a_share_is_no_binary_number():
    impostor = np.arange(1000.0)
    for far in np.arange(7, 1000, 13) / 1000:
        row = tar_at_fars(impostor + 0.5, impostor, [far]).iloc[0]
        assert row.false_accepts == round(far * 1000) and row.tar == round(far * 1000 + 1) / 1000


def test_searches_are_those_of_plain_loops():
    rng = np.random.default_rng(0)
    gallery, subjects = rng.integers(-2, 3, (40, 4)).astype(float), rng.integers(0, 25, 40)
    probes, truth = rng.integers(-2, 3, (1030, 4)).astype(float), rng.integers(0, 50, 1030)  # scores are whole numbers
    found = identify((gallery, subjects), (probes, truth))
    ranks, mates, highest = [], [], []
    for vector, subject in zip(probes, truth):
        best = {who: max(vector @ g for g, s in zip(gallery, subjects) if s == who) for who in set(subjects.tolist())}
        mate = best.pop(int(subject), None)
        if mate is None:
            highest.append(max(best.values()))
        else:
            ranks.append(1 + sum(score >= mate for score in best.values()))
            mates.append(mate)
    assert (found["mated"], found["strangers"]) == (len(mates), len(highest))
    for k in (1, 5, 10):
        assert found[f"rank_{k}"] == np.mean(np.array(ranks) <= k)
    for name, fpir in (("tpir_1e2", 1e-2), ("tpir_1e1", 1e-1)):
        thresholds, strangers = {*highest, *mates}, np.array(highest)
        allowed = [t for t in thresholds if np.mean(strangers >= t) <= fpir]
        assert found[name] == max([np.mean(np.array(mates) >= t) for t in allowed], default=0)


SCALE = """
import sys
import numpy as np
from calib_nb.faces import search, templates
from calib_nb.faces.demo import demo_embedder
from calib_nb.faces.embed import Embedder

class Network:
    name, size, rng = "stub", 16, np.random.default_rng(0)
    real = Embedder(demo_embedder())  # the memory of a session counts
    def __call__(self, crops):
        return self.rng.standard_normal((len(crops), 512), np.float32)

crop = np.zeros((16, 16, 3), np.uint8)
templates.TemplateSet.crop = lambda self, index, size: crop
templates.model_digest = str
search.open_embedder = lambda model, device: Network()
pairs, _ = search.score_templates(*sys.argv[1:2], ["stub.onnx"], sys.argv[2], progress=False, batch_size=256)
# The peak of this program; what getrusage gives begins with that of the process which started it.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak / 1e6, *pairs.iloc[0, 3:])
"""


@pytest.mark.slow
def test_ijb_c_fits_a_gigabyte_and_goes_on_after_kill_9(tmp_path):
    """469,375 images, 23,124 templates and 15,658,489 pairs, as many as IJB-C has; a network that makes numbers up."""
    photos, templates, pairs = 469_375, 23_124, 15_658_489
    faces = random_templates(tmp_path / "IJBC", photos, templates, 10)
    table = pd.DataFrame({0: faces.photos, 1: faces.templates, 2: faces.medias})
    table.to_csv(faces.meta("face_tid_mid.txt"), sep=" ", header=False, index=False)
    points = pd.DataFrame(np.random.default_rng(3).uniform(0, 99, (photos, 11)).round(2))
    points.insert(0, "photo", faces.photos)
    points.to_csv(faces.meta("name_5pts_score.txt"), sep=" ", header=False, index=False)
    rng = np.random.default_rng(4)
    with open(faces.meta("template_pair_label.txt"), "w") as f:
        for start in range(0, pairs, 10**6):
            count = min(10**6, pairs - start)
            part = pd.DataFrame(rng.integers(0, templates, (count, 2)) * 7 + 3)
            part[2] = (np.arange(start, start + count) % 800 == 0).astype(int)
            part.to_csv(f, sep=" ", header=False, index=False)
    words = [sys.executable, "-c", SCALE, str(tmp_path / "IJBC"), str(tmp_path / "out")]
    process, store = subprocess.Popen(words), tmp_path / "out" / "embeddings" / "ijbc, stub.rows"
    while process.poll() is None and (not store.exists() or store.stat().st_size < 400e6):
        time.sleep(0.05)
    process.kill()
    process.wait()
    left = store.stat().st_size
    start = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    gigabytes, genuine, impostor, *tar = map(float, done.stdout.split())
    print(
        f"{left / 1e6:.0f} MB before the kill; {time.perf_counter() - start:.0f} s, peak {gigabytes:.2f} GB, TAR {tar}"
    )
    assert gigabytes <= 1 and (genuine + impostor, store.stat().st_size) == (pairs, 256 + photos * 1024 * 4)
    assert tar == sorted(tar) and 0.05 < tar[-1] < 0.15  # embeddings say nothing here


def test_quality_of_faces_chooses_a_calibration_set(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for k in range(6):
        cv2.imwrite(str(tmp_path / f"{k}.png"), rng.integers(0, 256, (64, 64, 3), np.uint8))
    scores = tmp_path.with_name("scores.csv")
    words = [
        "faces",
        "quality",
        "--source-dir",
        str(tmp_path),
        "--model",
        str(demo_embedder()),
        "--output",
        str(scores),
    ]
    assert main(words) == 0
    table = pd.read_csv(scores, dtype={"path": str})
    crops = [cv2.imread(str(tmp_path / f"{k}.png")) for k in range(6)]
    assert np.allclose(table.magnitude, np.linalg.norm(Embedder(demo_embedder())(crops), axis=1), rtol=1e-4)
    assert table.quality.rank().equals(table.magnitude.rank())
    output = tmp_path.with_name("set")
    words = ["prepare", "--source-dir", str(tmp_path), "--output-dir", str(output), "--scores", str(scores)]
    assert main([*words, "--num-samples", "2", "--quality-threshold", "80"]) == 0
    best = table.sort_values("quality").path.tail(2)
    assert sorted(file.name for file in output.glob("*.png")) == sorted(best)
    table.head(3).to_csv(scores, index=False)
    assert main([*words, "--overwrite"]) == 2 and "has no quality for 3 images" in capsys.readouterr().err
    assert sorted(file.name for file in output.glob("*.png")) == sorted(best)


@pytest.fixture(scope="module")
def ijbc(tmp_path_factory):
    """Two drawn people in IJB-C's layout."""
    return draw_templates(tmp_path_factory.mktemp("drawn") / "IJBC", people=2)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("template_pair_label.txt", "10 20 1\n10 999 0\n", "template 999 has no images"),
        ("template_pair_label.txt", "10 20 1\n10 11 2\n", "other columns"),
        ("template_pair_label.txt", "10 20 1\n10 11 x\n", "cannot be read"),
        ("template_pair_label.txt", "10 20 1\n", "one kind only"),
        ("template_pair_label.txt", "", "cannot be read"),
        ("1N_gallery_G1.csv", "t,s\n999,1\n", "template 999 has no images"),
        ("face_tid_mid.txt", "1.jpg 10\n", "has 2 columns"),
        ("name_5pts_score.txt", "\xff\xfe\n", "columns"),
    ],
)
def test_a_wrong_file_of_ijb_is_one_line_before_anything_is_embedded(file, text, message, ijbc, tmp_path, capsys):
    shutil.copytree(ijbc / "meta", tmp_path / "IJBC" / "meta")
    (tmp_path / "IJBC" / "meta" / f"ijbc_{file}").write_bytes(text.encode("latin-1"))
    words = ["faces", "ijb", "--ijb-dir", str(tmp_path / "IJBC"), "--model", str(demo_embedder())]
    assert main([*words, "--output-dir", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err.replace("cannot be read", "cannot be read, columns")
    assert not (tmp_path / "out").exists()
