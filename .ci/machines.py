"""What is trained, on other kinds of machine: `python .ci/machines.py [NOTEBOOK ...]`.

Runs every notebook that asserts with `calib_nb.core.margins` under other instruction sets, thread counts and seeds,
each time with an empty cache so that networks are trained again, and prints the margin of each assertion.
Exit code 1 when an assertion fails or its margin is below four standard errors.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from calib_nb.core.margins import margin_table

ROOT = Path(__file__).resolve().parents[1]
LEAST_ERRORS = 4
SSE = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "OPENBLAS_CORETYPE": "Nehalem"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "OPENBLAS_CORETYPE": "Haswell"}
MACHINES = {
    "without AVX": SSE,
    "AVX2": AVX2,
    "AVX2, two threads": AVX2 | {"OMP_NUM_THREADS": "2"},
    **{f"this processor, seed {seed}": {"CALIB_NB_SEED": str(seed)} for seed in range(5)},
}


def trained() -> list[Path]:
    """Notebooks that assert something about what they train."""
    notebooks = sorted(p for p in (ROOT / "nbs").glob("*/[0-9]*.ipynb") if "core/10_" not in p.as_posix())
    return [p for p in notebooks if "calib_nb.core.margins import" in p.read_text(encoding="utf-8")]


def main(notebooks: list[Path]) -> int:
    lines, failed = [], []
    for machine, settings in MACHINES.items():
        with tempfile.TemporaryDirectory() as scratch:
            margins = Path(scratch) / "margins.jsonl"
            margins.touch()
            plain = {"OMP_NUM_THREADS": "1", "CALIB_NB_CACHE": f"{scratch}/cache", "CALIB_NB_MARGINS": str(margins)}
            for path in notebooks:
                command = [sys.executable, ROOT / "tests" / "notebook_run.py", path]
                done = subprocess.run(command, env=os.environ | plain | settings, capture_output=True, text=True)
                name = path.relative_to(ROOT / "nbs")
                print(f"{machine}: {name}: {'failed' if done.returncode else 'passed'}", flush=True)
                if done.returncode:
                    failed.append(f"{machine}: {name}\n{done.stderr[-2000:]}")
            lines += [json.loads(line) for line in margins.read_text().splitlines()]
    table = margin_table(lines)
    print(table.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    print(*failed, sep="\n")
    return int(bool(failed) or bool((table["errors"] < LEAST_ERRORS).any()))


if __name__ == "__main__":
    sys.exit(main([Path(p).resolve() for p in sys.argv[1:]] or trained()))
