"""The report notebooks on their built-in data: through the strict runner, and bare under papermill."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from calib_nb.core.errors import CalibError, InputError
from calib_nb.core.run import sha256_file
from calib_nb.report import list_reports, report_notebook, report_parameters, run_path, run_report

NAMES = list(list_reports().index)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("outputs")


@pytest.mark.parametrize("name", NAMES)
def test_a_report_runs_on_its_defaults_and_leaves_a_whole_run_folder(name, root):
    done = run_report(name, root=root)
    assert done.folder == root / name / "demo" / "demo"
    page = done.page.read_text(encoding="utf-8")
    assert "ynthetic" in page and "<script" not in page and not re.search(r'(?:src|href)="(?!data:|#|https?://)', page)
    assert not re.search(r'<img[^>]+src="http|<link|@import', page), "the page fetches something"
    assert str(root) not in page and ".partial" not in page
    manifest = json.loads((done.folder / "manifest.json").read_text())
    assert {"parameters", "versions", "git", "inputs", "outputs", "steps", "report", "seconds"} <= set(manifest)
    for file, digest in manifest["outputs"].items():
        assert sha256_file(done.folder / file) == digest, file
    assert {"report.ipynb", "report.html", "metrics.csv"} <= set(manifest["outputs"])
    assert len(pd.read_csv(done.folder / "metrics.csv")) >= 1
    assert not list(done.folder.parent.glob(".*")), "nothing half-made is left"


@pytest.mark.parametrize("name", ["quantize", "calibration-set", "npu-config"])
def test_the_same_parameters_give_the_same_metrics_byte_for_byte(name, root, tmp_path):
    again = run_report(name, root=tmp_path)
    first = root / name / "demo" / "demo" / "metrics.csv"
    if not first.exists():  # this test alone
        run_report(name, root=root)
    assert (again.folder / "metrics.csv").read_bytes() == first.read_bytes()


def test_a_report_runs_bare_under_papermill(tmp_path):
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(report_notebook("npu-config")),
        "out.ipynb",
        "-p",
        "num_samples",
        "2",
        "-p",
        "name",
        "bare",
        "-k",
        "python3",
        "--no-progress-bar",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"CALIB_NB_OUTPUTS": str(tmp_path / "outputs")},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "outputs/npu-config/demo/bare/metrics.csv").exists() and (tmp_path / "out.ipynb").exists()


@pytest.mark.parametrize("name", NAMES)
def test_every_literal_of_the_parameters_cell_can_be_set(name):
    """papermill's own reader silently drops a line whose comment it cannot parse."""
    import ast

    cells = json.loads(report_notebook(name).read_text(encoding="utf-8"))["cells"]
    tagged = next(c for c in cells if "parameters" in c["metadata"].get("tags", []))
    written = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse("".join(tagged["source"])).body}
    table = report_parameters(name)
    assert table["default"].to_dict() == written
    assert (table["help"].str.len() > 5).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_sampels": "5"}, "num_samples"),
        ({"num_samples": "five"}, "expected int"),
        ({"dedupe": "maybe"}, "expected bool"),
        ({"run_dir": "x"}, "filled by the runner"),
        ({"name": "../x"}, "cannot be a folder"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_runs(given, message, tmp_path):
    with pytest.raises(InputError, match=message):
        run_report("calibration-set", given, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failing_report_keeps_the_older_run_and_the_failed_notebook(tmp_path):
    wrong = tmp_path / "not-a-model.onnx"
    wrong.write_text("hello")
    folder = run_path("quantize", {"model": str(wrong)}, tmp_path)
    folder.mkdir(parents=True)
    (folder / "report.html").write_text("the older one")
    with pytest.raises(CalibError, match="not ONNX|is not"):
        run_report("quantize", {"model": str(wrong), "images": str(tmp_path), "preset": "yunet"}, root=tmp_path)
    assert (folder / "report.html").read_text() == "the older one"
    assert folder.with_name("demo.failed.ipynb").exists()


def test_edgeface_on_lfw(real_data, tmp_path):
    """The situation that this product is for: float near 99.4 %, and calibration photos that are not scored."""
    done = run_report(
        "edgeface",
        {
            "model": str(real_data / "models/edgeface_xxs_q_dequant.onnx"),
            "images": str(real_data / "lfw/images"),
            "pairs": str(real_data / "lfw/pairsDevTest.txt"),
        },
        root=tmp_path,
    )
    assert (
        0.99 < done.metrics["accuracy"][0] <= 1
        and done.metrics["accuracy"][1] > 0.985
        and done.metrics["size_mb"][1] < 0.4 * done.metrics["size_mb"][0]
    )
    scored, calibrated = (
        {line.split("/")[-1] for line in (done.folder / f"{part}_images.txt").read_text().split()}
        for part in ("scored", "calibration")
    )
    assert scored and calibrated and not scored & calibrated


def test_yunet_on_labelled_photos(real_data, tmp_path):
    done = run_report(
        "yunet",
        {
            "model": str(real_data / "models/face_detection_yunet_2023mar.onnx"),
            "images": str(real_data / "faces_multi"),
        },
        root=tmp_path,
    )
    assert (done.metrics[["precision", "recall"]].iloc[0] > 0.9).all() and 0 < done.metrics["landmark_px"][1] < 3


def test_a_detector_as_tagger_on_coco(real_data, tmp_path):
    given = {
        "model": str(real_data / "models/FastestDet_opset13.onnx"),
        "coco": str(real_data / "coco/instances_val.json"),
        "images": str(real_data / "coco/val"),
        "calibration_images": str(real_data / "coco/train"),
    }
    done = run_report("tags", given | {"profiles": "ort-cpu", "method": "minmax", "threads": 1}, root=tmp_path)
    assert done.metrics["map"][0] > 55 and (done.metrics["drop"][1:] <= 1).all() and done.metrics.int8_share[1] > 0.9
    scored, calibrated = (
        {line for line in (done.folder / f"{part}_images.txt").read_text().split()}
        for part in ("scored", "calibration")
    )
    assert scored and len(calibrated) == 100 and not scored & calibrated
    assert "Synthetic" not in done.page.read_text(encoding="utf-8")


def test_an_installed_package_carries_its_reports(tmp_path):
    root = Path(__file__).resolve().parents[1]
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, root],
        check=True,
        capture_output=True,
    )
    import zipfile

    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {f"calib_nb/reports/{name}.ipynb" for name in NAMES} <= set(names)
    assert "calib_nb/commands/npu.py" in names and not [n for n in names if n.startswith(("tests/", "nbs/"))]
