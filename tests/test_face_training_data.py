"""Files of photos for face training: whole, in parts, torn and fuzzed; order and augmentation by their seeds alone."""

import pickle
import struct

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.core.errors import CalibError, InputError
from calib_nb.training.recordio import RecordFile, pack_image, pack_record, read_record, write_records
from calib_nb.training.samples import FaceBatches, FaceSamples, Variation, epoch_order
from calib_nb.training.sets import FaceSet, load_faces, pack_faces, same_images

MAGIC = struct.pack("<I", 0xCED7230A)


def reference_record(data: bytes) -> bytes:
    """A record by the published rule: at each aligned magic word a part ends, and the word is left out."""
    parts, start = [], 0
    for at in range(0, len(data) - 3, 4):
        if data[at : at + 4] == MAGIC:
            parts.append(data[start:at])
            start = at + 4
    parts.append(data[start:])
    written = b""
    for k, part in enumerate(parts):
        kind = 0 if len(parts) == 1 else 1 if k == 0 else 3 if k == len(parts) - 1 else 2
        written += MAGIC + struct.pack("<I", kind * 2**29 + len(part)) + part + b"\0" * (-len(part) % 4)
    return written


@settings(max_examples=200)
@given(st.lists(st.sampled_from([MAGIC, b"a", b"bcd", MAGIC[:3], b"\0\0\0\0"]), max_size=12))
def test_records_are_written_by_the_rule_and_read_back(pieces):
    data = b"".join(pieces)
    assert pack_record(data) == reference_record(data)
    assert read_record(pack_record(data), 0) == (data, len(pack_record(data)))


@pytest.fixture(scope="module")
def record_file(tmp_path_factory):
    """Five photos of three people, one of which holds the magic word, with the bytes of both files."""
    folder = tmp_path_factory.mktemp("records")
    photos = [(0, b"one"), (0, b"two" + MAGIC), (2, b"four" * 3 + MAGIC + b"x"), (2, b""), (5, bytes(range(100)))]
    path = write_records(folder / "train.rec", photos)
    return photos, path.read_bytes(), path.with_suffix(".idx").read_text()


def test_a_file_is_read_with_and_without_its_index_and_by_workers(record_file, tmp_path):
    photos, data, index = record_file
    for name in ("with", "without"):
        (tmp_path / f"{name}.rec").write_bytes(data)
    (tmp_path / "with.idx").write_text(index)
    for name in ("with", "without"):
        for file in (opened := RecordFile(tmp_path / f"{name}.rec"), pickle.loads(pickle.dumps(opened))):
            assert file.ranges and file.labels.tolist() == [label for label, _ in photos]
            assert [file.read(k) for k in range(5)] == [image for _, image in photos]


def test_labels_may_be_arrays_and_record_0_a_photo(tmp_path):
    rows = [pack_image([3, 0.25, 9], 0, b"a"), pack_image(1, 1, b"b"), pack_image([2, 5], 2, MAGIC * 3)]
    (tmp_path / "x.rec").write_bytes(b"".join(map(pack_record, rows)))
    file = RecordFile(tmp_path / "x.rec")
    assert file.labels.tolist() == [3, 1, 2] and not file.ranges
    assert [file.read(k) for k in range(3)] == [b"a", b"b", MAGIC * 3]


def test_a_torn_end_is_refused_unless_every_photo_is_whole(record_file, tmp_path):
    photos, data, index = record_file
    refused = 0
    for size in range(1, len(data), 7):
        (tmp_path / "torn.rec").write_bytes(data[:size])
        for indexed in (True, False):
            (tmp_path / "torn.idx").unlink(missing_ok=True)
            if indexed:
                (tmp_path / "torn.idx").write_text(index)
            try:
                file = RecordFile(tmp_path / "torn.rec")
                assert [file.read(k) for k in range(len(file))] == [image for _, image in photos]
            except InputError:
                refused += 1
    end = int(index.splitlines()[6].split("\t")[1])  # behind the last photo
    assert refused >= 2 * (end // 7)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=4), st.booleans())
def test_a_damaged_file_is_one_line_or_photos(record_file, tmp_path_factory, changes, indexed):
    _, data, index = record_file
    folder = tmp_path_factory.getbasetemp()
    both = [bytearray(data), bytearray(index.encode())]
    for place, value in changes:
        part = both[indexed and place % 3 == 0]
        part[place % len(part)] = value
    (folder / "fuzz.rec").write_bytes(both[0])
    (folder / "fuzz.idx").unlink(missing_ok=True)
    if indexed:
        (folder / "fuzz.idx").write_bytes(both[1])
    try:
        file = RecordFile(folder / "fuzz.rec")
        assert all(isinstance(file.read(k), bytes) for k in range(len(file))) and len(file.labels) == len(file)
    except CalibError as e:
        assert "\n" not in str(e) and "fuzz" in str(e)


def test_reading_many_headers_at_once_is_reading_them_one_by_one(tmp_path):
    random = np.random.default_rng(0)
    labels = np.sort(random.integers(0, 50, 300)).tolist()
    file = RecordFile(write_records(tmp_path / "many.rec", [(k, random.bytes(k)) for k in labels]))
    assert file.labels.tolist() == labels == file._labels_one_by_one().tolist()


@pytest.fixture(scope="module")
def face_folder(tmp_path_factory):
    """Twelve photos of three people, 8 pixels wide; one photo stands under two people."""
    root = tmp_path_factory.mktemp("people") / "faces"
    random = np.random.default_rng(1)
    for k in range(12):
        (root / "abc"[k % 3]).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / "abc"[k % 3] / f"{k:02d}.png"), random.integers(0, 255, (8, 8, 3), np.uint8))
    (root / "c/02.png").write_bytes((root / "a/00.png").read_bytes())
    return root


