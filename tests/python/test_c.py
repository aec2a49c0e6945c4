"""The C tests, so that one command runs everything: tools/ctest.py builds and runs tests/c."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(
    os.environ.get("PIPESHARD_TEST_C") == "0", reason="PIPESHARD_TEST_C=0: the C tests run apart"
)
def test_c_programs(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/ctest.py"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
