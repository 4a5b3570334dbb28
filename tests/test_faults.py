"""The harness that breaks things, in its short form: nothing lost, nothing silently wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, /dev/full")
def test_what_is_broken_is_mended_or_refused():
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "faults.py"), "--short"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "| **all** |" in done.stdout and "LOST" not in done.stderr and "WRONG" not in done.stderr
