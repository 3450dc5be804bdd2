"""Every tutorial runs from top to bottom as a reader would run it, and ends with what to do on one's own data."""

import re
from pathlib import Path

import notebook_run
import pytest
from test_notebooks import execute

TUTORIALS = Path(__file__).resolve().parents[1] / "nbs" / "tutorials"
QUICK = {"yunet-dx-m1"}
BOOKS = [
    pytest.param(p, id=p.stem, marks=() if p.stem in QUICK else pytest.mark.slow)
    for p in sorted(TUTORIALS.glob("*.ipynb"))
]


@pytest.mark.parametrize("path", BOOKS)
def test_tutorial_runs(path):
    execute(path)


@pytest.mark.parametrize("path", sorted(TUTORIALS.glob("*.ipynb")), ids=lambda p: p.stem)
def test_tutorial_uses_the_shell_shows_a_picture_and_ends_with_own_data(path):
    cells = notebook_run.code_cells(path)
    assert any(re.search(r"^assert shell\(", c["source"], re.M) for c in cells)
    assert any("image/png" in output.get("data", {}) for c in cells for output in c["outputs"])
    text = path.read_text(encoding="utf-8")
    assert "## On your own data" in text and "Next: [" in text
