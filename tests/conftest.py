"""Fixtures that the whole suite shares."""

import os
import shlex
import signal
import sys
from pathlib import Path

import forked
import forked_worker
import pytest
from hypothesis import settings

# The same examples on every machine, and no deadline: a busy machine is not a fault.
settings.register_profile("house", derandomize=True, deadline=None)
settings.load_profile("house")


def pytest_configure(config):
    """Give Ctrl-C back: a background job of a shell starts with it ignored, and its children inherit that.

    Several workers share one preloaded process, and are forked from it where OMP_NUM_THREADS=1: no library has threads.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        forked.share(*(map(os.path.abspath, config.args) if one_thread_each() else ()))


def one_thread_each() -> bool:
    """Whether a process that has imported libraries can be forked: on Linux, where none of them started threads."""
    return sys.platform == "linux" and os.environ.get("OMP_NUM_THREADS") == "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs):
    """Workers of pytest-xdist are forked from the preloaded process."""
    for spec in specs if one_thread_each() else ():
        spec.python = shlex.join([sys.executable, forked_worker.__file__])


# They hold the longest tests, which begin first: no worker is alone with one of them at the end.
LONGEST = ("test_reports", "test_tags_export", "test_front_door", "test_depth_ablation", "test_cli")


def pytest_collection_modifyitems(items):
    """Keep a file's tests together, for the sake of what they share."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """What a test draws from torch without a seed is the same in every run, whatever ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real models and photos, named by CALIB_NB_DATA; a test that needs it skips where it is not."""
    folder = os.environ.get("CALIB_NB_DATA", "")
    if not folder or not Path(folder, "lfw", "images").is_dir():
        pytest.skip("real models and photos: set CALIB_NB_DATA to the folder that holds lfw/, faces_multi/ and models/")
    return Path(folder).resolve()


@pytest.fixture
def one_thread():
    """Torch on one thread: sums do not depend on how busy the machine is, and small networks are no slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
