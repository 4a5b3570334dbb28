"""Meaning against overlap in Ladder (chapter 04): what the top of a ranking shares with the query, and whether removing
it matters.

The number fixed beforehand (A5r in the design notes) is, of the influence that the strongest 1 % of sequences hold, of either
sign, the share of those that state the query's rule in other words (T2, T3) against those that share its words and state
another rule (T0r, T0a, T0e). It is read at the checkpoint at which the queries cost half a nat: towards no loss scores are
made of what vanishes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.world import World
from influence_kit.corpora.worlds.ladder import TIERS, tiers
from influence_kit.errors import UserError
from influence_kit.findings import phrasing
from influence_kit.findings.families import Fraction, Planned, planted_grid, section, text_grid, trained_again
from influence_kit.findings.profiles import Profile
from influence_kit.findings.solved import chosen
from influence_kit.findings.trained import Trained, changed_answers
from influence_kit.measures.checkpoints import READ, nearest
from influence_kit.measures.intervals import (
    Estimate,
    difference_in_differences,
    estimate_of,
    gaps,
    largest,
    over_seeds,
    pick,
    smallest,
)
from influence_kit.measures.lexical import idf_overlap, overlap, target_counts
from influence_kit.measures.lifts import lift, mass_share

if TYPE_CHECKING:
    import pandas

    from influence_kit.measures.claims import Claim

MEANING = ("T2", "T3")  # the query's rule without its agent or event
OVERLAP = ("T0r", "T0a", "T0e")  # its words in other rules
MASS = ["meaning_mass", "overlap_mass"]
RETRAINED = {"dropped_rule": "the same rule", "dropped_random": "unrelated"}
WORD = {"dropped_T0r": "the word, another rule"}  # the same for few seeds: what sharing the word does


def reads(profile: Profile) -> list[Planned]:
    """Ladder along training and where it is read, trained again without tiers, and real text."""
    grid = section(profile, "ladder", "04")
    found = planted_grid(profile, "ladder", fractions=(*grid.scan.fractions, READ))
    found += planted_grid(profile, "ladder", fractions=(READ,), **chosen(profile, "ladder"))
    found += trained_again(profile, "ladder", "04", *RETRAINED)
    return found + trained_again(profile, "ladder", "04", *WORD, seeds=profile.few) + text_grid(profile)


def abstraction(
    world: World, values: np.ndarray, rows: np.ndarray, queries: np.ndarray, top: float = 0.01
) -> pandas.DataFrame:
    """One row per scored query of Ladder.

    Args:
        values: Scores [Q, N], of any form, of the sequences at `rows` for the queries at `queries`.
        top: The share of the scan that is read.

    Returns:
        T1 ... T5, the lift of each tier into the largest |scores|; meaning_mass and overlap_mass, the shares of these
        scores' mass that T2 and T3, and T0r, T0a and T0e hold.

    Raises:
        UserError: Scores whose shape does not fit.
    """
    import pandas

    values, queries = np.asarray(values), np.asarray(queries)
    if values.shape != (len(queries), len(rows)):
        raise UserError(f"Scores have shape {values.shape}; {len(queries)} queries and {len(rows)} rows need [Q, N].")
    members = tiers(replace(world, queries=world.queries.take(queries)), rows)
    columns = {name: lift(values, members[name], top, two_sided=True) for name in TIERS}
    for name, group in zip(MASS, (MEANING, OVERLAP), strict=True):
        columns[name] = mass_share(values, np.any([members[tier] for tier in group], axis=0), top, two_sided=True)
    return pandas.DataFrame(columns)


def read(run: Trained, score: str, top: float, fraction: Fraction = READ) -> pandas.DataFrame:
    """`abstraction` of a model's scan in one form of the score, at a checkpoint, with the accuracy and the loss of its
    queries there."""
    scan = run.scan(fraction)
    found = abstraction(run.world, getattr(scan, score), scan.rows, scan.queries, top)
    at = answered(run, fraction).set_index("query").loc[scan.queries]
    about = {"size": run.parameters, "seed": run.seed, "fraction": str(fraction)}
    return found.assign(correct=at["correct"].to_numpy(float), loss=-at["log_p"].to_numpy(), **about)


def answered(run: Trained, fraction: Fraction = READ) -> pandas.DataFrame:
    """A model's answers at a checkpoint."""
    kept = run.answers["fraction"]
    return run.answers[kept == nearest(run.at(fraction), kept.unique())]


def read_words(run: Trained, top: float) -> pandas.DataFrame:
    """`abstraction` of a model's scan by BM25.

    Ties are everywhere in BM25: noise far below any difference breaks them, the same way for all tiers.
    """
    scan = run.scan(READ)
    values = overlap(run.world, scan.rows, scan.queries)
    values = values + 1e-6 * np.random.default_rng([run.seed, 0xB25]).random(values.shape)
    return abstraction(run.world, values, scan.rows, scan.queries, top).assign(seed=run.seed)


def share(masses: np.ndarray) -> float:
    """Meaning's part of what meaning and overlap hold together, of the masses [Q, 2] of a seed's queries."""
    meaning, both = masses.mean(0)[0], masses.mean(0).sum()
    return float(meaning / both) if both > 0 else float("nan")


