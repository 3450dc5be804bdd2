"""Finding, probing and decoding images: equal to OpenCV on what is whole, a named reason for what is not."""

import contextlib
import io
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from calib_nb.core.errors import ImageError, InputError
from calib_nb.data.images import EXTENSIONS, ImageInfo, contact_sheet, decode, encode_png, find_images, probe

rng = np.random.default_rng(0)


def picture(height=60, width=90):
    y, x = np.mgrid[:height, :width]
    image = np.stack([x * 2, y * 3, 255 - x - y], axis=2).clip(0, 255).astype(np.uint8)
    image[10:25, 20:50] = (30, 200, 90)
    return image


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def pillow_bytes(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def rgb():
    return Image.fromarray(picture()[..., ::-1].copy())


def reason(function, *args, **options) -> str:
    with pytest.raises(ImageError) as caught:
        function(*args, **options)
    text = str(caught.value)
    assert "\n" not in text and ";" in text, text  # one line, with what to do
    return caught.value.reason


# --- equal to OpenCV


def test_real_photos_are_pixel_equal_to_opencv(real_data):
    paths = [
        *sorted((real_data / "lfw/images").glob("*/*.jpg"))[::4],
        *sorted((real_data / "coco").glob("*/*.jpg"))[::3],
        *sorted((real_data / "faces_multi").glob("*/*.*")),
    ]
    paths = [p for p in paths if p.suffix.lower() in EXTENSIONS]
    assert len(paths) > 450
    for path in paths:
        assert np.array_equal(decode(path), cv2.imread(str(path), cv2.IMREAD_COLOR)), path


@settings(derandomize=True, max_examples=60, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from([".jpg", ".png", ".bmp", ".webp", ".tif"]),
    st.booleans(),
    st.integers(0, 10_000),
)
def test_any_size_and_format_is_equal_to_opencv(tmp_path_factory, height, width, ending, gray, seed):
    image = np.random.default_rng(seed).integers(
        0, 256, (height, width) if gray else (height, width, 3), dtype=np.uint8
    )
    path = write(tmp_path_factory.mktemp("i"), "x" + ending, cv2.imencode(ending, image)[1].tobytes())
    assert np.array_equal(decode(path), cv2.imread(str(path), cv2.IMREAD_COLOR))
    info = probe(path)
    assert (info.width, info.height, info.bit_depth) == (width, height, 8)


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"progressive": True},
        {"optimize": True},
        {"quality": 5},
        {"restart_marker_rows": 1},
    ],
    ids=str,
)
def test_kinds_of_jpeg(tmp_path, options):
    path = write(tmp_path, "a.jpg", pillow_bytes(rgb(), "JPEG", **options))
    assert np.array_equal(decode(path), cv2.imread(str(path)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation(tmp_path, format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write(
        tmp_path,
        "a." + format.lower(),
        pillow_bytes(rgb(), format, exif=exif, **({"lossless": True} if format == "WEBP" else {})),
    )
    image, upright = decode(path), np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))[..., ::-1]
    assert np.array_equal(
        image, cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    )  # imread refuses some rotated TIFF
    assert image.shape == upright.shape and np.abs(image.astype(int) - upright).mean() < 2
    info = probe(path)
    assert (info.orientation, info.height, info.width) == (orientation, *image.shape[:2])


@pytest.mark.parametrize("value", [0, 9, 77])
def test_an_orientation_that_does_not_exist_is_upright(tmp_path, value):
    exif = Image.Exif()
    exif[0x0112] = value
    path = write(tmp_path, "a.jpg", pillow_bytes(rgb(), "JPEG", exif=exif))
    assert decode(path).shape == (60, 90, 3) and probe(path).orientation == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_garbled_exif_does_not_stop_a_photo(tmp_path):
    whole = pillow_bytes(rgb(), "JPEG")
    for junk in (
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x03" * 9,
    ):
        path = write(tmp_path, "a.jpg", whole[:2] + b"\xff\xe1" + struct.pack(">H", len(junk) + 2) + junk + whole[2:])
        assert np.array_equal(decode(path), cv2.imread(str(path)))


def test_gray_16_bit_alpha_palette(tmp_path):
    image = picture()
    gray = write(tmp_path, "gray.png", cv2.imencode(".png", image[..., 0])[1].tobytes())
    assert (decode(gray) == image[..., :1]).all() and probe(gray).channels == 1
    deep = image.astype(np.uint16) * 257
    for name in ("deep.png", "deep.tif"):
        cv2.imwrite(str(tmp_path / name), deep)
        assert np.array_equal(decode(tmp_path / name), image) and probe(tmp_path / name).bit_depth == 16
    cv2.imwrite(str(tmp_path / "depth.png"), deep[..., 0])
    assert np.array_equal(decode(tmp_path / "depth.png")[..., 0], image[..., 0]) and probe(
        tmp_path / "depth.png"
    ) == ImageInfo(90, 60, 1, 16, "PNG", 1)
    alpha = np.dstack([image, rng.integers(0, 256, image.shape[:2], dtype=np.uint8)])
    path = write(tmp_path, "alpha.png", cv2.imencode(".png", alpha)[1].tobytes())
    assert np.array_equal(decode(path), image) and probe(path).channels == 4  # dropped, not blended
    for name, mode, options in (
        ("p.png", "P", {}),
        ("transparent.png", "P", {"transparency": 3}),
        ("bit.png", "1", {}),
        ("la.png", "LA", {}),
    ):
        path = write(tmp_path, name, pillow_bytes(rgb().convert(mode), "PNG", **options))
        assert np.array_equal(decode(path), cv2.imread(str(path))), name
        assert np.abs(decode(path).astype(int) - np.asarray(Image.open(path).convert("RGB"))[..., ::-1]).mean() < 1, (
            name
        )


def test_cmyk_has_its_colours(tmp_path):
    path = write(tmp_path, "cmyk.jpg", pillow_bytes(rgb().convert("CMYK"), "JPEG", quality=95))
    assert b"Adobe" in path.read_bytes()
    assert np.abs(decode(path).astype(int) - picture()).mean() < 3 and probe(path).channels == 4
    assert np.array_equal(decode(path), cv2.imread(str(path)))
    whole = path.read_bytes()
    assert reason(decode, write(tmp_path, "cut.jpg", whole[: len(whole) // 2])) == "truncated"


def test_content_counts_not_the_ending(tmp_path):
    assert np.array_equal(decode(write(tmp_path, "png.jpg", encode_png(picture()))), picture())
    assert decode(write(tmp_path, "jpg.png", pillow_bytes(rgb(), "JPEG"))).shape == (60, 90, 3)


# --- a reason for everything else


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP", "TIFF"])
def test_cut_short_anywhere(tmp_path, format):
    whole = pillow_bytes(rgb(), format)
    cuts = {*np.linspace(12, len(whole) - 1, 25).astype(int), len(whole) - 1, len(whole) - 2}
    for cut in cuts:
        path = write(tmp_path, "a.jpg", whole[:cut])
        try:
            image = decode(path)
        except ImageError as e:
            assert e.reason in ("truncated", "unreadable") if format == "TIFF" else e.reason == "truncated", (
                format,
                cut,
                str(e),
            )
        else:  # some pad their end: then nothing is missing
            assert format in ("TIFF", "WEBP", "BMP") and np.array_equal(
                image, decode(write(tmp_path, "whole.jpg", whole))
            ), (format, cut)


def test_real_photo_cut_short(real_data, tmp_path):
    for source in sorted((real_data / "lfw/images").glob("*/*.jpg"))[::150]:
        whole = source.read_bytes()
        for share in (0.1, 0.5, 0.9, 0.999):
            assert reason(decode, write(tmp_path, "cut.jpg", whole[: int(len(whole) * share)])) == "truncated"
        assert cv2.imread(str(tmp_path / "cut.jpg")) is not None  # what OpenCV alone would have let through


def test_progressive_cut_short(tmp_path):
    whole = pillow_bytes(rgb(), "JPEG", progressive=True, quality=95)
    assert reason(decode, write(tmp_path, "a.jpg", whole[: len(whole) * 2 // 3])) == "truncated"


def test_padding_before_the_end_is_not_damage(tmp_path, caplog):
    whole = pillow_bytes(rgb(), "JPEG")
    path = write(tmp_path, "a.jpg", whole[:-2] + b"x" * 40 + whole[-2:])
    assert np.array_equal(decode(path), cv2.imread(str(path))) and "extraneous" in caplog.text
    assert decode(write(tmp_path, "b.jpg", whole + b"more" * 100)).shape == (60, 90, 3)


def forged_png(width, height):
    whole = bytearray(encode_png(picture()))
    whole[16:24] = struct.pack(">II", width, height)
    whole[29:33] = struct.pack(">I", zlib.crc32(whole[12:29]))
    return bytes(whole)


def test_bombs_are_refused_from_the_header(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, "imdecode", lambda *a: pytest.fail("decoded"))
    flat = Image.new("L", (10_100, 10_000))  # 101 megapixels, a real file of 100 KB
    assert reason(decode, write(tmp_path, "bomb.png", pillow_bytes(flat, "PNG"))) == "too_large"
    assert reason(decode, write(tmp_path, "bomb.jpg", pillow_bytes(flat, "JPEG"))) == "too_large"
    for side in (10_000, 60_000, 2_000_000_000):
        assert reason(decode, write(tmp_path, "forged.png", forged_png(side, side))) == "too_large"
    assert (
        reason(decode, write(tmp_path, "small.jpg", pillow_bytes(rgb(), "JPEG")), max_megapixels=0.005) == "too_large"
    )


def test_bombs_in_other_formats(tmp_path):
    header = struct.pack("<2sIHHI", b"BM", 1000, 0, 0, 54) + struct.pack(
        "<IiiHHIIiiII", 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0
    )
    assert reason(decode, write(tmp_path, "a.bmp", header + bytes(900))) == "too_large"
    webp = write(tmp_path, "b.webp", pillow_bytes(Image.new("L", (1_100, 1_000)).convert("RGB"), "WEBP"))
    assert reason(decode, webp, max_megapixels=1) == "too_large"


def test_a_png_that_claims_more_than_it_holds(tmp_path):
    assert reason(decode, write(tmp_path, "a.png", forged_png(90, 600))) in ("truncated", "unreadable")


def test_sparse_giant_is_not_read(tmp_path):
    path = tmp_path / "giant.jpg"
    with open(path, "wb") as f:
        f.truncate(20_000_000_000)
    assert reason(decode, path) == "too_large"


def test_named_reasons(tmp_path):
    assert reason(decode, write(tmp_path, "empty.jpg", b"")) == "empty"
    assert reason(decode, write(tmp_path, "text.jpg", b"hello")) == "unsupported"
    assert reason(decode, write(tmp_path, "zeros.jpg", bytes(5000))) == "unsupported"
    assert reason(decode, write(tmp_path, "page.jpg", b"<!DOCTYPE html><html>" * 50)) == "unsupported"
    assert reason(decode, tmp_path / "nowhere.jpg") == "missing"
    assert reason(decode, tmp_path / "text.jpg" / "below.jpg") == "missing"
    (tmp_path / "folder.jpg").mkdir()
    assert reason(decode, tmp_path / "folder.jpg") == "unsupported"
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone")
    assert reason(decode, tmp_path / "dangling.jpg") == "missing"
    os.mkfifo(tmp_path / "pipe.jpg")
    assert (
        reason(decode, tmp_path / "pipe.jpg") == "unsupported" and reason(probe, tmp_path / "pipe.jpg") == "unsupported"
    )
    assert reason(decode, "/dev/zero") == "unsupported"
    assert reason(decode, "nul\0byte.jpg") == "unreadable"
    assert reason(decode, "x" * 5000 + ".jpg") == "unreadable"
    assert reason(probe, write(tmp_path, "half.png", encode_png(picture())[:20])) == "truncated"


@settings(derandomize=True, max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF"]), st.data())
def test_damaged_bytes_never_crash(tmp_path_factory, format, data):
    content = bytearray(pillow_bytes(rgb(), format))
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=8)):
        content[at] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.mktemp("d"), "a.jpg", bytes(content))
    try:
        image = decode(path)
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    except ImageError as e:
        assert e.reason in ("truncated", "unreadable", "unsupported", "too_large")


@settings(derandomize=True, max_examples=100, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"RIFF\0\0\0\0WEBP"]),
)
def test_random_bytes_never_crash(tmp_path_factory, content, start):
    path = write(tmp_path_factory.mktemp("r"), "a.jpg", start + content)
    with contextlib.suppress(ImageError):
        decode(path)


# --- finding


def test_find(tmp_path, caplog):
    data = encode_png(picture())
    outside = tmp_path / "outside"
    root = tmp_path / "root"
    for folder in (outside, root / "b" / "deep", root / "A", root / ".git"):
        folder.mkdir(parents=True)
    for name in (
        "b/deep/10.PNG",
        "b/2.jpeg",
        "A/ü 雪.JPG",
        ".git/x.png",
        ".hidden.png",
        "z.txt",
        "b/no_ending",
        "webp.WebP",
    ):
        write(root, name, data)
    write(outside, "secret.png", data)
    (root / "link_out.png").symlink_to(outside / "secret.png")
    (root / "link_in.png").symlink_to(root / "b" / "2.jpeg")
    (root / "folder_out").symlink_to(outside)
    (root / "loop").symlink_to(root)
    expected = ["A/ü 雪.JPG", "b/2.jpeg", "b/deep/10.PNG", "link_in.png", "webp.WebP"]
    assert find_images(root) == find_images(str(root) + "/") == sorted(expected)
    assert "link_out.png" in caplog.text
    assert find_images(root, ["PNG"]) == ["b/deep/10.PNG", "link_in.png"] == find_images(root, ".png")
    assert decode(root / "A/ü 雪.JPG").shape == (60, 90, 3)
    (tmp_path / "alias").symlink_to(root)
    assert find_images(tmp_path / "alias") == sorted(expected)


def test_find_relative_to_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    write(tmp_path, "a/x.jpg", b"x")
    monkeypatch.chdir(tmp_path)
    assert find_images(".") == ["a/x.jpg"] and find_images("a") == ["x.jpg"] == find_images("a/../a")


def test_find_leaves_out_a_name_that_is_not_utf8(tmp_path, caplog):
    write(tmp_path, "a.jpg", b"x")
    with open(os.fsencode(tmp_path) + b"/\xff\xfe.jpg", "wb") as f:
        f.write(b"x")
    assert find_images(tmp_path) == ["a.jpg"] and "not UTF-8" in caplog.text


def test_find_says_what_is_there(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(InputError, match="holds no files"):
        find_images(tmp_path)
    write(tmp_path, "a.heic", b"x")
    with pytest.raises(InputError, match=r"no image under .*\.jpg.*it holds 1 \.heic"):
        find_images(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        find_images(tmp_path / "a.heic")


# --- sheets


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(8, 64),
)
def test_contact_sheet_letterboxes(sizes, columns, cell):
    images = [np.zeros((h, w, 3), np.uint8) for h, w in sizes]
    sheet = contact_sheet(images, columns=columns, cell=cell)
    across, down = min(columns, len(sizes)), -(-len(sizes) // min(columns, len(sizes)))
    assert sheet.shape == (down * (cell + 2) + 2, across * (cell + 2) + 2, 3) and sheet.dtype == np.uint8
    expected = sum(max(1, round(w * cell / max(h, w))) * max(1, round(h * cell / max(h, w))) for h, w in sizes)
    assert (sheet == 0).all(axis=2).sum() == expected  # each in full, none over another
    assert all((image == 0).all() for image in images)


def test_contact_sheet_captions_and_gray():
    sheet = contact_sheet(
        [picture(), picture()[..., 0]], columns=2, cell=50, captions=["a very long name of a file.jpg", "ok"]
    )
    assert sheet.shape == (2 + 50 + 14 + 2, 2 + 2 * 52, 3)
    assert (sheet[52:66, :52] < 200).any() and (sheet[:, 52:54] == 255).all()  # the long caption stays in its own cell
    assert np.array_equal(cv2.imdecode(np.frombuffer(encode_png(sheet), np.uint8), cv2.IMREAD_COLOR), sheet)
