"""Every source notebook runs from top to bottom, with its assertions, as a reader would run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NBS = Path(__file__).resolve().parents[1] / "nbs"
SOURCES = sorted(p for p in NBS.rglob("*.ipynb") if re.match(r"\d\d_", p.name) and ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("path", [*SOURCES, NBS / "index.ipynb"], ids=lambda p: p.relative_to(NBS).as_posix())
def test_notebook_runs(path):
    command = [Path(sys.executable).with_name("nbdev_test"), "--path", path, "--do_print", "--n_workers", "0"]
    done = subprocess.run(
        command,
        cwd=NBS.parent,
        capture_output=True,
        text=True,
        env=os.environ | {"TQDM_DISABLE": "1", "MPLBACKEND": "agg"},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