def meaning_share(rows: pandas.DataFrame) -> Estimate:
    """`share` within each seed, of a table of `abstraction` with a column seed."""
    return estimate_of(rows, MASS, share, method="t", bounds=(0, 1))


def in_short(read: pandas.DataFrame, grows: Claim, same: Claim, costs: Claim) -> str:
    """What the chapter found, in a paragraph: of a table of `read` and its claims 04-grows, 04-given-accuracy and
    04-retraining-by-size."""
    small, large = (meaning_share(rows(read)).value for rows in (smallest, largest))
    return (
        phrasing.answered(grows, "**Yes**", "**No**")
        + f". In the smallest model {small:.0%} of the influence at the top comes from sequences that mean the same rather than share words, "
        f"in the largest {large:.0%}: {phrasing.interval(grows)} for ten times the size ({phrasing.number_of_seeds(grows)}; in brackets, here and below, 95 % intervals). "
        + phrasing.answered(
            same,
            "Of models that generalise equally well, the larger ones still rest more on meaning",
            "Most of it goes with generalisation: of models that answer equally well, size adds little or nothing",
        )
        + f" ({phrasing.interval(same)}). "
        + phrasing.answered(
            costs,
            "Trained again without the sequences of the same meaning, the larger model loses more",
            "Trained again without the sequences of the same meaning, the larger model loses no more",
        )
        + f" ({phrasing.interval(costs)} in accuracy)."
    )


def by_size(runs: Sequence[Trained], top: float) -> pandas.DataFrame:
    """`meaning_share` by size, of raw influence and of RelatIF, with the value of each seed."""
    import pandas

    forms = {"raw": "raw", "RelatIF": "relatif"}
    tables = {name: pandas.concat(read(run, form, top) for run in runs) for name, form in forms.items()}
    return pandas.DataFrame(
        meaning_share(part).row(parameters=size, form=name)
        for name, table in tables.items()
        for size, part in table.groupby("size")
    )


def by_accuracy(along: pandas.DataFrame) -> pandas.DataFrame:
    """`meaning_share` of every size and checkpoint of a table of `read`, beside its accuracy, with the value of each seed."""
    import pandas

    from influence_kit.reading.style import size_label

    at = points(along).groupby(["size", "fraction"])["correct"].mean()
    return pandas.DataFrame(
        meaning_share(part).row(accuracy=at[size, when], model=f"{size_label(size)} weights", fraction=when)
        for (size, when), part in along.groupby(["size", "fraction"])
    )


def points(along: pandas.DataFrame) -> pandas.DataFrame:
    """`share`, accuracy and loss of every seed, size and checkpoint of a table of `read`."""
    import pandas

    return pandas.DataFrame(
        {"seed": seed, "size": size, "fraction": fraction, "share": share(part[MASS].to_numpy())}
        | {name: part[name].mean() for name in ("correct", "loss")}
        for (seed, size, fraction), part in along.groupby(["seed", "size", "fraction"])
    )


def slope_given(points: pandas.DataFrame, *given: str) -> Estimate:
    """Change of `share` for ten times the size at equal values of some columns: the coefficient of log10 size in least
    squares over the sizes and checkpoints of each seed."""
    slopes = {}
    for seed, part in points.dropna().groupby("seed"):
        design = np.column_stack([np.log10(part["size"]), np.ones(len(part)), part[list(given)].to_numpy(float)])
        slopes[seed] = float(np.linalg.lstsq(design, part["share"].to_numpy(), rcond=None)[0][0])
    return over_seeds(slopes, n=len(points))


def partial_rank(values: np.ndarray, concept: np.ndarray, overlap: np.ndarray) -> np.ndarray:
    """Rank correlation of each query's scores with `concept`, given `overlap`: [Q] in [-1, 1], all three [Q, N].

    Partial Spearman correlation (r_vc - r_vo r_co) / sqrt((1 - r_vo^2)(1 - r_co^2)); nan where one of them does not
    vary.
    """
    from scipy.stats import rankdata

    ranked = [rankdata(np.asarray(part, float), axis=1) for part in (values, concept, overlap)]
    v, c, o = (part - part.mean(1, keepdims=True) for part in ranked)
    with np.errstate(divide="ignore", invalid="ignore"):
        v, c, o = (part / np.sqrt((part**2).sum(1, keepdims=True)) for part in (v, c, o))
        vc, vo, co = ((a * b).sum(1) for a, b in ((v, c), (v, o), (c, o)))
        return (vc - vo * co) / np.sqrt((1 - vo**2) * (1 - co**2))


def given_overlap(run: Trained) -> pandas.DataFrame:
    """How closely |influence| follows the query's rule once BM25 is given, a row a query."""
    import pandas

    scan = run.scan(READ)
    asked, told = run.world.queries.take(scan.queries), run.world.sequences.take(scan.rows)
    same = asked["cell"].to_numpy()[:, None] == told["cell"].to_numpy()[None]
    values = partial_rank(np.abs(scan.raw), same, overlap(run.world, scan.rows, scan.queries))
    return pandas.DataFrame({"partial": values, "size": run.parameters, "seed": run.seed})