def test_three_forms_of_a_set_give_the_same_photos(face_folder, tmp_path):
    wanted = load_faces(face_folder)
    for name in ("set.rec", "set.tar"):
        faces = load_faces(pack_faces(face_folder, tmp_path / name, shard=5))
        assert faces.people == ("a", "b", "c") and np.array_equal(faces.labels, wanted.labels)
        assert [faces.read(k) for k in range(12)] == [wanted.read(k) for k in range(12)]
    assert len(list(tmp_path.glob("set-*.tar"))) == 3
    pack_faces(face_folder, tmp_path / "set.tar")
    assert [p.name for p in tmp_path.glob("set-*.tar")] == ["set-000000.tar"]
    assert same_images(wanted, progress=False).person.tolist() == ["a", "c"]


def test_a_photo_that_cannot_be_decoded_leaves_no_set(face_folder, tmp_path):
    (tmp_path / "faces").mkdir()
    for name in "ab":
        (tmp_path / "faces" / name).mkdir()
        (tmp_path / "faces" / name / "x.png").write_bytes(
            (face_folder / "a/03.png").read_bytes()[: 60 if name == "b" else 9999]
        )
    for name in ("set.rec", "set.tar"):
        with pytest.raises(CalibError, match="b/x.png"):
            pack_faces(tmp_path / "faces", tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faces"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_are_the_same_for_any_number_of_processes(accumulate):
    labels = np.arange(100) % 7
    wanted = [sorted(step) for step in epoch_order(100, 8, 5, 3)]
    for world in (1, 2, 4):
        ranks = []
        for rank in range(world):
            batches = FaceBatches(labels, 8, seed=5, rank=rank, world=world, accumulate=accumulate)
            batches.epoch = 3
            ranks.append([[k for _, k in piece] for piece in batches])
        steps = [[sum((rank[k] for rank in ranks), []) for k in range(len(ranks[0]))]][0]
        steps = [sum(steps[k : k + accumulate], []) for k in range(0, len(steps), accumulate)]
        assert [sorted(step) for step in steps] == wanted
        assert sorted(batches.labels_of(4)) == sorted(labels[wanted[4]])


def test_samples_are_the_same_with_any_number_of_workers(face_folder):
    faces = load_faces(face_folder)
    samples = FaceSamples(faces, Variation(True, 0.5, 0.5, 0.5), size=8, seed=2)
    views = []
    for workers in (0, 2):
        batches = FaceBatches(faces.labels, 4, seed=2)
        batches.epoch = 1
        loader = torch.utils.data.DataLoader(samples, batch_sampler=batches, num_workers=workers)
        views.append([(x.numpy().tobytes(), y.tolist(), k.tolist()) for x, y, k in loader])
    assert views[0] == views[1] and len(views[0]) == 3
    plain = FaceSamples(faces, Variation(False), size=8)[0, 4][0]
    assert np.array_equal(plain, cv2.imread(faces.name(4))[..., ::-1].transpose(2, 0, 1))


def test_a_label_that_is_none_stops_before_the_first_step(tmp_path):
    for label in (0.5, -1.0, float("nan"), float("inf"), 3e9):
        (tmp_path / "x.rec").write_bytes(
            b"".join(pack_record(pack_image(v, k, b"")) for k, v in enumerate([0, label, 1]))
        )
        with pytest.raises(InputError, match="has the label"):
            load_faces(tmp_path / "x.rec")
    with pytest.raises(InputError, match="at least two people"):
        FaceSet(RecordFile(write_records(tmp_path / "y.rec", [(3, b""), (3, b"")])))
