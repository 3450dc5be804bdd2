"""Many runs: what is run again and what is not, failures, kills, and the page that compares them."""

import html
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from calib_nb.batch import (
    Entry,
    batch_summary,
    changes,
    drop_bar,
    drop_text,
    read_list,
    row_of_run,
    run_all,
    write_index,
)
from calib_nb.cli import main
from calib_nb.core.errors import CalibError, InputError
from calib_nb.core.run import atomic_folder, hash_outputs, write_json
from calib_nb.report import check_parameters, run_path, sources

EVIL = '"><script>alert(1)</script>'


def table(drop=0.1, low=0.0, high=0.2, verdict="within budget", **more):
    rows = {"model": ["float", "INT8"], "drop": [None, drop], "drop_low": [None, low], "drop_high": [None, high]}
    return pd.DataFrame(rows | {"verdict": ["reference", verdict], **more})


def write_run(folder: Path, metrics: pd.DataFrame | None, manifest: dict) -> None:
    """A run folder as `run_report` leaves it."""
    with atomic_folder(folder) as partial:
        (partial / "report.html").write_text("a report")
        if metrics is not None:
            metrics.to_csv(partial / "metrics.csv", index=False)
        write_json(partial / "manifest.json", manifest | {"outputs": hash_outputs(partial)})


@pytest.fixture(autouse=True)
def still(monkeypatch, request):
    """The package stays as it is while a test runs, whoever works on it; other processes read the real one."""
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr("calib_nb.report._package", lambda: "one version")


@pytest.fixture
def fake(monkeypatch):
    """Reports that take no time: those whose name begins with "bad" fail. What was run is listed."""
    ran = []

    def run(report, parameters, *, code=False, root=None, progress=True):
        values = check_parameters(report, parameters)
        ran.append(values.get("name", ""))
        if str(values.get("name")).startswith("bad"):
            raise CalibError(f"report {report} failed", fix=f"look at {EVIL}\nand so on")
        if str(values.get("name")).startswith("full"):
            raise OSError(28, "No space left on device")
        write_run(run_path(report, values, root), table(), {"made_from": sources(report, values, code=code)})

    monkeypatch.setattr("calib_nb.batch.run_report", run)
    return ran


def listed(folder: Path, *parameters: dict, report: str = "quantize") -> Path:
    path = folder / "list.yaml"
    path.write_text(yaml.safe_dump([{"report": report, "parameters": p} for p in parameters]))
    return path


def test_a_list_goes_on_past_failures_and_runs_only_what_it_must(fake, tmp_path):
    spec, root = listed(tmp_path, {"name": "a"}, {"name": "bad"}, {"name": "full"}, {"name": "b"}), tmp_path / "out"
    index, runs = run_all(spec, root=root, progress=False)
    assert list(runs.state) == ["run", "failed", "failed", "run"] and fake == ["a", "bad", "full", "b"]
    assert "No space left" in runs.error[2] and runs.error.str.count("\n").sum() == 0
    assert batch_summary(runs) == "4 runs: 2 run, 2 failed"
    page = index.read_text(encoding="utf-8")
    assert "<script>alert" not in page and html.escape(EVIL) in page and page.count("<script>") == 1
    fake.clear()
    assert list(run_all(spec, root=root, progress=False)[1].state) == ["unchanged", "failed", "failed", "unchanged"]
    assert fake == ["bad", "full"]
    fake.clear()
    again = run_all(listed(tmp_path, {"name": "a"}, {"name": "b", "seed": 1}), root=root, progress=False)[1]
    assert list(again.state) == ["unchanged", "run"] and list(again.why) == ["", "parameters"] and fake == ["b"]
    spec = listed(tmp_path, {"name": "a"}, {"name": "bad"}, {"name": "b"})
    forced = run_all(spec, root=root, force=True, progress=False)[1]
    assert list(forced.why) == ["forced", "new", "parameters"] and list(forced.state) == ["run", "failed", "run"]


