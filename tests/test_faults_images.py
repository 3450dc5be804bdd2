"""Images from anywhere: passed over, linked, too long, of many scans or odd values; configs that ask for too much."""

import io
import json
import os
import resource
import struct
import time
import zlib
from collections import Counter

import cv2
import numpy as np
import pytest
from PIL import Image

from calib_nb.cli import main
from calib_nb.core.errors import ConfigError, ImageError, InputError
from calib_nb.data.dataset import prepare
from calib_nb.data.demo_images import graded_images
from calib_nb.data.images import EXTENSIONS, decode, find_images, passed_over
from calib_nb.data.preprocess import Preprocess
from calib_nb.npu.config import COMPILER_EXTENSIONS, CompilerConfig, config_images, generate_config, load_config
from calib_nb.npu.validate import validate
from calib_nb.npu.verify import verify


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "photos"
    graded_images(folder, 6)
    return folder


def config_of(folder, count=1, **loader):
    raw = generate_config("yunet", folder, input_name="x", input_size=(32, 32), calibration_num=count).to_dict()
    return CompilerConfig.model_validate(raw | {"default_loader": raw["default_loader"] | loader})


def test_what_is_passed_over_is_counted_and_named(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.symlink(source, "photos")
    for name in ("IMG_1.HEIC", "IMG_2.heic", "a.GIF", "raw.DNG", "film.mp4", "notes.txt"):
        (source / name).write_bytes(b"x")
    try:
        assert main(["prepare", "--source-dir", "photos", "--output-dir", "set", "--num-samples", "3", "--quiet"]) == 0
    finally:
        for path in source.iterdir():
            if path.suffix.lower() in (".heic", ".gif", ".dng", ".mp4", ".txt"):
                path.unlink()
    counts = {".heic": 2, ".dng": 1, ".gif": 1, ".mp4": 1}
    text = "2 .heic, 1 .dng, 1 .gif, 1 .mp4"
    captured = capsys.readouterr()
    assert f"0 cannot be used; passed over, convert them first: {text}" in captured.out
    assert json.loads((tmp_path / "set/calibration_analysis.json").read_text())["passed_over"] == counts
    assert "- 2 x .heic, to be converted first" in (tmp_path / "set/README.md").read_text()


def test_every_listing_warns_once_of_what_it_passes_over(tmp_path, caplog):
    for name in ("a.jpg", "b.heic", "c.png"):
        (tmp_path / name).write_bytes(b"x")
    for _ in range(2):
        assert find_images(tmp_path, ["jpg"]) == ["a.jpg"]
    (record,) = caplog.records
    assert "passed over 1 .heic, 1 .png" in record.message and passed_over(tmp_path) == {".heic": 1}


def test_all_that_a_set_can_hold_is_in_the_compilers_extensions(tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    for k, ending in enumerate(EXTENSIONS):
        cv2.imwrite(str(tmp_path / f"{k}{ending}"), image)
    assert len(config_images(config_of(tmp_path))) == len(EXTENSIONS)
    assert {"webp", "WEBP", "tif"} < set(COMPILER_EXTENSIONS)
    (warning,) = validate(config_of(tmp_path, file_extensions=["jpg", "jpeg", "png", "bmp"]))
    assert warning.level == "warning" and "passes over 1 tif, 1 tiff, 1 webp" in warning.what


def test_a_set_of_links_is_read_by_the_next_command_and_nothing_else_is(source, tmp_path):
    made = prepare(source, tmp_path / "set", num_samples=4, link="symlink", progress=False)
    names = sorted(made.images["name"])
    assert find_images(made.path) == names and len(config_of(made.path, 4).images) == 4
    assert verify(config_of(made.path, 4), num_samples=2, progress=False).passed
    outside = tmp_path / "secret.png"
    cv2.imwrite(str(outside), np.zeros((8, 8, 3), np.uint8))
    (made.path / "x.png").symlink_to(outside)  # not in the set's own list
    (made.path / names[0]).unlink()
    (made.path / names[0]).symlink_to(outside)  # in the list, and leads elsewhere
    assert find_images(made.path) == names[1:]
    with pytest.raises(ConfigError):  # the links may not lead out of a root that was named
        config_images(config_of(made.path), data_root=tmp_path)
    analysis = json.loads((made.path / "calibration_analysis.json").read_text())
    analysis["images"].append({"name": "x.png", "path": "../../secret.png"})
    (made.path / "calibration_analysis.json").write_text(json.dumps(analysis))
    assert find_images(made.path) == names[1:]  # nor out of the folder that the set was made from


def test_many_links_out_are_one_warning(tmp_path, caplog):
    (tmp_path / "set").mkdir()
    cv2.imwrite(str(tmp_path / "set/a.png"), np.zeros((8, 8, 3), np.uint8))
    for k in range(50):
        (tmp_path / "set" / f"{k}.png").symlink_to("/etc/hostname")
    assert find_images(tmp_path / "set") == ["a.png"]
    assert len(caplog.records) == 1 and "(50): a link out of the folder" in caplog.text


def test_a_link_in_a_circle_is_counted_and_the_run_goes_on(source, tmp_path):
    (source / "circle.jpg").symlink_to("circle.jpg")
    try:
        made = prepare(source, tmp_path / "set", num_samples=3, progress=False)
    finally:
        (source / "circle.jpg").unlink()
    assert len(made.images) == 3
    assert made.pool.set_index("path").error["circle.jpg"] == "unreadable"


def reason(path):
    with pytest.raises(ImageError) as caught:
        decode(path)
    return caught.value.reason


def png(width, height):
    """A gray PNG of any size, without the memory for its pixels."""
    packed = zlib.compressobj()
    row = b"\0" + b"\x80" * width
    data = b"".join(packed.compress(row) for _ in range(height)) + packed.flush()
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", data), (b"IEND", b""))
    body = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_long_and_thin_images_are_bounded_by_their_side(tmp_path):
    (tmp_path / "long.png").write_bytes(png(1, 70_000))
    (tmp_path / "wide.png").write_bytes(png(65_535, 1))
    assert reason(tmp_path / "long.png") == "too_large" and decode(tmp_path / "wide.png").shape == (1, 65_535, 3)
    for chain in (Preprocess().resize(mode="torchvision", size=224), Preprocess().resize(mode="pad", size=64)):
        if chain.steps[0].mode == "torchvision":
            with pytest.raises(ConfigError, match="at most 64 megapixels"):
                chain(decode(tmp_path / "wide.png"))
        else:
            assert chain(decode(tmp_path / "wide.png")).shape == (64, 64, 3)


def jpeg(progressive):
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG", progressive=progressive)
    return file.getvalue()


def test_scans_are_counted_before_decoding(tmp_path):
    whole = jpeg(progressive=True)
    (tmp_path / "few.jpg").write_bytes(whole)
    assert np.array_equal(decode(tmp_path / "few.jpg"), cv2.imread(str(tmp_path / "few.jpg")))
    last = whole[whole.rindex(b"\xff\xda") : -2]
    (tmp_path / "many.jpg").write_bytes(whole[:-2] + 2000 * last + b"\xff\xd9")
    start = time.process_time()
    assert reason(tmp_path / "many.jpg") == "unsupported" and time.process_time() - start < 1
    # a phone's film behind the picture holds the bytes of a marker by chance, and is no scan
    (tmp_path / "live.jpg").write_bytes(jpeg(progressive=False) + 500 * b"\xff\xda\0\x08")
    assert decode(tmp_path / "live.jpg").shape == (240, 320, 3)


def test_tiffs_of_other_numbers_are_named_as_such_and_not_as_cut_short(tmp_path):
    for name, values in {
        "float3": np.random.default_rng(0).random((32, 32, 3)).astype(np.float32),
        "double": np.random.default_rng(0).random((32, 32)),
        "float0to1": np.random.default_rng(0).random((32, 32)).astype(np.float32),
    }.items():
        cv2.imwrite(str(tmp_path / f"{name}.tif"), values)
        assert reason(tmp_path / f"{name}.tif") == "unsupported", name
    data = (tmp_path / "float3.tif").read_bytes()
    (tmp_path / "cut.tif").write_bytes(data[: len(data) // 2])
    assert reason(tmp_path / "cut.tif") == "truncated"
    gray = np.arange(256, dtype=np.float32).reshape(16, 16)
    cv2.imwrite(str(tmp_path / "gray.tif"), gray)
    assert np.array_equal(decode(tmp_path / "gray.tif")[..., 0], gray.astype(np.uint8))


def test_a_sparse_file_of_20_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / "huge.jpg", "wb") as f:
        f.truncate(20 * 10**9)
    assert reason(tmp_path / "huge.jpg") == "too_large"
    with pytest.raises(InputError, match="20,000 MB"):
        load_config(tmp_path / "huge.jpg")


def resize(width, height=None):
    return {"resize": {"width": width, "height": height or width}}


HOSTILE_CONFIGS = {  # what is changed in a good config, and what the answer says
    "20,000 unknown keys": (lambda c: c.update({f"key{k}": k for k in range(20_000)}), "more faults of this kind"),
    "20,000 inputs": (lambda c: c.update(inputs={f"x{k}": [1, 3, 8, 8] for k in range(20_000)}), "at most 64 items"),
    "a long key": (lambda c: c.update({"k" * 1_000_000: 1}), "characters)"),
    "a deep qmaster": (lambda c: c.update(qmaster=json.loads('{"a":' * 500 + "1" + "}" * 500)), "too deep"),
    "62 expandDim": (
        lambda c: c["default_loader"]["preprocessings"].extend([{"expandDim": {"axis": 0}}] * 58),
        "fewer than 8",
    ),
    "60 resizes": (lambda c: c["default_loader"].update(preprocessings=[resize(4000)] * 60), "960 megapixels"),
    "a large resize": (lambda c: c["default_loader"].update(preprocessings=[resize(16384)]), "268 megapixels"),
    "a long axis": (
        lambda c: c["default_loader"].update(preprocessings=[{"transpose": {"axis": list(range(1, 10_000))}}]),
        "not an order of axes",
    ),
    "a long number": (lambda c: c.update(calibration_num="N"), "not valid JSON"),
}


@pytest.mark.parametrize("case", HOSTILE_CONFIGS)
def test_a_hostile_config_is_a_short_answer_in_little_time(case, source, tmp_path, capsys):
    change, text = HOSTILE_CONFIGS[case]
    raw = config_of(source).to_dict()
    change(raw)
    (tmp_path / "c.json").write_text(json.dumps(raw).replace('"N"', "9" * 5000))
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
    findings = validate(tmp_path / "c.json")
    assert main(["verify", "--config", str(tmp_path / "c.json"), "--num-samples", "1", "--quiet"]) in (1, 2)
    output = "".join(capsys.readouterr())
    assert text in " ".join(finding.what for finding in findings) + output
    assert len(str(findings)) < 20_000 and len(output) < 20_000
    assert time.process_time() - start < 5 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6


def test_unknown_keys_of_qmaster_are_counted(source):
    raw = config_of(source).to_dict() | {"qmaster": {f"key{k}": k for k in range(100_000)}}
    levels = Counter(finding.where.partition(".")[0] for finding in validate(raw))
    assert levels == {"qmaster": 6}
