"""Procedures against surfaces: which of two sequences influences a query more, the one that computes the same or the
one that looks the same.

Three contrasts between tiers of the Procedures world, each the probability that a sequence of the first outranks one of
the second (.5 where the ranking does not tell them apart):

    auc          SA and S0 (same procedure; other names, numbers and verb) over ON and ONA (same names, another procedure)
    auc_answer   SA over OA: both share the answer and no other word, only one computes the same
    auc_nothing  S0 over O0: neither shares a word

Signed influences of a class nearly cancel near convergence, so rankings are read by |score| unless told otherwise. The
correlation of two queries' influences over all scanned sequences is the measure of Ruis et al. 2024 (arXiv 2411.12580):
queries that are answered by one procedure should draw on the same sequences.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.world import World, token_matrix
from influence_kit.corpora.worlds.procedures import OWNS, PROCEDURES, SO, TIERS, tiers
from influence_kit.errors import UserError
from influence_kit.measures.lexical import bm25
from influence_kit.measures.lifts import auc, lift

if TYPE_CHECKING:
    import pandas

CONTRASTS = {
    "auc": (("SA", "S0"), ("ON", "ONA")),
    "auc_answer": (("SA",), ("OA",)),
    "auc_nothing": (("S0",), ("O0",)),
}
METHODS = ("pearson", "spearman")


def contrasts(
    world: World,
    values: np.ndarray,
    rows: np.ndarray,
    queries: np.ndarray,
    top: float = 0.01,
    two_sided: bool = True,
    procedure: np.ndarray | None = None,
) -> pandas.DataFrame:
    """One row per scored query of Procedures.

    values [Q, N] are scores, of any form, of the sequences at `rows` for the queries at `queries`; procedure [N], labels
    of these sequences in place of the planted ones. Columns: kind, procedure (by name); auc, auc_answer and auc_nothing,
    nan where a side is empty; same and names, the lifts in the top share of the two sides of `auc`; SW ... KO, the lift
    of each tier. Raises UserError for scores whose shape does not fit.
    """
    import pandas

    values = _checked(values, rows, queries)
    read = np.abs(values) if two_sided else values
    members = {name: member[queries] for name, member in tiers(world, rows, procedure).items()}
    columns: dict[str, object] = {**_about(world, queries)}
    for name, sides in CONTRASTS.items():
        first, second = (_union(members, side) for side in sides)
        columns[name] = [
            float(auc(row[a | b], a[a | b])) if a.any() and b.any() else np.nan
            for row, a, b in zip(read, first, second)
        ]
    for name, side in zip(("same", "names"), CONTRASTS["auc"]):
        columns[name] = lift(read, _union(members, side), top)
    return pandas.DataFrame({**columns, **{name: lift(read, members[name], top) for name in TIERS}})


def word_overlap(world: World, rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """BM25 [Q, N] of the sequences at `rows` for the queries with their answers, the first token left out."""
    asked, documents = token_matrix(world.queries)[queries], token_matrix(world.sequences)[rows]
    return bm25(asked[:, 1:], documents[:, 1:])


def correlations(
    world: World, values: np.ndarray, queries: np.ndarray, method: str = "pearson", procedure: np.ndarray | None = None
) -> pandas.DataFrame:
    """One row per scored query: the mean correlation of its influences [N] with those of other queries of its kind.

    values [Q, N] as in `contrasts`; procedure [Q], other labels of these queries than the planted ones. Columns: kind,
    procedure (by name); within and between, over queries of the same procedure and of the others. Only queries that
    share no word with it count, answers included; nan where there is none. Raises UserError for a method other than
    "pearson" or "spearman", and for scores whose shape does not fit.
    """
    import pandas

    if method not in METHODS:
        raise UserError(f"method={method!r} is not one of {', '.join(METHODS)}")
    values = _checked(values, None, queries)
    if method == "spearman":
        from scipy.stats import rankdata

        values = rankdata(values, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix = np.atleast_2d(np.corrcoef(values))
    tokens, kind = token_matrix(world.queries)[queries], _about(world, queries)["kind"]
    shared = (tokens[:, None, 1:, None] == tokens[None, :, None, 1:]) & _content(world, tokens[:, 1:])[:, None, :, None]
    usable = (kind[:, None] == kind[None]) & ~shared.any((2, 3)) & ~np.isnan(matrix)
    labels = world.queries["procedure"].to_numpy()[queries] if procedure is None else np.asarray(procedure)
    alike = labels[:, None] == labels[None]
    columns = {"within": _means(matrix, usable & alike), "between": _means(matrix, usable & ~alike)}
    return pandas.DataFrame({**_about(world, queries), **columns})


def shuffled_within(kind: np.ndarray, labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """The labels [N] dealt out anew among the rows of each kind: what a measure gives when they mean nothing."""
    rng, dealt = np.random.default_rng(seed), np.array(labels)
    for each in np.unique(kind):
        here = np.flatnonzero(kind == each)
        dealt[here] = dealt[rng.permutation(here)]
    return dealt


def _checked(values: np.ndarray, rows, queries: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or len(values) != len(queries) or (rows is not None and values.shape[1] != len(rows)):
        many = "" if rows is None else f" and {len(rows)} rows"
        raise UserError(f"Scores have shape {values.shape}; {len(queries)} queries{many} need [Q, N].")
    return values


def _about(world: World, queries: np.ndarray) -> dict[str, np.ndarray]:
    planted = world.queries.select(["kind", "procedure"]).take(queries)
    names = np.array(PROCEDURES, object)[planted["procedure"].to_numpy()]
    return {"kind": planted["kind"].to_numpy(zero_copy_only=False), "procedure": names}


def _content(world: World, tokens: np.ndarray) -> np.ndarray:
    """bool like `tokens`: not one of the few words that only hold a sentence together."""
    frame = np.array([word in (*OWNS, *SO) for word in world.vocabulary])
    return ~frame[tokens]


def _union(members: dict[str, np.ndarray], names) -> np.ndarray:
    return np.any([members[name] for name in names], axis=0)


def _means(matrix: np.ndarray, usable: np.ndarray) -> np.ndarray:
    usable = usable & ~np.eye(len(matrix), dtype=bool)
    number = usable.sum(1)
    total = np.where(usable, matrix, 0.0).sum(1)
    return np.divide(total, number, out=np.full(len(matrix), np.nan), where=number > 0)
