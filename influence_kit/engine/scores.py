"""What a scan found: influence by query and sequence in its three forms, rankings, and both ends of rankings.

Units: raw scores are nats at epsilon = 1; *nats per copy* are raw scores divided by the number of training sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .factors import Factors
from .sequences import gather

FORMS = ("raw", "relatif", "cosine")


class Ranked(NamedTuple):
    """One row of a ranking; a list of these makes a DataFrame. nats_per_copy is nan where the score is not in nats."""

    rank: int
    sequence: int
    score: float
    nats_per_copy: float


class Source(NamedTuple):
    """What scores were made from, for a closer look at a few of them."""

    model: nn.Module
    factors: Factors
    queries: Mapping[str, Tensor]
    sequences: Mapping[str, Tensor]
    damping: float


@dataclass(frozen=True)
class Scores:
    """Influence of N training sequences on Q queries.

    values [Q, N]: raw I in nats at epsilon = 1. by_layer [Q, N, L] or None, in the order of `layers`; sums to values.
    self_influence [N]: |phi_n|^2 of the whitened training gradient, or None; query_norm [Q]: |phi_q|.
    corpus_size: number of sequences of the training corpus (the N of the nats-per-copy convention).
    query_error [Q]: relative error of the query directions where they were held at low rank.
    """

    values: Tensor
    self_influence: Tensor | None
    query_norm: Tensor
    layers: tuple[str, ...]
    corpus_size: int
    by_layer: Tensor | None = None
    query_error: Tensor | None = None
    source: Source | None = field(default=None, repr=False, compare=False)

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
        if self.self_influence is None:
            raise ValueError("these scores were made with self_influence=False: score again without it for this form")
        return self.self_influence.sqrt().clamp(min=torch.finfo(self.values.dtype).tiny)

    def top(self, k: int, query: int = 0) -> list[Ranked]:
        """The k most positive sequences of one query, best first; ties by position."""
        return self._ranked(k, query, descending=True)

    def bottom(self, k: int, query: int = 0) -> list[Ranked]:
        """The k most negative sequences of one query, most negative first."""
        return self._ranked(k, query, descending=False)

    def _ranked(self, k: int, query: int, descending: bool) -> list[Ranked]:
        row = self.values[_checked(query, self.values)]
        order = row.argsort(descending=descending, stable=True)[: max(k, 0)].tolist()
        return [Ranked(r, i, float(row[i]), float(row[i]) / self.corpus_size) for r, i in enumerate(order, 1)]

    def per_token(self, query: int, sequences: Sequence[int]) -> Tensor:
        """Influence on one query of every position of the given sequences, [k, T]; see `token_scores`.

        Only these sequences are read again. Raises ValueError for scores that were loaded without their model.
        """
        if self.source is None:
            raise ValueError("these scores do not know their model: call influence_kit.token_scores with it")
        from .scans import token_scores

        model, factors, queries, corpus, damping = self.source
        if not len(sequences):
            raise ValueError("no sequences given: name at least one")
        asked = gather(queries, [_checked(query, self.values)])
        return token_scores(model, factors, asked, gather(corpus, sequences), damping)


@dataclass(frozen=True)
class TopScores:
    """Both ends of every query's ranking over N sequences: `values` [Q, 2, k] and `sequences` int64 [Q, 2, k].

    Index 0 of the middle axis is the most positive end, 1 the most negative; best first. `form`: raw (nats at
    epsilon = 1), relatif or cosine. Places beyond N hold -1. approximate: an index's scores that were not made exact.
    """

    values: Tensor
    sequences: Tensor
    form: str
    corpus_size: int
    approximate: bool = False

    def top(self, k: int, query: int = 0) -> list[Ranked]:
        """The k most positive sequences of one query, best first."""
        return self._ranked(k, query, 0)

    def bottom(self, k: int, query: int = 0) -> list[Ranked]:
        """The k most negative sequences of one query, most negative first."""
        return self._ranked(k, query, 1)

    def _ranked(self, k: int, query: int, end: int) -> list[Ranked]:
        query = _checked(query, self.values)
        kept = int((self.sequences[query, end] >= 0).sum())
        if k > kept:
            raise ValueError(f"k={k} is more than the {kept} sequences kept: ask top_scores for more")
        rows, values = self.sequences[query, end, :k].tolist(), self.values[query, end, :k].tolist()
        copies = self.corpus_size if self.form == "raw" else math.nan
        return [Ranked(r, i, v, v / copies) for r, (i, v) in enumerate(zip(rows, values, strict=True), 1)]


def ends(values: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, rows) of the k most positive of [Q, 2, n] at index 0 of the middle axis, and of the k most negative at 1.

    Equal values in the order of rows; rows below 0 stand for nothing, and fill up to k.
    """
    order = rows.argsort(dim=2, stable=True)
    values, rows = values.gather(2, order), rows.gather(2, order)
    better = values * torch.tensor([1, -1], dtype=values.dtype)[None, :, None]
    better = better.masked_fill(rows < 0, -torch.inf)
    order = better.argsort(dim=2, descending=True, stable=True)[..., :k]
    room = (0, k - order.shape[2])
    pad = torch.nn.functional.pad
    return pad(values.gather(2, order), room), pad(rows.gather(2, order), room, value=-1)


def _checked(query: int, values: Tensor) -> int:
    """The query's row; counted from the end where negative."""
    if not -len(values) <= query < len(values):
        raise ValueError(f"query={query} is out of range: there are {len(values)} queries")
    return query % len(values)
