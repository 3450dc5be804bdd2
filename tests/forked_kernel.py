"""A Jupyter kernel, forked from the preloaded process.

jupyter_client starts it as it would start ipykernel: `forked_kernel.py -f FILE`.
"""

import contextlib
import os
import signal
import sys
import threading
import types
from multiprocessing.connection import Connection

import forked


def serve(words: list[str], alive: Connection, *files: Connection) -> None:
    """Serve as `python -m ipykernel_launcher` does, until the end or until who asked for it has gone."""
    forked.use_standard_files(files)
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = ["ipykernel_launcher", *words]
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance()


def _end_with(alive: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        alive.recv_bytes()
    os._exit(1)


if __name__ == "__main__":
    alive, ours = forked.server().Pipe(duplex=False)
    # Nobody is its parent, whom it would ask after; matplotlib has been imported and would not choose again.
    environment = os.environ | {"JPY_PARENT_PID": "1", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    inline = "--IPKernelApp.exec_lines=%matplotlib inline"
    process = forked.start(serve, [*sys.argv[1:], inline], alive, *forked.standard_files(), env=environment)
    alive.close()
    signal.signal(signal.SIGINT, lambda *_: os.kill(process.pid, signal.SIGINT))
    process.join()
    os._exit(process.exitcode if process.exitcode >= 0 else 1)
