"""What a scan found: influence by query and sequence in its three forms, rankings, and both ends of rankings.

Units: raw scores are nats at epsilon = 1; *nats per copy* are raw scores divided by the number of training sequences.
Scores that are not finite rank last, at either end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .refine import Refinement

FORMS = ("raw", "relatif", "cosine")
TokenScorer = Callable[[int, Sequence[int]], Tensor]  # (query, sequences) -> token scores [k, T]


class Ranked(NamedTuple):
    """One row of a ranking; a list of these makes a DataFrame. nats_per_copy is nan where the score is not in nats."""

    rank: int
    sequence: int
    score: float
    nats_per_copy: float


@dataclass(frozen=True)
class Scores:
    """Influence of N training sequences on Q queries.

    Args:
        values: Raw I [Q, N], nats at epsilon = 1.
        self_influence: |phi_n|^2 of the whitened training gradients [N], or None.
        query_norm: |phi_q| [Q].
        layers: Names of the tracked layers.
        corpus_size: Number of sequences of the training corpus (the N of the nats-per-copy convention).
        by_layer: Raw I [Q, N, L] in the order of `layers`, which sums to values, or None.
        query_error: Relative error [Q] of the query directions where they were held at low rank.
        tokens_of: What scores the tokens of a few sequences; the scan hands it in.
        refinement: How far the queries' directions were solved for, None where they are EK-FAC's.
    """

    values: Tensor
    self_influence: Tensor | None
    query_norm: Tensor
    layers: tuple[str, ...]
    corpus_size: int
    by_layer: Tensor | None = None
    query_error: Tensor | None = None
    tokens_of: TokenScorer | None = field(default=None, repr=False, compare=False)
    refinement: Refinement | None = None

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

    def form(self, name: str) -> Tensor:
        """Scores [Q, N] in one of FORMS."""
        return self.values if name == "raw" else getattr(self, name)

    def _norms(self) -> Tensor:
        if self.self_influence is None:
            raise ValueError("these scores were made with self_influence=False: score again without it for this form")
        return self.self_influence.sqrt().clamp(min=torch.finfo(self.values.dtype).tiny)

    def top(self, k: int, query: int = 0) -> list[Ranked]:
        """The k most positive sequences of one query, best first; ties by position."""
        return self._ranked(k, query, 1)

    def bottom(self, k: int, query: int = 0) -> list[Ranked]:
        """The k most negative sequences of one query, most negative first."""
        return self._ranked(k, query, -1)

    def _ranked(self, k: int, query: int, sign: int) -> list[Ranked]:
        row = self.values[_checked(query, self.values)]
        order = finite_first(sign * row).argsort(descending=True, stable=True)[: max(k, 0)].tolist()
        return [Ranked(r, i, float(row[i]), float(row[i]) / self.corpus_size) for r, i in enumerate(order, 1)]

    def per_token(self, query: int, sequences: Sequence[int]) -> Tensor:
        """Influence on one query of every position of a few sequences; see `token_scores`.

        Args:
            query: From the end where negative.
            sequences: Numbers of k sequences, from the end where negative. Only these are read again.

        Returns:
            Token scores [k, T].

        Raises:
            ValueError: A query or sequence that is not there, none, or scores that were loaded without their model.
        """
        if self.tokens_of is None:
            raise ValueError("these scores do not know their model: call influence_kit.token_scores with it")
        return self.tokens_of(_checked(query, self.values), sequences)


@dataclass(frozen=True)
class TopScores:
    """Both ends of every query's ranking over N sequences.

    Index 0 of the middle axis is the most positive end, 1 the most negative; best first. Places beyond N hold -1.

    Args:
        values: Scores [Q, 2, k].
        sequences: Numbers of sequences [Q, 2, k], int64.
        form: raw (nats at epsilon = 1), relatif or cosine.
        corpus_size: As in Scores.
        approximate: Whether these are an index's scores that were not made exact.
        refinement: As in Scores.
    """

    values: Tensor
    sequences: Tensor
    form: str
    corpus_size: int
    approximate: bool = False
    refinement: Refinement | None = None

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
    """The two ends of rankings.

    Args:
        values: Scores [Q, 2, n], alike in both places of the middle axis.
        rows: Their sequences [Q, 2, n]; those below 0 stand for nothing.
        k: How many are kept of either end.

    Returns:
        (values, rows) [Q, 2, k] of the most positive at index 0 of the middle axis, of the most negative at 1. Equal values in
        the order of rows, then those that are not finite, then nothing (rows of -1), up to k.
    """
    order = rows.masked_fill(rows < 0, torch.iinfo(rows.dtype).max).argsort(dim=2, stable=True)
    values, rows = values.gather(2, order), rows.gather(2, order)
    better = finite_first(values * torch.tensor([1, -1], dtype=values.dtype)[None, :, None])
    order = better.masked_fill(rows < 0, -torch.inf).argsort(dim=2, descending=True, stable=True)[..., :k]
    room = (0, k - order.shape[2])
    pad = torch.nn.functional.pad
    return pad(values.gather(2, order), room), pad(rows.gather(2, order), room, value=-1)


def finite_first(values: Tensor) -> Tensor:
    """The values to sort by, descending: what is not finite comes last."""
    return values.masked_fill(~values.isfinite(), -torch.inf)


def _checked(query: int, values: Tensor) -> int:
    """The query's row; counted from the end where negative."""
    if not -len(values) <= query < len(values):
        raise ValueError(f"query={query} is out of range: there are {len(values)} queries")
    return query % len(values)
