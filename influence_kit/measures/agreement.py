"""What a query's own sequences do to it, beyond what those of other queries do."""

from __future__ import annotations

import numpy as np

from influence_kit.errors import UserError


def own_effects(log_p, asked) -> np.ndarray:
    """What its own strongest sequences do to a query when they are left out or doubled, beyond what those of other
    queries do.

    Args:
        log_p: Nats [K, C, R, Q], of all Q queries after training again, for what is strongest on each of the K queries
            that it was done for, C counts of sequences, R repetitions (one way of the stage `reweighted`).
        asked: Which of the Q queries it was done for, int [K].

    Returns:
        Nats [K, C, R].

    Raises:
        UserError: Shapes that do not fit, or fewer than two queries to compare.
    """
    log_p, asked = np.asarray(log_p, float), np.asarray(asked)
    if log_p.ndim != 4 or asked.shape != log_p.shape[:1]:
        raise UserError(f"Answers have shape {log_p.shape} and queries {asked.shape}; give [K, C, R, Q] and [K].")
    if len(asked) < 2:
        raise UserError(
            "Only one query had its sequences changed, so there is no other to compare with; ask two or more."
        )
    table = log_p[..., asked]  # [K, C, R, K]
    own = np.einsum("kcrk->kcr", table)
    others = (np.einsum("jcrk->kcr", table) - own) / (len(asked) - 1)
    return own - others
