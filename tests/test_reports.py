"""The report notebooks on their built-in data: through the strict runner, and bare under papermill."""

import ast
import base64
import html
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import forked
import pandas as pd
import PIL.Image
import pytest

import calib_nb as cn
from calib_nb.core.errors import CalibError, InputError
from calib_nb.core.run import sha256_file
from calib_nb.data.demo_images import graded_images
from calib_nb.graph.build import conv, linear, sequential
from calib_nb.report import list_reports, report_notebook, report_parameters, run_path, run_report

NAMES = list(list_reports().index)
# Their steps run in the notebooks of faces, depth, tags, training and commands, too.
LONG = ("depth", "edgeface", "face-alignment", "face-training", "tags", "yunet")
WHOLE = [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in NAMES]
# The recipe, and ExecuTorch programs, take longer than all the rest of a report: slow tests show both, and the tour
# the recipe.
QUICK = {
    "quantize": {"method": "minmax"},
    "depth": {"recipe": "all"},
    "tags": {"pte": False, "method": "minmax", "profiles": "ort-cpu"},
    "face-alignment": {"method": "minmax", "drift_images": 10},
    "yunet": {"method": "minmax"},
    "edgeface": {"method": "minmax", "num_calibration": 40},
    "face-training": {"epochs": 3, "int8_epochs": 1},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("work") / "outputs"


def run_demo(folder: Path) -> Path:
    """The page that `calib-nb demo` names in its last line."""
    plain = {"TQDM_DISABLE": "1", "COLUMNS": "120", "NO_COLOR": "1", "FORCE_COLOR": ""}
    result = forked.calib_nb("demo", cwd=folder, env=os.environ | plain)
    assert result.returncode == 0, result.stderr
    assert "synthetic" in result.stdout
    return Path(result.stdout.strip().splitlines()[-1].removeprefix("report: "))


@pytest.mark.slow
def test_the_demo_is_safe_to_repeat(tmp_path):
    """Quick tests of its steps: the tour's notebook, and the report `quantize` below."""
    page = run_demo(tmp_path)
    assert page == tmp_path / "outputs" / "quantize" / "demo" / "demo" / "report.html" and page.is_file()
    check_page(page.read_text(encoding="utf-8"), "quantize")
    assert run_demo(tmp_path) == page


def pixels(data: bytes) -> int:
    """Width of a PNG or JPEG."""
    return PIL.Image.open(io.BytesIO(data)).width


def check_page(page: str, name: str) -> None:
    """What a reader who does not know the notebook needs: the verdict first, sharp pictures, words for everything."""
    texts = re.sub(r"<style.*?</style>|<pre.*?</pre>|<img.*?>", "", page, flags=re.S)
    first = re.search(r"The verdict.*?</h2>.*?<p>(.*?)</p>", texts, re.S)[1]
    opening = {"calibration-set": "The 20 chosen images", "npu-config": "The config is"}
    if name == "tags":  # the form of the network that is recommended comes first
        first = first.removeprefix("LSQ ")
    assert first.startswith(opening.get(name, "INT8")) and first.endswith("."), first
    rough = (
        "Preprocess(",
        "&quot;}",
        "{'",
        "drop_low",
        "drop of map",
        "loses -",
        "nan",
        "1 pairs",
        "1 nodes",
        "1 images",
    )
    assert [word for word in rough if re.search(rf"(?<![\w.,]){re.escape(word)}(?!\w)", texts)] == []
    pictures = [dict(re.findall(r'([a-z]+)="([^"]*)"', tag)) for tag in re.findall(r"<img [^>]+>", page)]
    assert pictures and all(len(picture["alt"]) > 5 and int(picture["width"]) > 50 for picture in pictures)
    for picture in pictures:
        assert pixels(base64.b64decode(picture["src"].partition(",")[2])) >= 2 * int(picture["width"]) - 1
    assert "@media print" in page and ".wide" in page
    trusted = "Can you trust this calibration set?" in page
    assert trusted == (name in ("calibration-set", "quantize"))


@pytest.mark.parametrize("name", WHOLE)
def test_a_report_on_its_demo_data_leaves_a_whole_run_folder(name, root):
    folder = run_report(name, QUICK.get(name), root=root).folder
    assert folder == root / name / "demo" / "demo"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "ynthetic" in page and "<script" not in page and not re.search(r'(?:src|href)="(?!data:|#|https?://)', page)
    assert not re.search(r'<img[^>]+src="http|<link|@import', page), "the page fetches something"
    check_page(page, name)
    assert str(root) not in page and ".partial" not in page
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {"parameters", "versions", "git", "inputs", "outputs", "steps", "report", "seconds"} <= set(manifest)
    for file, digest in manifest["outputs"].items():
        assert sha256_file(folder / file) == digest, file
    assert {"report.ipynb", "report.html", "metrics.csv"} <= set(manifest["outputs"])
    assert len(pd.read_csv(folder / "metrics.csv")) >= 1
    assert not list(folder.parent.glob(".*")), "something unfinished is left"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["yunet", "edgeface"])
