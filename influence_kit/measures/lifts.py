"""Where planted documents land in a ranking: lifts, mass shares, ranks, AUC, recall and precision.

Scores are [Q, N], a row per query and a column per training sequence of the scan. A *tier* (`member`) is a set of
sequences given as booleans, [Q, N] when it depends on the query and [N] when it does not. Near convergence signed
averages of a class cancel, so everything here reads the ends of the ranking; `two_sided=True` reads |scores|.
"""

from __future__ import annotations

import math

import numpy as np

from influence_kit.errors import UserError


def top_count(n: int, fraction: float) -> int:
    """Number of sequences in the top `fraction` of `n`: ceil(fraction * n), at least 1.

    Raises:
        UserError: The fraction is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"The fraction {fraction} is not a share of the scan; give a number above 0 and up to 1.")
    # .01 * 700 is 7.000000000000001 in floating point: without the slack the ceiling would be 8.
    return max(1, math.ceil(fraction * n - 1e-9))


def _rows(scores) -> np.ndarray:
    scores = np.atleast_2d(np.asarray(scores))
    if scores.ndim != 2 or scores.shape[1] == 0:
        raise UserError(f"Scores have shape {scores.shape}; give [Q, N] with at least one sequence.")
    if np.isnan(scores).any():
        raise UserError(f"{int(np.isnan(scores).sum())} of {scores.size} scores are nan; score these sequences again.")
    return scores


def _tier(member, shape: tuple[int, int]) -> np.ndarray:
    member = np.asarray(member, dtype=bool)
    if member.shape not in (shape, shape[1:]):
        raise UserError(f"The tier has shape {member.shape}; scores of shape {shape} need {shape} or {shape[1:]}.")
    return np.broadcast_to(member, shape)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole > 0)


def _top_k(values: np.ndarray, k: int) -> np.ndarray:
    threshold = np.partition(values, values.shape[1] - k, axis=1)[:, [values.shape[1] - k]]
    above = values > threshold
    tied = values == threshold
    # Equal scores are taken in the order of the scan, so that the count is exact and the choice repeats.
    return above | (tied & (np.cumsum(tied, axis=1) <= k - above.sum(1, keepdims=True)))


def top_members(scores, fraction: float = 0.01, two_sided: bool = False) -> np.ndarray:
    """Which sequences are each query's top `fraction`, exactly ceil(fraction * N) a row.

    Args:
        scores: [Q, N], any unit.
        fraction: Share of the scan, in (0, 1].
        two_sided: Take the largest |scores| instead of the largest scores.

    Returns:
        bool [Q, N].

    Raises:
        UserError: nan among the scores, or a fraction outside (0, 1].
    """
    scores = _rows(scores)
    return _top_k(np.abs(scores) if two_sided else scores, top_count(scores.shape[1], fraction))


def lift(scores, member, fraction: float = 0.01, two_sided: bool = False) -> np.ndarray:
    """Share of the tier in each query's top `fraction`, over its share in the scan: 1 is chance.

    Args:
        scores: [Q, N].
        member: The tier, bool [Q, N] or [N].
        fraction: Share of the scan, in (0, 1].
        two_sided: As in `top_members`.

    Returns:
        [Q], at most min(1 / fraction, N / tier size); nan where the tier is empty.

    Raises:
        UserError: nan among the scores, shapes that do not fit, or a fraction outside (0, 1].
    """
    scores = _rows(scores)
    member = _tier(member, scores.shape)
    top = top_members(scores, fraction, two_sided)
    return _share((top & member).sum(1) / top.sum(1), member.mean(1))


def mass_share(scores, member, fraction: float | None = 0.01, two_sided: bool = False) -> np.ndarray:
    """Share of the influence mass of each query's top `fraction` that the tier holds.

    Mass is the sum of positive scores, or of |scores| when `two_sided`. The quotient of two tiers' mass shares is their
    mass ratio.

    Args:
        scores: [Q, N].
        member: The tier, bool [Q, N] or [N].
        fraction: Share of the scan, in (0, 1]; None takes all of it.
        two_sided: As in `top_members`.

    Returns:
        [Q] in [0, 1]; nan where the top holds no mass at all.

    Raises:
        UserError: nan among the scores, shapes that do not fit, or a fraction outside (0, 1].
    """
    scores = _rows(scores)
    member = _tier(member, scores.shape)
    mass = np.abs(scores) if two_sided else np.maximum(scores, 0)
    if fraction is not None:
        mass = np.where(top_members(scores, fraction, two_sided), mass, 0)
    return _share((mass * member).sum(1), mass.sum(1))


def _positive_mask(positives, shape: tuple[int, int]) -> np.ndarray:
    """Indices [Q] (-1: none) or booleans [Q, N] as booleans [Q, N]."""
    positives = np.asarray(positives)
    if positives.dtype == bool:
        return _tier(positives, shape)
    if positives.shape != shape[:1] or not np.issubdtype(positives.dtype, np.integer):
        raise UserError(
            f"Positives of shape {positives.shape} and type {positives.dtype} do not fit scores of shape {shape}; "
            f"give one integer a query ({shape[0]} of them, -1 for none) or booleans of shape {shape}."
        )
    if positives.size and not -1 <= positives.min() <= positives.max() < shape[1]:
        raise UserError(
            f"Positives lie between {positives.min()} and {positives.max()} and the scan has columns 0 to "
            f"{shape[1] - 1}; give columns of the scan, -1 for none."
        )
    return np.arange(shape[1]) == positives[:, None]


def ranks(scores, positives) -> np.ndarray:
    """Rank of each query's positive, 1 for the highest score.

    Ties share their middle rank, so that constant scores do not rank anything first. With several positives the best
    one counts.

    Args:
        scores: [Q, N].
        positives: The positive's column, int [Q] (-1: none), or bool [Q, N].

    Returns:
        float [Q]; nan where a query has none.

    Raises:
        UserError: nan among the scores, or positives outside the scan.
    """
    scores = _rows(scores)
    mask = _positive_mask(positives, scores.shape)
    best = np.where(mask, scores, -np.inf).max(1, keepdims=True)
    rank = (scores > best).sum(1) + ((scores == best).sum(1) + 1) / 2
    return np.where(mask.any(1), rank, np.nan)


def auc(scores, positive) -> float | np.ndarray:
    """Probability that a positive outranks a negative, ties counted half.

    This is the Mann-Whitney U statistic over the product of the class sizes.

    Args:
        scores: [N] or [Q, N].
        positive: bool, the shape of `scores`, or [N] for all queries alike.

    Returns:
        float for [N], [Q] for [Q, N]; nan where a class is empty.

    Raises:
        UserError: nan among the scores, or shapes that do not fit.
    """
    from scipy.stats import rankdata

    single = np.ndim(scores) == 1
    scores = _rows(scores)
    positive = np.asarray(positive, dtype=bool)
    positive = _tier(positive[None] if single and positive.ndim == 1 else positive, scores.shape)
    n_positive = positive.sum(1).astype(float)
    wins = (rankdata(scores, axis=1) * positive).sum(1) - n_positive * (n_positive + 1) / 2
    area = _share(wins, n_positive * (scores.shape[1] - n_positive))
    return float(area[0]) if single else area


def _top_hits(scores, positives, k: int) -> tuple[np.ndarray, np.ndarray, int]:
    scores = _rows(scores)
    if not 1 <= k:
        raise UserError(f"k is {k}; give a positive number of sequences.")
    mask = _positive_mask(positives, scores.shape)
    k = min(int(k), scores.shape[1])
    return (_top_k(scores, k) & mask).sum(1), mask.sum(1), k


def recall_at(scores, positives, k: int) -> np.ndarray:
    """Share of each query's positives among its k highest scores.

    Args:
        scores: [Q, N].
        positives: int [Q] (-1: none), or bool [Q, N] or [N].
        k: How many sequences are the top; all N when it is larger.

    Returns:
        [Q]; 0 or 1 with one positive, nan with none.

    Raises:
        UserError: nan among the scores, positives outside the scan, or k below 1.
    """
    hits, size, _ = _top_hits(scores, positives, k)
    return _share(hits, size)


def precision_at(scores, positives, k: int) -> np.ndarray:
    """Share of positives among each query's k highest scores, [Q]; nan with no positive. Otherwise as `recall_at`."""
    hits, size, k = _top_hits(scores, positives, k)
    return np.where(size > 0, hits / k, np.nan)
