"""LiSSA (Agarwal et al. 2017), the iterative inverse that the paper compares EK-FAC with (its Eq 10 and Sec. 5.1).

    r_j = v + (I - alpha (G~ + lambda)) r_{j-1},   r_0 = v,   alpha r_j -> (G + lambda)^-1 v

G~ is the Gauss-Newton matrix of a minibatch drawn anew at every step. `alpha` has to keep alpha (G~ + lambda) below 2,
and an eigenvalue s of G + lambda is inverted to a share 1 - (1 - alpha s)^(j + 1): a flat direction takes 1 / (alpha
lambda) steps. Nothing is shared between queries but the minibatches.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from influence_kit.engine.products import GaussNewton
from influence_kit.engine.sequences import count
from influence_kit.errors import UserError

BATCHES, STEPS = 4, 10  # of power iteration, for the scale
HALVINGS = 4  # of that scale, before LiSSA is given up


def minibatch(curvature: GaussNewton, size: int, generator: torch.Generator) -> Tensor:
    """Positions int64 [size] of sequences drawn without replacement. Raises UserError for a size that there is not."""
    total = count(curvature.sequences)
    if not 1 <= size <= total:
        raise UserError(
            f"a minibatch of {size} cannot be drawn from {total} sequences: give a size between 1 and {total}"
        )
    return torch.randperm(total, generator=generator)[:size]


def top_eigenvalue(
    curvature: GaussNewton, batch_size: int, batches: int = BATCHES, steps: int = STEPS, seed: int = 0
) -> float:
    """The largest eigenvalue of G~ + lambda over several minibatches, by `steps` of power iteration on each (a lower
    bound).

    Raises UserError for a minibatch larger than the sample.
    """
    generator, largest = torch.Generator().manual_seed(seed), 0.0
    for _ in range(batches):
        rows = minibatch(curvature, batch_size, generator)
        v = torch.randn(len(curvature.damping_of), generator=generator, dtype=torch.float64)[None].to(
            curvature.damping_of
        )
        for _ in range(steps):
            v = v / v.norm()
            moved = curvature.product(v, rows)
            value, v = float((v * moved).sum()), moved
        largest = max(largest, value)
    return largest


def lissa(
    curvature: GaussNewton, vectors: Tensor, depths: Sequence[int], scale: float, batch_size: int, seed: int = 0
) -> Tensor:
    """(G + lambda)^-1 v as LiSSA has it after each of `depths` steps, [len(depths), Q, D], for v [Q, D].

    scale: alpha; 1 / `top_eigenvalue` is as large as is safe. Cost of a step: batch_size products a row of v.

    Raises UserError where it diverges (a contraction keeps |r_j| below (j + 1) |v|), for depths that do not rise from
    1, a scale that is not above 0, or a minibatch larger than the sample.
    """
    depths = list(depths)
    if not depths or depths[0] < 1 or depths != sorted(set(depths)):
        raise UserError(f"depths={depths} must be whole numbers from 1 up, rising")
    if not scale > 0:
        raise UserError(f"scale={scale!r} must be above 0: 1 / top_eigenvalue(...) is as large as is safe")
    generator, kept = torch.Generator().manual_seed(seed), []
    r, size = vectors.clone(), vectors.norm(dim=1)
    for step in range(1, depths[-1] + 1):
        r = vectors + r - scale * curvature.product(r, minibatch(curvature, batch_size, generator))
        if not bool((r.norm(dim=1) <= 1.01 * (step + 1) * size).all()):
            raise UserError(
                f"LiSSA diverges at step {step} with scale={scale:.3g}: it must stay below 2 / the largest eigenvalue of "
                "G + lambda of every minibatch; take a smaller scale or larger minibatches"
            )
        if step in depths:
            kept.append(scale * r)
    return torch.stack(kept)


def tuned(
    curvature: GaussNewton, vectors: Tensor, depths: Sequence[int], batch_size: int, seed: int = 0
) -> tuple[float, Tensor]:
    """LiSSA at the largest scale that power iteration calls safe, or half of it, and so on, where a minibatch is
    steeper than those that power iteration saw: (scale, what `lissa` returns). Raises UserError where HALVINGS do not
    help."""
    scale = 1 / top_eigenvalue(curvature, batch_size, seed=seed)
    for _ in range(HALVINGS):
        try:
            return scale, lissa(curvature, vectors, depths, scale, batch_size, seed)
        except UserError:
            scale /= 2
    return scale, lissa(curvature, vectors, depths, scale, batch_size, seed)
