"""The vendor's compiler, by a stand-in executable: log, exit code, manifest, and nothing half-finished."""

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from processes import ends

from calib_nb.core.errors import CheckFailed, ConfigError, InputError
from calib_nb.graph.build import network
from calib_nb.npu.compile import TOOLCHAINS, compile_model, read_toolchain
from calib_nb.npu.config import generate_config, save_config


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    os.makedirs("bin")
    os.makedirs("my images")
    for i in range(4):
        cv2.imwrite(f"my images/{i}.jpg", np.zeros((8, 8, 3), np.uint8))
    weight = np.ones((2, 3, 1, 1))
    network("out = Conv (input, w)", inputs={"input": (1, 3, 32, 32)}, w=weight).save("my model.onnx")
    save_config(generate_config("yunet", "my images", model="my model.onnx", calibration_num=3), "c.json")
    return tmp_path


def stand_in(body, name="dxcom"):
    head = "import json, os, sys, time\nargs = sys.argv[1:]"
    out = "out = args[args.index('-o' if '-o' in args else '--output') + 1]"
    Path("bin", name).write_text(f"#!{sys.executable}\n{head}\n{out}\n{body}\n")
    Path("bin", name).chmod(0o755)


WRITE = """print('compiling', args)
print('a warning', file=sys.stderr)
open(os.path.join(out, 'model.dxnn'), 'w').write('binary')"""


def test_without_the_compiler_its_command_line_is_the_answer(place):
    compilation = compile_model("my model.onnx", "c.json", "out")
    assert (
        not compilation.ran
        and compilation.exit_code == 0
        and compilation.command == "dxcom -m 'my model.onnx' -c c.json -o out"
        and not Path("out").exists()
    )
    assert shlex.split(compilation.command)[2] == "my model.onnx"


def test_with_the_compiler(place):
    stand_in(WRITE)
    compilation = compile_model("my model.onnx", "c.json", "out")
    assert (
        compilation.ran
        and compilation.exit_code == 0
        and compilation.files == ("model.dxnn",)
        and compilation.problem == ""
    )
    log = Path("out/compile.log").read_text()
    assert "'-m', 'my model.onnx', '-c', 'c.json', '-o'" in log and "a warning" in log
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["inputs"]["model"]["sha256"] == hashlib.sha256(Path("my model.onnx").read_bytes()).hexdigest()
    assert (
        set(manifest["outputs"]) == {"model.dxnn", "compile.log"}
        and manifest["steps"][0]["seconds"] >= 0
        and manifest["parameters"]["command"] == compilation.command
    )
    assert compile_model("my model.onnx", "c.json", "out").exit_code == 0  # its own result may be replaced
    assert not compile_model("my model.onnx", "c.json", "out", run=False).ran


@pytest.mark.parametrize(
    "body, code",
    [
        ("sys.exit(7)", 7),
        (f"os.kill(os.getpid(), {int(signal.SIGSEGV)})", 128 + signal.SIGSEGV),
        ("pass", 1),
        (WRITE + "; sys.exit(2)", 2),
    ],
)
def test_exit_codes_are_passed_on_and_nothing_is_left(place, body, code):
    stand_in(f"print('before')\nsys.stdout.flush()\n{body}")
    compilation = compile_model("my model.onnx", "c.json", "out")
    assert (
        (compilation.exit_code, compilation.files, compilation.manifest) == (code, (), None)
        and "before" in compilation.log.read_text()
        and compilation.problem
    )
    assert not Path("out").exists() and not list(place.glob(".*partial"))


def test_a_failed_run_leaves_the_older_result(place):
    stand_in(WRITE)
    compile_model("my model.onnx", "c.json", "out")
    before = Path("out/manifest.json").read_bytes()
    stand_in("sys.exit(1)")
    assert (
        compile_model("my model.onnx", "c.json", "out").exit_code == 1
        and Path("out/manifest.json").read_bytes() == before
    )


def test_too_long_ends_the_whole_group(place):
    child = "child = subprocess.Popen(['sleep', '600'])\nopen('child', 'w').write(str(child.pid))"
    stand_in(f"import subprocess\n{child}\ntime.sleep(600)")
    for seconds in (1, 4, 16, 64):  # a slow machine takes a while to come so far
        start = time.perf_counter()
        compilation = compile_model("my model.onnx", "c.json", "out", timeout_s=seconds)
        assert compilation.exit_code == 124 and time.perf_counter() - start < 300
        if Path("child").exists() and Path("child").read_text():
            break
    assert ends(int(Path("child").read_text()))


def test_ctrl_c_ends_the_compiler_and_leaves_nothing(place):
    stand_in("open('child', 'w').write(str(os.getpid()))\ntime.sleep(600)")
    code = "from calib_nb.npu.compile import compile_model; compile_model('my model.onnx', 'c.json', 'out')"
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(root)}, stderr=subprocess.DEVNULL
    )
    for _ in range(1200):
        if Path("child").exists() and Path("child").read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) != 0
    assert ends(int(Path("child").read_text())) and not Path("out").exists() and not list(place.glob(".*partial"))


