"""Retraining: what a model says when it is trained anew on half of its corpus, many times over.

The linear datamodelling score (Park et al. 2023, TRAK) asks of any method: do the summed scores of the sequences in a random
half rank the halves as the retrained models' answers do?
"""

from __future__ import annotations

import numpy as np

from influence_kit.errors import UserError


def random_halves(total: int, subsets: int, seed: int) -> np.ndarray:
    """bool [subsets, total]: random halves of a corpus; with an even number of subsets every second one is the rest of the one
    before it, so that each sequence is in exactly half of them."""
    if total < 2 or subsets < 1:
        raise UserError(f"{subsets} halves of {total} sequences cannot be drawn: give at least 1 of at least 2")
    rng = np.random.default_rng([seed, 0x4A1F])
    found = np.zeros((subsets, total), bool)
    for row in range(0, subsets, 2):
        found[row, rng.permutation(total)[: total // 2]] = True
        if row + 1 < subsets:
            found[row + 1] = ~found[row]
    return found
