"""What crosses from one language to another (chapter 05): lifts of supporters in Atlas, ranks of translations in real
text.

X is the lift of documents that state the asked fact in the other language, over that of documents in the query's own.
0: nothing crosses; 1: language does not matter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.texts.parallel import aligned
from influence_kit.corpora.world import World
from influence_kit.corpora.worlds.atlas import namesakes, supporters
from influence_kit.findings.families import END, Planned, planted_grid, text_grid, trained_again
from influence_kit.findings.profiles import Profile
from influence_kit.findings.trained import Trained, changed_answers
from influence_kit.measures.checkpoints import nearest
from influence_kit.measures.intervals import Estimate, estimate_of, pick, ratio_of_means
from influence_kit.measures.lexical import idf_overlap, shares_tokens, target_counts
from influence_kit.measures.lifts import auc, lift, recall_at

if TYPE_CHECKING:
    import pandas

X = ["other", "own"]


def reads(profile: Profile) -> list[Planned]:
    """Atlas and real text along training, variations of Atlas, and Atlas trained without translations."""
    along = (*profile.atlas.scan.fractions, END)
    arms = ("minority", "no_anchors", "half_anchors")
    found = planted_grid(profile, "atlas", fractions=along) + planted_grid(profile, "atlas", arms)
    found += trained_again(profile, "atlas", "05", "without_translations")
    return found + (text_grid(profile, (*profile.text.scan.fractions, END)) if profile.text else [])


def tier_lifts(
    world: World, values: np.ndarray, rows: np.ndarray, queries: np.ndarray, top: float = 0.01
) -> pandas.DataFrame:
    """One row per scored Atlas query: lift in the top share of the scan of three kinds of sequence.

    Args:
        values: Scores [Q, N] of the sequences at `rows` for the queries at `queries`.
        top: Share of the scan.

    Returns:
        Columns other (states the fact in the other language), own (in the query's language), namesake (other language,
        same entity, another fact), asked (language 0 or 1).
    """
    import pandas

    own, other = (tier[queries] for tier in supporters(world, rows))
    tiers = {"other": other, "own": own, "namesake": namesakes(world, rows)[1][queries]}
    lifts = {name: lift(values, tier, top) for name, tier in tiers.items()}
    return pandas.DataFrame({**lifts, "asked": world.queries["language"].to_numpy()[queries]})


def translation_ranks(world: World, values: np.ndarray, rows: np.ndarray, k: int = 15) -> pandas.DataFrame:
    """One row per query and other language: how high the query's translation ranks among that language's sequences.

    Args:
        values: Scores [Q, N] of the sequences at `rows` for all queries of a parallel world.
        k: The highest scores whose recall is read.

    Returns:
        Columns asked, language, auc, recall (at k), the same for IDF-weighted token overlap (overlap_auc,
        overlap_recall), chance_recall, and shares (the pair has a token in common that fewer than 5 % of the scanned
        sequences have).
    """
    import pandas

    spoken = world.sequences["language"].to_numpy(zero_copy_only=False)[rows]
    asked = world.queries["language"].to_numpy(zero_copy_only=False)
    words, others = target_counts(world.queries), target_counts(world.sequences.take(rows))
    overlap, shared = idf_overlap(words, others), shares_tokens(words, others)
    found = []
    for language, place in aligned(world, rows).items():
        columns = np.flatnonzero(spoken == language)
        chosen = np.flatnonzero(place >= 0)
        right = columns[None] == place[chosen, None]
        ours, theirs = values[np.ix_(chosen, columns)], overlap[np.ix_(chosen, columns)]
        measures = {"auc": auc(ours, right), "overlap_auc": auc(theirs, right)}
        measures |= {"recall": recall_at(ours, right, k), "overlap_recall": recall_at(theirs, right, k)}
        about = {"asked": asked[chosen], "language": language, "shares": shared[chosen, place[chosen]]}
        found.append(pandas.DataFrame({**about, **measures, "chance_recall": min(1.0, k / len(columns))}))
    return pandas.concat(found, ignore_index=True)


def read(run: Trained, score: str, top: float, fraction: float = 1.0) -> pandas.DataFrame:
    """`tier_lifts` of a model's scan in one form of the score, at a checkpoint."""
    scan = run.scan(fraction)
    found = tier_lifts(run.world, getattr(scan, score), scan.rows, scan.queries, top)
    return found.assign(size=run.parameters, seed=run.seed, fraction=fraction, arm=run.arm)


def crossing(rows: pandas.DataFrame) -> Estimate:
    """X of a table of `read`."""
    return estimate_of(rows, X, ratio_of_means, bounds=(0, np.inf))


def meaning(rows: pandas.DataFrame) -> Estimate:
    """Lift of supporters in the other language over that of namesakes, of a table of `read`."""
    return estimate_of(rows, ["other", "namesake"], ratio_of_means, bounds=(0, np.inf))


def loss_at(answers: pandas.DataFrame, size: int, fraction: float) -> float:
    """Mean loss (nats) of the scored queries at the kept checkpoint nearest a fraction of training."""
    asked = pick(answers, kind="fact", availability="both", size=size)
    return -pick(asked, fraction=nearest(fraction, sorted(asked["fraction"].unique())))["log_p"].mean()


def x_and_transfer(along: pandas.DataFrame, answers: pandas.DataFrame) -> pandas.DataFrame:
    """X and the accuracy on facts stated only in the other language (`correct`) of every size, seed and checkpoint;
    `answers` as `snapped` gives them."""
    by = ["size", "seed", "fraction"]
    means = along.groupby(by)[X].mean()
    points = (means["other"] / means["own"]).rename("x").reset_index()
    only_there = answers[(answers["kind"] == "fact") & (answers["availability"] != "both")]
    return points.merge(only_there.groupby(by)["correct"].mean().reset_index())


def lost(base: Iterable[Trained], again: Iterable[Trained], fraction: float) -> pandas.DataFrame:
    """Change of log p (nats) of facts that both languages state, by whether a fact lost its statements (`treated`), at
    the checkpoint nearest a fraction of training."""
    found = pick(changed_answers(base, again, fraction), kind="fact", availability="both")
    return found[["treated", "language", "change", "size", "seed"]].assign(fraction=fraction)


def read_text(run: Trained, score: str, k: int, fraction: float) -> pandas.DataFrame:
    """`translation_ranks` of a model of real text in one form of the score, at a checkpoint, with its held-out loss
    there."""
    scan = run.scan(fraction)
    found = translation_ranks(run.world, getattr(scan, score), scan.rows, k)
    return found.assign(size=run.parameters, seed=run.seed, fraction=fraction, loss=run.held_out_loss(fraction))


def auc_by_size(rows: pandas.DataFrame) -> Iterator[dict]:
    """AUC of influence and of token overlap by size, for all pairs and for those that share no rare token: lines of a
    table."""
    for name, part in (("all pairs", rows), ("no shared rare token", rows[~rows["shares"]])):
        for label, column in (("influence", "auc"), ("token overlap", "overlap_auc")):
            for size, at in part.groupby("size"):
                yield estimate_of(at, column, bounds=(0, 1)).row(parameters=size, series=f"{label}: {name}")


def shown_query(lifts: pandas.DataFrame, run: Trained) -> int:
    """A query of which a model lifts supporters in the other language more than of three quarters of the others."""
    own = lifts[(lifts["size"] == run.parameters) & (lifts["seed"] == run.seed)]["other"]
    return int(own.fillna(0).to_numpy().argsort(kind="stable")[len(own) * 3 // 4])
