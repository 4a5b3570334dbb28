"""What influence costs, in a unit that repeats, and what a shortcut's scores have in common with those they stand for.

Work is counted in *sequence gradients*: one forward and backward pass of one sequence, 3 W L multiplications for a model of W
weights (head included, embeddings not) and L positions. Everything else is counted in multiplications and divided by that.
Seconds belong to a machine; work does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from influence_kit.measures.lifts import top_members

if TYPE_CHECKING:
    import pandas

Shapes = Sequence[Sequence[int]]  # (P, M') of every tracked layer
EIGH = 4.5  # multiplications of a symmetric eigendecomposition with vectors over n^3 (Golub and Van Loan, Sec. 8.3)


def ekfac_work(shapes: Shapes, weights: int, length: int, sequences: int, blocks: int = 1) -> tuple[float, float]:
    """(fit, each query) of EK-FAC, in sequence gradients.

    A fit is a pass over `sequences`, their covariances, rotations and squared gradients, L (2 P^2 + 2 M'^2 + P M')
    multiplications a sequence and layer, and two eigendecompositions a layer. A query is a pass, the rotation of its gradient
    into the eigenbasis and of the quotient out of it. blocks: O, of the paper's Appendix A.
    """
    one = 3 * weights * length
    each = sum(length * (2 * p * p / blocks + 2 * m * m / blocks + p * m) for p, m in shapes)
    bases = sum(EIGH * (p**3 + m**3) / blocks**2 for p, m in shapes)
    asked = sum(length * p * m + 2 * (p * p * m + p * m * m) / blocks for p, m in shapes)
    return sequences * (1 + each / one) + bases / one, 1 + asked / one


def lissa_work(depth: float, batch_size: int, product: float) -> float:
    """A query's work by LiSSA, in sequence gradients: its own gradient, then `depth` products with minibatches of
    `batch_size` sequences, each product of a sequence `product` gradients."""
    return 1 + depth * batch_size * product


def total_work(fixed, each, queries):
    """fixed + each * queries, elementwise."""
    return np.asarray(fixed) + np.asarray(each) * np.asarray(queries)


def crossover(fixed: float, each: float, rival_fixed: float, rival_each: float) -> float:
    """The smallest number of queries, at least 1, from which on a method is cheaper than its rival; infinite if there is none."""
    if each >= rival_each:
        return 1.0 if fixed + each < rival_fixed + rival_each and each == rival_each else math.inf
    exact = (fixed - rival_fixed) / (rival_each - each)
    return float(max(1, math.floor(exact) + 1))


def top_shared(scores, reference, k: int = 10) -> np.ndarray:
    """Share of the reference's k highest that are among the k highest of the scores, [Q] of [Q, N]."""
    fraction = min(k, np.shape(reference)[1]) / np.shape(reference)[1]
    a, b = top_members(scores, fraction), top_members(reference, fraction)
    return (a & b).sum(1) / b.sum(1)


def smallest_rank(table: pandas.DataFrame, enough: float, by: Sequence[str] = ()) -> pandas.DataFrame:
    """The least rank at which the mean correlation over queries is at least `enough`, per model (columns `by`).

    table: a row per query and rank, with rank, share (of the width), stored (share of the whole direction's numbers) and
    agreement. Returns columns `by`, rank, share, stored; a model that never gets there keeps its largest rank and inf as
    share and stored.
    """
    import pandas

    found = []
    for key, rows in table.groupby(list(by)) if by else [((), table)]:
        means = rows.groupby("rank")[["agreement", "share", "stored"]].mean()
        good = means[means["agreement"] >= enough]
        about = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        if len(good):
            found.append({**about, "rank": int(good.index[0]), **good.iloc[0][["share", "stored"]]})
        else:
            found.append({**about, "rank": int(means.index[-1]), "share": np.inf, "stored": np.inf})
    return pandas.DataFrame(found)


def depth_needed(table: pandas.DataFrame, column: str, above: float | None = None, below: float | None = None) -> float:
    """The first depth from which on the mean of `column` over queries stays at or above `above` (or at or below `below`).

    table: a row per query and depth. inf where it never does.
    """
    means = table.groupby("depth")[column].mean().sort_index()
    good = means >= above if above is not None else means <= below
    bad = np.flatnonzero(~good.to_numpy())
    start = bad[-1] + 1 if len(bad) else 0
    return float(means.index[start]) if start < len(means) else math.inf


def speed_up(
    costs: pandas.DataFrame,
    about: pandas.DataFrame,
    seconds: pandas.DataFrame,
    queries: int = 50,
    residual: float | None = None,
) -> dict[str, float]:
    """What one model's queries cost by LiSSA and by EK-FAC, from the three tables of the stage `cost`.

    LiSSA runs with the minibatch size and to the depth that make it cheapest while its solution is as near to the exact one as
    EK-FAC's (by alignment), or, given `residual`, until |v - (G + lambda) x| / |v| is at most that. Returns batch, depth,
    reached (False: no depth tried suffices, and the largest stands in, so that costs are lower bounds), fit and each (EK-FAC's
    work), lissa_fit (its tuning) and lissa_each; crossover (queries from which on EK-FAC is cheaper), speedup and
    seconds_speedup (log10 of LiSSA's cost over EK-FAC's at that many queries, in work and in seconds); alignment, that of EK-FAC.
    """
    of = {method: rows for method, rows in costs.groupby("method")}
    goal = float(of["EK-FAC"]["alignment"].mean())
    rule = {"column": "alignment", "above": goal} if residual is None else {"column": "residual", "below": residual}
    tried = []
    for batch, rows in of["LiSSA"].groupby("batch"):
        depth = depth_needed(rows, **rule)  # type: ignore[arg-type]
        reached, depth = math.isfinite(depth), min(depth, float(rows["depth"].max()))
        each = float(rows.loc[rows["depth"] == depth, "work"].mean())
        tuning = float(about.loc[about["batch"] == batch, "tuning"].iloc[0])
        tried.append({"batch": float(batch), "depth": depth, "reached": reached, "lissa_fit": tuning, "lissa_each": each})
    # One that suffices before any that does not; the cheapest of these.
    best = min(tried, key=lambda one: (not one["reached"], total_work(one["lissa_fit"], one["lissa_each"], queries)))
    fit, each = (float(about[name].iloc[0]) for name in ("fit", "each"))
    ratio = total_work(best["lissa_fit"], best["lissa_each"], queries) / total_work(fit, each, queries)
    taken = seconds.set_index(["part", "batch"])["seconds"]
    slow = queries * best["depth"] * taken["step", int(best["batch"])]
    quick = total_work(taken["fit", 0], taken["query", 0], queries)
    crossed = crossover(fit, each, best["lissa_fit"], best["lissa_each"])
    found = {"fit": fit, "each": each, "crossover": crossed, "speedup": math.log10(ratio), "alignment": goal}
    return {**best, **found, "seconds_speedup": math.log10(slow / quick)}