def removal(base: Iterable[Trained], again: Iterable[Trained]) -> pandas.DataFrame:
    """What became of answers when documents were dropped: one row per model and combination of rule and response word.

    Queries of one combination lose the same documents, so the combination is the unit; what the dropped tier carries is
    the change of treated combinations less that of the others.

    Returns:
        arm, size, seed, combination, change of log p (nats) and gained (of accuracy), means over the combination's
        queries, treated.
    """
    by = ["arm", "size", "seed", "combination"]
    changed = changed_answers(base, again)
    columns = {"change": ("change", "mean"), "gained": ("gained", "mean"), "treated": ("treated", "first")}
    return changed.groupby(by, as_index=False).agg(**columns)


def by_what_is_gone(lost: pandas.DataFrame) -> pandas.DataFrame:
    """Accuracy gained by combinations that lost documents beyond that of the others, of a table of `removal`: a row an arm
    and size, with the value of each seed."""
    import pandas

    from influence_kit.reading.style import size_label

    names = RETRAINED | WORD
    return pandas.DataFrame(
        difference_in_differences(rows, "gained").row(
            label=f"{names[arm]} · {size_label(size)}", gone=names[arm], parameters=size
        )
        for (arm, size), rows in lost.groupby(["arm", "size"])
    )


def without_rule(lost: pandas.DataFrame) -> pandas.DataFrame:
    """Accuracy gained without the rule's documents, beyond that of combinations that lost none: rows seeds, columns sizes."""
    return gaps(pick(lost, arm="dropped_rule"), ["size", "seed"], "gained").unstack("size")


def overlap_ranks(world: World, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rank correlation of influence with word overlap (summed IDF of shared tokens) among the sequences in each query's
    language, [Q]; real text, values [Q, N] for all queries of the world."""
    from scipy.stats import spearmanr

    spoken = world.sequences["language"].to_numpy(zero_copy_only=False)[rows]
    asked = world.queries["language"].to_numpy(zero_copy_only=False)
    shared = idf_overlap(target_counts(world.queries), target_counts(world.sequences.take(rows)))
    alike = spoken[None] == asked[:, None]
    return np.array([spearmanr(v[own], o[own]).statistic for v, o, own in zip(values, shared, alike, strict=True)])


def read_text(run: Trained, score: str) -> pandas.DataFrame:
    """`overlap_ranks` of a model of real text, a row a query."""
    import pandas

    scan = run.scan()
    found = overlap_ranks(run.world, getattr(scan, score), scan.rows)
    return pandas.DataFrame({"overlap": found, "size": run.parameters, "seed": run.seed})


def median_query(end: pandas.DataFrame, run: Trained) -> tuple[int, dict[int, str]]:
    """The query whose meaning's share is the median of a model's, and what each sequence of the scan is to it, in
    words."""
    scan = run.scan(READ)
    masses = end[(end["size"] == run.parameters) & (end["seed"] == run.seed)][MASS].to_numpy()
    query = int(np.argsort(masses[:, 0] - masses[:, 1], kind="stable")[len(masses) // 2])
    words = {"T1": "same rule, a shared word", "T2": "same rule", "T3": "same rule", "T0r": "shared word, other rule"}
    words |= {"T0a": words["T0r"], "T0e": words["T0r"]}
    members = tiers(run.world, scan.rows)
    return query, {
        int(place): word for name, word in words.items() for place in np.flatnonzero(members[name][scan.queries[query]])
    }


def median_text_query(run: Trained, language: str = "en-us") -> int:
    """Of a real-text model's queries in a language, the one whose overlap with what is influential is the median."""
    asked = run.world.queries["language"].to_numpy(zero_copy_only=False)
    values = np.where(asked == language, read_text(run, "raw")["overlap"].to_numpy(), np.nan)
    return int(np.argsort(values, kind="stable")[np.isfinite(values).sum() // 2])


def of_card(read: pandas.DataFrame, runs: Sequence[Trained], query: int) -> str:
    """What a card of Ladder shows, in a sentence: the query's share of meaning in the smallest and the largest model."""
    small, large = (
        share(read[(read["size"] == run.parameters) & (read["seed"] == run.seed)][MASS].to_numpy()[[query]])
        for run in (runs[0], runs[-1])
    )
    against = "" if large > small else " This query goes against the finding."
    return f"The median query of one seed's largest model: meaning holds {small:.0%} of its top in the small model, {large:.0%} in the large.{against}"


def of_text_card(runs: Sequence[Trained], query: int) -> str:
    """What a card of real text shows, in a sentence: how closely influence follows shared words in two models."""
    small, large = (read_text(run, "raw")["overlap"][query] for run in runs)
    against = "" if large < small else " This query goes against the paper's picture."
    return (
        "The paper's own picture, on the median query of the real text. Influence follows shared words by "
        f"{small:.2f} (rank correlation) in the small model, {large:.2f} in the large.{against}"
    )
