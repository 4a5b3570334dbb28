"""Role-play in Cast: how far up a query's ranking its persona, its plan and its description stand, words being equal.

An effect is the lift of one tier over that of another which shares the same words with the query but for the ones that the
effect is named after: `persona` adds the persona, `planner` the goal and the question, `rule` the goal alone to documents that
have the question and the action already; `description` adds nothing, its two tiers share the persona only. A bare lift says
little: documents that share an action word only reach high ones too. What the added word does by being the same word is to be
read off a world in which it means nothing: the persona in the planning world, goal and question in the two others.

A ratio adds chance, a lift of 1, to both lifts: it has a value where a tier never comes up, and is 1 where neither is common in
the top, whatever the ratio of two small numbers. Ratios are averaged over seeds on the log scale: one tier ten times as common
and one a tenth as common average to 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from influence_kit.errors import UserError
from influence_kit.measures.intervals import Estimate, bootstrap, difference
from influence_kit.measures.lifts import auc, lift

if TYPE_CHECKING:
    import pandas

EFFECTS = {
    "persona": ("demo_persona_action", "demo_action"),
    "planner": ("planner_pair_action", "planner_action"),
    "rule": ("planner_pair_action", "planner_question_action"),
    "description": ("description_persona_dimension", "description_persona"),
    # The same words where they are only mentioned: what sharing them does by itself.
    "persona_mention": ("neutral_persona_action", "neutral_action"),
    "planner_mention": ("neutral_pair_action", "neutral_action"),
}
LIFTS = ["first", "second"]  # those of an effect's two tiers
CHANCE = 1.0  # a lift


def tier_lifts(scores, tiers: Mapping[str, np.ndarray], top: float = 0.01, two_sided: bool = False) -> pandas.DataFrame:
    """Lift of every tier in each query's top share of the scan: one row a query, one column a tier, nan where it is empty.

    Args:
        scores: `[Q, N]`, any form.
        tiers: bool `[Q, N]` by name, as `influence_kit.corpora.worlds.cast.tiers` gives them for the scanned rows and scored queries.
        two_sided: read |scores| instead of scores.

    Raises:
        UserError: nan among the scores, or shapes that do not fit.
    """
    import pandas

    return pandas.DataFrame({name: lift(scores, member, top, two_sided) for name, member in tiers.items()})


def contrasts(scores, tiers: Mapping[str, np.ndarray], top: float = 0.01, two_sided: bool = False) -> pandas.DataFrame:
    """What each of EFFECTS compares: a row for each query and effect, in the order of EFFECTS.

    Columns: query (row of `scores`), effect, first and second (lifts of its two tiers in the top share; nan where either is
    empty), preference (how often a sequence of the first tier outranks one of the second, .5 by chance: it reads whole
    rankings, so it says something where other documents crowd both tiers out of the top).

    Args and errors as in `tier_lifts`; UserError too where a tier that an effect needs is missing.
    """
    import pandas

    if missing := sorted({tier for pair in EFFECTS.values() for tier in pair} - set(tiers)):
        raise UserError(f"There is no tier {', '.join(missing)}; take the tiers of a Cast world.")
    scores = np.asarray(scores)
    found = []
    for name, pair in EFFECTS.items():
        one, other = (np.broadcast_to(tiers[tier], scores.shape) for tier in pair)
        lacking = ~(one.any(1) & other.any(1))
        columns = {"first": lift(scores, one, top, two_sided), "second": lift(scores, other, top, two_sided)}
        columns["preference"] = np.array(_preference(scores, one, other))
        columns = {column: np.where(lacking, np.nan, values) for column, values in columns.items()}
        found.append(pandas.DataFrame({"query": np.arange(len(scores)), "effect": name, **columns}))
    return pandas.concat(found, ignore_index=True)


def log_ratio(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """log2 of the mean first lift over the mean second one, chance added to both: `[..., units, 2]`, `axis` the units'."""
    first, second = np.moveaxis(np.mean(values, axis=axis), -1, 0)
    return np.log2((first + CHANCE) / (second + CHANCE))


def effect(rows: pandas.DataFrame, **options) -> Estimate:
    """One effect's ratio with its interval: `rows` of `contrasts` of that effect, with a column seed.

    Ratio of the mean lifts over queries within a seed, averaged over seeds on the log scale. nan where no query has both
    tiers: in the imitation world nobody who is asked was described, so there is no description effect.

    options: passed on to `influence_kit.measures.intervals.bootstrap`.
    """
    return _raised(bootstrap(rows[LIFTS], rows["seed"], log_ratio, **options))


