"""How a model is trained, in numbers: what a profile says and a plan counts with, long before torch is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

ARCHITECTURES = ("gpt_neox", "llama", "gpt2")
LOGITS = 2**20  # entries of a batch of all models trained together: more are no faster (4 MB, of a core's cache)
MOST = 64  # models trained together: more are no faster either


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. Batches are in sequences, learning rate is AdamW's peak, fractions are of all steps."""

    learning_rate: float = 3e-3
    batch_size: int = 64
    passes: int = 1
    warmup_steps: int = 100
    weight_decay: float = 0.01
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)
    checkpoints: tuple[float, ...] = (0.0, 1 / 3, 2 / 3, 1.0)
    evaluations: int = 12  # points of the held-out loss curve
    seed: int = 0


def steps_of(sequences: int, recipe: Recipe) -> int:
    """Number of optimiser steps of a training run."""
    return recipe.passes * math.ceil(sequences / recipe.batch_size)


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: a linear rise, at most a tenth of the run, then a cosine to .02."""
    warmup = min(warmup, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def how_many_together(recipe: Recipe, length: int, vocabulary_size: int) -> int:
    """Number of models that are best trained at once (by `referees.retraining`), on sequences of `length` tokens."""
    return max(1, min(MOST, LOGITS // (recipe.batch_size * length * vocabulary_size)))


def tuples(parameters: dict) -> dict:
    """Parameters as dataclasses take them: JSON's lists become tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in parameters.items()}
