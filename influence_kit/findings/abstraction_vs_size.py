"""Meaning against overlap in Ladder (chapter 04): what the top of a ranking shares with the query, and whether removing
it matters.

The contrast fixed beforehand is lift(T2) / lift(T0r), at the end of training and at the checkpoint where the query loss
is nearest .5 nat: both tiers share the response word with the query and no other word; T2 also states its rule. It is a
ratio of means over the queries of one seed. 1 is what matching of tokens gives. The mass ratio is the same with
`meaning_mass` and `overlap_mass`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.world import World
from influence_kit.corpora.worlds.ladder import TIERS, tiers
from influence_kit.errors import UserError
from influence_kit.findings.families import END, Planned, planted_grid, section, text_grid
from influence_kit.findings.profiles import Profile
from influence_kit.findings.trained import Trained, changed_answers
from influence_kit.measures.checkpoints import half_nat
from influence_kit.measures.intervals import Estimate, bootstrap, estimate_of, ratio_of_means
from influence_kit.measures.lexical import idf_overlap, overlap, target_counts
from influence_kit.measures.lifts import lift, mass_share, precision_at, top_members

if TYPE_CHECKING:
    import pandas

CONCEPT = ("T1", "T2", "T3")  # the query's own rule
MEANING = ("T2", "T3")  # its rule without its agent or event
OVERLAP = ("T0r", "T0a", "T0e")  # its words in other rules
INDEX = ["T2", "T0r"]
MASS = ["meaning_mass", "overlap_mass"]


def reads(profile: Profile) -> list[Planned]:
    """Ladder along training, trained again without tiers, and real text."""
    grid = section(profile, "ladder", "04")
    dropped = [arm for arm in grid.arms if arm.startswith("dropped_")]
    found = planted_grid(profile, "ladder", fractions=(*grid.scan.fractions, END))
    return found + planted_grid(profile, "ladder", dropped, fractions=()) + text_grid(profile)


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

    Args:
        values: Scores [Q, N], of any form, of the sequences at `rows` for the queries at `queries`.
        top: The share of the scan whose lifts are read.
        k: The highest scores whose precision is read.
        two_sided: Lifts are of the largest |scores|.

    Returns:
        T1 ... T5, the tier's lift; meaning_mass and overlap_mass, the share of the two-sided mass of the top held by T2
        and T3, and by T0r, T0a and T0e; precision, the share of the query's own rule (T1, T2, T3) among its k highest
        scores, and shuffled_precision, the same share where the rule is another query's (mean over the queries of all
        other rules; nan where there is none).

    Raises:
        UserError: Scores whose shape does not fit.
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
    columns["precision"] = precision_at(values, concept, k)
    columns["shuffled_precision"] = _of_others(values, concept, world.queries["cell"].to_numpy()[queries], k)
    return pandas.DataFrame(columns)


def _union(members: dict[str, np.ndarray], names: Sequence[str]) -> np.ndarray:
    return np.any([members[name] for name in names], axis=0)


def _of_others(values: np.ndarray, concept: np.ndarray, cell: np.ndarray, k: int) -> np.ndarray:
    """Each ranking's precision for the rules of the other queries, [Q]: what any query's ranking gives."""
    k = min(k, values.shape[1])
    highest = top_members(values, k / values.shape[1])
    found = highest.astype(np.float32) @ concept.T.astype(np.float32) / k  # [ranking, rule]
    apart = np.not_equal.outer(cell, cell) & concept.any(1)
    counted = apart.sum(1)
    return np.divide((found * apart).sum(1), counted, out=np.full(len(values), np.nan), where=counted > 0)


def read(
    run: Trained, score: str, top: float, k: int, fraction: float = 1.0, two_sided: bool = False
) -> pandas.DataFrame:
    """`abstraction` of a model's scan in one form of the score, at a checkpoint."""
    scan = run.scan(fraction)
    found = abstraction(run.world, getattr(scan, score), scan.rows, scan.queries, top, k, two_sided)
    return found.assign(size=run.parameters, seed=run.seed, fraction=fraction)


def read_words(run: Trained, top: float, k: int) -> pandas.DataFrame:
    """`abstraction` of a model's scan by BM25.

    Ties are everywhere in BM25: noise far below any difference breaks them, the same way for all tiers.
    """
    scan = run.scan()
    values = overlap(run.world, scan.rows, scan.queries)
    values = values + 1e-6 * np.random.default_rng([run.seed, 0xB25]).random(values.shape)
    return abstraction(run.world, values, scan.rows, scan.queries, top, k).assign(seed=run.seed)


def index(rows: pandas.DataFrame) -> Estimate:
    """The abstraction index, lift(T2) / lift(T0r), of a table of `abstraction` with a column seed."""
    return estimate_of(rows, INDEX, ratio_of_means, bounds=(0, np.inf))


