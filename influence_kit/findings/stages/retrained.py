"""What models answer that are trained anew on changed corpora, many of them at once; shared by the stages that ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from influence_kit import models
from influence_kit.corpora.world import World, batch_of
from influence_kit.findings.stages import tuples
from influence_kit.recipes import how_many_together
from influence_kit.referees.retraining import answers

APART = 1000  # between the seeds of repeated trainings: worlds count theirs in ones


def retrained(
    trained: Mapping, world: World, corpora: Sequence[np.ndarray], repeats: int, queries: Mapping[str, Tensor], kept: Path, progress: Callable
) -> Tensor:
    """log_p [C, R, Q] (nats) of all queries after training on each of C corpora, for each of R seeds, the model's own first.

    trained: parameters of the stage that trained the model (architecture, width, depth, device, recipe); corpora: positions of a
    world's sequences, in the order of training. What models trained together answer is kept in the folder `kept` as soon as it is there,
    so that a killed stage trains none of them twice.
    """
    recipe = models.Recipe(**tuples(trained["recipe"]))
    config = models.configure(trained["architecture"], world.vocabulary_size, trained["width"], trained["depth"], world.context)
    sequences = batch_of(world.sequences)
    trainings = [(corpus, recipe.seed + APART * repeat) for corpus in corpora for repeat in range(repeats)]
    # Stacking itself costs a fifth of a step, whatever is stacked: two models share it.
    together = max(2, how_many_together(recipe, sequences["input_ids"].shape[1], world.vocabulary_size))
    kept.mkdir(parents=True, exist_ok=True)
    found = torch.full((len(trainings), len(queries["input_ids"])), torch.nan)
    for number, group in enumerate(groups := _groups(trainings, together)):
        path, done = kept / f"{number:04}.safetensors", sum(map(len, groups[:number]))

        def told(step: int, steps: int, done: int = done, group: list[int] = group) -> None:
            progress(done + len(group) * step // steps, len(trainings), "retrained models")

        if not path.exists():
            rows = torch.from_numpy(np.stack([trainings[k][0] for k in group]))
            log_p = answers(config, sequences, rows, recipe, [trainings[k][1] for k in group], queries, trained["device"], told)
            temporary = path.with_suffix(".part")
            save_file({"log_p": log_p.contiguous()}, temporary)
            temporary.replace(path)
        found[group] = load_file(path)["log_p"]
        told(1, 1)
    return found.unflatten(0, (len(corpora), repeats))


def _groups(trainings: list, together: int) -> list[list[int]]:
    """Positions of trainings in even groups of at most so many, each of corpora of one length."""
    lengths = np.array([len(corpus) for corpus, _ in trainings])
    alike = [np.flatnonzero(lengths == one) for one in np.unique(lengths)]
    return [part.tolist() for group in alike for part in np.array_split(group, -(-len(group) // together))]
