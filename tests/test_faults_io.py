"""Files and folders that are written: by several runs at once, through links, under long names, after kills."""

import contextlib
import ctypes
import functools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import nbformat
import numpy as np
import pytest
import yaml

from calib_nb.batch import run_all
from calib_nb.cli import _go_on, main
from calib_nb.core import run as files
from calib_nb.core.errors import CalibError, InputError
from calib_nb.core.parallel import Journal
from calib_nb.core.run import atomic_file, atomic_folder, made_once, private_folder
from calib_nb.core.settings import read_yaml
from calib_nb.graph.build import network
from calib_nb.npu.compile import compile_model, read_toolchain
from calib_nb.npu.config import generate_config, save_config
from calib_nb.report import check_parameters, report_parameters, run_path, run_report


def hidden(folder):
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def killed(act):
    """Call `act` in a process that ends as if it was killed."""
    child = os.fork()
    if not child:
        try:
            act()
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_of_two_runs_that_write_one_folder_one_is_refused_and_the_other_is_whole(tmp_path):
    with atomic_folder(tmp_path / "set") as first:
        (first / "a").write_text("first")
        with (
            pytest.raises(InputError, match="another run is writing .*set; wait for it"),
            atomic_folder(tmp_path / "set"),
        ):
            pass
        assert (first / "a").exists()
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["a"] and not hidden(tmp_path)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "renameat2"), reason="two names are not exchanged in one step here")
@pytest.mark.parametrize("step", range(3))
def test_a_kill_between_any_two_steps_leaves_the_old_folder_or_the_new_one(step, tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "set") as folder:
        (folder / "a").write_text("old")
    calls = []

    def killed_at(function, *arguments):
        if len(calls) == step:
            raise SystemExit
        calls.append(1)
        return function(*arguments)

    for owner, name in ((files, "_exchanged"), (files.Path, "rmdir")):
        monkeypatch.setattr(owner, name, functools.partial(killed_at, getattr(owner, name)))
    with contextlib.suppress(SystemExit), atomic_folder(tmp_path / "set") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "set" / "a").read_text() == ("old" if step < 2 else "new") and len(calls) == step
    monkeypatch.undo()
    with atomic_folder(tmp_path / "set") as folder:
        (folder / "a").write_text("newest")
    assert (tmp_path / "set" / "a").read_text() == "newest" and [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_folder_is_locked_until_it_is_in_place(tmp_path, monkeypatch):
    refused = []

    def while_another_comes(function, *paths):
        try:
            with atomic_folder(tmp_path / "set"):
                pass
        except InputError as e:
            refused.append(e)
        return function(*paths)

    (tmp_path / "set").mkdir()
    with atomic_folder(tmp_path / "set") as folder:
        (folder / "a").write_text("1")
        for owner, name in ((files.os, "replace"), (files, "_exchanged")):
            monkeypatch.setattr(owner, name, functools.partial(while_another_comes, getattr(owner, name)))
    monkeypatch.undo()
    assert len(refused) == 2  # the older folder leaves, the new one comes
    assert (tmp_path / "set" / "a").exists() and not hidden(tmp_path)


def test_many_runs_at_once_leave_one_whole_result(tmp_path):
    start = threading.Barrier(8)

    def write(number):
        start.wait()
        try:
            with atomic_folder(tmp_path / "set") as folder:
                for k in range(20):
                    (folder / f"{k}").write_text(str(number))
        except InputError:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(write, range(8))) >= 1
    texts = {p.read_text() for p in (tmp_path / "set").iterdir()}
    assert len(texts) == 1 and len(list((tmp_path / "set").iterdir())) == 20 and not hidden(tmp_path)


def test_what_killed_runs_left_goes_with_the_next_run(tmp_path):
    def write(act):
        with act:
            os._exit(9)

    for act in (
        lambda: write(atomic_file(tmp_path / "a.csv")),
        lambda: write(atomic_folder(tmp_path / "set")),
        lambda: made_once(tmp_path / "demo", "x", lambda new: os._exit(9)),
        lambda: write(private_folder(".kernel-", tmp_path)),
    ):
        killed(act)
    assert len(hidden(tmp_path)) == 4
    with atomic_file(tmp_path / "a.csv") as f, atomic_folder(tmp_path / "set"), private_folder(".kernel-", tmp_path):
        f.write("1")
    made_once(tmp_path / "demo", "x", lambda new: (new / "x").touch())
    assert not hidden(tmp_path) and (tmp_path / "a.csv").read_text() == "1"


