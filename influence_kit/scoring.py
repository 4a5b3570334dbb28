"""Queries x training sequences: influence scores by sequence, layer and token.

    I(q, z) = grad log p(q)^T (G + lambda)^-1 grad log p(z)        (the paper's Eq 5, 25, 30)

in nats for epsilon = 1: positive means that more weight on z raises log p(completion | prompt). Both losses are sums over
target tokens. One copy of z added to N training sequences is epsilon = 1 / N, so *nats per copy* = I / N. EK-FAC's
absolute scale needs a referee; ranks and ratios are what it is good for.

Everything happens in the eigenbasis, where the inverse is a division: one pass over the training sequences serves
every query, and the whitened norm (self-influence) comes from the same gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from influence_kit.ekfac import Factors, Progress, _working_dtype
from influence_kit.gradients import Recorder, as_batches, count, forward, frozen, sequence_losses, shape_of


class Ranked(NamedTuple):
    """One row of a ranking; a list of these makes a DataFrame."""

    rank: int
    sequence: int
    score: float
    nats_per_copy: float


@dataclass(frozen=True)
class Scores:
    """Influence of N training sequences on Q queries.

    values [Q, N]: raw I in nats at epsilon = 1. by_layer [Q, N, L] or None, in the order of `layers`; sums to values.
    self_influence [N]: |phi_n|^2 of the whitened training gradient; query_norm [Q]: |phi_q|.
    corpus_size: number of sequences of the training corpus (the N of the nats-per-copy convention).
    """

    values: Tensor
    self_influence: Tensor
    query_norm: Tensor
    layers: tuple[str, ...]
    corpus_size: int
    by_layer: Tensor | None = None

    @property
    def nats_per_copy(self) -> Tensor:
        """I / corpus_size [Q, N]: predicted change of log p(query) in nats when one more copy is added."""
        return self.values / self.corpus_size

    @property
    def relatif(self) -> Tensor:
        """phi_q . phi_n / |phi_n| [Q, N] (Barshan et al. 2020): influence at a fixed size of the parameter change."""
        return self.values / self._norms()

    @property
    def cosine(self) -> Tensor:
        """phi_q . phi_n / (|phi_q| |phi_n|) [Q, N], in [-1, 1]."""
        return self.values / self._norms() / self.query_norm[:, None].clamp(min=torch.finfo(self.values.dtype).tiny)

    def _norms(self) -> Tensor:
        return self.self_influence.sqrt().clamp(min=torch.finfo(self.values.dtype).tiny)

    def top(self, k: int, query: int = 0) -> list[Ranked]:
        """The k most positive sequences of one query, best first; ties by position."""
        return self._ranked(k, query, descending=True)

    def bottom(self, k: int, query: int = 0) -> list[Ranked]:
        """The k most negative sequences of one query, most negative first."""
        return self._ranked(k, query, descending=False)

    def _ranked(self, k: int, query: int, descending: bool) -> list[Ranked]:
        if not -len(self.values) <= query < len(self.values):
            raise ValueError(f"query={query} is out of range: there are {len(self.values)} queries")
        row = self.values[query]
        order = row.argsort(descending=descending, stable=True)[: max(k, 0)].tolist()
        return [Ranked(r, i, float(row[i]), float(row[i]) / self.corpus_size) for r, i in enumerate(order, 1)]


def score(
    model: nn.Module,
    factors: Factors,
    queries: Mapping[str, Tensor],
    sequences: Mapping[str, Tensor],
    damping: float = 0.1,
    batch_size: int = 32,
    by_layer: bool = False,
    corpus_size: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Influence of every sequence on every query.

    queries, sequences: `input_ids` int64 [., T] with optional `loss_mask` bool; a query's mask marks its completion.
    damping: lambda of each layer as a share of the mean of its eigenvalues (the paper's 0.1).
    by_layer: also keep [Q, N, L]. corpus_size: sequences of the whole training corpus, default N.

    Raises ValueError when the factors belong to other layers or shapes than the model's, or a query has no target.
    Cost: one pass over the queries; one over the sequences, each (T + Q) P M' multiplications a layer beyond the model's own.
    """
    check_damping(damping)
    factors = _on(model, factors)
    chosen = _chosen(model, factors)
    whitened, directions = _query_directions(model, factors, chosen, queries, damping, batch_size)
    query_norm = sum(phi.square().sum(1) for phi in whitened.values()).sqrt()  # type: ignore[union-attr]
    del whitened
    inverse = {name: 1 / layer.damped(damping).flatten() for name, layer in factors.layers.items()}
    total, device = count(sequences), next(model.parameters()).device
    values, norms, layer_values = [], [], []
    with frozen(model), Recorder(chosen) as recorder:
        for rows, batch in as_batches(sequences, batch_size, device):
            losses = sequence_losses(forward(model, batch.tokens), batch.tokens, batch.loss_mask)
            parts, norm = [], 0
            for name, gradients in recorder.gradients(losses.sum()).items():
                rotated = factors.layers[name].sequence_gradients(gradients).flatten(1)
                parts.append(directions[name] @ rotated.T)
                norm = norm + rotated.square() @ inverse[name]  # type: ignore[assignment]
            values.append(sum(parts).cpu())  # type: ignore[union-attr]
            norms.append(norm.cpu())  # type: ignore[attr-defined]
            if by_layer:
                layer_values.append(torch.stack(parts, 2).cpu())
            if progress:
                progress(rows.stop, total)
    return Scores(
        torch.cat(values, 1),
        torch.cat(norms),
        query_norm.cpu(),
        tuple(chosen),
        corpus_size or total,
        torch.cat(layer_values, 1) if by_layer else None,
    )


