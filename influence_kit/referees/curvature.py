"""The Gauss-Newton matrix itself, by matrix-vector products, and the exact damped inverse of it by conjugate gradients.

    G v = mean over sequences of sum_t J_t^T (diag p_t - p_t p_t^T) J_t v         (the paper's Eq 9; one matrix over all
                                                                                 tracked layers, nothing factored)

J_t is the Jacobian of the logits at t. J v comes from forward-mode differentiation, J^T from a backward pass, each for all rows of
v at once; the forward pass itself is taken once for all of them.
Vectors over the tracked weights are flat, [Q, D]: a row a query, each layer's [P, M'] after the other.

Cost of G v, one sequence and one row of v, where forward and backward pass together are 1: PRODUCT = 4/3 (tangents 2/3, backward
2/3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence_kit.engine.factors import Factors, rotate_columns, rotate_rows
from influence_kit.engine.gradients import Recorder, TokenGradients, device_of, forward, frozen
from influence_kit.engine.labels import drawn_at, uniforms
from influence_kit.engine.layers import shape_of
from influence_kit.engine.passes import sequence_gradients
from influence_kit.engine.sequences import Batch, batch_rows, count, read_batch
from influence_kit.errors import UserError

PRODUCT = 4 / 3
WINDOW = 10  # iterations over which an energy that stands still has arrived
AT_ONCE = 1 << 14  # rows of v times tokens in one pass
LARGEST = 8_000  # tracked weights whose matrix is held whole: 0.5 GB


class GaussNewton:
    """G and G + lambda over the layers of `factors`, each damped by the share `damping` of its mean eigenvalue, as EK-FAC does.

    sequences: `input_ids` int64 [N, T], optional `loss_mask` bool [N, T], tensors. damping_of [D]: lambda of every weight.
    """

    def __init__(
        self, model: nn.Module, factors: Factors, sequences: Mapping[str, Tensor], damping: float = 0.1
    ) -> None:
        self.model, self.sequences, self.damping = model, sequences, damping
        self.factors = factors.beside(model)
        modules = dict(model.named_modules())
        self.layers = {name: modules[name] for name in self.factors.layers}
        self.shapes = {name: tuple(each.eigenvalues.shape) for name, each in self.factors.layers.items()}
        parts = [
            torch.full_like(each.eigenvalues, float(damping * each.eigenvalues.mean())).flatten()
            for each in self.factors.layers.values()
        ]
        self.damping_of = torch.cat(parts)

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """Each layer's part [..., P, M'] of flat vectors [..., D]."""
        parts = vectors.split([p * m for p, m in self.shapes.values()], -1)
        return {name: part.unflatten(-1, shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}

    def gradients(self, sequences: Mapping[str, Tensor], batch_size: int = 32) -> Tensor:
        """Gradient of each sequence's summed loss, [N, D]."""
        with frozen(self.model), Recorder(self.layers) as recorder:
            found = []
            for rows in batch_rows(count(sequences), batch_size):
                batch = read_batch(sequences, rows, device_of(self.model))
                each = sequence_gradients(self.model, recorder, batch)[0]
                found.append(torch.cat([_outer(layer).flatten(1) for layer in each.values()], 1))
        return torch.cat(found)

    def scores(self, directions: Tensor, sequences: Mapping[str, Tensor], batch_size: int = 32) -> Tensor:
        """Inner products [Q, N] of directions [Q, D] with the sequences' gradients: influence, in nats at epsilon = 1, where
        they are (G + lambda)^-1 of query gradients."""
        parts = []
        for rows in batch_rows(count(sequences), batch_size):
            some = {name: tensor[rows] for name, tensor in sequences.items()}
            parts.append(directions @ self.gradients(some, batch_size).T)
        return torch.cat(parts, 1)

    def product(self, vectors: Tensor, rows: Sequence[int] | Tensor | None = None) -> Tensor:
        """(G + lambda) v [Q, D] for v [Q, D], with G the mean over the sequences at `rows` (all by default)."""
        chosen = torch.arange(count(self.sequences)) if rows is None else torch.as_tensor(rows)
        length = self.sequences["input_ids"].shape[1]
        total, step = torch.zeros_like(vectors), max(AT_ONCE // (len(vectors) * length), 1)
        for part in chosen.split(step):
            some = {name: tensor[part] for name, tensor in self.sequences.items()}
            total += self._summed(vectors, read_batch(some, slice(0, len(part)), device_of(self.model)))
        return total / len(chosen) + self.damping_of * vectors

    def dense(self, rows: int = 64) -> Tensor:
        """G + lambda itself, float64 [D, D], from products with `rows` unit vectors at a time: D products over all sequences.

        Raises UserError where it is too large to be held.
        """
        number = len(self.damping_of)
        if number > LARGEST:
            raise UserError(
                f"{number} tracked weights have a Gauss-Newton matrix of {8 * number**2 / 1e9:.1f} GB: take a model of at most {LARGEST}, or "
                "`solve`, which needs products alone"
            )
        found = torch.zeros(number, number, dtype=torch.float64)
        for start in range(0, number, rows):
            stop = min(start + rows, number)
            units = torch.zeros(stop - start, number, dtype=self.damping_of.dtype, device=self.damping_of.device)
            units[:, start:stop].fill_diagonal_(1)
            found[start:stop] = self.product(units).double().cpu()
        return (found + found.T) / 2

    def within_layers(self, matrix: Tensor) -> Tensor:
        """The matrix [D, D] without what one layer's weights know of another's: a block a layer."""
        return torch.block_diag(*(matrix[places, places] for places in self._places()))

    def _places(self) -> list[slice]:
        """Where each layer's weights lie in a flat vector."""
        found, start = [], 0
        for p, m in self.shapes.values():
            found.append(slice(start, start + p * m))
            start += p * m
        return found

    def weights_of(self, vectors: Tensor) -> dict[str, Tensor]:
        """Flat vectors [..., D] as torch lays weights and biases out, by parameter name, layer after layer."""
        found = {}
        for name, part in self.split(vectors).items():
            layer, (_, width) = self.layers[name], shape_of(self.layers[name])
            found[f"{name}.weight"] = part[..., :width] if isinstance(layer, nn.Linear) else part[..., :width].mT
            if layer.bias is not None:
                found[f"{name}.bias"] = part[..., width]
        return found

    def flat(self, weights: Mapping[str, Tensor]) -> Tensor:
        """What `weights_of` took apart."""
        parts = []
        for name, layer in self.layers.items():
            weight = weights[f"{name}.weight"]
            weight = weight if isinstance(layer, nn.Linear) else weight.mT
            bias = [] if layer.bias is None else [weights[f"{name}.bias"][..., None]]
            parts.append(torch.cat([weight, *bias], -1).flatten(-2))
        return torch.cat(parts, -1)

    def _summed(self, vectors: Tensor, batch: Batch) -> Tensor:
        """Sum over a batch's sequences of J^T H J v, [Q, D]."""
        tokens, wanted = batch.tokens[:, : batch.length], batch.loss_mask[:, 1 : batch.length + 1]
        model = _Logits(self.model)
        weights = {f"model.{name}": self.model.get_parameter(name).detach() for name in self.weights_of(vectors)}

        def logits_at(weights: dict[str, Tensor]) -> Tensor:
            return functional_call(model, weights, (tokens,))

        def tangent(v: Tensor) -> Tensor:
            moved = {f"model.{name}": part.to(weights[f"model.{name}"]) for name, part in self.weights_of(v).items()}
            return jvp(logits_at, (weights,), (moved,))[1]

        # Of the attention kernels only the plain one has forward-mode derivatives.
        with torch.no_grad(), frozen(self.model), sdpa_kernel(SDPBackend.MATH):
            logits, back = vjp(logits_at, weights)  # type: ignore[misc]
            moved, p = vmap(tangent)(vectors), logits.softmax(-1)
            pulled = p * (moved - (p * moved).sum(-1, keepdim=True)) * wanted[..., None]
            found = vmap(lambda each: back(each)[0])(pulled)
        return self.flat({name.removeprefix("model."): each for name, each in found.items()}).to(vectors)

    def precondition(self, vectors: Tensor) -> Tensor:
        """EK-FAC's (G + lambda)^-1 v, [Q, D]."""
        solved = []
        for name, v in self.split(vectors).items():
            layer = self.factors.layers[name]
            turned = v if layer.outputs is None else rotate_rows(v, layer.outputs)
            turned = turned if layer.inputs is None else rotate_columns(turned, layer.inputs)
            turned = turned / layer.damped(self.damping)
            turned = turned if layer.inputs is None else rotate_columns(turned, layer.inputs, back=True)
            turned = turned if layer.outputs is None else rotate_rows(turned, layer.outputs, back=True)
            solved.append(turned.flatten(1))
        return torch.cat(solved, 1)

    def quality(self, solution: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """(residual, energy) [Q] of x for (G + lambda) x = v, over all sequences.

        residual: |v - (G + lambda) x| / |v|. energy: (v x)^2 / x (G + lambda) x, which no scale of x changes and which the exact
        solution x* makes largest, v x*: the root of energy / v x* is the cosine between x and x* in the norm of G + lambda.
        Of two solutions the one with more energy is nearer, and x* need not be known to say so.
        """
        moved = self.product(solution)
        residual = (vectors - moved).norm(dim=1) / vectors.norm(dim=1)
        return residual, (vectors * solution).sum(1) ** 2 / (solution * moved).sum(1)


def sampled_gradients(curvature: GaussNewton, draws: int, seed: int = 0, batch_size: int = 32) -> Iterator[Tensor]:
    """Gradients [B, D] of the curvature's sequences under labels drawn from the model, batch after batch, `draws` times over.

    The mean of their squares is the Fisher matrix in expectation, and that is the Gauss-Newton matrix.
    """
    model, total = curvature.model, count(curvature.sequences)
    with frozen(model), Recorder(curvature.layers) as recorder:
        for draw in range(draws):
            for rows in batch_rows(total, batch_size):
                batch = read_batch(curvature.sequences, rows, device_of(model))
                chance = uniforms(seed * draws + draw, rows, batch.tokens.shape[1])[:, 1 : batch.length + 1]
                found = sequence_gradients(model, recorder, batch, drawn_at(chance))[0]
                yield torch.cat([_outer(each).flatten(1) for each in found.values()], 1)


def sampled_inverse(
    curvature: GaussNewton, draws: int = 4, seed: int = 0, batch_size: int = 32
) -> Callable[[Tensor], Tensor]:
    """v -> (F + lambda)^-1 v, [Q, D], where F is the Fisher matrix of the same sequences under `draws` sets of labels drawn from
    the model: near G + lambda, and solved at once, since F has no more than n = N draws directions (Woodbury's identity).

    Takes n D numbers, n^2 D + n^3 multiplications once and 2 n D a row of v.
    """
    total, parts = count(curvature.sequences), list(sampled_gradients(curvature, draws, seed, batch_size))
    root = curvature.damping_of.sqrt()
    E = torch.cat(parts).div_(root).div_((draws * total) ** 0.5)
    inner = torch.linalg.cholesky((E @ E.T).double() + torch.eye(len(E), dtype=torch.float64, device=E.device))

    def solved(vectors: Tensor) -> Tensor:
        scaled = vectors / root
        weights = torch.cholesky_solve((E @ scaled.T).double(), inner).to(E)
        return (scaled - weights.T @ E) / root

    return solved


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
    x, r = torch.zeros_like(vectors), vectors.clone()
    z = precondition(r)
    direction, rz, done = z.clone(), (r * z).sum(1), 0
    energies = [torch.zeros_like(rz)]
    growth = torch.ones_like(rz)
    while done < most and bool((growth > tolerance).any()):
        moved = curvature.product(direction)
        step = rz / (direction * moved).sum(1)
        x, r = x + step[:, None] * direction, r - step[:, None] * moved
        z = precondition(r)
        new = (r * z).sum(1)
        direction, rz, done = z + (new / rz)[:, None] * direction, new, done + 1
        energies.append((vectors * x).sum(1))
        growth = 1 - energies[max(0, done - WINDOW)] / energies[-1]
    return x, growth, done


class _Logits(nn.Module):
    """A model that returns its logits, whichever kind it is (`gradients.forward`)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return forward(self.model, tokens)


def _outer(found: TokenGradients) -> Tensor:
    """sum_t g a^T of each sequence, [B, P, M']."""
    a, g, bias = found
    a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2) if bias else a
    return g.mT @ a
