"""A bank of models retrained on random halves of their corpus, and what each answers."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from influence_kit import models
from influence_kit.corpora.world import World, batch_of
from influence_kit.pipeline.stages import tuples
from influence_kit.pipeline.stages.influence import scored_queries
from influence_kit.referees.retraining import random_halves

APART = 1000  # between the seeds of repeated trainings: worlds count theirs in ones


def bank(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Train the model again on random halves, in the same order; write bank.safetensors: members bool [S, N] (which sequences
    each half holds), log_p [S, R, Q] (nats, of the scored queries, for each of R training seeds, the model's own first),
    queries int64 [Q] (their positions in the world's table), whole [Q] (the model's own log_p).

    parameters: model (those of the stage that trained it), subsets, repeats, seed, and an extra's own. Each answer is kept as
    soon as it is there, so that a killed bank trains none of its models twice.
    """
    world, trained = World.load(inputs["world"]), parameters["model"]
    recipe = replace(models.Recipe(**tuples(trained["recipe"])), checkpoints=(1.0,), evaluations=1)
    size = (trained["width"], trained["depth"])
    config = models.configure(trained["architecture"], world.vocabulary_size, *size, world.context)
    sequences, held_out = batch_of(world.sequences), batch_of(world.held_out)
    asked = scored_queries(world)
    queries = batch_of(world.queries, asked)
    members = random_halves(world.sequences.num_rows, parameters["subsets"], parameters["seed"])
    kept = out / "resume"
    kept.mkdir(parents=True, exist_ok=True)
    answers = []
    trainings = [(number, repeat) for number in range(len(members)) for repeat in range(parameters["repeats"])]
    for done, (number, repeat) in enumerate(trainings):
        path = kept / f"{number:04}-{repeat}.safetensors"
        if not path.exists():
            folder = kept / f"{number:04}-{repeat}"
            folder.mkdir(exist_ok=True)
            rows = torch.from_numpy(np.flatnonzero(members[number]))
            half = {name: tensor[rows] for name, tensor in sequences.items()}
            again = replace(recipe, seed=recipe.seed + APART * repeat)
            models.train(config, half, held_out, again, folder, device=parameters["device"])
            log_p, _ = models.evaluate(models.load(folder, 1.0), queries)
            temporary = path.with_suffix(".part")
            save_file({"log_p": log_p.contiguous()}, temporary)
            temporary.replace(path)
            shutil.rmtree(folder)
        answers.append(load_file(path)["log_p"])
        progress(done + 1, len(trainings), "retrained models")
    whole, _ = models.evaluate(models.load(inputs["model"], parameters["fraction"]), queries)
    log_p = torch.stack(answers).unflatten(0, (len(members), parameters["repeats"]))
    tensors = {"members": torch.from_numpy(members), "log_p": log_p, "whole": whole}
    save_file({**tensors, "queries": torch.from_numpy(asked)}, out / "bank.safetensors")
