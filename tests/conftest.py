"""Fixtures that the whole suite shares."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real models and photos, named by CALIB_NB_DATA; a test that needs it skips where it is not."""
    folder = os.environ.get("CALIB_NB_DATA", "")
    if not folder or not Path(folder, "lfw", "images").is_dir():
        pytest.skip("real models and photos: set CALIB_NB_DATA to the folder that holds lfw/, faces_multi/ and models/")
    return Path(folder).resolve()
