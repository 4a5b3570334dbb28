"""Paragraphs of real text continued from their middle: trained on and never seen, and what the continuation leans on."""

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
from influence_kit.errors import UserError
from influence_kit.findings.stages.written import write_scores

SHORTEST = 16  # targets: a shorter paragraph has no half that could be recited


def recital(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Score second halves of paragraphs, given their first halves, against those paragraphs and others that were trained on.

    parameters: fraction, seed, device, damping; queries (paragraphs of each of two kinds: trained on, and never seen),
    sequences (others in the scan, beside the paragraphs that are asked).
    Writes recital.parquet, a row for each paragraph read: trained, position (in the world's sequences, or in its held_out
    where it was never trained on), targets (of the second half), log_p (nats, theirs), recited (each of them is the likeliest),
    and asked (its row in the scores, -1 where it was only read); and scores.safetensors as `influence` does, whose `queries`
    are rows of that table.

    Raises UserError where the world has fewer paragraphs of 16 targets or more than are asked for.
    """
    world = World.load(inputs["world"])
    model = models.load(inputs["model"], parameters["fraction"], parameters["device"])
    factors = Factors.load(inputs["influence"] / "factors.safetensors")
    rng = np.random.default_rng([parameters["seed"], 0x2EC1])
    unseen, trained = rng.permutation(_long(world.held_out)), rng.permutation(_long(world.sequences))
    wanted = parameters["queries"]
    if not 1 <= wanted <= min(len(unseen), len(trained)):
        raise UserError(
            f"recital: queries={wanted!r} must be between 1 and {min(len(unseen), len(trained))}, the number of paragraphs of "
            f"{SHORTEST} targets or more that were trained on, or held out"
        )
    trained = trained[: len(unseen)]
    others = rng.permutation(np.setdiff1d(np.arange(world.sequences.num_rows), trained[:wanted]))[
        : parameters["sequences"]
    ]
    rows = np.sort(np.concatenate([trained[:wanted], others]))
    read = [second_halves(world.sequences, trained), second_halves(world.held_out, unseen)]
    place = np.concatenate([np.arange(len(trained)), np.arange(len(unseen))])
    asked = np.flatnonzero(place < wanted)
    batch = {name: from_numpy(np.concatenate([part[name] for part in read])) for name in read[0]}
    queries = {name: tensor[asked] for name, tensor in batch.items()}
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
    log_p, recited = models.evaluate(model.cpu(), batch)
    order = np.full(len(place), -1)
    order[asked] = np.arange(len(asked))
    columns = {"trained": np.arange(len(place)) < len(trained), "position": np.concatenate([trained, unseen])}
    columns |= {
        "targets": batch["loss_mask"].sum(1).numpy(),
        "log_p": log_p.numpy(),
        "recited": recited.numpy(),
        "asked": order,
    }
    pq.write_table(pa.table(columns), out / "recital.parquet")


def second_halves(table: pa.Table, rows: np.ndarray) -> dict[str, np.ndarray]:
    """`input_ids` int64 [N, T] and `loss_mask` bool [N, T] of the given rows, of whose targets the second half is left."""
    mask = _targets(table)[rows]
    count = mask.cumsum(1)
    return {
        "input_ids": token_matrix(table)[rows].astype(np.int64),
        "loss_mask": mask & (count > (count[:, -1:] + 1) // 2),
    }


def _targets(table: pa.Table) -> np.ndarray:
    """Where a token is a target, [N, T]; the first never is."""
    mask = token_matrix(table, "loss_mask").copy()
    mask[:, 0] = False
    return mask


def _long(table: pa.Table) -> np.ndarray:
    return np.flatnonzero(_targets(table).sum(1) >= SHORTEST)
