"""What crosses from one language to another: lifts of supporters in Atlas, ranks of translations in real text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.texts.parallel import aligned
from influence_kit.corpora.world import World, token_matrix
from influence_kit.corpora.worlds.atlas import namesakes, supporters
from influence_kit.measures.lexical import idf_overlap, shares_tokens
from influence_kit.measures.lifts import auc, lift, recall_at

if TYPE_CHECKING:
    import pandas


def tier_lifts(
    world: World, values: np.ndarray, rows: np.ndarray, queries: np.ndarray, top: float = 0.01
) -> pandas.DataFrame:
    """One row per scored Atlas query: lift in the top share of the scan of three kinds of sequence.

    values [Q, N] are scores of the sequences at `rows` for the queries at `queries`. Columns: `other` (states the fact in the
    other language), `own` (in the query's language), `namesake` (other language, same entity, another fact), `asked` (0, 1).
    """
    import pandas

    own, other = (tier[queries] for tier in supporters(world, rows))
    tiers = {"other": other, "own": own, "namesake": namesakes(world, rows)[1][queries]}
    lifts = {name: lift(values, tier, top) for name, tier in tiers.items()}
    return pandas.DataFrame({**lifts, "asked": world.queries["language"].to_numpy()[queries]})


def translation_ranks(world: World, values: np.ndarray, rows: np.ndarray, k: int = 15) -> pandas.DataFrame:
    """One row per query and other language: how high the query's translation ranks among that language's sequences.

    values [Q, N] are scores of the sequences at `rows` for all queries of a parallel world. Columns: asked, language, auc,
    recall (at k), the same for IDF-weighted token overlap (overlap_auc, overlap_recall), chance_recall, and shares (the
    pair has a token in common that fewer than 5 % of the scanned sequences have).
    """
    import pandas

    spoken = world.sequences["language"].to_numpy(zero_copy_only=False)[rows]
    asked = world.queries["language"].to_numpy(zero_copy_only=False)
    scanned = world.sequences.take(rows)
    words, others = _words(world.queries), _words(scanned)
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


def _words(table) -> list[list[int]]:
    """Token ids of each row's targets, padding and the first token left out."""
    return [row[mask].tolist() for row, mask in zip(token_matrix(table), _targets(table), strict=True)]


def _targets(table) -> np.ndarray:
    mask = token_matrix(table, "loss_mask").copy()
    mask[:, 0] = False
    return mask
