"""Two gloo processes give what one gives, uneven shards included, also after one of them was killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two_processes import results

HERE = Path(__file__).parent


def torchrun(out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(HERE / "two_processes.py"), str(out), *options],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def assert_like_one(out: Path) -> None:
    expected = results()
    for rank in (0, 1):
        found = load_file(out / f"rank-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            if tensor.dtype == torch.int64:
                assert torch.equal(found[name], tensor), name
            else:
                torch.testing.assert_close(
                    found[name], tensor, rtol=1e-5, atol=1e-7 * float(tensor.abs().max()), msg=name
                )


def test_two_processes_equal_one(tmp_path):
    ran = torchrun(tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert_like_one(tmp_path)


@pytest.mark.parametrize("stage", ["fit", "scan"])
def test_killed_rank_leaves_a_state_to_go_on_from(tmp_path, stage):
    ran = torchrun(tmp_path, "--kill", stage)
    assert ran.returncode != 0 and not (tmp_path / "rank-1.safetensors").exists()
    kept = sorted(path.name for path in (tmp_path / "state" / stage).iterdir() if path.suffix == ".safetensors")
    assert kept, "nothing was kept"
    again = torchrun(tmp_path)
    assert again.returncode == 0, again.stderr[-2000:]
    assert_like_one(tmp_path)
    assert not list((tmp_path / "state").glob("*/*.safetensors"))


def test_a_scan_begun_by_two_is_finished_by_one(tmp_path):
    assert torchrun(tmp_path, "--kill", "scan").returncode != 0
    kept = {path.name for path in (tmp_path / "state" / "scan").iterdir() if path.suffix == ".safetensors"}
    assert kept
    seen = []
    found = results(tmp_path / "state", lambda stage: lambda done, to_do: seen.append((stage, done)))
    for name, tensor in results().items():
        if tensor.dtype.is_floating_point:
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7 * float(tensor.abs().max()))
