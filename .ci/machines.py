"""What is trained, on other kinds of machine: `python .ci/machines.py [NOTEBOOK ...]`.

Runs every notebook that asserts with `calib_nb.core.margins` under other instruction sets, thread counts and seeds,
each time with an empty cache so that networks are trained again, and prints the margin of each assertion; every value
stays in outputs/machines.
Exit code 1 when an assertion fails or its margin is below four standard errors.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from calib_nb.core.margins import margin_table

ROOT = Path(__file__).resolve().parents[1]
MARGINS = ROOT / "outputs" / "machines"
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


def run_on(machine: str, notebooks: list[Path]) -> list[str]:
    """What failed on one machine; the margins go to a file named after it."""
    MARGINS.mkdir(parents=True, exist_ok=True)
    margins, failed = MARGINS / f"{re.sub(r'[^a-z0-9]+', '_', machine.lower())}.jsonl", []
    margins.write_text("")
    with tempfile.TemporaryDirectory() as scratch:
        plain = {"OMP_NUM_THREADS": "1", "CALIB_NB_CACHE": f"{scratch}/cache", "CALIB_NB_MARGINS": str(margins)}
        for path in notebooks:
            command = [sys.executable, ROOT / "tests" / "notebook_run.py", path]
            begun = time.monotonic()
            done = subprocess.run(command, env=os.environ | plain | MACHINES[machine], capture_output=True, text=True)
            name, seconds = path.relative_to(ROOT / "nbs"), time.monotonic() - begun
            print(f"{machine}: {name}: {'failed' if done.returncode else 'passed'}, {seconds:.0f} s", flush=True)
            if done.returncode:
                failed.append(f"{machine}: {name}\n{done.stderr[-2000:]}")
    return failed


def main(notebooks: list[Path]) -> int:
    failed, machines = [], []
    shutil.rmtree(MARGINS, ignore_errors=True)
    try:
        for machine in MACHINES:
            failed += run_on(machine, notebooks)
            machines.append(machine)
    except KeyboardInterrupt:  # a run takes an hour: what it has measured is shown
        print(f"stopped after {len(machines)} of {len(MACHINES)} machines")
    lines = [line for file in sorted(MARGINS.glob("*.jsonl")) for line in file.read_text().splitlines()]
    table = margin_table(map(json.loads, lines))
    print(table.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    print(*failed, sep="\n")
    return int(bool(failed) or len(machines) < len(MACHINES) or bool((table["errors"] < LEAST_ERRORS).any()))


if __name__ == "__main__":
    sys.exit(main([Path(p).resolve() for p in sys.argv[1:]] or trained()))
