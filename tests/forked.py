"""Processes that start in milliseconds: forked from one that has imported the heavy libraries.

A forked process has its own memory, folder, environment and output, as one of a shell has; what it saves is a second or
three of imports. What is tested about the start itself (lazy imports, signals, killing) needs a real one.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent

# What most notebooks and commands import.
PRELOAD = [
    "forked",
    "notebook_run",
    "execnb.shell",
    "IPython",
    "matplotlib.pyplot",
    "pandas",
    "cv2",
    "scipy.stats",
    "onnx",
    "onnxruntime",
    "torch",
    "numba",
    "pytest",
    "typer.testing",
    "pydantic",
    "papermill",
    "ipykernel.kernelapp",
    "nbconvert",
    "warm",
]


# Names the socket of a server that another process has started.
SHARED = "CALIB_NB_TEST_FORKSERVER"
# What the server's pytest collects before anything is forked.
COLLECTED = "CALIB_NB_TEST_COLLECTED"


@cache
def server(collected: tuple[str, ...] = ()):
    """The context whose processes are forked from the preloaded one, which finds its modules by PYTHONPATH alone.

    It has also imported the tests that pytest finds behind the words `collected`.
    """
    context = multiprocessing.get_context("forkserver")
    if SHARED in os.environ:
        shared = forkserver._forkserver
        shared._forkserver_address = os.environ[SHARED]
        shared._forkserver_alive_fd = os.open(os.devnull, os.O_WRONLY)  # it lives as long as the one that started it
        shared.ensure_running = resource_tracker.ensure_running
        return context
    context.set_forkserver_preload([*PRELOAD, *["collected"][: len(collected)], "frozen"])
    folders = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    names = {"PYTHONPATH": os.pathsep.join(folders), COLLECTED: json.dumps(collected)}
    with mock.patch.dict(os.environ, names):
        forkserver.ensure_running()
    os.environ[SHARED] = forkserver._forkserver._forkserver_address  # for the processes that this one starts
    return context


def share(*collected: str) -> None:
    """Start the server now, for this process and those that it starts from now on, with the tests `collected`."""
    server(collected)
    server.cache_clear()  # whoever asks without words means the same one


def start(target: Callable, *args, env: dict[str, str] | None = None):
    """A running process with this one's environment, or with that of `env`."""
    process = server().Process(target=_call, args=(dict(os.environ if env is None else env), target, args))
    process.start()
    return process


def _call(environment: dict[str, str], target: Callable, args: tuple) -> None:
    os.environ.clear()
    os.environ.update(environment)
    fork_kernels()
    target(*args)


def fork_kernels() -> None:
    """Let this process start its Jupyter kernels as forked ones."""
    from ipykernel import kernelspec

    words = [sys.executable, str(HERE / "forked_kernel.py"), "-f", "{connection_file}"]
    kernelspec.make_ipkernel_cmd = lambda *_, **__: words


def start_script(code: str, *words: object, cwd=None, env: dict[str, str] | None = None, output: Path | None = None):
    """A running process of Python code, with `words` behind its name in sys.argv.

    Its standard output and errors go to the files 1 and 2 in the folder `output`, or nowhere.
    """
    files = {n: os.devnull if output is None else str(output / str(n)) for n in (1, 2)}
    return start(_script, code, [str(word) for word in words], str(cwd or os.getcwd()), files, env=env)


def standard_files() -> list[Connection]:
    """Standard input, output and errors of this process, for one that is started."""
    return [Connection(os.dup(number), readable=number == 0, writable=number > 0) for number in range(3)]


def use_standard_files(files: Sequence[Connection]) -> None:
    """Make those of another process this one's."""
    for number, file in enumerate(files):
        os.dup2(file.fileno(), number)
        file.close()
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))


def _script(code: str, words: list[str], folder: str, files: dict[int, str]) -> None:
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in files.items():
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    sys.argv, status = ["-c", *words], 0
    try:
        exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:  # as the interpreter ends: a traceback and 1
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def script(code: str, *words: object, cwd=None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Python code run to its end in a process; its standard output and errors are texts."""
    with tempfile.TemporaryDirectory() as scratch:
        process = start_script(code, *words, cwd=cwd, env=env, output=Path(scratch))
        process.join()
        texts = [
            file.read_text(encoding="utf-8") if file.exists() else "" for file in map(Path(scratch).joinpath, "12")
        ]
    return subprocess.CompletedProcess(words, process.exitcode, *texts)


def calib_nb(*words: object, cwd=None, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """One command line behind `calib-nb`, in a process; its standard output and errors are texts."""
    return script("import sys; from calib_nb.cli import main; sys.exit(main(sys.argv[1:]))", *words, cwd=cwd, env=env)


HEAVY = {"torch", "onnx", "onnxruntime", "cv2", "pandas", "matplotlib", "scipy", "pooch"}


def helps(*commands: str) -> dict[str, tuple[int, str, list[str]]]:
    """Of each command, all asked in one new process: exit code, text, and the heavy libraries loaded by then."""
    code = f"""if True:
        import contextlib, io, json, sys
        from calib_nb.cli import main
        answers = {{}}
        for command in {commands}:
            sys.argv[1:] = [*command.split(), "--help"]
            with contextlib.redirect_stdout(io.StringIO()) as text:
                status = main()
            answers[command] = status, text.getvalue(), sorted(set(sys.modules) & {HEAVY})
        print(json.dumps(answers))"""
    plain = os.environ | {"COLUMNS": "120", "NO_COLOR": "1", "FORCE_COLOR": ""}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain)
    assert result.returncode == 0, result.stderr[-1000:]
    return json.loads(result.stdout)


def kill(process) -> int:
    """End a process as `kill -9` does; its exit status."""
    process.kill()
    process.join()
    return process.exitcode
