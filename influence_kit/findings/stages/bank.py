"""A bank of models retrained on random halves of their corpus, and what each answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from influence_kit import models
from influence_kit.corpora.world import World, batch_of
from influence_kit.findings.stages.influence import scored_queries
from influence_kit.findings.stages.retrained import retrained
from influence_kit.referees.retraining import random_halves


def bank(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Train the model again on random halves, in the same order; write bank.safetensors: members bool [S, N] (which sequences
    each half holds), log_p [S, R, Q] (nats, of the scored queries, for each of R training seeds, the model's own first),
    queries int64 [Q] (their positions in the world's table), whole [Q] (the model's own log_p).

    parameters: model (those of the stage that trained it), subsets, repeats, seed, and an extra's own.
    """
    world = World.load(inputs["world"])
    asked = scored_queries(world)
    queries = batch_of(world.queries, asked)
    members = random_halves(world.sequences.num_rows, parameters["subsets"], parameters["seed"])
    halves = [np.flatnonzero(half) for half in members]
    log_p = retrained(parameters["model"], world, halves, parameters["repeats"], queries, out / "resume", progress)
    whole, _ = models.evaluate(models.load(inputs["model"], parameters["fraction"]), queries)
    tensors = {"members": torch.from_numpy(members), "log_p": log_p, "whole": whole}
    save_file({**tensors, "queries": torch.from_numpy(asked)}, out / "bank.safetensors")
