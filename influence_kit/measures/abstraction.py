"""Meaning against overlap in Ladder: what the top of a ranking shares with the query, and whether removing it matters.

The contrast fixed beforehand is lift(T2) / lift(T0r), at the end of training and at the checkpoint where the query loss
is nearest .5 nat (`half_nat`): both tiers share the response word with the query and no other word; T2 also states its
rule. It is a ratio of means over the queries of one seed:

    bootstrap(found[["T2", "T0r"]], seeds, ratio_of_means)

1 is what matching of tokens gives. The mass ratio is the same with `meaning_mass` and `overlap_mass`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.world import World, token_matrix
from influence_kit.corpora.worlds.ladder import TIERS, tiers
from influence_kit.errors import UserError
from influence_kit.measures.lexical import idf_overlap, token_counts
from influence_kit.measures.lifts import _top_k, lift, mass_share, precision_at

if TYPE_CHECKING:
    import pandas

CONCEPT = ("T1", "T2", "T3")  # the query's own rule
MEANING = ("T2", "T3")  # its rule without its agent or event
OVERLAP = ("T0r", "T0a", "T0e")  # its words in other rules


def abstraction(
    world: World,
    values: np.ndarray,
    rows: np.ndarray,
    queries: np.ndarray,
    top: float = 0.01,
    k: int = 6,
    two_sided: bool = False,
) -> pandas.DataFrame:
    """One row per scored query of Ladder.

    values [Q, N] are scores, of any form, of the sequences at `rows` for the queries at `queries`.

    Columns: T1 ... T5, the tier's lift in the top share of the scan (of |scores| where `two_sided`); meaning_mass and
    overlap_mass, the share of the two-sided mass of that top held by T2 and T3, and by T0r, T0a and T0e; precision, the
    share of the query's own rule (T1, T2, T3) among its k highest scores, shuffled_precision, the same share where the
    rule is another query's (mean over the queries of all other rules; nan where there is none), and concept_share, that
    of the whole scan; cell, combination, treated as planted.

    Raises UserError for scores whose shape does not fit.
    """
    import pandas

    values, queries = np.asarray(values), np.asarray(queries)
    if values.shape != (len(queries), len(rows)):
        raise UserError(f"Scores have shape {values.shape}; {len(queries)} queries and {len(rows)} rows need [Q, N].")
    members = tiers(replace(world, queries=world.queries.take(queries)), rows)
    columns = {name: lift(values, members[name], top, two_sided) for name in TIERS}
    for name, group in (("meaning_mass", MEANING), ("overlap_mass", OVERLAP)):
        columns[name] = mass_share(values, _union(members, group), top, two_sided=True)
    concept = _union(members, CONCEPT)
    cell = world.queries["cell"].to_numpy()[queries]
    columns["precision"] = precision_at(values, concept, k)
    columns["shuffled_precision"] = _of_others(values, concept, cell, k)
    columns["concept_share"] = concept.mean(1)
    planted = {name: world.queries[name].to_numpy(zero_copy_only=False)[queries] for name in ("combination", "treated")}
    return pandas.DataFrame({**columns, "cell": cell, **planted})


def partial_rank(values: np.ndarray, concept: np.ndarray, overlap: np.ndarray) -> np.ndarray:
    """Rank correlation of each query's scores with `concept`, given `overlap`: [Q] in [-1, 1], all three [Q, N].

    Partial Spearman correlation (r_vc - r_vo r_co) / sqrt((1 - r_vo^2)(1 - r_co^2)); nan where one of them does not vary.
    """
    from scipy.stats import rankdata

    ranked = [rankdata(np.asarray(part, float), axis=1) for part in (values, concept, overlap)]
    v, c, o = (part - part.mean(1, keepdims=True) for part in ranked)
    with np.errstate(divide="ignore", invalid="ignore"):
        v, c, o = (part / np.sqrt((part**2).sum(1, keepdims=True)) for part in (v, c, o))
        vc, vo, co = ((a * b).sum(1) for a, b in ((v, c), (v, o), (c, o)))
        return (vc - vo * co) / np.sqrt((1 - vo**2) * (1 - co**2))


def overlap_ranks(world: World, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rank correlation of influence with word overlap (summed IDF of shared tokens) among the sequences in each query's
    language, [Q]; real text, values [Q, N] for all queries of the world."""
    from scipy.stats import spearmanr

    spoken = world.sequences["language"].to_numpy(zero_copy_only=False)[rows]
    asked = world.queries["language"].to_numpy(zero_copy_only=False)
    shared = idf_overlap(
        *(token_counts(token_matrix(part), token_matrix(part, "loss_mask")) for part in (world.queries, world.sequences.take(rows)))
    )
    alike = spoken[None] == asked[:, None]
    return np.array([spearmanr(v[own], o[own]).statistic for v, o, own in zip(values, shared, alike, strict=True)])


