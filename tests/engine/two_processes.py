"""Run under torchrun by test_processes.py: fit and score in every process, and write what each got.

torchrun --nproc-per-node 2 tests/engine/two_processes.py OUT [--kill fit|scan]
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from conftest import random_sequences, tiny_model
from safetensors.torch import save_file

from influence_kit import fit_ekfac, score, top_scores
from influence_kit.engine import resume
from influence_kit.engine.processes import rank_and_size


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


def main() -> None:
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
    main()
