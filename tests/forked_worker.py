"""A worker of pytest-xdist, forked from the preloaded process: it has imported every library and every test already.

pytest-xdist starts it as it would start Python: `forked_worker.py -u -c CODE`, and talks to it over stdin and stdout.
"""

import atexit
import logging
import os
import sys
import types

import forked


def work(code: str, *files) -> None:
    """Execute what pytest-xdist sends, with the standard files of the process that it started."""
    forked.use_standard_files(files)
    sys.modules["__main__"] = types.ModuleType("__main__")  # as behind `python -c`: children import no main file
    sys.argv = ["-c"]
    logging.root.handlers.clear()  # set up by a library, for standard errors that are closed
    exec(code, {"__name__": "__main__"})
    atexit._run_exitfuncs()  # a forked process leaves them out


if __name__ == "__main__":
    worker = forked.start(work, sys.argv[-1], *forked.standard_files())
    for number in (0, 1):  # the worker has them: the end of its input is the end of it
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    worker.join()
    os._exit(worker.exitcode or 0)
