"""Pairs files, face trees, boxes and depth maps of other people: read as they are meant, or refused in one line."""

import json
import shutil

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib_nb.core.errors import CalibError, InputError
from calib_nb.depth.ncdb import read_depth, read_split
from calib_nb.depth.predict import read_map
from calib_nb.faces.bench import bench
from calib_nb.faces.boxes import DetectionTask, read_boxes
from calib_nb.faces.verification import read_pairs

FEW, MANY = 50, 1000
LFW = "2\nAnn 1 2\nBob 1 2\nAnn 1 Bob 1\nAnn 2 Bob 2\n"


def one_line(error: CalibError) -> None:
    assert str(error) and "\n" not in str(error) and len(str(error)) < 3000


def tree(folder, form="{name}/{name}_{number:04d}.jpg"):
    for name in ("Ann", "Bob"):
        for number in (1, 2):
            path = folder / form.format(name=name, number=number)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x")
    return folder


def pairs_file(folder, text, name="pairs.txt"):
    (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    return folder / name


@pytest.mark.parametrize(
    "form",
    [
        "{name}/{name}_{number:04d}.jpg",
        "{name}/{name}_{number:04d}.png",
        "{name}/{name}_{number:04d}.JPG",
        "{name}/{name}_{number:04d}.JPEG",
        "{name}/{name}_{number}.webp",
        "{name}/{name}_{number:02d}.bmp",
    ],
)
def test_a_face_tree_may_have_other_endings(tmp_path, form):
    images = tree(tmp_path / "images", form)
    pairs = read_pairs(pairs_file(tmp_path, LFW), images)
    assert len(pairs) == 4 and not pairs.missing and pairs.table.same.tolist() == [True, True, False, False]
    assert pairs.photos == sorted(form.format(name=n, number=k) for n in ("Ann", "Bob") for k in (1, 2))
    table = "first,second,same\n" + "".join(f"{a},{b},{int(s)}\n" for a, b, s in pairs.table.iloc[:, :3].to_numpy())
    again = read_pairs(pairs_file(tmp_path, table.replace("/", "\\"), "pairs.csv"), images)
    assert again.table.equals(pairs.table.assign(fold=again.table.fold))


def test_the_named_file_comes_first(tmp_path):
    images = tree(tree(tmp_path / "images"), "{name}/{name}_{number:04d}.png")
    assert all(p.endswith(".jpg") for p in read_pairs(pairs_file(tmp_path, LFW), images).photos)


def test_what_is_missing_is_still_missing(tmp_path):
    images = tree(tmp_path / "images", "{name}/{name}_{number:04d}.png")
    (images / "Ann/Ann_0002.png").rename(images / "Ann/Ann_0012.png")
    pairs = read_pairs(pairs_file(tmp_path, LFW), images)
    assert pairs.missing == ("Ann/Ann_0002.jpg",) and len(pairs) == 2
    shutil.rmtree(images / "Bob")
    with pytest.raises(InputError, match="no pair has both images below .*, Ann/Ann_0002.jpg is missing"):
        read_pairs(pairs_file(tmp_path, LFW), images)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pairs.txt", "2\nAnn one two\nBob\n"),
        ("pairs.txt", f"2\n{'x' * 200_000}\n"),
        ("pairs.csv", f"first,second,same\n{'x' * 131_073},b,1\n"),
        ("pairs.csv", "first,second,same\na,a,1\n"),
        ("pairs.csv", f"first,second,same,fold\na,b,1,{'9' * 5000}\n"),
        ("pairs.csv", "name,imagenum1,imagenum2,\nAnn,1\n"),
        ("pairs.txt", f"2\nAnn {'1' * 5000} 2\n"),
        ("pairs.txt", "2\nAnn \u00b2 1\n"),
    ],
)
def test_a_file_without_a_readable_line_names_the_first(tmp_path, name, text):
    with pytest.raises(InputError, match="no line can be read as a pair; line 2: ") as refused:
        read_pairs(pairs_file(tmp_path, text, name), tree(tmp_path / "images"))
    one_line(refused.value)


