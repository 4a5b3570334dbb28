"""Canaries of Atlas: influence on their continuation, and how well canaries that were never trained on are continued."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import from_numpy

from influence_kit import models
from influence_kit.corpora.world import World, batch_of, token_matrix
from influence_kit.engine.factors import Factors
from influence_kit.engine.scans import score
from influence_kit.findings.stages.written import write_scores


def canaries(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Score all copies of all canaries, and as many other sequences as asked for, for every canary query.

    Writes scores.safetensors as `influence` does, and fresh.parquet: log_p in nats of the second halves of as many canaries
    that nobody was trained on, drawn like the planted ones.
    """
    world = World.load(inputs["world"])
    model = models.load(inputs["model"], parameters["fraction"], parameters["device"])
    factors = Factors.load(inputs["influence"] / "factors.safetensors")
    rng = np.random.default_rng([parameters["seed"], 0xCA9A])
    canary = world.sequences["canary"].to_numpy()
    others = rng.permutation(np.flatnonzero(canary < 0))[: parameters["sequences"]]
    rows = np.sort(np.concatenate([np.flatnonzero(canary >= 0), others]))
    asked = np.flatnonzero(world.queries["kind"].to_numpy(zero_copy_only=False) == "canary")
    queries = batch_of(world.queries, asked)
    scores = score(
        model,
        factors,
        queries,
        batch_of(world.sequences, rows),
        parameters["damping"],
        corpus_size=world.sequences.num_rows,
        resume=out / "resume",
        progress=lambda done, to_do: progress(done / to_do, 1, "scan"),
    )
    write_scores(out, scores, rows, asked)
    kind = world.sequences["kind"].to_numpy(zero_copy_only=False)
    noise = np.unique(token_matrix(world.sequences)[(kind == "noise") | (kind == "canary"), 1:])
    fresh = {name: tensor.clone() for name, tensor in queries.items()}
    fresh["input_ids"][:, 1:] = from_numpy(rng.choice(noise, fresh["input_ids"][:, 1:].shape))
    log_p, _ = models.evaluate(model.cpu(), fresh)
    pq.write_table(pa.table({"log_p": log_p.numpy()}), out / "fresh.parquet")
