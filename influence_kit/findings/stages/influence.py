"""EK-FAC factors and influence scores of one checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import from_numpy

from influence_kit import models
from influence_kit.corpora.world import World, batch_of
from influence_kit.engine.factors import Factors
from influence_kit.engine.fitting import fit_ekfac
from influence_kit.engine.scans import score


def influence(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Fit EK-FAC at one checkpoint and score the scan; write factors.safetensors and scores.safetensors.

    scores.safetensors: values [Q, N] (nats at epsilon = 1), self_influence [N], query_norm [Q], rows [N] and queries [Q]
    (positions in the world's tables).
    """
    world = World.load(inputs["world"])
    model = models.load(inputs["model"], parameters["fraction"], parameters["device"])
    rng = np.random.default_rng([parameters["seed"], 0x5CA7])
    total = world.sequences.num_rows
    fit_rows = np.sort(rng.permutation(total)[: parameters["fit"]])
    rows = scan_rows(world, parameters["sequences"], rng)
    asked = scored_queries(world)
    share = len(fit_rows) * 2 / (len(fit_rows) * 2 + len(rows))
    kept = out / "resume" / "factors.safetensors"
    if kept.exists():
        factors = Factors.load(kept)
    else:
        factors = fit_ekfac(
            model,
            batch_of(world.sequences, fit_rows),
            parameters["layers"],
            seed=parameters["seed"],
            resume=out / "resume" / "fit",
            progress=lambda done, to_do: progress(share * done / to_do, 1, "factors"),
        )
        kept.parent.mkdir(parents=True, exist_ok=True)
        factors.save(kept)
    scores = score(
        model,
        factors,
        batch_of(world.queries, asked),
        batch_of(world.sequences, rows),
        parameters["damping"],
        corpus_size=total,
        resume=out / "resume" / "scan",
        progress=lambda done, to_do: progress(share + (1 - share) * done / to_do, 1, "scan"),
    )
    assert scores.self_influence is not None
    tensors = {"values": scores.values, "self_influence": scores.self_influence, "query_norm": scores.query_norm}
    tensors |= {"rows": from_numpy(rows), "queries": from_numpy(asked)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "scores.safetensors")
    os.replace(kept, out / "factors.safetensors")


def scan_rows(world: World, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of the sequences to score: those the world marks with `scan`, else `limit` of them at random."""
    if "scan" in world.sequences.column_names:
        return np.flatnonzero(world.sequences["scan"].to_numpy(zero_copy_only=False))
    return np.sort(rng.permutation(world.sequences.num_rows)[:limit])


def scored_queries(world: World) -> np.ndarray:
    """Positions of the queries to score: those the world marks with `scored`, of Atlas facts in both languages and canaries.

    Every query of a world that has neither.
    """
    if "scored" in world.queries.column_names:
        return np.flatnonzero(world.queries["scored"].to_numpy(zero_copy_only=False))
    if world.name != "atlas":
        return np.arange(world.queries.num_rows)
    kind, availability = (world.queries[name].to_numpy(zero_copy_only=False) for name in ("kind", "availability"))
    return np.flatnonzero((kind == "canary") | (availability == "both"))
