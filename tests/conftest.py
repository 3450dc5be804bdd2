"""Fixtures that the whole suite shares."""

import os
import signal
from pathlib import Path

import forked
import pytest
from hypothesis import settings

# The same examples on every machine, and no deadline: a busy machine is not a fault.
settings.register_profile("house", derandomize=True, deadline=None)
settings.load_profile("house")


def pytest_configure(config):
    """Give Ctrl-C back: a background job of a shell starts with it ignored, and its children inherit that.

    Several workers share one preloaded process, which is made while they collect.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        forked.share()


# They hold the longest tests, which begin first: no worker is alone with one of them at the end.
LONGEST = ("test_reports", "test_tags_export", "test_front_door", "test_depth_ablation", "test_cli")


def pytest_collection_modifyitems(items):
    """Keep a file's tests together, for the sake of what they share."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


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
