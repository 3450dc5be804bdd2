"""Files of photos for face training: whole, in parts, torn and fuzzed; order and augmentation by their seeds alone."""

import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.core.errors import CalibError, InputError
from calib_nb.training.recordio import RecordFile, pack_photo, pack_record, read_record, write_records

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
    rows = [pack_photo([3, 0.25, 9], 0, b"a"), pack_photo(1, 1, b"b"), pack_photo([2, 5], 2, MAGIC * 3)]
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
