"""The tests that pytest was asked for, imported by importing this module: workers forked afterwards have them."""

import contextlib
import io
import json
import os

import forked
import pytest


class ModulesOnly:
    """Imports every file of tests and makes nothing of its names: that is done once, in the worker."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_pycollect_makeitem(self):
        return []


with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    words = json.loads(os.environ[forked.COLLECTED])
    pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *words], plugins=[ModulesOnly()])
