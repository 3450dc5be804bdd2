"""Readers of files from elsewhere on damaged and hostile bytes: a value or one line, quickly, and never a traceback."""

import io
import json
import time
from dataclasses import dataclass

import cv2
import nbformat
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from calib_nb.core.errors import CalibError
from calib_nb.core.run import read_json
from calib_nb.core.settings import parse_yaml
from calib_nb.data.images import decode, find_images, probe
from calib_nb.data.set_files import is_calibration_set
from calib_nb.npu.compile import TOOLCHAINS, read_toolchain
from calib_nb.npu.config import generate_config, load_config
from calib_nb.npu.validate import validate
from calib_nb.report import report_parameters

SECONDS = 5  # of one case; a case that takes so long on any machine has no limit
NOISE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def encoded(kind: str, image=None, **options) -> bytes:
    """An image as the bytes of a file."""
    file = io.BytesIO()
    (Image.fromarray(NOISE) if image is None else image).save(file, kind, **options)
    return file.getvalue()


def images() -> list[bytes]:
    """One small image in every form that a reader meets."""
    gray = Image.fromarray(np.arange(768, dtype=np.uint16).reshape(24, 32))
    real = Image.fromarray(NOISE[..., 0].astype(np.float32))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded("JPEG", progressive=True), encoded("JPEG", exif=exif), encoded("PNG"), encoded("PNG", gray)]
    files += [encoded("BMP"), encoded("WEBP"), encoded("WEBP", lossless=True), encoded("GIF"), encoded("PPM")]
    files += [encoded("TIFF"), encoded("TIFF", gray), encoded("TIFF", real), encoded("TIFF", compression="tiff_lzw")]
    return files + [cv2.imencode(".tiff", NOISE.astype(np.float32))[1].tobytes()]


def configs() -> list[bytes]:
    """A compiler's config as it is written."""
    config = generate_config("edgeface", "images", input_name="x", input_size=(112, 112))
    return [json.dumps(config.to_dict()).encode()]


def notebooks() -> list[bytes]:
    """A report with two parameters."""
    cell = nbformat.v4.new_code_cell("count = 3  # how many\nname = 'demo'", metadata={"tags": ["parameters"]})
    return [nbformat.writes(nbformat.v4.new_notebook(cells=[cell])).encode()]


def sets() -> list[bytes]:
    """The part of a set's analysis that later commands read."""
    analysis = {"format": "calib_nb calibration set, version 1", "parameters": {"source_dir": "/source"}}
    return [json.dumps(analysis | {"images": [{"name": "a.jpg", "path": "b/a.jpg"}]}).encode()]


@dataclass
class Reader:
    """A reader, the name of the file that it is given, whole files, and what its readers trip over."""

    name: str
    whole: list[bytes]
    read: tuple
    tokens: tuple[bytes, ...]


TEXT = (b"[", b"{", b'{"a":', b"9" * 5000, b"1e999", b"NaN", b"null", b"-1", b'""', b"\xff", b"\0", b"\n", b'"\\ud800"')
BINARY = (
    b"\xff\xda",
    b"\xff\xd9",
    b"\xff\xff\xff\xff",
    b"\0\0\0\0",
    b"\x7f\xff\xff\xff",
    b"\0\1",
    b"IDAT",
    b"\xff\xc2",
)
YAML = (
    *TEXT,
    b"&a ",
    b"*a",
    b"<<: ",
    b"- ",
    b": ",
    b"!!set ",
    b"!!python/name:os.system ",
    b"2026-01-31",
    b"  ",
    b"|\n",
)


def listed(path):
    """What a folder with a set's analysis in it holds."""
    (path.parent / "a.jpg").unlink(missing_ok=True)
    (path.parent / "a.jpg").symlink_to("/etc/hostname")
    (path.parent / "b.jpg").touch()
    assert find_images(path.parent) == ["b.jpg"]


READERS = {
    "image": Reader("x.jpg", images(), (decode, probe), BINARY),
    "config": Reader("x.json", configs(), (load_config, validate, read_json), TEXT),
    "toolchain": Reader("x.yaml", [text.encode() for text in TOOLCHAINS.values()], (read_toolchain,), YAML),
    "notebook": Reader("x.ipynb", notebooks(), (lambda path: report_parameters(str(path)),), TEXT),
    "set": Reader("calibration_analysis.json", sets(), (lambda p: is_calibration_set(p.parent), listed), TEXT),
}


@st.composite
def damaged(draw, reader: Reader) -> bytes:
    """A whole file, cut, with bytes changed, doubled or left out, and with tokens put in."""
    data = draw(st.sampled_from(reader.whole))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        end = at + draw(st.sampled_from((0, 1, 2, 4, 16, 200)))
        kind = draw(st.sampled_from(("put", "replace", "drop", "double", "cut", "byte")))
        token = draw(st.sampled_from(reader.tokens) | st.binary(min_size=1, max_size=4))
        middle = {"put": token + data[at:end], "replace": token, "drop": b"", "double": 2 * data[at:end]}
        middle |= {"cut": b"", "byte": bytes([draw(st.integers(0, 255))]) + data[at + 1 : end]}
        data = data[:at] + middle[kind] + (b"" if kind == "cut" else data[end:])
    return data


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cases", [50, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_a_reader_gives_a_value_or_one_line(name, cases, tmp_path):
    reader = READERS[name]

    @settings(max_examples=cases, suppress_health_check=list(HealthCheck))
    @given(damaged(reader))
    def check(data):
        path = tmp_path / reader.name
        path.write_bytes(data)
        for read in reader.read:
            start = time.process_time()
            try:
                read(path)
            except CalibError as e:
                assert len(str(e)) < 10_000
            assert time.process_time() - start < SECONDS

    check()


@pytest.mark.parametrize("cases", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_yaml_made_of_its_own_signs_gives_a_value_or_one_line(cases):
    signs = st.sampled_from(
        [token.decode(errors="replace") for token in YAML] + ["a", "b: 1\n", "x", "]", "}", "'", "#"]
    )

    @settings(max_examples=cases, suppress_health_check=list(HealthCheck))
    @given(st.lists(signs, max_size=30).map("".join) | st.text(max_size=60))
    def check(text):
        try:
            json.dumps(parse_yaml(text))  # plain data, and nothing in a circle
        except CalibError as e:
            assert len(str(e)) < 1000

    check()