def test_one_line_that_is_too_long_costs_one_line(tmp_path):
    images = tree(tmp_path / "images")
    rows = ["first,second,same", "Ann/Ann_0001.jpg,Ann/Ann_0002.jpg,1", f"{'x' * 131_073},b,1", "\x00,b,1"]
    pairs = read_pairs(pairs_file(tmp_path, "\n".join(rows), "pairs.csv"), images)
    assert len(pairs) == 1 and len(pairs.malformed) + len(pairs.missing) >= 2 and max(map(len, pairs.malformed)) < 200


@pytest.mark.parametrize("header", ["\u00b2", "9" * 5000, "10 300 2", "", "-1", "x"])
def test_a_header_that_is_none_is_one_line(tmp_path, header):
    with pytest.raises(InputError) as refused:
        read_pairs(pairs_file(tmp_path, f"{header}\nAnn 1 2\n"), tree(tmp_path / "images"))
    one_line(refused.value)


WORD = st.sampled_from(["Ann", "Bob", "1", "2", "Ann/Ann_0001.jpg", "\\", "..", "", "\x00", "\ud800", "9" * 30, '"'])
LINE = st.lists(WORD | st.text(max_size=4), max_size=5)
HEAD = st.sampled_from(["2", "10 300", "first,second,same", "first,second,same,fold", "name,imagenum1,imagenum2", "0"])


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_any_pairs_file_is_read_or_refused(tmp_path, examples):
    images = tree(tmp_path / "images")

    @settings(max_examples=examples)
    @given(HEAD | st.text(max_size=8), st.lists(LINE, max_size=6), st.sampled_from([" ", "\t", ","]), st.booleans())
    def check(head, lines, between, comma):
        text = "\n".join([head, *(between.join(line) for line in lines)])
        try:
            pairs = read_pairs(pairs_file(tmp_path, text, "any.csv" if comma else "any.txt"), images)
        except CalibError as e:
            one_line(e)
        else:
            assert len(pairs) and all((images / path).is_file() for path in pairs.photos)

    check()


def boxes(folder, entries):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / "images/a.png"), np.zeros((8, 8, 3), np.uint8))
    (folder / "ground-truth.json").write_text(json.dumps(entries))
    return folder


def test_boxes_with_windows_paths(tmp_path):
    (tmp_path / "images/sub").mkdir(parents=True)
    cv2.imwrite(str(tmp_path / "images/sub/a.png"), np.zeros((8, 8, 3), np.uint8))
    found = read_boxes(boxes(tmp_path, [{"iname": "sub\\a.png", "bbox": [1, 2, 3, 4]}]))
    assert found.values.tolist() == [["images/sub/a.png", 1, 2, 4, 6]]
    (tmp_path / "ground-truth.json").unlink()
    xml = "<dataset><image file='images\\sub\\a.png'><box left='1' top='2' width='3' height='4'/></image></dataset>"
    (tmp_path / "labels.xml").write_text(xml)
    assert read_boxes(tmp_path).equals(found)
    (tmp_path / "labels.xml").write_text(xml.replace("images\\sub", "..\\..\\sub"))
    with pytest.raises(InputError, match="outside"):
        read_boxes(tmp_path)


NUMBER = (
    st.integers(-3, 9) | st.sampled_from([1e400, 10**400, "1", None, True, [1], "x" * 99]) | st.floats(allow_nan=False)
)
NAME = st.sampled_from(["a.png", "b.png", "..", "\x00", "a" * 300, "\ud800", "", "\\", 3, None, ["a.png"], {"a": 1}])


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_any_boxes_are_read_or_refused(tmp_path, examples):
    @settings(max_examples=examples)
    @given(
        st.lists(st.fixed_dictionaries({"iname": NAME, "bbox": st.lists(NUMBER, max_size=5) | NUMBER}), max_size=3)
        | st.lists(NUMBER, max_size=2)
        | NUMBER
    )
    def check(entries):
        try:
            found = read_boxes(boxes(tmp_path, entries))
        except CalibError as e:
            one_line(e)
        else:
            assert np.isfinite(found[["x1", "y1", "x2", "y2"]].to_numpy()).all()

    check()