def test_what_a_run_depends_on(fake, tmp_path, monkeypatch):
    """A change of the model, of an image in a folder, of the config's images, of a version, of a file of the run."""
    images, chosen, root = tmp_path / "images", tmp_path / "chosen", tmp_path / "out"
    for folder in (images, chosen):
        folder.mkdir()
        (folder / "1.jpg").write_bytes(b"one")
    model, config = tmp_path / "m.onnx", tmp_path / "c.json"
    model.write_bytes(b"weights")
    write_json(config, {"default_loader": {"dataset_path": str(chosen)}})
    values = {"model": str(model), "images": str(images), "config": str(config), "name": "x"}
    spec = listed(tmp_path, values)
    (entry,) = read_list(spec)
    run_all(spec, root=root, progress=False)
    assert changes(entry, root) == ""

    def repaired(why: str) -> None:
        assert changes(entry, root) == why
        run_all(spec, root=root, progress=False)
        assert changes(entry, root) == ""

    model.write_bytes(b"others!")
    repaired("inputs")
    (images / "2.jpg").write_bytes(b"two")
    repaired("inputs")
    (chosen / "1.jpg").write_bytes(b"uno")
    repaired("inputs")
    (root / entry.run / "metrics.csv").write_text("model\n")
    repaired("its files")
    (root / entry.run / "report.html").unlink()
    repaired("its files")
    with monkeypatch.context() as patched:
        patched.setattr("calib_nb.report.versions", lambda: {"numpy": "0"})
        assert changes(entry, root) == "versions of packages"
    assert changes(entry, root, code=True) == "--code"
    (root / entry.run / "manifest.json").write_text("[]")
    repaired("new")
    (root / entry.run / "notes.txt").write_text("a reader's own file")
    assert changes(entry, root) == ""


def test_jobs_run_at_the_same_time(monkeypatch, tmp_path):
    meet = threading.Barrier(3, timeout=20)

    def run(report, parameters, *, code=False, root=None, progress=True):
        meet.wait()
        write_run(run_path(report, parameters, root), None, {})

    monkeypatch.setattr("calib_nb.batch.run_report", run)
    spec = listed(tmp_path, *({"name": f"n{k}"} for k in range(3)))
    runs = run_all(spec, jobs=3, root=tmp_path / "out", progress=False)[1]
    assert list(runs.state) == ["run"] * 3 and list(runs.run) == [f"quantize/demo/n{k}" for k in range(3)]


UNITS = [
    ("quantize", {"budget": 0.01}, {}, 0.004, "0.0040 (0.0010 to 0.0070), budget 0.01"),
    ("edgeface", {"budget": 1.0}, {}, 0.004, "0.40 (0.10 to 0.70) points of accuracy, budget 1"),
    ("yunet", {"budget": -1}, {}, 0.004, "0.40 (0.10 to 0.70) points of F1"),
    ("tags", {"budget": 0.5}, {}, 0.004, "0.0040 (0.0010 to 0.0070) points of mAP, budget 0.5"),
    ("depth", {"good_pct": 5.0}, {"abs_rel": [0.1, 0.104]}, 0.004, "4.0 (1.0 to 7.0) % of abs_rel, budget 5"),
]


@pytest.mark.parametrize(("report", "parameters", "more", "drop", "text"), UNITS, ids=[unit[0] for unit in UNITS])
def test_a_drop_has_the_unit_of_its_budget(report, parameters, more, drop, text, tmp_path):
    entry = Entry(report, {}, f"{report}/m/x")
    write_run(tmp_path / entry.run, table(drop, drop - 0.003, drop + 0.003, **more), {"parameters": parameters})
    assert drop_text(row_of_run(entry, tmp_path)) == text


def test_the_worst_of_several_files_and_reports_without_a_drop(tmp_path):
    several = pd.DataFrame(
        {
            "model": ["float", "a", "b", "c"],
            "drop": [None, 0.5, 0.1, 0.9],
            "drop_low": 0.0,
            "drop_high": 1.0,
            "verdict": ["reference", "undecided", "over budget", "undecided"],
            "size_mb": [4.0, 1.0, 2.0, 1.0],
            "latency_ms": [3.0, None, None, None],
        }
    )
    tags, npu, chosen = (Entry(name, {}, f"{name}/m/x") for name in ("tags", "npu-config", "calibration-set"))
    write_run(tmp_path / tags.run, several, {})
    write_run(tmp_path / npu.run, pd.DataFrame({"check": ["a"], "passed": [False]}), {})
    covered = {"measure": ["luma_mean", "luma_std", "quality"], "covered": [0.99, 0.96, 0.2]}
    write_run(tmp_path / chosen.run, pd.DataFrame(covered), {})
    row = row_of_run(tags, tmp_path)
    assert (row["model"], row["verdict"], row["size_mb"]) == ("b", "over budget", (4.0, 2.0))
    assert row_of_run(npu, tmp_path)["verdict"] == "not fit to compile with"
    assert row_of_run(chosen, tmp_path)["verdict"] == "covers the pool"
    page = write_index([tags, npu, chosen], pd.DataFrame({"state": ["run"] * 3, "error": [""] * 3}), tmp_path)
    text = page.read_text(encoding="utf-8")
    rows = re.search(r'class="runs">(.*?)</table>', text, re.S)[1]
    assert rows.count("<tr><td") == 3 and "time not measurable here" in text and "the worst of its files: b" in text
    links = re.findall(r'href="([^"]+)"', text)
    assert links and all((tmp_path / link).is_file() for link in links) and "http" not in text


