"""Maths and code (chapter 11): procedures against surfaces. Which of two sequences influences a query more, the one
that computes the same or the one that looks the same?

Three contrasts between tiers of the Procedures world, each the probability that a sequence of the first outranks one of
the second (.5 where the ranking does not tell them apart):

    auc          SA and S0 (same procedure; other names, numbers, verb) over ON and ONA (same names, another procedure)
    auc_answer   SA over OA: both share the answer and no other word, only one computes the same
    auc_nothing  S0 over O0: neither shares a word

Signed influences of a class nearly cancel near convergence, so rankings are read by |score| as well as by the score. The
correlation of two queries' influences over all scanned sequences is the measure of Ruis et al. 2024 (arXiv 2411.12580):
queries that are answered by one procedure should draw on the same sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.world import World, token_matrix
from influence_kit.corpora.worlds.procedures import OWNS, PROCEDURES, SO, TIERS, tiers
from influence_kit.errors import UserError
from influence_kit.findings.families import END, Planned, planted_grid, section
from influence_kit.findings.profiles import Profile
from influence_kit.findings.trained import Trained
from influence_kit.measures.intervals import estimate_of, pick
from influence_kit.measures.lifts import auc, lift

if TYPE_CHECKING:
    import pandas

    from influence_kit.reading.cards import CardView

CONTRASTS = {
    "auc": (("SA", "S0"), ("ON", "ONA")),
    "auc_answer": (("SA",), ("OA",)),
    "auc_nothing": (("S0",), ("O0",)),
}
METHODS = ("pearson", "spearman")
RELATIONS = {
    "SW": "same procedure, shared words",
    "SA": "same procedure, same answer",
    "S0": "same procedure",
    "ON": "another procedure, same names",
    "ONA": "another procedure, same names and answer",
    "OA": "another procedure, same answer",
    "OW": "another procedure, shared words",
    "O0": "another procedure",
    "KS": "other kind, same procedure",
    "KO": "other kind, another procedure",
}


def reads(profile: Profile) -> list[Planned]:
    """Procedures at the end of training."""
    section(profile, "procedures", "11")
    return planted_grid(profile, "procedures")


def contrasts(
    world: World,
    values: np.ndarray,
    rows: np.ndarray,
    queries: np.ndarray,
    top: float = 0.01,
    two_sided: bool = True,
    procedure: np.ndarray | None = None,
) -> pandas.DataFrame:
    """The contrasts of a scan.

    Args:
        world: A Procedures world.
        values: Scores [Q, N], of any form.
        rows: The sequences [N].
        queries: The queries [Q].
        top: The share of sequences that counts as most influential.
        two_sided: Rank by |score|.
        procedure: Labels of the sequences [N] in place of the planted ones.

    Returns:
        One row a query: kind, procedure (by name); auc, auc_answer and auc_nothing, nan where a side is empty; same and
        names, the lifts in the top share of the two sides of `auc`; SW ... KO, the lift of each tier.

    Raises:
        UserError: Scores whose shape does not fit.
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


def within_and_between(
    world: World, values: np.ndarray, queries: np.ndarray, method: str = "pearson"
) -> pandas.DataFrame:
    """The mean correlation of a query's influences [N] with those of others of its kind that share no word with it.

    Args:
        world: A Procedures world.
        values: Scores [Q, N], of any form.
        queries: The queries [Q].
        method: "pearson" or "spearman".

    Returns:
        One row a query: kind, procedure (by name); within and between, over queries of the same procedure and of the
        others, and gap, by which the first is more; answers count as words, and nan stands for no such query.

    Raises:
        UserError: Another method, or scores whose shape does not fit.
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
    labels = world.queries["procedure"].to_numpy()[queries]
    alike = labels[:, None] == labels[None]
    within, between = _means(matrix, usable & alike), _means(matrix, usable & ~alike)
    return pandas.DataFrame({**_about(world, queries), "within": within, "between": between, "gap": within - between})


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


def read(trained: Trained, fraction: float = END, form: str = "raw", **options) -> pandas.DataFrame:
    """`contrasts` of one checkpoint by a form of the score, with the model's size and seed; options: of `contrasts`."""
    scan = trained.scan(fraction)
    found = contrasts(trained.world, getattr(scan, form), scan.rows, scan.queries, **options)
    return found.assign(size=trained.parameters, seed=trained.seed, fraction=fraction)


def both_ways(runs: Iterable[Trained], form: str, top: float) -> dict[str, pandas.DataFrame]:
    """`read` of all models at the end of training, ranked by the score and by its size."""
    import pandas

    sides = {"by the score": False, "by the size of the score": True}
    return {
        way: pandas.concat(read(run, form=form, top=top, two_sided=two_sided) for run in runs)
        for way, two_sided in sides.items()
    }


def in_short(ways: Mapping[str, pandas.DataFrame], small: int, large: int) -> str:
    """The AUC of the smallest and of the largest model in both ways of ranking, in a sentence."""
    told = (
        f"{way} from {estimate_of(pick(rows, size=small), 'auc', bounds=(0, 1)):.2f} to "
        f"{estimate_of(pick(rows, size=large), 'auc', bounds=(0, 1)):.2f}"
        for way, rows in ways.items()
    )
    return (
        f"From {small:,} to {large:,} weights, the chance that a word problem of the same procedure stands above one with the same names "
        f"goes {', and '.join(told)}."
    )


def read_dealt(trained: Trained, form: str, **options) -> pandas.DataFrame:
    """`read` with procedures dealt out anew among the sequences of each kind."""
    scan, sequences = trained.scan(), trained.world.sequences
    kind, labels = (sequences[name].to_numpy(zero_copy_only=False)[scan.rows] for name in ("kind", "procedure"))
    return read(trained, form=form, procedure=shuffled_within(kind, labels, trained.seed), **options)


def related(trained: Trained, form: str, method: str = "pearson") -> pandas.DataFrame:
    """`within_and_between` at the end of training, with the model's size and seed."""
    scan = trained.scan()
    rows = within_and_between(trained.world, getattr(scan, form), scan.queries, method)
    return rows.assign(size=trained.parameters, seed=trained.seed)


def cards(smallest: Trained, largest: Trained, kind: str, found: pandas.DataFrame) -> CardView:
    """One query in both models: of its kind, the median one by AUC in the largest."""
    from influence_kit.reading.cards import median_query, side_by_side, which_query

    rows = pick(found, seed=largest.seed, size=largest.parameters).reset_index(drop=True)
    asked = pick(rows, kind=kind)["auc"].dropna()
    place = median_query(asked.to_numpy())
    query = int(asked.index[place])
    caption = which_query(asked.to_numpy(), place, float(asked.mean()), 0.5, "the larger model's AUC")
    made = []
    for trained in (smallest, largest):
        scan = trained.scan()
        members = tiers(trained.world, scan.rows)
        labels = {
            int(column): RELATIONS[name]
            for name, member in members.items()
            for column in np.flatnonzero(member[scan.queries[query]])
        }
        title, said = f"{kind}, {trained.parameters:,} weights", caption if trained is largest else ""
        made.append(trained.card(query, k=4, lowest=1, title=title, labels=labels, caption=said))
    return side_by_side(made)