def quotient_of_effects(rows: pandas.DataFrame, others: pandas.DataFrame, **options) -> Estimate:
    """One effect's ratio over another's, within each seed: both as in `effect`, of the same seeds.

    Raises UserError where only one of them has a seed.
    """
    return _raised(difference(rows[LIFTS], rows["seed"], others[LIFTS], others["seed"], log_ratio, **options))


def _raised(logs: Estimate) -> Estimate:
    return replace(logs, value=2.0**logs.value, low=2.0**logs.low, high=2.0**logs.high)


def _preference(scores: np.ndarray, first: np.ndarray, second: np.ndarray) -> list[float]:
    """Area under the curve between the two tiers, [Q]."""
    pairs = ((row[a | b], a[a | b]) for row, a, b in zip(scores, first, second))
    return [float(auc(row, member)) if len(row) else np.nan for row, member in pairs]


def predicted_removal(scores, gone) -> np.ndarray:
    """What influence foretells of each query's log-probability when documents are removed: `[Q]` nats.

    Minus their summed influence over the number of sequences (removing one is epsilon = -1/N, Eq 1 of Grosse et al. 2023);
    the scan stands for the corpus, so both are counted in the scan. EK-FAC's scale is not to be trusted: read signs and ranks.

    Args:
        scores: `[Q, N]` raw influence, nats at epsilon = 1.
        gone: bool `[N]`, which of the scanned sequences are removed.
    """
    scores, gone = np.asarray(scores), np.asarray(gone, bool)
    if scores.ndim != 2 or gone.shape != scores.shape[1:]:
        raise UserError(f"Scores have shape {scores.shape} and what is removed {gone.shape}; give [Q, N] and [N].")
    return -scores[:, gone].sum(1) / scores.shape[1]


def changes(base, dropped, treated, units) -> pandas.DataFrame:
    """Change of log-probability (nats) by what documents were dropped by: a row for each unit.

    Columns unit, treated, change (mean over the unit's queries). Queries of one unit rise and fall together, so a unit counts
    once: the difference of treated and other units is what dropping did to the queries that it concerns beyond what
    it did to all.

    Args:
        base, dropped: `[Q]` log-probabilities in nats of the same queries after training on either corpus.
        treated: bool `[Q]`, queries whose documents were dropped.
        units: `[Q]` label of what documents were dropped by (the persona, or the pair of goal and question).

    Raises:
        UserError: shapes that do not fit, a unit on both sides, or fewer than two units on a side.
    """
    import pandas

    change, treated = np.asarray(dropped, float) - np.asarray(base, float), np.asarray(treated, bool)
    units = np.asarray(units)
    if change.ndim != 1 or not change.shape == treated.shape == units.shape:
        shapes = f"{change.shape}, treated {treated.shape} and units {units.shape}"
        raise UserError(f"Changes have shape {shapes}; give one value a query in each.")
    labels = set(units[treated].tolist()), set(units[~treated].tolist())
    if labels[0] & labels[1]:
        raise UserError(
            f"Units {sorted(labels[0] & labels[1])[:5]} have treated queries and others; label what was dropped."
        )
    if min(map(len, labels)) < 2:
        raise UserError(f"{len(labels[0])} units are treated and {len(labels[1])} are not; each side needs two.")
    rows = pandas.DataFrame({"unit": units, "treated": treated, "change": change})
    return rows.groupby("unit", as_index=False).agg(treated=("treated", "first"), change=("change", "mean"))


def difference_in_differences(rows: pandas.DataFrame, column: str = "change", **options) -> Estimate:
    """Treated units' mean change less the others', within each seed, averaged over seeds: nats, with its interval.

    rows: of `changes`, with a column seed. options: passed on to `influence_kit.measures.intervals.difference`.
    """
    gone, kept = rows[rows["treated"]], rows[~rows["treated"]]
    return difference(gone[column], gone["seed"], kept[column], kept["seed"], **options)


def difference_of_removals(rows: pandas.DataFrame, others: pandas.DataFrame, **options) -> Estimate:
    """Difference in differences of one removal less that of another, within each seed: nats, with its interval.

    Both as in `difference_in_differences`, of the same seeds; UserError where only one of them has a seed.
    """
    columns = ["change", "treated"]
    return difference(rows[columns], rows["seed"], others[columns], others["seed"], _gap, **options)


def _gap(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean change of treated units less that of the others: `[..., units, 2]` of change and treated, `axis` the units'.

    nan where a resample has only one of the two.
    """
    change, treated = values[..., 0], values[..., 1]
    with np.errstate(invalid="ignore"):
        gone, kept = ((change * side).sum(axis) / side.sum(axis) for side in (treated, 1 - treated))
    return gone - kept
