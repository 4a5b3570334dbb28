"""Training one model of a family."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from influence_kit import models
from influence_kit.corpora.world import World, batch_of
from influence_kit.findings.stages import tuples


def train(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Train one model; write checkpoints, losses.json, and answers.parquet (step, query, log_p in nats, correct)."""
    world = World.load(inputs["world"])
    recipe = models.Recipe(**tuples(parameters["recipe"]))
    size = (parameters["width"], parameters["depth"])
    config = models.configure(parameters["architecture"], world.vocabulary_size, *size, world.context)
    device = parameters["device"]
    models.train(config, batch_of(world.sequences), batch_of(world.held_out), recipe, out, progress, device)
    steps = json.loads((out / "losses.json").read_text())["steps"]
    queries, parts = batch_of(world.queries), []
    for fraction in recipe.checkpoints:
        log_p, correct = models.evaluate(models.load(out, fraction), queries)
        columns = {"query": np.arange(len(log_p)), "log_p": log_p.numpy(), "correct": correct.numpy()}
        parts.append(pa.table({"step": np.full(len(log_p), round(fraction * steps)), **columns}))
    pq.write_table(pa.concat_tables(parts), out / "answers.parquet")
