"""Other people's quantizers: processes that end, runs that are kept, failures of one line, numbers as by hand."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
from processes import ends
from typer.testing import CliRunner

from calib_nb.analysis.compare import AgreementTask
from calib_nb.analysis.toolchain_scripts import PACKAGES, QUANTIZERS
from calib_nb.analysis.toolchains import (
    TRIED,
    ToolchainOptions,
    find_toolchains,
    judge_toolchains,
    read_environments,
    run_toolchain,
    save_inputs,
)
from calib_nb.core.errors import CheckFailed, InputError
from calib_nb.graph.build import conv, linear, sequential

# Environments of toolchains, for the slow tests: NAME=FOLDER, separated by spaces.
ENVIRONMENTS = os.environ.get("CALIB_NB_TOOLCHAINS", "").split()
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (24, 8, 8, 3)).astype(np.uint8)


def preprocess(bgr: np.ndarray) -> np.ndarray:
    return bgr.transpose(2, 0, 1)[None].astype(np.float32) / 128 - 1


INPUTS, TASK = [preprocess(image) for image in IMAGES[:8]], AgreementTask(IMAGES[8:], preprocess)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    network = sequential(conv(8, 3), "Relu", "GlobalAveragePool", "Flatten", linear(3), shape=(1, 3, 8, 8))
    return Path(network.save(tmp_path_factory.mktemp("model") / "model.onnx"))


@pytest.fixture
def options(tmp_path) -> ToolchainOptions:
    return ToolchainOptions(folder=tmp_path / "runs", resamples=50, progress=False)


def own(path: Path, body: str) -> str:
    """A toolchain of the test's own."""
    path.write_text(f"import shutil\n\n\ndef quantize(model, inputs, folder):\n    {body}\n")
    return str(path)


def test_the_default_of_onnx_runtime_is_what_its_own_function_writes(model, options, tmp_path):
    from calib_nb.quant.black_boxes import ort_static
    from calib_nb.quant.judge import file_outputs

    judged = judge_toolchains({"given": model}, INPUTS, TASK, ["ort"], options)
    row, scored = judged.table.iloc[1], [preprocess(image) for image in IMAGES[8:]]
    by_hand = file_outputs(ort_static(model, tmp_path / "q.onnx", INPUTS), scored)
    before = file_outputs(model, scored)
    cosines = [
        float(x[0].ravel() @ y[0].ravel() / np.linalg.norm(x[0]) / np.linalg.norm(y[0]))
        for x, y in zip(before, by_hand)
    ]
    assert np.isclose(row.cosine, np.mean(cosines), atol=1e-6) and row.int8_share == 1 and row.seconds > 0
    assert row.drop_low <= row["drop"] <= row.drop_high and judged.failures == {}


def test_a_second_run_resumes_and_another_input_does_not(model, options, tmp_path):
    log = tmp_path / "log"
    body = f"open('litter', 'w').close(); open({str(log)!r}, 'a').write('x'); return shutil.copy(model, folder)"
    tool = own(tmp_path / "own.py", body)
    scored = save_inputs(INPUTS[:2], tmp_path / "scored.npz")
    for arrays, runs in ((INPUTS, 1), (INPUTS, 1), (INPUTS[:7], 2)):
        calibration = save_inputs(arrays, tmp_path / "calibration.npz")
        run = run_toolchain(tool, model, calibration, scored, options, "own")
        assert log.read_text() == "x" * runs and len(run.outputs) == 2 and run.int8_share == 0
        assert (run.file.parent / "litter").is_file() and not Path("litter").exists()


