"""Correlations of the rows of two tables, each with its like: queries with queries, say."""

from __future__ import annotations

import numpy as np

from influence_kit.errors import UserError


def correlations(a, b) -> np.ndarray:
    """Pearson's correlation of each row with the same row of the other table.

    Args:
        a: [Q, K], any unit.
        b: [Q, K].

    Returns:
        [Q] in [-1, 1]; nan where a row does not vary.

    Raises:
        UserError: Shapes that differ.
    """
    a, b = (np.asarray(rows, float) for rows in (a, b))
    if a.shape != b.shape or a.ndim != 2:
        raise UserError(f"Rows of shapes {a.shape} and {b.shape} cannot be correlated; give two [Q, K].")
    a, b = (rows - rows.mean(1, keepdims=True) for rows in (a, b))
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), size, out=np.full(len(a), np.nan), where=size > 0)


def rank_correlations(a, b) -> np.ndarray:
    """Spearman's correlation of each row with the same row of the other table, as `correlations`; ties share ranks."""
    from scipy.stats import rankdata

    return correlations(*(rankdata(np.asarray(rows, float), axis=1) for rows in (a, b)))
