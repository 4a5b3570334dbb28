"""Shortcuts inside the estimate: query directions at low rank, and curvature in diagonal blocks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from torch import Tensor

from influence_kit import models
from influence_kit.corpora.world import World, batch_of
from influence_kit.engine.factors import Factors
from influence_kit.engine.fitting import fit_ekfac
from influence_kit.engine.scans import score
from influence_kit.measures.correlations import correlations
from influence_kit.measures.cost import top_shared
from influence_kit.referees.curvature import GaussNewton

SALT = 0xBA7C


def batching(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Score some queries and sequences of a scan by every shortcut; write batching.parquet.

    A row per query, method and setting: agreement (correlation with the scores of the whole), top (share of its ten most
    influential that stay), stored (numbers kept over those of the whole). Methods: "rank" (query batching, setting is r),
    "random" (the same r by a random projection in place of the best one), "blocks" (setting is O; stored counts the factors'
    numbers), and "redrawn" (O = 1 fitted on other sequences and labels: what any fit leaves open). `share` is r / width;
    `positions` how many positions the query's loss can reach, which bounds the rank of its gradient.

    parameters: queries, sequences (how many), fit (sequences of each fit by blocks), blocks (the O beside 1), and an
    extra's own.
    """
    world, rng = World.load(inputs["world"]), np.random.default_rng([parameters["seed"], SALT])
    model = models.load(inputs["model"], parameters["fraction"], parameters["device"])
    factors = Factors.load(inputs["influence"] / "factors.safetensors")
    with safe_open(str(inputs["influence"] / "scores.safetensors"), "pt") as file:
        scanned, scored = (file.get_tensor(name).numpy() for name in ("rows", "queries"))
    asked = np.sort(rng.permutation(scored)[: parameters["queries"]])
    queries = batch_of(world.queries, asked)
    sequences = batch_of(world.sequences, np.sort(rng.permutation(scanned)[: parameters["sequences"]]))
    damping, width = parameters["damping"], min(min(each.eigenvalues.shape) for each in factors.layers.values())
    ranks = [2**i for i in range(width.bit_length()) if 2**i < width] + [width]
    orders = [1, *parameters["blocks"]]
    done, steps = 0, len(ranks) + len(orders) + 3

    def scores_of(factors: Factors, **how) -> np.ndarray:
        nonlocal done
        done += 1
        progress(done, steps, "shortcuts")
        return score(model, factors, queries, sequences, damping, self_influence=False, **how).values.numpy()

    positions = (queries["loss_mask"].int() * torch.arange(queries["loss_mask"].shape[1])).max(1).values.numpy()
    rows: list[dict] = []

    def keep(method: str, size: int, found: np.ndarray, whole: np.ndarray, stored: float) -> None:
        same = {"agreement": correlations(found, whole), "top": top_shared(found, whole)}
        about = {"method": method, "setting": size, "share": size / width if method in ("rank", "random") else float("nan"), "stored": stored}
        rows.extend(
            {"query": int(q), "positions": int(p), **about, **{name: float(each[i]) for name, each in same.items()}}
            for i, (q, p) in enumerate(zip(asked, positions, strict=True))
        )

    whole = scores_of(factors)
    for rank, found in projected(GaussNewton(model, factors, sequences, damping), queries, ranks, parameters["seed"]).items():
        keep("random", rank, found, whole, stored_at(factors, rank))
    for rank in ranks:
        keep("rank", rank, scores_of(factors, rank=rank), whole, stored_at(factors, rank))
    drawn = rng.permutation(world.sequences.num_rows)[: 2 * parameters["fit"]]
    first, second = (batch_of(world.sequences, np.sort(part)) for part in np.array_split(drawn, 2))
    fits = {o: fit_ekfac(model, first, parameters["layers"], seed=parameters["seed"], blocks=o) for o in orders}
    whole = scores_of(fits[1])
    for blocks, fitted in fits.items():
        if blocks > 1:
            keep("blocks", blocks, scores_of(fitted), whole, numbers(fitted) / numbers(fits[1]))
    again = fit_ekfac(model, second, parameters["layers"], seed=parameters["seed"] + 1)
    keep("redrawn", 1, scores_of(again), whole, 1.0)
    pq.write_table(pa.Table.from_pylist(rows), out / "batching.parquet")


def stored_at(factors: Factors, rank: int) -> float:
    """Numbers that a query direction takes at this rank, r (P + M') a layer, over P M'."""
    shapes = [each.eigenvalues.shape for each in factors.layers.values()]
    return sum(min(rank, p, m) * (p + m) for p, m in shapes) / sum(p * m for p, m in shapes)


def numbers(factors: Factors) -> int:
    """Numbers that the factors hold: eigenvectors and eigenvalues of all layers."""
    bases = {id(q): q.numel() for each in factors.layers.values() for q in (*(each.inputs or ()), *(each.outputs or ()))}
    return sum(bases.values()) + sum(each.eigenvalues.numel() for each in factors.layers.values())


def projected(curvature: GaussNewton, queries: dict[str, Tensor], ranks: Iterable[int], seed: int) -> dict[int, np.ndarray]:
    """Scores [Q, N] of the curvature's sequences, every direction projected to a random subspace of each rank (nested ones).

    The projection acts on the narrower side of each layer, so that the layer's full rank leaves the direction as it is.
    """
    generator, ranks = torch.Generator().manual_seed(seed), list(ranks)
    directions = curvature.split(curvature.precondition(curvature.gradients(queries)))
    spans = {}
    for name, (p, m) in curvature.shapes.items():
        noise = torch.randn(min(p, m), min(p, m), generator=generator, dtype=torch.float64)
        spans[name] = torch.linalg.qr(noise)[0].to(directions[name])

    def narrowed(name: str, each: Tensor) -> Tensor:
        p, m = curvature.shapes[name]
        return (each @ spans[name]) if m <= p else (each.mT @ spans[name])

    asked = {name: narrowed(name, each) for name, each in directions.items()}
    parts: dict[int, list[Tensor]] = {rank: [] for rank in ranks}
    total, step = len(curvature.sequences["input_ids"]), 32
    for start in range(0, total, step):
        some = {name: tensor[start : start + step] for name, tensor in curvature.sequences.items()}
        found = {name: narrowed(name, each) for name, each in curvature.split(curvature.gradients(some)).items()}
        for rank in ranks:
            pairs = ((asked[n][..., :rank].flatten(1), found[n][..., :rank].flatten(1)) for n in asked)
            parts[rank].append(sum(a @ b.T for a, b in pairs))  # type: ignore[arg-type]
    return {rank: torch.cat(each, 1).cpu().numpy() for rank, each in parts.items()}
