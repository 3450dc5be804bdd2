"""The command line as a process: exit codes, one-line errors, interrupted runs, and how quickly it answers."""

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import forked
import numpy as np
import pytest

from calib_nb.data.demo_images import graded_images
from calib_nb.demo import demo_data

SHELL = [sys.executable, "-m", "calib_nb"]
PLAIN = {"TQDM_DISABLE": "1", "COLUMNS": "120", "NO_COLOR": "1", "FORCE_COLOR": ""}


def calib_nb(line: str, cwd=None, **env) -> subprocess.CompletedProcess:
    """One command line behind `calib-nb`, in a process."""
    return forked.calib_nb(*shlex.split(line), cwd=cwd, env=os.environ | PLAIN | env)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "images"
    graded_images(folder, 30)
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return demo_data(tmp_path_factory.mktemp("demo") / "data", progress=False)


def demo_config(demo: Path, cwd: Path) -> dict:
    """A config for the demo tagger in demo.json, as the shell writes it."""
    model, folder = demo / "tagger.onnx", demo / "calibration/images"
    line = f"config --model-type resnet-tags --model {model} --dataset-path {folder} --output-path demo.json"
    result = calib_nb(line, cwd)
    assert result.returncode == 0, result.stderr
    return json.loads((cwd / "demo.json").read_text())


@pytest.fixture(scope="module")
def job(demo, tmp_path_factory):
    """A folder with the config of the demo tagger and its INT8 file."""
    folder = tmp_path_factory.mktemp("job")
    demo_config(demo, folder)
    line = f"quantize --model {demo / 'tagger.onnx'} --config demo.json --output int8.onnx --num-samples 30"
    result = calib_nb(line, folder)
    assert result.returncode == 0, result.stderr
    return folder


