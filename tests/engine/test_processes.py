"""Two gloo processes give what one gives, uneven shards included, also after one of them was killed."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import random_sequences, tiny_model
from safetensors.torch import load_file, save_file

from influence_kit import fit_ekfac, score, top_scores
from influence_kit.engine import resume
from influence_kit.engine.processes import rank_and_size

TESTS = Path(__file__).parents[1]


def results(folder: Path | None = None, progress=None, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Labels, eigenvalues, scores, self-influence and ends of the ranking; 27 sequences, so that shards are uneven."""
    model, data = tiny_model("llama", dtype=dtype), random_sequences(27, padded=True)
    queries = random_sequences(3, seed=11)
    fitting, scanning = (None, None) if folder is None else (folder / "fit", folder / "scan")
    factors = fit_ekfac(model, data, batch_size=4, resume=fitting, progress=progress and progress("fit"))
    scores = score(
        model,
        factors,
        queries,
        data,
        batch_size=4,
        by_layer=True,
        resume=scanning,
        progress=progress and progress("scan"),
    )
    ends = top_scores(model, factors, queries, data, k=5, batch_size=4)
    found = {"labels": factors.labels, "values": scores.values, "self_influence": scores.self_influence}
    found |= {"by_layer": scores.by_layer, "ends": ends.values, "rows": ends.sequences}
    for name, layer in factors.layers.items():
        found[f"eigenvalues {name}"] = layer.eigenvalues
    few = {name: tensor[:3] for name, tensor in data.items()}  # one batch: the other process has nothing to read
    found["few"] = score(model, fit_ekfac(model, few, method="diagonal"), queries, few).values
    return {name: tensor.contiguous() for name, tensor in found.items()}


def torchrun(out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, __file__, str(out), *options],
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


def in_every_process() -> None:
    """What torchrun runs: fit and score, and write what each process got; `--kill`: one is killed in the middle."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kill", choices=["fit", "scan"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    resume.SAVE_SECONDS = -1
    torch.distributed.init_process_group("gloo")
    rank, _ = rank_and_size()

    def watched(stage: str):
        def kill(done: int, to_do: int) -> None:
            if rank == 1 and asked.kill == stage and done > 0.6 * to_do:
                os.kill(os.getpid(), 9)

        return kill

    found = results(asked.out / "state", watched)
    save_file(found, asked.out / f"rank-{rank}.safetensors")
    torch.distributed.barrier()  # a rank that leaves while another still sends aborts
    torch.distributed.destroy_process_group()
    # torch 2.13's native threads sometimes abort a process that takes its interpreter down ("without an active exception")
    os._exit(0)


if __name__ == "__main__":
    in_every_process()