XML = b"<?xml version='1.0'?><dataset><image file='images/a.png'>"
XML += b"<box left='1' top='2' width='3' height='4'/></image></dataset>"


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_any_xml_boxes_are_read_or_refused(tmp_path, examples):
    boxes(tmp_path, [])
    (tmp_path / "ground-truth.json").unlink()

    @settings(max_examples=examples)
    @given(
        st.lists(st.tuples(st.integers(0, len(XML) - 1), st.binary(max_size=6)), max_size=3), st.integers(0, len(XML))
    )
    def check(edits, length):
        text = XML
        for at, new in edits:
            text = text[:at] + new + text[at + len(new) :]
        (tmp_path / "labels.xml").write_bytes(text[:length] if length > 40 else text)
        try:
            read_boxes(tmp_path)
        except CalibError as e:
            one_line(e)

    check()


@pytest.mark.parametrize("encoding", ["utf-7", "foo", "utf-32", "cp037", "big5"])
def test_an_encoding_nobody_knows_is_one_line(tmp_path, encoding):
    boxes(tmp_path, [])
    (tmp_path / "ground-truth.json").unlink()
    (tmp_path / "labels.xml").write_bytes(XML.replace(b"'1.0'", f"'1.0' encoding='{encoding}'".encode()))
    with pytest.raises(InputError) as refused:
        read_boxes(tmp_path)
    one_line(refused.value)


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["png", "npy"])
def test_any_depth_map_is_read_or_refused(tmp_path, examples, kind):
    path = tmp_path / f"map.{kind}"
    array = np.arange(64, dtype=np.uint16).reshape(8, 8)
    np.save(path, array.astype(np.float32)) if kind == "npy" else cv2.imwrite(str(path), array)
    whole = path.read_bytes()

    @settings(max_examples=examples)
    @given(
        st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4), st.integers(0, len(whole))
    )
    def check(edits, length):
        data = bytearray(whole)
        for at, byte in edits:
            data[at] = byte
        path.write_bytes(data[:length] if length % 3 == 0 else data)
        for read in (lambda: read_map(path, 256), *([lambda: read_depth(path)] if kind == "png" else [])):
            try:
                assert np.isfinite(read()).all()
            except CalibError as e:
                one_line(e)

    check()


def test_an_npy_header_cannot_ask_for_memory(tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (200000, 200000), }"
    header += b" " * (117 - len(header)) + b"\n"
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + b"1234")
    with pytest.raises(CalibError, match="cannot be read as .npy"):
        read_map(tmp_path / "x.npy", 1)
    np.savez(tmp_path / "z.npz", a=np.zeros(3))
    (tmp_path / "z.npz").rename(tmp_path / "z.npy")
    with pytest.raises(CalibError, match="cannot be read as .npy"):
        read_map(tmp_path / "z.npy", 1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
PART = st.sampled_from(["synced_data/s", "a", "..", "/x", "\x00", "\ud800", "a/b", "C:\\x", "a" * 300]) | JSON


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_any_split_file_is_read_or_refused(tmp_path, examples):
    @settings(max_examples=examples)
    @given(st.lists(st.fixed_dictionaries({}, optional={"dataset_root": PART, "new_filename": PART}) | JSON) | JSON)
    def check(entries):
        (tmp_path / "split.json").write_text(json.dumps(entries))
        try:
            read_split(tmp_path / "split.json")
        except CalibError as e:
            one_line(e)

    check()


def test_images_whose_faces_have_one_size_are_one_slice(tmp_path):
    folder = boxes(tmp_path, [{"iname": "a.png", "bbox": [0, 0, 4, 4]}])
    task = DetectionTask(folder, read_boxes(folder), input_size=(32, 32))
    assert task.slices().face_size.tolist() == ["4 px"]


def test_a_benchmark_without_two_kinds_of_pairs_is_one_line(tmp_path):
    pairs = pairs_file(tmp_path, "first,second,same\nAnn/Ann_0001.jpg,Ann/Ann_0002.jpg,1\n", "pairs.csv")
    with pytest.raises(InputError, match="1 pairs of 1 kinds in 1 folds; expected pairs of one person and of two"):
        bench(tree(tmp_path / "images"), pairs, ["yunet"], None, tmp_path / "out")
