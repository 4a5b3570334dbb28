"""The Gauss-Newton matrix whole, where it fits, and its exact damped inverse by conjugate gradients, to convergence.

The matrix is that of `engine/products.py`, where vectors [Q, D] over the tracked weights are explained.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from influence_kit.engine.products import GaussNewton
from influence_kit.engine.refine import Iterate
from influence_kit.errors import UserError

PRODUCT = 4 / 3  # cost of a product a sequence and row of v, where its forward and backward pass together are 1
WINDOW = 10  # iterations over which an energy that stands still has arrived
LARGEST = 8_000  # tracked weights whose matrix is held whole: 0.5 GB


def dense(curvature: GaussNewton, rows: int = 64) -> Tensor:
    """G + lambda itself, float64 [D, D], from products with `rows` unit vectors at a time: D products over all sequences.

    Raises:
        UserError: It is too large to be held.
    """
    number, damping_of = len(curvature.damping_of), curvature.damping_of
    if number > LARGEST:
        raise UserError(
            f"{number} tracked weights have a Gauss-Newton matrix of {8 * number**2 / 1e9:.1f} GB: take a model of at most {LARGEST}, or "
            "`solve`, which needs products alone"
        )
    found = torch.zeros(number, number, dtype=torch.float64)
    for start in range(0, number, rows):
        stop = min(start + rows, number)
        units = torch.zeros(stop - start, number, dtype=damping_of.dtype, device=damping_of.device)
        units[:, start:stop].fill_diagonal_(1)
        found[start:stop] = curvature.product(units).double().cpu()
    return (found + found.T) / 2


def within_layers(curvature: GaussNewton, matrix: Tensor) -> Tensor:
    """The matrix [D, D] without what one layer's weights know of another's: a block a layer."""
    sizes = [p * m for p, m in curvature.shapes.values()]
    return torch.block_diag(*(part.split(sizes, 1)[i] for i, part in enumerate(matrix.split(sizes))))


def quality(curvature: GaussNewton, solution: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """How near x [Q, D] is to the solution of (G + lambda) x = v, over all sequences.

    Returns:
        residual [Q]: |v - (G + lambda) x| / |v|. energy [Q]: (v x)^2 / x (G + lambda) x, which no scale of x changes and which the exact
        solution x* makes largest, v x*: the root of energy / v x* is the cosine between x and x* in the norm of G + lambda.
        Of two solutions the one with more energy is nearer, and x* need not be known to say so.
    """
    moved = curvature.product(solution)
    residual = (vectors - moved).norm(dim=1) / vectors.norm(dim=1)
    return residual, (vectors * solution).sum(1) ** 2 / (solution * moved).sum(1)


def solve(
    curvature: GaussNewton,
    vectors: Tensor,
    tolerance: float = 0.01,
    most: int = 200,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, int]:
    """(x, growth [Q], iterations): (G + lambda) x = v for v [Q, D], by preconditioned conjugate gradients (EK-FAC's inverse
    by default).

    The energy v x rises at every iteration, to v x* in the end. It stops when the energy of every query has grown by no more
    than the share `tolerance` over the last WINDOW iterations, or after `most` (growth says by how much). Each iteration is
    one product over all sequences and rows.
    """
    precondition = precondition or curvature.precondition
    found = Iterate.begin(vectors, precondition)
    energies, growth = [torch.zeros_like(found.rz)], torch.ones_like(found.rz)
    while found.done < most and bool((growth > tolerance).any()):
        found = found.step(curvature.product, precondition)
        energies.append((vectors * found.x).sum(1))
        growth = 1 - energies[max(0, found.done - WINDOW)] / energies[-1]
    return found.x, growth, found.done