def test_of_two_runs_that_write_one_journal_one_is_refused(tmp_path):
    first = Journal(tmp_path / "scores.jsonl", "v1")
    first.add([("a", 1)])
    with pytest.raises(InputError, match="another run is writing the journal"):
        Journal(tmp_path / "scores.jsonl", "v2")
    first.add([("b", 2)])
    first.close()
    assert Journal(tmp_path / "scores.jsonl", "v1").done == {"a": 1, "b": 2}


def test_links_stay_and_their_targets_are_written(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "note").write_text("old")
    (tmp_path / "far" / "set").mkdir()
    for name in ("note", "set"):
        (tmp_path / name).symlink_to(tmp_path / "far" / name)
    with atomic_file(tmp_path / "note") as f, atomic_folder(tmp_path / "set") as folder:
        f.write("new")
        (folder / "a").touch()
    assert (tmp_path / "note").is_symlink() and (tmp_path / "far" / "note").read_text() == "new"
    assert (tmp_path / "set").is_symlink() and (tmp_path / "far" / "set" / "a").exists()
    assert not hidden(tmp_path) and not hidden(tmp_path / "far")


@pytest.mark.parametrize("length", [1, 240, 255])
def test_names_as_long_as_the_system_takes(length, tmp_path):
    name = "n" * length
    with atomic_file(tmp_path / name) as f:
        f.write("1")
    assert (tmp_path / name).read_text() == "1"
    (tmp_path / name).unlink()
    with atomic_folder(tmp_path / name), atomic_folder(tmp_path / ("m" * length)):
        pass
    assert (tmp_path / name).is_dir() and not hidden(tmp_path)


def test_a_device_is_written_and_not_replaced():
    with atomic_file("/dev/null") as f:
        f.write("text")
    assert not os.path.isfile("/dev/null")


def test_wrong_kinds_of_outputs_are_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a folder"), atomic_file(tmp_path):
        pytest.fail("the work began")
    with pytest.raises(InputError, match="is a file"), atomic_folder(tmp_path / "file"):
        pytest.fail("the work began")
    for write in (atomic_file, atomic_folder):
        with pytest.raises(InputError, match="part of this path is a file"), write(tmp_path / "file" / "a" / "b"):
            pytest.fail("the work began")


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left.*a\.csv"), atomic_file(tmp_path / "a.csv"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="No space left.*/dev/full"), atomic_file("/dev/full") as f:
        f.write("1")


def notebook(path, code, *, kernel="python3", parameters='name = "demo"  # run name\nrun_dir = ""'):
    cells = [nbformat.v4.new_code_cell(code)]
    if parameters:
        cells.insert(0, nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    meta = {"kernelspec": {"name": kernel, "display_name": kernel, "language": "python"}} if kernel else {}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=meta), path)
    return str(path)


def test_reports_at_the_same_time_from_one_folder_do_not_meet(tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    work.chmod(0o500)
    mine = notebook(tmp_path / "mine.ipynb", "import os\nassert not os.listdir(), os.listdir()")
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run_report, mine, {"name": name}, root=tmp_path / "out") for name in ("n1", "n2")]
        assert all(run.result().page.is_file() for run in runs)
    assert not list(work.iterdir())


def test_a_kernel_that_dies_is_one_line_and_its_notebook_stays(tmp_path):
    mine = notebook(tmp_path / "mine.ipynb", "print('so far')\nimport os\nos.kill(os.getpid(), 9)", kernel="gone")
    with pytest.raises(CalibError, match=r"its kernel died.*demo\.failed\.ipynb"):
        run_report(mine, root=tmp_path / "out")
    assert "run_dir" in (tmp_path / "out/mine/demo/demo.failed.ipynb").read_text()
    assert not hidden(tmp_path / "out/mine/demo")


