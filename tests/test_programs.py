"""Damaged ExecuTorch programs: one line, never the end of the process that opens them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from calib_nb.core.errors import ModelError

pytest.importorskip("executorch")

from calib_nb.nets import pte  # noqa: E402  (only where ExecuTorch is installed)

pytestmark = pytest.mark.usefixtures("one_thread")
FUZZ = """
import os, random, signal, sys, json
from calib_nb.core.errors import ModelError
from calib_nb.nets.pte import PteSession, quietly
with quietly():
    import torch
    import executorch.runtime
folder, count = sys.argv[1], int(sys.argv[2])
whole, ends = open(f"{folder}/whole.pte", "rb").read(), {}
for k in range(count):  # what the child of survive_program would meet, without its imports
    random.seed(k)
    damaged = bytearray(whole)
    for _ in range(random.randint(1, 6)):
        damaged[random.randrange(random.choice([64, 600, len(whole)]))] = random.randrange(256)
    damaged = damaged[: random.choice([len(whole)] * 5 + [random.randrange(len(whole))])]
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(60)
        open(f"{folder}/{k}.pte", "wb").write(damaged)
        import calib_nb.nets.pte as module
        module.survive_program = lambda path: None
        try:
            session = PteSession(f"{folder}/{k}.pte")
            session.run(None, {"input": torch.zeros(session.get_inputs()[0].shape).numpy()})
            os._exit(0)
        except ModelError:
            os._exit(2)
        except (RuntimeError, MemoryError):
            os._exit(3)
        except BaseException:
            os._exit(4)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    ends.setdefault(code, []).append(k)
print(json.dumps(ends))
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A small program, as this package writes it."""
    torch.set_num_threads(1)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    exported = torch.export.export(module, (torch.zeros(1, 3, 8, 8),))
    folder = tmp_path_factory.mktemp("programs")
    return pte.write_pte(exported, folder / "whole.pte", notes={"tagger": "{}"})


@pytest.mark.slow
def test_what_was_written_here_needs_no_child(program, monkeypatch):
    monkeypatch.setattr(pte.subprocess, "run", lambda *a, **k: pytest.fail("a child was started"))
    assert pte.PteSession(program).notes == {"tagger": "{}"}


@pytest.mark.parametrize("ending", [-6, -11])
def test_a_child_that_crashes_is_one_line(tmp_path, monkeypatch, ending):
    (program := tmp_path / "x.pte").write_bytes(b"\0\0\0\0ET12")
    monkeypatch.setenv("CALIB_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pte.subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, ending))
    with pytest.raises(ModelError, match="it is damaged, and ends the process that runs it"):
        pte.PteSession(program)
    assert not any((tmp_path / "cache").rglob("*"))


def test_a_child_without_end_is_one_line(tmp_path, monkeypatch):
    (program := tmp_path / "x.pte").write_bytes(b"\0\0\0\0ET12")

    def endless(*_, **settings):
        raise subprocess.TimeoutExpired("python", settings["timeout"])

    monkeypatch.setenv("CALIB_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pte.subprocess, "run", endless)
    with pytest.raises(ModelError, match="does not end within 300 seconds"):
        pte.PteSession(program)


@pytest.mark.parametrize("content", [b"", b"no program", b"\0" * 100, b"PK\3\4ET", os.urandom(300)])
def test_what_is_no_program_is_refused_without_a_child(tmp_path, monkeypatch, content):
    monkeypatch.setattr(pte.subprocess, "run", lambda *a, **k: pytest.fail("a child was started"))
    (tmp_path / "x.pte").write_bytes(content[:4] + content[4:6].replace(b"ET", b"et") + content[6:])
    with pytest.raises(ModelError, match="it is no ExecuTorch program"):
        pte.PteSession(tmp_path / "x.pte")


@pytest.mark.slow
def test_a_foreign_program_runs_once_in_a_child_and_is_remembered(program, tmp_path, monkeypatch):
    monkeypatch.setenv("CALIB_NB_CACHE", str(tmp_path / "cache"))
    x = np.ones((1, 3, 8, 8), np.float32)
    first = pte.PteSession(program).run(None, {"input": x})[0]
    monkeypatch.setattr(pte.subprocess, "run", lambda *a, **k: pytest.fail("a child was started"))
    assert np.array_equal(pte.PteSession(program).run(None, {"input": x})[0], first)


@pytest.mark.slow
def test_damaged_programs_end_in_one_line(program, tmp_path, monkeypatch):
    """Of 1,000 damaged files those that end a process are refused by this one, which goes on."""
    words = [sys.executable, "-c", FUZZ, str(program.parent), "1000"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1800, check=True)
    ends = json.loads(done.stdout.splitlines()[-1])
    assert "4" not in ends, ends  # a traceback
    monkeypatch.setenv("CALIB_NB_CACHE", str(tmp_path / "cache"))
    crashing = [k for code, numbers in ends.items() if int(code) < 0 for k in numbers]
    for k in crashing[:3]:
        with pytest.raises(ModelError):
            pte.PteSession(program.parent / f"{k}.pte")


FIRST = {  # what a process may do first with ExecuTorch
    "table": "from calib_nb.nets.pte import backend_table; backend_table()",
    "write": "from calib_nb.nets.pte import write_pte; write_pte(program(), 'new.pte')",
    "run": "from calib_nb.nets.pte import PteSession; PteSession('whole.pte').run(None, {'input': x.numpy()})",
    "calibrate": "from calib_nb.tags.export import calibrated_program; calibrated_program(net, [x.numpy()] * 2)",
    "every module": "import pkgutil, importlib, calib_nb\n"
    "for m in pkgutil.walk_packages(calib_nb.__path__, 'calib_nb.'):\n"
    "    m.name.endswith('__main__') or importlib.import_module(m.name)",
}


@pytest.mark.slow
@pytest.mark.parametrize("first", FIRST)
def test_a_process_says_nothing_of_torchao(first, program, tmp_path):
    """Importing ExecuTorch prints what torchao cannot load, and warnings: none of it reaches stderr."""
    (tmp_path / "whole.pte").write_bytes(program.read_bytes())
    setup = (
        "import torch\nfrom calib_nb.nets.pte import PteSession\n"
        "net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval()\n"
        "x = torch.zeros(SHAPE)\nprogram = lambda: torch.export.export(net, (x,))\n"
    )
    shape = list(pte.PteSession(program).get_inputs()[0].shape)
    code = setup.replace("SHAPE", str(shape)) + FIRST[first]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr[-2000:]
