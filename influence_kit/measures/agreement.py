"""How far scores agree with what a referee saw: retrained models, proximal responses, planted truth."""

from __future__ import annotations

import numpy as np

from influence_kit.errors import UserError
from influence_kit.measures.correlations import rank_correlations


def lds(scores, members, outputs) -> np.ndarray:
    """Linear datamodelling score (Park et al. 2023), [Q]: Spearman's correlation, over subsets of the corpus, of the summed scores
    of a subset's sequences with what a model retrained on the subset says.

    Args:
        scores: `[Q, N]`, any method's; nats or not, only the order of sums counts.
        members: bool `[S, N]`, which sequences each subset holds.
        outputs: `[S, Q]`, log-probabilities in nats after retraining.

    Raises:
        UserError: shapes that do not fit, or fewer than three subsets.
    """
    scores, members, outputs = np.asarray(scores, float), np.asarray(members, float), np.asarray(outputs, float)
    if scores.ndim != 2 or members.shape[1:] != scores.shape[1:] or outputs.shape != (len(members), len(scores)):
        raise UserError(
            f"Scores have shape {scores.shape}, members {members.shape} and outputs {outputs.shape}; give [Q, N], [S, N] and [S, Q]."
        )
    if len(members) < 3:
        raise UserError(f"{len(members)} subsets are too few for a rank correlation; retrain on more.")
    return rank_correlations(scores @ members.T, outputs.T)


def slopes(truth, scores) -> np.ndarray:
    """Slope of the truth on the scores through zero, row by row, [Q]: what a score in nats has to be multiplied with to be right.

    1 for an estimate on the right scale; below 1 where it exaggerates. nan where all scores of a row are 0.
    """
    truth, scores = (np.asarray(rows, float) for rows in (truth, scores))
    size = (scores**2).sum(1)
    return np.divide((truth * scores).sum(1), size, out=np.full(len(size), np.nan), where=size > 0)


def found_at(scores, planted, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(precision, recall) [Q] of the planted sequences among each query's k highest scores; nan for queries that have none.

    planted: bool `[Q, N]`. Recall is over min(k, number planted), so that a perfect ranking has 1.
    """
    from influence_kit.measures.lifts import precision_at

    planted = np.asarray(planted, bool)
    precision = precision_at(scores, planted, k)
    most = np.minimum(planted.sum(1), k)
    return precision, np.divide(precision * k, most, out=np.full(len(most), np.nan), where=most > 0)


def own_effects(log_p, asked) -> np.ndarray:
    """What its own strongest sequences do to a query when they are left out or doubled, beyond what those of other queries do: nats,
    [K, C, R].

    Args:
        log_p: `[K, C, R, Q]`, of all Q queries after training again, for what is strongest on each of the K queries that it was done
            for, C counts of sequences, R repetitions (one way of the stage `reweighted`).
        asked: int `[K]`, which of the Q queries it was done for.

    Raises:
        UserError: shapes that do not fit, or fewer than two queries to compare.
    """
    log_p, asked = np.asarray(log_p, float), np.asarray(asked)
    if log_p.ndim != 4 or asked.shape != log_p.shape[:1]:
        raise UserError(f"Answers have shape {log_p.shape} and queries {asked.shape}; give [K, C, R, Q] and [K].")
    if len(asked) < 2:
        raise UserError("Only one query had its sequences changed, so there is no other to compare with; ask two or more.")
    table = log_p[..., asked]  # [K, C, R, K]
    own = np.einsum("kcrk->kcr", table)
    others = (np.einsum("jcrk->kcr", table) - own) / (len(asked) - 1)
    return own - others