def test_a_notebook_without_kernel_metadata_and_without_parameters_runs(tmp_path):
    mine = notebook(tmp_path / "mine.ipynb", "print(1)", kernel="", parameters="")
    assert report_parameters(mine).empty
    with pytest.raises(InputError, match="no cell of it has the tag 'parameters'"):
        check_parameters(mine, {"count": 1})
    assert report_parameters(notebook(tmp_path / "b.ipynb", "1", kernel="")).index.tolist() == ["name", "run_dir"]


@pytest.mark.parametrize("text", ["", "text", "[]", "{}", '{"cells": 3, "nbformat": 4}', "[" * 900 + "]" * 900])
def test_what_is_no_notebook_is_one_line(text, tmp_path):
    (tmp_path / "x.ipynb").write_text(text)
    with pytest.raises(InputError, match=r"x\.ipynb .*(no notebook|not valid JSON|levels)"):
        report_parameters(str(tmp_path / "x.ipynb"))


def test_names_of_models_become_folders_and_names_of_runs_are_checked(tmp_path):
    folders = {"yunet (1).onnx": "yunet_1_", "my photos": "my_photos", "é+1.onnx": "é+1", "???.onnx": "_"}
    for model, folder in folders.items():
        assert run_path("yunet", {"model": f"a b/{model}"}, tmp_path) == tmp_path / "yunet" / folder / "run"
    assert run_path("yunet", {"name": "n" * 242}, tmp_path).name == "n" * 242
    with pytest.raises(InputError, match=r"n{60}\.\.\. \(250 characters\)' cannot be a folder.*at most 242"):
        run_path("yunet", {"name": "n" * 250}, tmp_path)


def test_a_missing_file_of_a_report_is_found_before_a_cell_runs(tmp_path):
    for report, key in (("yunet", "model"), ("calibration-set", "source_dir"), ("tags", "coco")):
        with pytest.raises(InputError, match=f"{key}: no such file or folder: nope"):
            run_report(report, {key: "nope"}, root=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A config, and a compiler on PATH that fails when its model is called wrong.onnx."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "images").mkdir()
    cv2.imwrite("images/0.png", np.zeros((8, 8, 3), np.uint8))
    for name in ("dxcom", "npu-compiler"):
        body = 'case "$*" in *wrong.onnx*) echo unsupported; exit 3;; *) for out; do :; done; echo ok > "$out/x";; esac'
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("right", "wrong"):
        network("y = Conv (x, w)", inputs={"x": (1, 3, 8, 8)}, w=np.ones((1, 3, 1, 1))).save(f"{name}.onnx")
    save_config(generate_config("yunet", "images", model="right.onnx", calibration_num=1), "c.json")
    return tmp_path


def test_a_compiler_leaves_the_files_of_others_alone(compiler):
    for name in ("out.log", "out_inputs/images.txt"):
        (compiler / name).parent.mkdir(exist_ok=True)
        (compiler / name).write_text("mine")
    assert compile_model("right.onnx", "c.json", "out").files == ("x",)
    assert compile_model("wrong.onnx", "c.json", "out").log.read_text() == "unsupported\n"
    with pytest.raises(InputError, match="out_inputs holds other files"):
        compile_model("right.onnx", "c.json", "out", toolchain="generic")
    for _ in range(2):  # its own folder of inputs may be written again
        assert compile_model("right.onnx", "c.json", "second", toolchain="generic").files == ("x",)
    assert (compiler / "out.log").read_text() == (compiler / "out_inputs/images.txt").read_text() == "mine"
    assert not hidden(compiler)


def test_a_missing_model_is_named_before_the_config(compiler):
    with pytest.raises(InputError, match="no such model: nope.onnx"):
        compile_model("nope.onnx", "no-config.json", "out")


def test_a_linked_output_of_a_compiler_stays_a_link(compiler):
    (compiler / "far").mkdir()
    (compiler / "out").symlink_to("far")
    assert compile_model("right.onnx", "c.json", "out").files == ("x",)
    assert (compiler / "out").is_symlink() and (compiler / "far" / "x").exists()


def test_a_line_break_in_a_name_is_refused_where_a_list_would_hold_it(compiler):
    (compiler / "images/0.png").rename(compiler / "images/0\n1.png")
    with pytest.raises(InputError, match="holds a line break"):
        compile_model("right.onnx", "c.json", "out", toolchain="generic")
    assert compile_model("right.onnx", "c.json", "out").files == ("x",)


SYSTEM = {
    "permission": (
        PermissionError(13, "Permission denied", "out/a"),
        "out/a: Permission denied; check the permissions",
    ),
    "full disk": (OSError(28, "No space left on device", "out/a"), "out/a: No space left on device; free some space"),
    "a link in a circle": (OSError(40, "Too many levels of symbolic links", "a"), "leads back to itself"),
    "a folder": (IsADirectoryError(21, "Is a directory", b"out"), "out: Is a directory; name a file"),
    "a rename": (OSError(18, "Invalid cross-device link", "a", None, "b"), "b: Invalid cross-device link"),
    "memory": (MemoryError(), "not enough memory"),
    "memory of OpenCV": (cv2.error("(-4:Insufficient memory) Failed to allocate 9 bytes"), "not enough memory"),
    "a name": (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), "not UTF-8"),
    "a long message": (InputError("x" * 20_000_000), "(20,000,000 characters)"),
}


