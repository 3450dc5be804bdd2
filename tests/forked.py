"""Processes that start in milliseconds: forked from one that has imported the heavy libraries.

A forked process has its own memory, folder, environment and output, as one of a shell has; what it saves is a second or
three of imports. What is tested about the start itself (lazy imports, signals, killing) needs a real one.
"""

import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
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
    "warm",
]


@cache
def server():
    """The context whose processes are forked from the preloaded one, which finds its modules by PYTHONPATH alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    folders = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(folders)):
        forkserver.ensure_running()
    return context


def start(target: Callable, *args, env: dict[str, str] | None = None):
    """A running process with this one's environment, or with that of `env`."""
    process = server().Process(target=_call, args=(dict(os.environ if env is None else env), target, args))
    process.start()
    return process


def _call(environment: dict[str, str], target: Callable, args: tuple) -> None:
    os.environ.clear()
    os.environ.update(environment)
    target(*args)


def _command(words: list[str], folder: str, output: dict[int, str]) -> None:
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in output.items():
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    from calib_nb.cli import main

    try:
        code = main(words)
    except BaseException:  # as the interpreter ends: a traceback and 1
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def calib_nb(
    *words: object, cwd: str | Path | None = None, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """One command line behind `calib-nb`, in a process; its standard output and errors are texts."""
    import tempfile

    words = [str(word) for word in words]
    with tempfile.TemporaryDirectory() as scratch:
        output = {number: str(Path(scratch, str(number))) for number in (1, 2)}
        process = start(_command, words, str(cwd or os.getcwd()), output, env=env)
        process.join()
        texts = [Path(path).read_text(encoding="utf-8") if Path(path).exists() else "" for path in output.values()]
    return subprocess.CompletedProcess(words, process.exitcode, *texts)