def half_nat(answers: pandas.DataFrame, fractions=None, nats: float = 0.5) -> float:
    """The fraction of training, one of those given, at which the mean loss of the queries in `answers` is nearest `nats`.

    answers: fraction, log_p (nats), a row for each query and checkpoint. Of equally near ones the earliest; by default all
    fractions but 0. Raises UserError where none of the fractions was kept.
    """
    loss = -answers.groupby("fraction")["log_p"].mean()
    kept = {at: float(value) for at, value in loss.items() if at > 0}
    if fractions is not None:  # a checkpoint lies at a whole step, next to the fraction that was asked for
        kept = {wanted: value for wanted in fractions for at, value in kept.items() if abs(at - wanted) <= 0.02}
    if not kept:
        raise UserError(
            f"No checkpoint is among the fractions {fractions}; kept are {[round(f, 3) for f in loss.index]}."
        )
    return float(min(sorted(kept), key=lambda at: abs(kept[at] - nats)))


def top_decline(small: np.ndarray, large: np.ndarray, k: int = 10) -> np.ndarray:
    """Mean of each query's k highest scores in the small model over that in the large one: [Q], both [Q, N].

    Both must score the same queries and sequences. nan where a query's highest scores in the large model are not positive.
    """
    small, large = np.asarray(small, float), np.asarray(large, float)
    if small.shape != large.shape or small.ndim != 2 or not 1 <= k <= small.shape[1]:
        raise UserError(
            f"Scores of shapes {small.shape} and {large.shape} with k={k}: give both as [Q, N] with N >= k."
        )
    first, second = (np.sort(values, axis=1)[:, -k:].mean(1) for values in (small, large))
    return np.divide(first, second, out=np.full(len(first), np.nan), where=second > 0)


def removal(base: pandas.DataFrame, dropped: pandas.DataFrame) -> pandas.DataFrame:
    """Change of log p (nats) when documents were dropped: one row per combination of rule and response word.

    base, dropped: a row per query of the two runs at the end of training: query, log_p, combination, treated. Columns:
    change (the mean over the combination's queries), treated. Queries of one combination lose the same documents, so the
    combination is the unit; what the dropped tier carries is `difference` of treated and control combinations.

    Raises UserError where the runs do not ask the same queries.
    """
    both = base.merge(dropped[["query", "log_p", "treated"]], on="query", suffixes=("", "_dropped"), validate="1:1")
    if not len(both) == len(base) == len(dropped) or (both["treated"] != both["treated_dropped"]).any():
        raise UserError(
            f"The runs ask {len(base)} and {len(dropped)} queries, not the same ones: give one seed's two arms."
        )
    both["change"] = both["log_p_dropped"] - both["log_p"]
    return both.groupby("combination").agg(change=("change", "mean"), treated=("treated", "first")).reset_index()


def _union(members: dict[str, np.ndarray], names) -> np.ndarray:
    return np.any([members[name] for name in names], axis=0)


def _of_others(values: np.ndarray, concept: np.ndarray, cell: np.ndarray, k: int) -> np.ndarray:
    """Each ranking's precision for the rules of the other queries, [Q]: what any query's ranking gives."""
    k = min(k, values.shape[1])
    found = _top_k(values, k).astype(np.float32) @ concept.T.astype(np.float32) / k  # [ranking, rule]
    apart = np.not_equal.outer(cell, cell) & concept.any(1)
    counted = apart.sum(1)
    return np.divide((found * apart).sum(1), counted, out=np.full(len(values), np.nan), where=counted > 0)
