"""Do lines of the same speaker count for more than lines of others that share as many words with what is said?

Each line of the one kind is compared with the lines of the other kind that come next to it in token overlap with the query, below
and above, weighted so that their mean overlap is its own, and that come from the query's scenario if it does, from another if it
does not; what is read is how often it outranks them. .5 is what token overlap and scene give.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.texts.wesnoth import NARRATOR
from influence_kit.corpora.world import World, token_matrix
from influence_kit.errors import UserError
from influence_kit.measures.lexical import bm25, token_counts

if TYPE_CHECKING:
    import pandas


def speaker_preference(
    world: World, values: np.ndarray, rows: np.ndarray, queries: np.ndarray, neighbours: int = 3, shuffled: bool = False
) -> pandas.DataFrame:
    """One row per query: how often lines of its speaker outrank matched lines of other speakers of its campaign.

    values [Q, N] are scores, of any form, of the sequences at `rows` for the queries at `queries`. The narrator's lines are
    left out. Overlap is BM25 over what is said; names that stand before the lines do not count.

    shuffled: take each query for one of another speaker of its campaign, drawn from the campaign's other queries; the
    lines of that speaker are compared with those of third ones.

    Columns: those of `matched_preference`, and campaign, speaker (whose lines were compared).
    Raises UserError as `matched_preference`.
    """
    asked, told, near = _who(world, rows, queries)
    own = asked["speaker"]
    speaker = _of_others(asked["campaign"], own) if shuffled else own
    first = near & (told["speaker"][None] == speaker[:, None])
    # Where labels are shuffled, the query's true speaker stands on neither side.
    second = near & ~first & (told["speaker"][None] != own[:, None])
    scene = told["scenario"][None] == asked["scenario"][:, None]
    found = matched_preference(values, first, second, word_overlap(world, rows, queries), scene, neighbours)
    return found.assign(campaign=asked["campaign"], speaker=speaker)


def side_preference(
    world: World, values: np.ndarray, rows: np.ndarray, queries: np.ndarray, neighbours: int = 3
) -> pandas.DataFrame:
    """The same for lines of other speakers on the side of the query's, against lines of speakers on other sides.

    Speakers whose side no scenario tells are left out. Columns and errors as in `speaker_preference`.
    """
    asked, told, near = _who(world, rows, queries)
    others = near & (told["speaker"][None] != asked["speaker"][:, None])
    known = (told["side"] != "")[None] & (asked["side"] != "")[:, None]
    same = told["side"][None] == asked["side"][:, None]
    scene = told["scenario"][None] == asked["scenario"][:, None]
    kinds = others & known & same, others & known & ~same
    found = matched_preference(values, *kinds, word_overlap(world, rows, queries), scene, neighbours)
    return found.assign(campaign=asked["campaign"], speaker=asked["speaker"])


def _who(world: World, rows: np.ndarray, queries: np.ndarray) -> tuple[dict, dict, np.ndarray]:
    """Who speaks in queries and sequences, and where (columns by name), and bool [Q, N]: spoken in the query's campaign."""
    names = ("campaign", "speaker", "scenario", "side")
    asked = {name: world.queries[name].to_numpy(zero_copy_only=False)[queries] for name in names}
    told = {name: world.sequences[name].to_numpy(zero_copy_only=False)[rows] for name in names}
    near = (asked["campaign"][:, None] == told["campaign"][None]) & (told["speaker"] != NARRATOR)[None]
    return asked, told, near