def mass_ratio(rows: pandas.DataFrame) -> Estimate:
    """Meaning's mass over overlap's, of a table of `abstraction` with a column seed."""
    return estimate_of(rows, MASS, ratio_of_means, bounds=(0, np.inf))


def top_decline(small: np.ndarray, large: np.ndarray, k: int = 10) -> np.ndarray:
    """Mean of each query's k highest scores in the small model over that in the large one: [Q], both [Q, N].

    Both must score the same queries and sequences. nan where a query's highest scores in the large model are not
    positive.
    """
    small, large = np.asarray(small, float), np.asarray(large, float)
    if small.shape != large.shape or small.ndim != 2 or not 1 <= k <= small.shape[1]:
        raise UserError(
            f"Scores of shapes {small.shape} and {large.shape} with k={k}: give both as [Q, N] with N >= k."
        )
    first, second = (np.sort(values, axis=1)[:, -k:].mean(1) for values in (small, large))
    return np.divide(first, second, out=np.full(len(first), np.nan), where=second > 0)


def declines(runs: Iterable[Trained]) -> pandas.DataFrame:
    """`top_decline` from the smallest model to the largest, a row a query and seed."""
    import pandas

    by = {(run.parameters, run.seed): run for run in runs}
    small, large = min(by)[0], max(by)[0]
    return pandas.concat(
        pandas.DataFrame({"decline": top_decline(by[small, seed].scan().raw, run.scan().raw), "seed": seed})
        for (size, seed), run in by.items()
        if size == large
    )


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

    scan = run.scan()
    asked, told = run.world.queries.take(scan.queries), run.world.sequences.take(scan.rows)
    same = asked["cell"].to_numpy()[:, None] == told["cell"].to_numpy()[None]
    values = partial_rank(np.abs(scan.raw), same, overlap(run.world, scan.rows, scan.queries))
    return pandas.DataFrame({"partial": values, "size": run.parameters, "seed": run.seed})


def at_half_nat(run: Trained, path: Sequence[float]) -> float:
    """The checkpoint at which the loss of a model's scored queries is nearest half a nat."""
    return half_nat(run.answers[run.answers["query"].isin(run.scan().queries)], path)


def index_and_accuracy(along: pandas.DataFrame, answers: pandas.DataFrame) -> pandas.DataFrame:
    """The index and the accuracy on all queries (`correct`) of every seed, size and checkpoint; `answers` as `snapped`
    gives them."""
    by = ["seed", "size", "fraction"]
    means = along.groupby(by)[INDEX].mean()
    points = (means["T2"] / means["T0r"]).rename("index").reset_index()
    return points.merge(answers.groupby(by)["correct"].mean().reset_index())


def correlation(points: pandas.DataFrame, column: str, given: str) -> Estimate:
    """Rank correlation, over the sizes and checkpoints of a seed, of the index with one column, given another."""
    by_seed = {
        seed: partial_rank(*(part[[name]].to_numpy().T for name in ("index", column, given)))[0]
        for seed, part in points.groupby("seed")
    }
    exact = {"method": "t", "bounds": (-1, 1)} if len(by_seed) > 1 else {}
    return bootstrap(list(by_seed.values()), list(by_seed), **exact)  # type: ignore[arg-type]


def removal(base: Iterable[Trained], again: Iterable[Trained]) -> pandas.DataFrame:
    """Change of log p (nats) when documents were dropped: one row per model and combination of rule and response word.

    Queries of one combination lose the same documents, so the combination is the unit; what the dropped tier carries is
    the change of treated combinations less that of the others.

    Returns:
        arm, size, seed, combination, change (the mean over the combination's queries), treated.
    """
    by = ["arm", "size", "seed", "combination"]
    return (
        changed_answers(base, again)
        .groupby(by, as_index=False)
        .agg(change=("change", "mean"), treated=("treated", "first"))
    )


def documents_gone(again: Sequence[Trained]) -> float:
    """How many documents were replaced in a corpus, the mean over seeds."""
    gone = {run.seed: run.world.sequences["replaced"].to_numpy(zero_copy_only=False).sum() for run in again}
    return float(np.mean(list(gone.values())))


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


def shown_query(end: pandas.DataFrame, run: Trained) -> tuple[int, dict[int, str]]:
    """A query in whose top a model has more of its own rule than three quarters of the others have, and the tier of
    each sequence."""
    scan = run.scan()
    own = end[(end["size"] == run.parameters) & (end["seed"] == run.seed)]["T2"].to_numpy()
    query = int(np.argsort(own, kind="stable")[len(own) * 3 // 4])
    members = {name: member[scan.queries[query]] for name, member in tiers(run.world, scan.rows).items()}
    return query, {place: name for name, member in members.items() for place in np.flatnonzero(member)}  # type: ignore[misc]