@pytest.mark.parametrize("command", ["prepare --source-dir x --output-dir y", "verify --config x", "report --all x"])
@pytest.mark.parametrize("case", SYSTEM)
def test_what_the_system_refuses_is_one_line_in_every_command(command, case, monkeypatch, capsys):
    error, text = SYSTEM[case]

    def refuse(*_, **__):
        raise error

    for name in ("data.dataset.prepare", "npu.verify.verify", "batch.run_all"):
        monkeypatch.setattr(f"calib_nb.{name}", refuse)
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1 and len(err) < 5000


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("calib_nb.batch.run_all", lambda *_, **__: {}["x"])
    with pytest.raises(KeyError):
        main(["report", "--all", "x"])


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("prepare", "goes on where"),
        ("depth infer", "goes on where"),
        ("depth train", "goes on where"),
        ("tags train", "goes on where"),
    ]
    + [(command, "begins again") for command in ("quantize", "verify", "report", "depth compare")],
)
def test_what_ctrl_c_says_is_true_of_each_command(command, text):
    assert text in _go_on([*command.split(), "--model", "prepare"])


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE_YAML = {
    "alias bomb": BOMB,
    "merge bomb": "a0: &a0 {x: 1}\n" + "".join(f"a{k}: &a{k} {{<<: [*a{k - 1}, *a{k - 1}]}}\n" for k in range(1, 40)),
    "circle": "a: &a [*a]",
    "deep": "[" * 90_000,
    "deep by indentation": "".join(" " * k + "a:\n" for k in range(300)),
    "deep by aliases": "- &a0 []\n" + "".join(f"- &a{k + 1} [*a{k}]\n" for k in range(200)),
    "a number of 5,000 digits": "n: " + "9" * 5000,
    "code": "!!python/object/apply:os.system [touch owned]",
    "not text": "\x00\x01",
    "many documents": "a: 1\n---\nb: 2",
}


@pytest.mark.parametrize("case", HOSTILE_YAML)
def test_hostile_yaml_is_one_short_line_in_little_time(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.yaml"
    path.write_text(HOSTILE_YAML[case])
    start = time.process_time()
    for read in (read_yaml, read_toolchain, run_all):
        with pytest.raises(InputError, match=r"x\.yaml") as refused:
            read(path)
        assert len(str(refused.value)) < 500
    assert time.process_time() - start < 3 and [p.name for p in tmp_path.iterdir()] == ["x.yaml"]


def test_yaml_of_every_day_is_read_as_pyyaml_reads_it(tmp_path):
    text = "a: {<<: &m {x: 1, y: 2.5}, z: [*no, null]}".replace("*no", "no") + "\nb: 'x'\nc: |\n  two\n  lines\n"
    (tmp_path / "x.yaml").write_text(text)
    assert read_yaml(tmp_path / "x.yaml") == yaml.safe_load(text)
    (tmp_path / "x.yaml").write_text("name: 2026-01-31")
    assert read_yaml(tmp_path / "x.yaml") == {"name": "2026-01-31"}  # the text, where PyYAML makes a date