COMMANDS = "prepare config verify fix-batch compile quantize stability compare diagnose report demo".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def helps():
    return forked.helps("", *COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_teaches_and_loads_nothing_heavy(command, helps):
    status, text, loaded = helps[command]
    assert (status, loaded) == (0, []), text[-300:]
    assert "Usage:" in text and ("Example" in text if command else "Exit codes" in text)


WRONG = {
    "no such command": ("prepaer", "prepare"),
    "no such option": ("prepare --sauce-dir x", "--sauce-dir"),
    "a missing option": ("prepare --source-dir x", "--output-dir"),
    "no such folder": ("prepare --source-dir nowhere --output-dir never", "nowhere"),
    "a file for a folder": ("prepare --source-dir text.jpg --output-dir never", "text.jpg"),
    "no images": ("prepare --source-dir empty --output-dir never", "empty"),
    "not a model": (
        "config --model-type yunet --model text.jpg --dataset-path empty --output-path never",
        "ONNX",
    ),
    "no model type": ("config --model-type yolo --dataset-path empty --output-path never", "yunet"),
    "a config that is no JSON": ("verify --config text.jpg", "JSON"),
    "a config that is empty": ("verify --config zero", "empty"),
    "a hostile config": ("verify --config deep.json", "deep.json"),
    "no config": ("quantize --model text.jpg --config never.json --output never", "never.json"),
    "no report": ("report edgefase", "edgeface"),
    "a notebook that is none": ("report nothing.ipynb", "nothing.ipynb"),
    "no list of reports": ("report --all text.jpg", "text.jpg"),
    "half a parameter": ("report yunet -p model", "KEY=VALUE"),
    "a folder that cannot be written": ("prepare --source-dir empty --output-dir text.jpg/set", ""),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path):
    line, named = WRONG[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "zero").touch()
    (tmp_path / "deep.json").write_text("[" * 200_000)
    before = sorted(p.name for p in tmp_path.iterdir())
    result = calib_nb(line, tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and named in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and len(result.stderr) < 700
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_underscores_are_another_spelling_of_hyphens(tmp_path):
    result = calib_nb("prepare --source_dir nowhere --output_dir=never", tmp_path)
    assert result.returncode == 2 and "nowhere" in result.stderr and "option" not in result.stderr


def test_debug_shows_the_traceback(tmp_path):
    result = calib_nb("prepare --source-dir nowhere --output-dir never --debug", tmp_path)
    assert result.returncode != 0 and "Traceback" in result.stderr and "InputError" in result.stderr


def test_quiet_shows_no_progress(images, tmp_path):
    line = f"prepare --source-dir {images} --output-dir set --num-samples 10"
    plain = os.environ | PLAIN | {"TQDM_DISABLE": ""}

    def terminal(more: str) -> str:
        """What a terminal shows as standard error."""
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(ours, (24, 100))
        # A real process: bars read the environment when they are imported.
        result = subprocess.run(
            [*SHELL, *f"{line} {more}".split()], cwd=tmp_path, env=plain, stdout=subprocess.PIPE, stderr=theirs
        )
        os.write(theirs, b"|end")
        text = b""
        while not text.endswith(b"|end"):
            text += os.read(ours, 65536)
        os.close(theirs)
        os.close(ours)
        assert result.returncode == 0, text
        return text.decode().removesuffix("|end")

    assert "image/s" in terminal("") and terminal("--quiet --overwrite") == ""


def test_prepare_twice_gives_the_same_bytes(images, tmp_path):
    for out in ("one", "two"):
        result = calib_nb(f"prepare --source-dir {images} --output-dir {out} --num-samples 10", tmp_path)
        assert result.returncode == 0, result.stderr
    names = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*") if p.is_file())
    assert len([n for n in names if n.suffix == ".jpg"]) >= 10
    for name in names:
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert one.replace(b"/one", b"/two") == two, name


def test_ctrl_c_and_kill_leave_no_half_set_and_the_run_goes_on(tmp_path):
    graded_images(tmp_path / "many", 120)
    line = "prepare --source-dir many --output-dir set --num-samples 20"
    for how, expected in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        process = subprocess.Popen([*SHELL, *line.split()], cwd=tmp_path, text=True, env=os.environ | PLAIN, **pipes)
        journal, deadline = tmp_path / ".set.partial", time.time() + 60
        while time.time() < deadline and process.poll() is None:
            if any(p.stat().st_size > 500 for p in journal.glob("*") if p.is_file()):
                break
            time.sleep(0.005)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
        assert process.returncode in (expected, 0) and "Traceback" not in err
        assert process.returncode == 0 or not (tmp_path / "set").exists()
    result = calib_nb(line, tmp_path)
    assert result.returncode == 0 and (tmp_path / "set" / "README.md").exists()
    assert not (tmp_path / ".set.partial").exists()


# What a command meets where Ctrl-C comes at an unlucky moment.
UNLUCKY = {
    "a thread waits for a lock that is never given back": "threading.Thread(target=waits).start(); waits()",
    "the error is lost in a callback": "\n    with contextlib.suppress(KeyboardInterrupt): waits()\n    waits()",
    "the error passes an exec, as of a dataclass": "exec('waits()', globals())",
    "the error becomes another": "\n    try: waits()\n    except KeyboardInterrupt: raise RuntimeError('unlocked')",
}


@pytest.mark.parametrize("what", UNLUCKY)
def test_ctrl_c_ends_the_process_whatever_it_meets(what, tmp_path):
    (tmp_path / "command.py").write_text(
        "import contextlib, sys, threading, calib_nb.cli as cli\n"
        "def waits(): print('waits', flush=True), threading.Event().wait()\n"
        f"def app(**_): {UNLUCKY[what]}\n"
        "cli.app, cli.INTERRUPT_SECONDS, sys.argv = app, 1, ['calib-nb', 'prepare']\n"
        "sys.exit(cli.main())"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-m", "command"], cwd=tmp_path, text=True, **pipes)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "calib-nb: interrupted; the same command goes on where this one stopped\n"


def _steps(config: dict) -> list:
    return config["default_loader"]["preprocessings"]


def _swap_order(config: dict) -> None:
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
REMEDIES = ("fix:", "did you mean 'calibration_method'", "correct dataset_path")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_config_with_one_fault_is_refused_with_the_fix_named(fault, demo, job, tmp_path):
    config = json.loads((job / "demo.json").read_text())
    FAULTS[fault](config)
    (tmp_path / "wrong.json").write_text(json.dumps(config))
    line = f"verify --config wrong.json --model {demo / 'tagger.onnx'} --model-type resnet-tags"
    result = calib_nb(line, tmp_path)
    text = result.stdout + result.stderr
    assert result.returncode in (1, 2) and "Traceback" not in text, text
    assert any(remedy in text for remedy in REMEDIES), text


def test_the_whole_job_step_by_step(demo, job):
    model = demo / "tagger.onnx"
    result = calib_nb(f"verify --config demo.json --model {model} --visualize --output-dir check", job)
    assert result.returncode == 0 and len(list((job / "check").rglob("*.png"))) == 5, result.stderr
    assert (job / "int8.onnx").stat().st_size < model.stat().st_size
    models = f"compare --float {model} --int8 int8.onnx --config demo.json"
    labels = f"--coco {demo / 'val/instances.json'}"
    result = calib_nb(f"{models} {labels} --budget 0.1 --output table.csv", job)
    assert result.returncode == 0 and "within budget" in result.stdout, result.stdout + result.stderr
    result = calib_nb(f"{models} --images {demo / 'val/images'} --num-samples 20 --budget 0", job)
    assert result.returncode == 1 and "over the budget" in result.stderr


def test_a_predicted_drop_over_the_budget_ends_with_1(demo, job):
    line = f"quantize --model {demo / 'tagger.onnx'} --config demo.json --output poor.onnx --method kl --num-samples 4"
    result = calib_nb(f"{line} --labels {demo / 'val/instances.json'} --task tags --budget 0", job)
    assert result.returncode == 1 and "predicted drop of map" in result.stdout and "over the budget" in result.stderr


def test_an_int8_model_is_not_quantized_again(job):
    result = calib_nb("quantize --model int8.onnx --config demo.json --output twice.onnx", job)
    assert result.returncode == 2 and "already quantized" in result.stderr and not (job / "twice.onnx").exists()


def test_the_scores_of_compare_are_onnx_runtimes(demo, job):
    """The mean cosine that the table shows, computed once more from plain ONNX Runtime."""
    import onnxruntime as ort
    import pandas as pd

    from calib_nb.data.images import decode
    from calib_nb.npu.config import load_config

    few = job / "few"
    few.mkdir()
    for path in sorted((demo / "val/images").iterdir())[:5]:
        (few / path.name).write_bytes(path.read_bytes())
    models = f"compare --float {demo / 'tagger.onnx'} --int8 int8.onnx --config demo.json"
    result = calib_nb(f"{models} --images {few} --output few.csv", job)
    assert result.returncode == 0, result.stderr
    chain = load_config(job / "demo.json").preprocess
    files = sorted(few.iterdir())
    outputs = []
    for model in (demo / "tagger.onnx", job / "int8.onnx"):
        session = ort.InferenceSession(str(model))
        outputs.append([session.run(None, {"input": chain(decode(p))})[0].ravel() for p in files])
    cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(*outputs, strict=True)]
    assert pd.read_csv(job / "few.csv")["cosine"][1] == pytest.approx(np.mean(cosines), abs=1e-5)
