"""What most notebooks and commands load, loaded by importing this module: processes forked afterwards have it."""

import contextlib
import importlib
import pkgutil

import numpy as np

import calib_nb
from calib_nb.nets.pte import quietly

HEAVY = [
    "torch._dynamo",
    "torch.export",
    "executorch.exir",
    "executorch.backends.xnnpack.partition.xnnpack_partitioner",
]


def import_all() -> None:
    """The heavy libraries, as far as they are installed, and every module of the package."""
    modules = [m.name for m in pkgutil.walk_packages(calib_nb.__path__, "calib_nb.")]
    for name in (*HEAVY, *modules):
        if not name.endswith("__main__"):
            with contextlib.suppress(ImportError), quietly():
                importlib.import_module(name)


def load_kernels() -> None:
    """Compiled code is read from its cache at the first call."""
    from calib_nb.quant.ranges import RANGE_METHODS, ranges
    from calib_nb.quant.stats import channel_values, collect

    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 4, 4, 4)
    channel_values(values, 1)
    stats = collect([("a", {"x": values}), ("b", {"x": values})])
    for method in RANGE_METHODS:
        ranges(stats, method)


import_all()
load_kernels()