def test_nothing_goes_through_a_shell(place):
    stand_in("open(os.path.join(out, 'args.json'), 'w').write(json.dumps(args))")
    nasty = "x; touch owned $(touch owned) `touch owned`.onnx"
    os.rename("my model.onnx", nasty)
    compilation = compile_model(nasty, "c.json", "out")
    assert (
        compilation.exit_code == 0
        and not Path("owned").exists()
        and json.loads(Path("out/args.json").read_text())[1] == nasty
    )


def test_a_toolchain_from_a_file(place):
    Path("mine.yaml").write_text(
        TOOLCHAINS["generic"].replace("npu-compiler", "my-npu").replace("name: generic", "name: mine")
    )
    compilation = compile_model("my model.onnx", "c.json", "out", toolchain="mine.yaml")
    options = dict(zip(*[iter(shlex.split(compilation.command)[1:])] * 2))
    assert (
        not compilation.ran
        and options["--num-samples"] == "3"
        and Path(options["--calibration-dir"]).is_dir()
        and options["--method"] == "ema"
    )
    assert [Path(p).name for p in Path(options["--calibration-list"]).read_text().splitlines()] == [
        "0.jpg",
        "1.jpg",
        "2.jpg",
    ]
    assert "resize" in json.loads(Path(options["--preprocessing"]).read_text())[0]
    stand_in(WRITE, "my-npu")
    compilation = compile_model("my model.onnx", "c.json", "out", toolchain="mine.yaml")
    assert compilation.files == ("model.dxnn",) and compilation.command.startswith("my-npu --model 'my model.onnx'")


@pytest.mark.parametrize(
    "text, message",
    [
        ("name: x\nprograms: [x]\ncommand: ['{modl}']", "did you mean 'model'"),
        ("name: x\nprograms: [x]\ncomand: ['{model}']", "did you mean 'command'"),
        ("name: x\nprograms: []\ncommand: ['{model}']", "programs"),
        ("name: x\nprograms: [x]\ncommand: ['{model.__class__}']", "unknown place"),
        ("name: x\nprograms: [x]\ncommand: ['{0}', '{}']", "unknown place"),
        ("name: ../x\nprograms: [x]\ncommand: ['{model}']", "name"),
        ("!!python/object/apply:os.system ['touch owned']", "not YAML"),
        ("- a", "valid dictionary|object"),
        ("", "valid dictionary|object"),
        ("a: [", "not YAML"),
    ],
)
def test_bad_toolchains(tmp_path, text, message):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_toolchain(tmp_path / "t.yaml")
    assert "\n" not in str(caught.value)


def test_refusals_before_anything_runs(place):
    stand_in("open('/dev/null')")
    save_config(generate_config("yunet", "nowhere", model="my model.onnx"), "wrong.json")
    with pytest.raises(CheckFailed, match="no such folder"):
        compile_model("my model.onnx", "wrong.json", "out")
    with pytest.raises(InputError, match="no such model"):
        compile_model("none.onnx", "c.json", "out")
    os.makedirs("full")
    Path("full/keep.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files"):
        compile_model("my model.onnx", "c.json", "full")
    assert Path("full/keep.txt").exists()
    with pytest.raises(ConfigError, match="did you mean 'dx-com'"):
        compile_model("my model.onnx", "c.json", "out", toolchain="dxcom")
    Path("bin/dxcom").write_text("not a program")
    with pytest.raises(ConfigError, match="cannot be started"):
        compile_model("my model.onnx", "c.json", "out")


DIAGNOSED = """if '--quant_diagnosis' in args:
    open(os.path.join(out, 'model.qxnn'), 'w').write('checkpoint')
open(os.path.join(out, 'model.dxnn'), 'w').write(' '.join(args))
print('Added nodes: [Transpose_0]')"""


def test_the_loop_goes_on_from_the_checkpoint_and_chooses_only_by_numbers(place, capsys):
    from calib_nb.cli import main

    stand_in(DIAGNOSED + "\nprint('SQNR:', 25 if 'ema' in args else 20)")
    line = [
        "compile",
        "--model",
        "model.onnx",
        "--config",
        "c.json",
        "--output",
        "out",
        "--diagnose",
        "--opt-level",
        "1",
    ]
    os.rename("my model.onnx", "model.onnx")
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert "take transpose out of the host's code" in shown and "best: ema" in shown
    assert Path("out/model.dxnn").read_text().endswith("--opt_level 1 --quant_diagnosis")
    for name in ("ema", "minmax", "iqr", "q_pro", "P3"):
        arguments = shlex.split(Path(f"out_{name}/model.dxnn").read_text())
        assert arguments[:2] == ["--checkpoint", str(Path("out/model.qxnn"))] and "--opt_level" not in arguments
    stand_in(DIAGNOSED)
    assert main(line) == 0 and "compare them on the board" in capsys.readouterr().out
    stand_in(WRITE)  # a version without checkpoints
    assert main(line) == 0 and "no checkpoint" in capsys.readouterr().out
    stand_in("sys.exit(3)")
    assert main(line) == 3 and "ended with 3" in capsys.readouterr().out
    assert main([*line, "--checkpoint", "out/model.qxnn"]) == 2