def word_overlap(world: World, rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """BM25 of the sequences at `rows` for the queries at `queries`, over what each predicts: [Q, N]."""

    def said(table, places):
        mask = token_matrix(table, "loss_mask")[places]
        return token_counts(token_matrix(table)[places], mask, world.vocabulary_size, ignore=(0, 1))

    return bm25(said(world.queries, queries), said(world.sequences, rows))


def matched_preference(
    values: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    overlap: np.ndarray,
    strata: np.ndarray,
    neighbours: int = 3,
) -> pandas.DataFrame:
    """How often sequences of the first kind outrank those of the second that come next in overlap: one row a query.

    Args:
        values: `[Q, N]` scores. first, second: bool `[Q, N]`. overlap: `[Q, N]`, the score that is matched.
        strata: `[Q, N]`, any labels; both of a pair come from one stratum.
        neighbours: how many of the second kind, on either side in overlap, each of the first is compared with; fewer on
            both sides where one side has fewer, and a sequence beyond all of the second kind is left out.

    Columns: preference (ties count half), overlap (mean of the matched score less that of the partners: 0),
    unmatched_preference and unmatched_overlap (over all pairs), lines (of the first kind that found a partner); nan where
    there is none.

    Raises:
        UserError: shapes that do not fit, or neighbours below 1.
    """
    import pandas

    from influence_kit.measures.lifts import auc

    values, parts = np.asarray(values), (first, second, overlap, strata)
    if values.ndim != 2 or any(np.shape(part) != values.shape for part in parts):
        shapes = ", ".join(str(np.shape(part)) for part in (values, *parts))
        raise UserError(f"Scores, kinds, overlap and strata have shapes {shapes}; give all as [Q, N].")
    if neighbours < 1:
        raise UserError(f"neighbours={neighbours!r} must be 1 or more.")
    # Many lines share no word with a query and tie: which of them are taken must not depend on their order.
    ties = np.random.default_rng(0).random(values.shape[1])
    found = []
    for query in range(len(values)):
        wins, level = [], []
        for stratum in np.unique(strata[query]):
            here = strata[query] == stratum
            one, other = np.flatnonzero(first[query] & here), np.flatnonzero(second[query] & here)
            if not len(one) or not len(other):
                continue
            for place, partners, weights in _next_to(overlap[query] + 1e-9 * ties, one, other, neighbours):
                own, theirs = values[query, place], values[query, partners]
                wins.append(weights @ ((own > theirs) + 0.5 * (own == theirs)))
                level.append(overlap[query, place] - weights @ overlap[query, partners])
        either = first[query] | second[query]
        whole = {"unmatched_preference": values[query], "unmatched_overlap": overlap[query]}
        row = {
            name: auc(scores[either], first[query][either]) if either.any() else np.nan
            for name, scores in whole.items()
        }
        means = [float(np.mean(part)) if part else np.nan for part in (wins, level)]
        found.append({"preference": means[0], "overlap": means[1], **row, "lines": len(wins)})
    return pandas.DataFrame(found)


def _next_to(
    overlap: np.ndarray, one: np.ndarray, other: np.ndarray, neighbours: int
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(sequence, its partners, their weights) for each of `one` that has some of `other` on both sides.

    Partners that are far weigh little: where lines get rarer the next one above is further off than the next one below, and
    equal weights would call that a difference.
    """
    other = other[np.argsort(overlap[other], kind="stable")]
    places = np.searchsorted(overlap[other], overlap[one])
    reach = np.minimum(neighbours, np.minimum(places, len(other) - places))
    found = []
    for place, at, r in zip(one, places, reach):
        if r:
            below, above = other[at - r : at], other[at : at + r]
            down, up = overlap[place] - overlap[below].mean(), overlap[above].mean() - overlap[place]
            weights = np.repeat([up, down], r) / (r * (up + down))
            found.append((int(place), np.concatenate([below, above]), weights))
    return found


def _of_others(campaign: np.ndarray, speaker: np.ndarray) -> np.ndarray:
    """For each query a speaker of another query of its campaign; its campaign's only speaker becomes nobody."""
    rng, found = np.random.default_rng(0), np.full(len(speaker), "", dtype=object)
    for place in range(len(speaker)):
        others = speaker[(campaign == campaign[place]) & (speaker != speaker[place])]
        if len(others):
            found[place] = rng.choice(others)
    return found
