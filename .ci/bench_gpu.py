"""Run nbs/benchmarks/gpu.ipynb as plain Python, without Jupyter: `python .ci/bench_gpu.py [--json FILE]`.

For machines with a GPU that have torch and little else. The table is printed, and written as JSON.
"""

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ["CALIB_NB_BENCH_NBS"] = str(ROOT / "nbs" / "benchmarks")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--json", type=Path, default=ROOT / "outputs" / "bench_gpu.json", help="where the table goes")
options = parser.parse_args()

cells = json.loads((ROOT / "nbs" / "benchmarks" / "gpu.ipynb").read_text(encoding="utf-8"))["cells"]
space = {"__name__": "__main__"}
options.json.parent.mkdir(parents=True, exist_ok=True)
for cell in cells:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), f"gpu.ipynb, {cell['id']}", "exec"), space)
        options.json.write_text(json.dumps(space["rows"], indent=1, default=float) + "\n", encoding="utf-8")
import pandas as pd  # noqa: E402

with pd.option_context("display.width", 200, "display.max_colwidth", 90, "display.max_rows", None):
    print(space["table"].to_string(index=False, na_rep="", float_format=lambda x: f"{x:,.3g}"))
print(f"written to {options.json}")
