"""Progress: one bar at a time, lines in place of frames where there is no terminal, nothing under --quiet."""

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from calib_nb.core.errors import CalibError
from calib_nb.report import run_report

ROOT = Path(__file__).resolve().parents[1]
OUTER = """
import time
from tqdm.auto import tqdm
from calib_nb.core import parallel
from calib_nb.core.parallel import bar_switch, parallel_map

parallel.ProgressLines.__init__.__defaults__ = (None, 0.05)  # in place of ten seconds
for step in tqdm(range(3), desc="recipe", mininterval=0, **bar_switch(True)):
    list(parallel_map(lambda x: time.sleep(0.01), range(6), desc="observe", workers=1))
list(parallel_map(lambda x: time.sleep(0.01), range(12), desc="score", workers=1))
"""


def run(**environment) -> str:
    """What the program above writes to a standard error that is no terminal."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith("TQDM")}
    done = subprocess.run(
        [sys.executable, "-c", OUTER], cwd=ROOT, env=plain | environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    return done.stderr


def test_a_log_has_lines_and_no_frames():
    log = run()
    assert "\r" not in log and "\x1b" not in log and "|" not in log
    assert all(re.match(r"(recipe|score): \d+ of \d+, ", line) for line in log.splitlines()), log
    assert "recipe: 3 of 3" in log and "observe" not in log, "one bar at a time: the outer one"


def test_quiet_silences_lines_as_it_does_bars():
    assert run(TQDM_DISABLE="1") == ""


def test_a_terminal_shows_bars():
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 100))
    plain = {k: v for k, v in os.environ.items() if not k.startswith("TQDM")}
    process = subprocess.Popen([sys.executable, "-c", OUTER], cwd=ROOT, env=plain, stderr=theirs)
    os.close(theirs)
    text = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side has closed it
            break
        if not part:
            break
        text += part
    assert process.wait(30) == 0
    os.close(ours)
    shown = text.decode()
    assert "\r" in shown and "recipe: 100%" in shown and "score: 100%" in shown and "observe" not in shown


def test_what_ends_at_once_leaves_no_line():
    from calib_nb.core.parallel import LINE_SECONDS

    assert LINE_SECONDS == 10
    code = "from calib_nb.core.parallel import parallel_map; list(parallel_map(abs, range(9), desc='score'))"
    plain = {k: v for k, v in os.environ.items() if not k.startswith("TQDM")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=plain, capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_every_bar_goes_through_the_switch():
    sources = [p for p in (ROOT / "calib_nb").rglob("*.py") if "disable=None" in p.read_text(encoding="utf-8")]
    assert not sources, "it overrules TQDM_DISABLE: use core.parallel.bar_switch"


def test_the_bar_of_a_report_goes_through_the_switch_too(tmp_path, monkeypatch, capsys):
    import papermill
    from papermill.engines import NotebookExecutionManager

    def run_nothing(notebook, *_, progress_bar, **__):
        manager = NotebookExecutionManager(papermill.iorw.load_notebook_node(notebook), progress_bar=progress_bar)
        manager.pbar.update(1)
        manager.pbar.close()
        raise OSError("no kernel today")

    monkeypatch.setattr(papermill, "execute_notebook", run_nothing)
    with pytest.raises(CalibError, match="no kernel today"):
        run_report("npu-config", folder=tmp_path / "run")
    assert capsys.readouterr().err == "", "what ends at once leaves no line"


def test_libpng_says_nothing_about_a_colour_profile(tmp_path):
    code = """
import struct, sys, zlib
import cv2
import numpy as np
from calib_nb.data.images import decode

drawn = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
good = cv2.imencode(".png", drawn)[1].tobytes()
profile = b"iCCP" + b"broken\\0\\0" + zlib.compress(b"x" * 200)
chunk = struct.pack(">I", len(profile) - 4) + profile + struct.pack(">I", zlib.crc32(profile))
open("bad.png", "wb").write(good[:33] + chunk + good[33:])
if "--plain" in sys.argv:
    cv2.imread("bad.png")
else:
    assert (decode("bad.png") == drawn).all()
"""
    ours = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    plain = subprocess.run([sys.executable, "-c", code, "--plain"], cwd=tmp_path, capture_output=True, text=True)
    assert "libpng warning" in plain.stderr and ours.stderr == ""
