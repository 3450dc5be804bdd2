"""A set of links, as `prepare --link symlink` writes it, is read by every command as a copied one is."""

import json
import os
import stat
import sys

import cv2
import numpy as np
import pytest

from calib_nb.core.errors import ConfigError, InputError
from calib_nb.core.links import linked_folders
from calib_nb.data.dataset import prepare
from calib_nb.data.demo_images import graded_images
from calib_nb.data.images import find_images
from calib_nb.graph.build import conv, linear, sequential
from calib_nb.npu.config import config_images, generate_config


def config_of(at, preset, side):
    return generate_config(preset, at / "sets" / "linked", input_name="x", input_size=(side, side))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images, a set of links to eight of them in another folder, a network and what the earlier commands wrote."""
    at = tmp_path_factory.mktemp("links")
    graded_images(at / "photos", 12)
    graded_images(at / "others", 4, seed=5)
    prepare(at / "photos", at / "sets" / "linked", num_samples=8, link="symlink", progress=False)
    prepare(at / "others", at / "held", num_samples=4, link="symlink", progress=False)
    sequential(conv(4, 3), "Relu", linear(2), shape=(1, 3, 8, 8)).save(at / "net.onnx")
    at.joinpath("c.json").write_text(json.dumps(config_of(at, "unit", 8).to_dict() | {"calibration_num": 8}))
    program = at / "bin" / "dxcom"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nimport sys\na = sys.argv\nopen(a[a.index('-o') + 1] + '/m.dxnn', 'w')\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return at


CONFIG = "config --model net.onnx --dataset-path sets/linked --output-path new.json --scale 255 --calibration-num 8"
COMMANDS = {
    "config": (CONFIG, "config: new.json"),
    "verify": ("verify --config c.json --num-samples 2 --output-dir verify", "yes"),
    "verify within": ("verify --config c.json --num-samples 2 --data-root . --output-dir verify", "yes"),
    "quantize": ("quantize --model net.onnx --config c.json --output q.onnx --method minmax", "from 8 images"),
    "compare": ("compare --float net.onnx --int8 q.onnx --config c.json --images held", "scored"),
    "diagnose": ("diagnose --float net.onnx --int8 q.onnx --config c.json --output d.html", "page: d.html"),
    "compile": ("compile --model net.onnx --config c.json --output compiled", "m.dxnn"),
    "audit": ("audit --images sets/linked --against held --output-dir audit", "8 images"),
    "prove": ("prove --config c.json --images sets/linked --deployed c.json --output-dir prove", "equal"),
    "coverage": (
        "prepare --source-dir sets/linked --output-dir covered --num-samples 3 --quality-threshold 0 "
        "--strategy coverage --model net.onnx --config c.json",
        "3 of 8 images chosen",
    ),
    "export-ranges": ("export-ranges --model net.onnx --config c.json --format csv --output r.csv", "r.csv"),
}


# Its page takes as long as all the others.
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "diagnose" else name for name in COMMANDS]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_reads_a_set_of_links(place, name, monkeypatch, capsys):
    from calib_nb.cli import main

    monkeypatch.chdir(place)
    monkeypatch.setenv("PATH", f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}")
    if name in ("compare", "diagnose") and not os.path.exists("q.onnx"):  # this test alone
        assert main([*COMMANDS["quantize"][0].split(), "--quiet"]) == 0
        capsys.readouterr()
    line, words = COMMANDS[name]
    code = main([*line.split(), "--quiet"])
    output = capsys.readouterr()
    assert code == 0 and words in output.out, output.out + output.err
    assert "left out" not in output.err


def test_links_are_followed_into_the_folders_that_the_manifest_records(place, tmp_path, caplog):
    """Also those of a set of a set, and of a set below the folder that is read; any other link is refused by name."""
    linked, photos = place / "sets" / "linked", place / "photos"
    made = prepare(linked, tmp_path / "again", num_samples=4, link="symlink", quality_threshold=0, progress=False)
    assert linked_folders(made.path) == [str(linked.resolve()), str(photos.resolve())]
    assert find_images(made.path) == sorted(made.images["name"]) and linked_folders(photos) == []
    assert len(find_images(place / "sets")) == 8 and not caplog.records
    cv2.imwrite(str(tmp_path / "secret.png"), np.zeros((8, 8, 3), np.uint8))
    first, second = sorted(made.images["name"])[:2]
    (made.path / first).unlink()
    (made.path / first).symlink_to(tmp_path / "secret.png")
    assert first not in find_images(made.path)
    (record,) = caplog.records
    assert f"left out {first} (1): a link out of {linked} and {photos}, which the set was made from" in record.message
    analysis = json.loads((made.path / "calibration_analysis.json").read_text())
    analysis["parameters"]["linked_folders"] = [str(linked)]
    (made.path / "calibration_analysis.json").write_text(json.dumps(analysis))
    with pytest.raises(InputError, match=r"left out \(a link out of .*, which the set was made from\)"):
        find_images(made.path)


def test_a_root_that_the_links_leave_is_one_line(place):
    config = config_of(place, "yunet", 32)
    assert len(config_images(config, data_root=place)) == 8
    with pytest.raises(ConfigError, match="holds 8 links, and all lead out of .*--link copy"):
        config_images(config, data_root=place / "sets")


@pytest.mark.slow
@pytest.mark.parametrize("report", ["calibration-set", "npu-config", "quantize"])
def test_reports_read_a_set_of_links(place, report, tmp_path, monkeypatch):
    from calib_nb.report import run_report

    monkeypatch.chdir(place)
    settings = {
        "calibration-set": {"source_dir": str(place / "sets" / "linked"), "num_samples": 4, "quality_threshold": 0.0},
        "npu-config": {"config": str(place / "c.json"), "model": str(place / "net.onnx")},
        "quantize": {"config": str(place / "c.json"), "model": str(place / "net.onnx"), "method": "minmax"},
    }
    made = run_report(report, settings[report], root=tmp_path, progress=False)
    assert made.page.exists() and "left out" not in made.page.read_text()
