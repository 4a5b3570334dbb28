"""How a model is trained, in numbers: what a profile says and a plan counts with, long before torch is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

ARCHITECTURES = ("gpt_neox", "llama", "gpt2")


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