def test_bars_stay_in_their_frame():
    row = {"verdict": "over budget", "unit": "", "drop": 50.0, "low": -40.0, "high": 90.0, "budget": 0.5}
    numbers = [float(x) for x in re.findall(r'(?:x1?|x2)="([\d.]+)"', drop_bar(row))]
    assert all(0 <= x <= 210 for x in numbers)
    beyond = "8l5 5l-5 5z"
    assert beyond in drop_bar(row) and beyond not in drop_bar(row | {"drop": 0.5, "low": 0.3, "high": 0.9})
    for zero in ({"budget": 0.0}, {"drop": 0.0, "low": 0.0, "high": 0.0}, {"low": float("nan"), "high": float("nan")}):
        assert "nan" not in drop_bar(row | zero).lower()
    assert drop_text(row | {"drop": -0.0, "low": -0.0, "high": 0.0}).startswith("0.0")


def test_lists_that_cannot_be_used(tmp_path):
    for text in (
        "[]",
        "a: 1",
        "- report: quantise",
        "- {report: quantize, parameters: [1]}",
        "- {report: quantize, x: 1}",
    ):
        (tmp_path / "list.yaml").write_text(text)
        with pytest.raises(InputError):
            run_all(tmp_path / "list.yaml", root=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="write the same run"):
        run_all(listed(tmp_path, {"name": "a"}, {"name": "a"}), root=tmp_path / "out")


def test_the_command(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CALIB_NB_OUTPUTS", str(tmp_path / "out"))
    spec = str(listed(tmp_path, {"name": "a"}, {"name": "bad"}))
    assert main(["report", "--all", spec, "--jobs", "2", "--quiet"]) == 1
    shown = capsys.readouterr()
    assert "failed: quantize/demo/bad: report quantize failed" in shown.out and "2 runs: 1 run, 1 failed" in shown.out
    assert shown.err.count("\n") == 1 and "1 of 2 reports failed" in shown.err
    assert main(["report", "--all", str(listed(tmp_path, {"name": "a"})), "--quiet"]) == 0
    assert "1 run: 1 unchanged" in capsys.readouterr().out
    assert main(["report", "quantize", "--force"]) == 2 and main(["report", "--all", spec, "--jobs", "0"]) == 2


def notebook(path: Path) -> Path:
    """A report that waits for a file named "go" beside it, if it is called "slow"."""
    head = 'name = "run"  # run name\nfolder = ""  # where "go" will be\nrun_dir = ""'
    body = """
import time
from pathlib import Path

import pandas as pd
from calib_nb.report import open_run, save_metrics

run = open_run("mine", "", name=name, run_dir=run_dir)
Path(folder, f"{name}.begun").touch()
while name == "slow" and not Path(folder, "go").exists():
    time.sleep(0.05)
save_metrics(run, pd.DataFrame({"model": ["float"], "score": [1.0]}))
run.finish({"name": name})
"""
    cells = [nbformat.v4.new_code_cell(head, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(body)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def waiting_list(folder: Path) -> Path:
    report = str(notebook(folder / "mine.ipynb"))
    return listed(folder, *({"name": n, "folder": str(folder)} for n in ("first", "slow", "last")), report=report)


@pytest.mark.slow
def test_a_list_that_was_killed_goes_on(tmp_path):
    spec, root = waiting_list(tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "calib_nb", "report", "--all", str(spec), "--quiet"]
    process = subprocess.Popen(command, env=os.environ | {"CALIB_NB_OUTPUTS": str(root)}, cwd=tmp_path)
    until = time.monotonic() + 120
    while not (tmp_path / "slow.begun").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert (tmp_path / "slow.begun").exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    page = (root / "index.html").read_text(encoding="utf-8")
    assert "3 runs: 1 run, 2 waiting" in page
    (tmp_path / "go").touch()
    runs = run_all(spec, root=root, progress=False)[1]
    assert list(runs.state) == ["unchanged", "run", "run"]
    assert sorted(p.name for p in (root / "mine" / "demo").iterdir()) == ["first", "last", "slow"]


@pytest.mark.slow
def test_runs_on_a_cluster(tmp_path):
    pytest.importorskip("distributed", reason="the extra cluster is not installed")
    from calib_nb.core.cluster import cluster

    (tmp_path / "go").touch()
    spec, root = waiting_list(tmp_path), tmp_path / "out"
    with cluster("local:2"):
        runs = run_all(spec, root=root, progress=False)[1]
    assert list(runs.state) == ["run"] * 3, runs.error.tolist()
    assert set(run_all(spec, root=root, progress=False)[1].why) <= {"", "the package"}  # which somebody may be editing