def test_a_run_out_of_time_ends_with_all_that_it_started_and_leaves_nothing(model, options, tmp_path):
    pid = tmp_path / "pid"
    child = f"p = subprocess.Popen(['sleep', '600']); open({str(pid)!r}, 'w').write(str(p.pid))"
    tool = own(tmp_path / "slow.py", f"import subprocess, time; {child}; time.sleep(600)")
    inputs, start = save_inputs(INPUTS[:1], tmp_path / "inputs.npz"), time.monotonic()
    with pytest.raises(CheckFailed, match="stopped after 1.5 seconds"):
        hurried = ToolchainOptions(folder=options.folder, timeout=1.5)
        run_toolchain(tool, model, inputs, inputs, hurried, "own")
    assert time.monotonic() - start < 300 and not list(Path(options.folder).glob("*"))
    if pid.is_file():  # a slow machine may not have come so far
        assert ends(int(pid.read_text()))


def test_what_fails_is_one_line(model, options, tmp_path):
    tools = [
        own(tmp_path / "broken.py", "raise ValueError('no\\nsuch operator')"),
        own(tmp_path / "gone.py", "import os; os._exit(3)"),
    ]
    judged = judge_toolchains({"given": model}, INPUTS, TASK, tools, options)
    assert judged.table.toolchain.tolist() == ["float"]
    assert judged.failures == {
        "broken, given": "broken own on the file given: ValueError: no such operator",
        "gone, given": "gone own on the file given: exit code 3",
    }


def test_names_environments_and_lines_to_install(tmp_path):
    assert {name.split(":")[0] for name in QUANTIZERS} == set(PACKAGES) == set(TRIED)
    assert not any("dx" in name for name in (*QUANTIZERS, *PACKAGES.values()))
    versions, missing = find_toolchains(["ort", "aimet"], ToolchainOptions())
    assert list(versions) == ["ort"] and "aimet-env/bin/pip install aimet-onnx==" in missing["aimet"]
    for wrong, words in (("ort", "NAME=FOLDER"), ("ort=", "NAME=FOLDER"), ("otr=x", "'ort'"), ("ort=x", "no Python")):
        with pytest.raises(InputError, match=words):
            read_environments([wrong])
    python = tmp_path / "odd" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'no such library' >&2; exit 127\n")
    python.chmod(0o755)
    options = ToolchainOptions(environments=read_environments([f"nncf={tmp_path / 'odd'}"]))
    _, missing = find_toolchains(["nncf"], options)
    assert missing == {"nncf": "nncf: the Python of its environment does not run: no such library"}
    with pytest.raises(InputError, match="no file nowhere.py"):
        find_toolchains(["nowhere.py"], ToolchainOptions())


@pytest.mark.slow
@pytest.mark.skipif(not ENVIRONMENTS, reason="CALIB_NB_TOOLCHAINS names no environments")
@pytest.mark.parametrize("word", ENVIRONMENTS)
def test_a_toolchain_by_its_default(word, model, options):
    name, folder = word.split("=", 1)
    judged = judge_toolchains({"given": model}, INPUTS, TASK, [name], options, environments={name: folder})
    assert judged.failures == {} and judged.table.sqnr_db[1] > 10 and judged.table.int8_share[1] > 0.5
    assert judged.table.version[1] and judged.table.seconds[1] > 0


@pytest.mark.slow
def test_the_shell_hardens_judges_and_keeps_both(tmp_path, monkeypatch):
    import calib_nb as cn
    from calib_nb.commands.compare import app
    from calib_nb.demo import demo_data

    monkeypatch.chdir(tmp_path)
    data = demo_data("data", progress=False)
    settings = {"model": data / "tagger.onnx", "calibration_num": 12}
    cn.save_config(cn.generate_config("resnet-tags", data / "calibration" / "images", **settings), "config.json")
    line = f"--float {data}/tagger.onnx --config config.json --coco {data}/val/instances.json --toolchain ort,nncf"
    tables = []
    for _ in range(2):
        result = CliRunner().invoke(app, f"{line} --output judged.csv".split())
        assert result.exit_code == 0 and "nncf is not installed" in result.output, result.exception
        tables.append(Path("judged.csv").read_text())
    assert tables[0] == tables[1], "the second run shows the seconds of the first"
    assert tables[0].count("hardened") == 2
