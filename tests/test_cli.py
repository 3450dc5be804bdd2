"""The command line as a process: exit codes, one-line errors, interrupted runs, and how quickly it answers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from calib_nb.data.demo_photos import graded_photos
from calib_nb.demo import demo_data

SHELL = [sys.executable, "-c", "import sys; from calib_nb.cli import main; sys.exit(main())"]


def calib_nb(*arguments, cwd=None, **env):
    return subprocess.run(
        [*SHELL, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"TQDM_DISABLE": "1", "COLUMNS": "120", "NO_COLOR": "1", "FORCE_COLOR": "", **env},
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "photos"
    graded_photos(folder, 30)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return demo_data(tmp_path_factory.mktemp("demo") / "data", progress=False)


COMMANDS = ["prepare", "config", "verify", "fix-batch", "compile", "quantize", "compare", "report", "demo"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_teaches_and_loads_nothing_heavy(command):
    code = f"import sys; sys.argv[1:] = {[*([command] if command else []), '--help']}\nfrom calib_nb.cli import main\ncode = main()\nprint(code, sorted(set(sys.modules) & {{'torch', 'onnx', 'onnxruntime', 'cv2', 'pandas', 'matplotlib', 'scipy'}}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "120", "NO_COLOR": "1"},
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stdout[-300:] + done.stderr[-1000:]
    assert "Usage:" in done.stdout and ("Example" in done.stdout if command else "Exit codes" in done.stdout)


WRONG = {
    "no such command": (["prepaer"], "prepare"),
    "no such option": (["prepare", "--sauce-dir", "x"], "--sauce-dir"),
    "a missing option": (["prepare", "--source-dir", "x"], "--output-dir"),
    "no such folder": (["prepare", "--source-dir", "nowhere", "--output-dir", "never"], "nowhere"),
    "a file for a folder": (["prepare", "--source-dir", "text.jpg", "--output-dir", "never"], "text.jpg"),
    "no photos": (["prepare", "--source-dir", "empty", "--output-dir", "never"], "empty"),
    "not a model": (
        ["config", "--model-type", "yunet", "--model", "text.jpg", "--dataset-path", "empty", "--output-path", "never"],
        "ONNX",
    ),
    "no model type": (["config", "--model-type", "yolo", "--dataset-path", "empty", "--output-path", "never"], "yunet"),
    "a config that is no JSON": (["verify", "--config", "text.jpg"], "JSON"),
    "a config that is empty": (["verify", "--config", "zero"], "empty"),
    "a hostile config": (["verify", "--config", "deep.json"], "deep.json"),
    "no config": (["quantize", "--model", "text.jpg", "--config", "never.json", "--output", "never"], "never.json"),
    "no report": (["report", "edgefase"], "edgeface"),
    "a notebook that is none": (["report", "nothing.ipynb"], "nothing.ipynb"),
    "no list of reports": (["report", "--all", "text.jpg"], "text.jpg"),
    "half a parameter": (["report", "yunet", "-p", "model"], "KEY=VALUE"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path):
    arguments, named = WRONG[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "zero").touch()
    (tmp_path / "deep.json").write_text("[" * 200_000)
    before = sorted(p.name for p in tmp_path.iterdir())
    done = calib_nb(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and named in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr) < 700
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_debug_shows_the_traceback(tmp_path):
    done = calib_nb("prepare", "--source-dir", "nowhere", "--output-dir", "never", "--debug", cwd=tmp_path)
    assert done.returncode != 0 and "Traceback" in done.stderr and "InputError" in done.stderr


def test_prepare_twice_gives_the_same_bytes(photos, tmp_path):
    for out in ("one", "two"):
        done = calib_nb("prepare", "--source-dir", photos, "--output-dir", out, "--num-samples", 10, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    names = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len([n for n in names if n.suffix == ".jpg"]) >= 10
    for name in names:
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert one.replace(b"/one", b"/two") == two, name


def test_ctrl_c_and_kill_leave_no_half_set_and_the_run_goes_on(tmp_path):
    graded_photos(tmp_path / "many", 250)
    command = [*SHELL, "prepare", "--source-dir", "many", "--output-dir", "set", "--num-samples", "20"]
    for how, expected in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TQDM_DISABLE": "1", "COLUMNS": "120"},
        )
        journal, deadline = tmp_path / ".set.partial", time.time() + 60
        while (
            time.time() < deadline
            and process.poll() is None
            and not any(p.stat().st_size > 500 for p in journal.glob("*") if p.is_file())
        ):
            time.sleep(0.005)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (expected, 0) and "Traceback" not in err
        assert process.returncode == 0 or not (tmp_path / "set").exists()
    done = calib_nb(*command[len(SHELL) :], cwd=tmp_path)
    assert (
        done.returncode == 0 and (tmp_path / "set" / "README.md").exists() and not (tmp_path / ".set.partial").exists()
    )


def _demo_config(demo, cwd, name="demo.json"):
    done = calib_nb(
        "config",
        "--model-type",
        "resnet-tags",
        "--model",
        demo / "tagger.onnx",
        "--dataset-path",
        demo / "calibration/images",
        "--output-path",
        name,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((cwd / name).read_text())


def _steps(config):
    return config["default_loader"]["preprocessings"]


def _swap_order(config):
    names = [next(iter(step)) for step in _steps(config)]
    a, b = names.index("div"), names.index("normalize")
    _steps(config)[a], _steps(config)[b] = _steps(config)[b], _steps(config)[a]


FAULTS = {
    "wrong name": lambda c: c.update(inputs={"imgae": next(iter(c["inputs"].values()))}),
    "batch 2": lambda c: c["inputs"].update({k: [2, *v[1:]] for k, v in c["inputs"].items()}),
    "missing transpose": lambda c: _steps(c).remove(next(s for s in _steps(c) if "transpose" in s)),
    "normalise before div": _swap_order,
    "swapped colours": lambda c: _steps(c).remove(next(s for s in _steps(c) if "convertColor" in s)),
    "no such folder": lambda c: c["default_loader"].update(dataset_path="nowhere"),
    "misspelt key": lambda c: c.update(calibration_metod=c.pop("calibration_method")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_config_with_one_fault_is_refused_with_the_fix_named(fault, demo, tmp_path):
    config = _demo_config(demo, tmp_path)
    FAULTS[fault](config)
    (tmp_path / "wrong.json").write_text(json.dumps(config))
    done = calib_nb(
        "verify", "--config", "wrong.json", "--model", demo / "tagger.onnx", "--model-type", "resnet-tags", cwd=tmp_path
    )
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert (
        "mend:" in done.stdout
        or "did you mean 'calibration_method'" in done.stderr
        or "mend dataset_path" in done.stderr
    )


def test_the_whole_job_step_by_step(demo, tmp_path):
    _demo_config(demo, tmp_path)
    done = calib_nb(
        "verify",
        "--config",
        "demo.json",
        "--model",
        demo / "tagger.onnx",
        "--visualize",
        "--output-dir",
        "seen",
        cwd=tmp_path,
    )
    assert done.returncode == 0 and len(list((tmp_path / "seen").rglob("*.png"))) == 5, done.stderr
    done = calib_nb(
        "quantize",
        "--model",
        demo / "tagger.onnx",
        "--config",
        "demo.json",
        "--output",
        "int8.onnx",
        "--num-samples",
        30,
        cwd=tmp_path,
    )
    assert done.returncode == 0 and (tmp_path / "int8.onnx").stat().st_size < (demo / "tagger.onnx").stat().st_size, (
        done.stderr
    )
    models = ["--float", demo / "tagger.onnx", "--int8", "int8.onnx", "--config", "demo.json"]
    done = calib_nb(
        "compare",
        *models,
        "--coco",
        demo / "val/instances.json",
        "--budget",
        0.1,
        "--output",
        "table.csv",
        cwd=tmp_path,
    )
    assert done.returncode == 0 and "within budget" in done.stdout, done.stdout + done.stderr
    done = calib_nb(
        "compare", *models, "--images", demo / "val/images", "--num-samples", 20, "--budget", 0, cwd=tmp_path
    )
    assert done.returncode == 1 and "over the budget" in done.stderr
    again = calib_nb(
        "quantize", "--model", "int8.onnx", "--config", "demo.json", "--output", "twice.onnx", cwd=tmp_path
    )
    assert again.returncode == 2 and "already quantized" in again.stderr and not (tmp_path / "twice.onnx").exists()


def test_the_scores_of_compare_are_onnx_runtimes(demo, tmp_path):
    """The mean cosine that the table shows, computed once more from plain ONNX Runtime."""
    import onnxruntime as ort
    import pandas as pd

    from calib_nb.data.images import decode
    from calib_nb.npu.config import config_preprocess, load_config

    _demo_config(demo, tmp_path)
    calib_nb(
        "quantize",
        "--model",
        demo / "tagger.onnx",
        "--config",
        "demo.json",
        "--output",
        "int8.onnx",
        "--num-samples",
        10,
        cwd=tmp_path,
    )
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted((demo / "val/images").iterdir())[:5]:
        (few / path.name).write_bytes(path.read_bytes())
    done = calib_nb(
        "compare",
        "--float",
        demo / "tagger.onnx",
        "--int8",
        "int8.onnx",
        "--config",
        "demo.json",
        "--images",
        few,
        "--output",
        "table.csv",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    chain = config_preprocess(load_config(tmp_path / "demo.json"))
    outputs = [
        [
            ort.InferenceSession(str(model)).run(None, {"input": chain(decode(p))})[0].ravel()
            for p in sorted(few.iterdir())
        ]
        for model in (demo / "tagger.onnx", tmp_path / "int8.onnx")
    ]
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(*outputs, strict=True)]
    assert pd.read_csv(tmp_path / "table.csv")["cosine"][1] == pytest.approx(np.mean(cosines), abs=1e-5)


def test_the_demo_ends_with_the_path_of_its_report(tmp_path):
    for _ in range(2):  # safe to repeat
        done = calib_nb("demo", cwd=tmp_path, CALIB_NB_OUTPUTS=str(tmp_path / "outputs"))
        assert done.returncode == 0, done.stderr
        page = Path(done.stdout.strip().splitlines()[-1].removeprefix("report: "))
        assert page.name == "report.html" and page.is_file() and "synthetic" in done.stdout
