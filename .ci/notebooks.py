"""Run notebooks from top to bottom and store what their cells show: `python .ci/notebooks.py [NOTEBOOK ...]`.

Without names: every notebook that exports, the index, and the reports on their built-in data. Benchmarks want real
data, so they are named. Cells marked `#| eval: false` want more than the checkout, such as a download: they keep
their outputs unless their notebook is named. A notebook that fails keeps its old outputs, and the exit code says so.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NBS = Path(__file__).resolve().parents[1] / "nbs"


def usual() -> list[Path]:
    """Notebooks that need nothing but the checkout, in the order of reading."""
    sources = (p for p in NBS.rglob("*.ipynb") if re.match(r"\d\d_", p.name) and ".ipynb_checkpoints" not in p.parts)
    return [*sorted(sources), NBS / "index.ipynb", *sorted((NBS / "reports").glob("*.ipynb"))]


WIDGET = "application/vnd.jupyter.widget-view+json"


def is_for_readers(output: dict) -> bool:
    """Whether an output is more than a progress bar, or what a native library says of the machine.

    Of a widget that brings a picture, the picture stays.
    """
    data = output.get("data", {})
    was_widget = data.pop(WIDGET, None) is not None
    return output.get("name") != "stderr" and not (was_widget and set(data) <= {"text/plain", "text/html"})


def store(path: Path, everything: bool) -> str:
    """Run one notebook in its folder and write it back; returns what went wrong, or ""."""
    notebook = nbformat.read(path, 4)
    asleep = [c for c in notebook.cells if re.search(r"^#\|\s*eval:\s*false", c.source, re.M) and not everything]
    for cell in asleep:
        cell.cell_type = "raw"
    resources = {"metadata": {"path": str(path.parent)}}
    try:
        NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=resources).execute()
    except CellExecutionError as e:
        return str(e)
    for cell in asleep:
        cell.cell_type = "code"
    notebook.metadata.pop("widgets", None)  # the state of progress bars, tens of kilobytes
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_for_readers(output)]
    nbformat.write(notebook, path)
    subprocess.run([Path(sys.executable).with_name("nbdev_clean"), "--fname", path], check=True)
    return ""


if __name__ == "__main__":
    os.environ |= {"TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    failed = 0
    for path in [Path(p).resolve() for p in sys.argv[1:]] or usual():
        error = store(path, everything=len(sys.argv) > 1)
        failed += bool(error)
        print(f"{path.relative_to(NBS)}: {error or 'stored'}", flush=True)
    sys.exit(f"{failed} notebooks failed and keep their old outputs" if failed else 0)
