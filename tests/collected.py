"""The tests that pytest was asked for, imported by importing this module: workers forked afterwards have them."""

import contextlib
import io
import json
import os

import forked
import pytest

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *json.loads(os.environ[forked.COLLECTED])])
