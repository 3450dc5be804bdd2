"""The README's Python and the README's shell: the same job, the same bytes; and the package without its extras."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from calib_nb.core.run import sha256_file
from calib_nb.demo import demo_data
from calib_nb.faces.demo import demo_embedder
from calib_nb.graph.fixed import fix_batch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUIET = os.environ | {"TQDM_DISABLE": "1", "COLUMNS": "120", "NO_COLOR": "1", "MPLBACKEND": "agg"}


def block(language: str) -> str:
    """The first code block of the README in this language."""
    return re.search(rf"```{language}\n(.*?)```", README, re.S)[1]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two folders with the same images and the same float network, one for Python and one for the shell."""
    folders = [tmp_path_factory.mktemp(name) for name in ("python", "shell")]
    drawn = demo_data(tmp_path_factory.mktemp("drawn") / "data", progress=False)
    for folder in folders:
        shutil.copytree(drawn / "calibration" / "images", folder / "photos")
        (folder / "others").mkdir()
        for image in sorted((drawn / "val" / "images").iterdir())[:12]:
            shutil.copy(image, folder / "others")
        fix_batch(demo_embedder(), folder / "edgeface_b1.onnx")
    return folders


def test_python_and_shell_of_the_readme_write_the_same_bytes(places):
    python, shell = places
    done = forked.script(block("python"), cwd=python, env=QUIET)
    assert done.returncode == 0 and "sqnr_db" in done.stdout, done.stderr
    for line in block("sh").strip().splitlines():
        words = shlex.split(line)
        if words[1] != "report":  # the report wants pairs of faces
            done = forked.calib_nb(*words[1:], cwd=shell, env=QUIET)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    written = [sha256_file(folder / "edgeface_int8.onnx") for folder in places]
    assert written[0] == written[1]
    assert (shell / "outputs" / "diagnosis" / "edgeface_int8" / "diagnosis.html").is_file()


def test_the_readme_names_commands_that_exist():
    done = subprocess.run([sys.executable, "-m", "calib_nb", "--help"], env=QUIET, capture_output=True, text=True)
    named = {shlex.split(line)[1] for line in block("sh").strip().splitlines()}
    assert all(re.search(rf"\b{command}\b", done.stdout) for command in named)


@pytest.mark.parametrize("arguments", [["--version"], ["tags", "train", "--help"], ["demo", "--help"]])
def test_without_torch_the_command_line_answers(arguments):
    code = "import sys; sys.modules['torch'] = None; from calib_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=QUIET, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_missing_extra_is_one_line_with_the_command_that_installs_it(tmp_path):
    code = "import sys; sys.modules['torch'] = None; from calib_nb.cli import main; sys.exit(main(sys.argv[1:]))"
    command = ["faces", "export", "--checkpoint", "edgeface.pt", "--output", "edgeface.onnx"]
    (tmp_path / "edgeface.pt").write_bytes(b"PK")
    done = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=tmp_path, env=QUIET, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install 'calib-nb[torch]'" in done.stderr


@pytest.mark.slow
def test_a_wheel_without_extras_runs_the_demo_outside_the_checkout(tmp_path):
    """Built, installed into an environment of its requirements alone, and run in an empty folder."""
    import venv

    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    wheel = next(tmp_path.glob("*.whl"))
    pip = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel]
    subprocess.run(pip, check=True, capture_output=True)
    away = tmp_path / "away"
    away.mkdir()
    env = QUIET | {"CALIB_NB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([python.with_name("calib-nb"), "demo"], cwd=away, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.strip().splitlines()[-1].removeprefix("report: "))
    assert page.is_file() and page.is_relative_to(away / "outputs")
    modules = subprocess.run([python, "-c", "import torch"], capture_output=True)
    assert modules.returncode != 0, "torch came along, so nothing was shown"
