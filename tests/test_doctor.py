"""calib-nb doctor: what is installed, held against what is asked for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from typer.testing import CliRunner

from calib_nb.commands import doctor
from calib_nb.core import machine
from calib_nb.core.machine import MachineFinding

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def fake_package(tmp_path, monkeypatch):
    """Installs a package that is nothing but metadata: a name, a version, and what it asks for."""

    def install(name: str, version: str, *requires: str) -> str:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = [
            "Metadata-Version: 2.1",
            f"Name: {name}",
            f"Version: {version}",
            *(f"Requires-Dist: {r}" for r in requires),
        ]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        return name

    monkeypatch.syspath_prepend(tmp_path)
    machine._installed.cache_clear()
    yield install
    machine._installed.cache_clear()


def test_what_a_package_asks_of_others_is_held_against_them(fake_package):
    old = fake_package(
        "runs-pte", "1.3.1", "numpy<1", "no-such-package", 'numpy<1; extra == "gpu"', 'x; python_version < "3"'
    )
    assert machine.conflicts_of(old) == [
        f"runs-pte asks for numpy<1: {machine._installed('numpy')}, where <1 is asked for",
        "runs-pte asks for no-such-package: not installed",
    ]
    fits = fake_package("fits", "1.0", "numpy>=1")
    assert machine.conflicts_of(fits) == []


def test_a_package_that_does_not_fit_its_neighbours_is_broken(fake_package, monkeypatch):
    fake_package("runs-pte", "1.3.1", "numpy<1")
    monkeypatch.setattr(machine, "requirements_of", lambda extra="": [Requirement("runs-pte")])
    (finding,) = machine.check_packages("torch")
    assert finding.state == "broken" and "numpy<1" in finding.value and "pip install" in finding.fix


def test_two_opencvs_of_different_versions_are_broken(fake_package):
    fake_package("opencv-contrib-python", "4.0")
    broken = [f for f in machine.check_python() if f.state == "broken"]
    assert [f.name for f in broken] == ["OpenCV"] and "opencv-contrib-python==" in broken[0].fix


def test_pins_are_those_of_this_python():
    pins = machine.pinned_versions()
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    plain = {line.split("==")[0].lower() for line in lines if "==" in line}
    assert len(pins) == len(plain) and "soupsieve" in pins
    assert all(version and ";" not in version for version in pins.values())


def test_every_extra_is_known_to_the_doctor():
    extras = set(machine._distribution().metadata.get_all("Provides-Extra"))
    assert set(doctor.EXTRAS) == extras - {"all"}


def test_only_what_is_broken_ends_with_exit_code_1(monkeypatch):
    for state, code in (("ok", 0), ("note", 0), ("missing", 0), ("broken", 1)):
        found = [MachineFinding("packages", "numpy", state, "1.0", "" if state == "ok" else "pip install numpy")]
        monkeypatch.setattr(doctor, "examine", lambda deep, folder, found=found: found)
        result = CliRunner().invoke(doctor.app, [])
        assert result.exit_code == code
        assert ("pip install numpy" in result.output) == (state in ("note", "broken"))
        page = CliRunner().invoke(doctor.app, ["--json"])
        assert (page.exit_code, json.loads(page.output)["passed"]) == (code, code == 0)


def test_a_fix_is_never_folded():
    fix = "calib-nb models fetch " + " ".join(f"model-{k}" for k in range(40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "examine", lambda deep, folder: [MachineFinding("system", "x", "missing", "y", fix)])
        assert fix in CliRunner().invoke(doctor.app, []).output


def test_a_library_that_ends_its_process_is_a_finding(monkeypatch):
    real = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **k: real([sys.executable, "-c", "import os; os.abort()"], **k)
    )
    finding = machine.probe_library("onnxruntime")
    assert finding.state == "broken" and finding.value


def test_it_answers_without_torch():
    code = (
        "import sys; from calib_nb.commands.doctor import examine; found = examine(); "
        "assert 'torch' not in sys.modules and 'executorch' not in sys.modules; print(len(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 40


@pytest.mark.slow
def test_deep_runs_every_library_that_is_installed():
    deep = {f.name: f for f in doctor.examine(deep=True) if f.part == "deep"}
    assert {"onnxruntime", "torch", "executorch", "cluster"} <= set(deep)
    assert [f for f in deep.values() if f.state != "ok"] == []