def token_scores(
    model: nn.Module,
    factors: Factors,
    query: Mapping[str, Tensor],
    sequences: Mapping[str, Tensor],
    damping: float = 0.1,
    batch_size: int = 32,
) -> Tensor:
    """Influence of every position of k sequences on one query, [k, T]; row sums are the sequence scores (Eq 31).

    Entry t is Ds_t^T V a_t: what the *updating* position t contributes, through every target it helps predict, first of
    all token t + 1. `query` holds a single row.
    """
    check_damping(damping)
    if count(query) != 1:
        raise ValueError(f"token_scores takes one query, got {count(query)} rows")
    factors = _on(model, factors)
    chosen = _chosen(model, factors)
    _, directions = _query_directions(model, factors, chosen, query, damping, batch_size)
    device, found = next(model.parameters()).device, []
    with frozen(model), Recorder(chosen) as recorder:
        for _, batch in as_batches(sequences, batch_size, device):
            losses = sequence_losses(forward(model, batch.tokens), batch.tokens, batch.loss_mask)
            summed = 0
            for name, gradients in recorder.gradients(losses.sum()).items():
                a, g = factors.layers[name].rotate(gradients)
                direction = directions[name].view(g.shape[2], a.shape[2])
                summed = summed + ((g @ direction) * a).sum(2)  # type: ignore[assignment]
            found.append(summed.cpu())  # type: ignore[attr-defined]
    return torch.cat(found)


def check_damping(damping: float) -> None:
    """Raise ValueError unless damping is a number >= 0."""
    if not damping >= 0:
        raise ValueError(f"damping={damping!r} must be zero or positive: it is a share of the mean eigenvalue")


def _on(model: nn.Module, factors: Factors) -> Factors:
    return factors.to(next(model.parameters()).device, _working_dtype(model))


def _chosen(model: nn.Module, factors: Factors) -> dict[str, nn.Module]:
    modules = dict(model.named_modules())
    missing = [name for name in factors.layers if name not in modules]
    if missing:
        raise ValueError(f"the factors belong to another model: it has no layer {missing[0]!r}")
    for name, layer in factors.layers.items():
        p, m = shape_of(modules[name])
        expected = (p, m + (modules[name].bias is not None))
        if tuple(layer.eigenvalues.shape) != expected:
            raise ValueError(
                f"layer {name!r}: factors are {tuple(layer.eigenvalues.shape)}, the model's are {expected}"
            )
    return {name: modules[name] for name in factors.layers}


def _query_directions(
    model, factors, chosen, queries, damping, batch_size
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Per layer: whitened query gradients phi_q [Q, P M'], and directions (G + lambda)^-1 grad in the eigenbasis [Q, P M'].

    Signs: both gradients are of losses, i.e. of -log p, so the product equals that of log-probability gradients.
    """
    whitened: dict[str, list[Tensor]] = {name: [] for name in chosen}
    roots = {name: layer.damped(damping).sqrt() for name, layer in factors.layers.items()}
    with frozen(model), Recorder(chosen) as recorder:
        for rows, batch in as_batches(queries, batch_size, next(model.parameters()).device):
            empty = ~batch.loss_mask.any(1)
            if empty.any():
                raise ValueError(
                    f"query {rows.start + int(empty.nonzero()[0])} has no target token: its loss_mask is empty"
                )
            losses = sequence_losses(forward(model, batch.tokens), batch.tokens, batch.loss_mask)
            for name, gradients in recorder.gradients(losses.sum()).items():
                whitened[name].append((factors.layers[name].sequence_gradients(gradients) / roots[name]).flatten(1))
    phi = {name: torch.cat(parts) for name, parts in whitened.items()}
    return phi, {name: phi[name] / roots[name].flatten() for name in phi}
