"""Benchmarks that have a small form run in it, so that they start where they are needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent / "benchmarks"


def test_the_gpu_benchmark_runs_on_a_cpu_with_tiny_shapes(tmp_path):
    command = [sys.executable, str(FOLDER / "gpu.py"), "--device", "cpu", "--tiny"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parents[1], timeout=600)
    assert ran.returncode == 0, ran.stderr[-2000:]
    lines = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    parity = [line for line in lines if line["step"] == "parity"]
    assert len(parity) == 3 and all(line["scores"] <= 1e-5 and line["same_top"] for line in parity)
    assert {"eigh", "goal", "rivals"} <= {line["step"] for line in lines}