def test_quantize_names_its_measure_and_what_judges_by_the_task(kind, tmp_path):
    from calib_nb.faces.demo import demo_detector, demo_embedder, demo_lfw, demo_scenes

    model = demo_detector() if kind == "yunet" else demo_embedder()
    images = demo_scenes() / "ub" / "images" if kind == "yunet" else demo_lfw() / "images"
    given = {"model": str(model), "images": str(images), "preset": kind, "method": "minmax"}
    report = run_report("quantize", given | {"num_samples": 8, "num_scored": 12}, root=tmp_path)
    page = report.page.read_text(encoding="utf-8")
    check_page(page, "quantize")
    assert f"calib-nb report {kind} -p images=" in page
    if kind == "yunet":
        assert report.metrics.f1[0] == 1 and "F1 against the faces that float finds" in page
    else:
        assert "mean cosine of the outputs" in page and "without labels" in page
        assert "top1_agreement" not in report.metrics


@pytest.mark.slow
def test_a_calibration_set_is_chosen_and_examined_by_a_models_activations(tmp_path):
    """Real runs are called "run"; an app that swaps red and blue is found out."""
    images, network = (
        tmp_path / "images",
        sequential(conv(4), "Relu", "GlobalAveragePool", linear(3), shape=(1, 3, 32, 32)),
    )
    graded_images(images, 30)
    model = network.save(tmp_path / "net.onnx")
    config = cn.save_config(cn.generate_config("edgeface", images, model=model), tmp_path / "config.json")
    (tmp_path / "app.py").write_text(f"""
from calib_nb.npu.config import load_config
chain = load_config({str(config)!r}).preprocess
def swapped(bgr):
    return chain(bgr[..., ::-1].copy())
""")
    given = {"source_dir": str(images), "num_samples": 10, "strategy": "coverage", "model": str(model)}
    given |= {"config": str(config), "deployed": f"{tmp_path / 'app.py'}:swapped"}
    report = run_report("calibration-set", given, root=tmp_path / "outputs")
    assert report.folder == tmp_path / "outputs/calibration-set/net/run"
    page = html.unescape(report.page.read_text(encoding="utf-8"))
    assert "red and blue are swapped" in page and "of the pool's ranges" in page and "ynthetic" not in page
    with pytest.raises(CalibError, match="strategy coverage without a model"):
        run_report("calibration-set", given | {"model": "", "config": "", "deployed": ""}, root=tmp_path / "outputs")


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_report_with_its_defaults(name, tmp_path):
    report = run_report(name, root=tmp_path)
    assert len(report.metrics) >= 2
    if name == "tags" and importlib.util.find_spec("executorch"):
        assert report.metrics.model.str.endswith(".pte").sum() == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_same_parameters_give_the_same_metrics_byte_for_byte(name, root, tmp_path):
    first = root / name / "demo" / "demo" / "metrics.csv"
    if not first.exists():  # this test alone
        run_report(name, QUICK.get(name), root=root)
    again = run_report(name, QUICK.get(name), root=tmp_path)
    assert (again.folder / "metrics.csv").read_bytes() == first.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_report_runs_bare_under_papermill(name, tmp_path):
    given = QUICK.get(name, {}) | {"name": "bare"}
    options = [word for key, value in given.items() for word in ("-p", key, str(value))]
    command = [sys.executable, "-m", "papermill", str(report_notebook(name)), "out.ipynb", *options]
    ended = subprocess.run(
        [*command, "-k", "python3", "--no-progress-bar"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"CALIB_NB_OUTPUTS": str(tmp_path / "outputs")},
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    folder = tmp_path / "outputs" / name / "demo/bare"
    assert (folder / "metrics.csv").exists() and (tmp_path / "out.ipynb").exists()
    check_page((folder / "report.html").read_text(encoding="utf-8"), name)
    assert "report.html" in json.loads((folder / "manifest.json").read_text())["outputs"]


@pytest.mark.parametrize("name", NAMES)
def test_every_literal_of_the_parameters_cell_can_be_set(name):
    """papermill's reader silently drops a line whose comment it cannot parse."""
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
    assert folder.with_name("run.failed.ipynb").exists()


def listed_images(folder):
    """Names of the scored images and of the calibration images of a run."""
    return (set((folder / f"{part}_images.txt").read_text().split()) for part in ("scored", "calibration"))


def test_edgeface_on_lfw(real_data, tmp_path):
    """The situation that this product is for: float near 99.4 %, and calibration images that are not scored."""
    report = run_report(
        "edgeface",
        {
            "model": str(real_data / "models/edgeface_xxs_q_dequant.onnx"),
            "images": str(real_data / "lfw/images"),
            "pairs": str(real_data / "lfw/pairsDevTest.txt"),
        },
        root=tmp_path,
    )
    accuracy, size = report.metrics["accuracy"], report.metrics["size_mb"]
    assert 0.99 < accuracy[0] <= 1 and accuracy[1] > 0.985 and size[1] < 0.4 * size[0]
    scored, calibrated = listed_images(report.folder)
    assert scored and calibrated and not scored & calibrated


def test_yunet_on_labelled_images(real_data, tmp_path):
    report = run_report(
        "yunet",
        {
            "model": str(real_data / "models/face_detection_yunet_2023mar.onnx"),
            "images": str(real_data / "faces_multi"),
        },
        root=tmp_path,
    )
    assert (report.metrics[["precision", "recall"]].iloc[0] > 0.85).all() and 0 < report.metrics["landmark_px"][1] < 3


def test_a_detector_as_tagger_on_coco(real_data, tmp_path):
    given = {
        "model": str(real_data / "models/FastestDet_opset13.onnx"),
        "coco": str(real_data / "coco/instances_val.json"),
        "images": str(real_data / "coco/val"),
        "calibration_images": str(real_data / "coco/train"),
    }
    report = run_report("tags", given | {"profiles": "ort-cpu", "method": "minmax", "threads": 1}, root=tmp_path)
    assert report.metrics["map"][0] > 55 and (report.metrics["drop"][1:] <= 1).all()
    assert report.metrics.int8_share[1] > 0.5  # this target keeps in float what integer kernels slow down
    scored, calibrated = listed_images(report.folder)
    assert scored and len(calibrated) == 100 and not scored & calibrated
    assert "Synthetic" not in report.page.read_text(encoding="utf-8")


def test_an_installed_package_carries_its_reports(tmp_path):
    root = Path(__file__).resolve().parents[1]
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, root],
        check=True,
        capture_output=True,
    )
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert {f"calib_nb/reports/{name}.ipynb" for name in NAMES} <= set(names)
    assert "calib_nb/commands/npu.py" in names and not [n for n in names if n.startswith(("tests/", "nbs/"))]
