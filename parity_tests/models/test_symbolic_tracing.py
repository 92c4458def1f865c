"""torch.fx, feature extraction and torch.jit.script: their suite in a process of its own, without shape checks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long(reason="traces, exports and scripts whole models")

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "parity_tests" / "support" / "tracing_suite.py"


def test_the_suite_passes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(SUITE), "--noconftest", "-q", "-p", "no:cacheprovider"],
        env={name: value for name, value in os.environ.items() if "PYTEST" not in name},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)
