"""Files and folders that are written: by several runs at once, through links, under long names, after kills."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest

from calib_nb.core import run as files
from calib_nb.core.errors import CalibError, InputError
from calib_nb.core.run import atomic_file, atomic_folder, made_once, private_folder
from calib_nb.report import run_report


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


def test_a_folder_is_locked_until_it_is_in_place(tmp_path, monkeypatch):
    refused, replace = [], os.replace

    def replace_while_another_comes(*paths):
        try:
            with atomic_folder(tmp_path / "set"):
                pass
        except InputError as e:
            refused.append(e)
        replace(*paths)

    (tmp_path / "set").mkdir()
    with atomic_folder(tmp_path / "set") as folder:
        (folder / "a").write_text("1")
        monkeypatch.setattr(files.os, "replace", replace_while_another_comes)
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
