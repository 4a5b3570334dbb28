"""What a lexical filter before the scan loses: how much of the full scan's top it keeps, by what ties that top to the query.

The paper scored only the 10,000 sequences with the highest TF-IDF (Sec. 3.2.1; Eq 28 and 29) and found the unfiltered top 10
among them for most queries (Sec. 5.2.2). Here every sequence of the scan is scored, so that what a filter would have lost is
known, and so is what it is to the query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.texts.parallel import aligned
from influence_kit.corpora.world import World, token_matrix
from influence_kit.corpora.worlds import atlas, ladder
from influence_kit.errors import UserError
from influence_kit.measures.lexical import bm25
from influence_kit.measures.lifts import top_count, top_members

if TYPE_CHECKING:
    import pandas

ALL = "all"


def survival(lexical, k: int) -> np.ndarray:
    """Probability [Q, N] that each sequence is among the k with the highest lexical score [Q, N], ties broken at random.

    Word overlap ties often (a word-level world has few distinct scores), and an order of ties would be an answer made up.
    """
    return _share_kept(*_places(lexical), k)


def all_survive(lexical, members, k: int) -> np.ndarray:
    """Probability [Q] that all of a query's `members` (bool [Q, N]) are among the k with the highest lexical score.

    Where s of m tied sequences find room, j members among them all do with probability s (s - 1) ... / m (m - 1) ... (j factors).
    """
    return _all_kept(*_places(lexical), np.asarray(members, dtype=bool), k)


def _places(lexical) -> tuple[np.ndarray, np.ndarray]:
    """How many sequences lie above each one, and above or level with it: int [Q, N] twice."""
    from scipy.stats import rankdata

    scores = -np.asarray(lexical, dtype=float)
    above, level = (rankdata(scores, way, axis=1).astype(int) for way in ("min", "max"))
    return above - 1, level


def _share_kept(above: np.ndarray, level: np.ndarray, k: int) -> np.ndarray:
    return np.clip((k - above) / (level - above), 0, 1)


def _all_kept(above: np.ndarray, level: np.ndarray, members: np.ndarray, k: int) -> np.ndarray:
    kept, found = _share_kept(above, level, k), []
    tied = members & (kept > 0) & (kept < 1)
    for row in range(len(kept)):
        chance = float((kept[row][members[row]] > 0).all())
        for i in range(int(tied[row].sum())):
            first = tied[row].argmax()  # all of these tie with each other, at the filter's edge
            chance *= (k - above[row, first] - i) / (level[row, first] - above[row, first] - i)
        found.append(chance)
    return np.array(found)


def relations(world: World, rows: np.ndarray, queries: np.ndarray) -> dict[str, np.ndarray]:
    """What the sequences at `rows` are to the queries at `queries`: bool [Q, N] by kind, every pair in just one kind.

    Raises UserError for a world whose relations are not known.
    """
    if world.name == "atlas":
        copies = world.sequences["canary"].to_numpy()[rows][None] == world.queries["canary"].to_numpy()[queries][:, None]
        kinds = {"verbatim": copies & (world.queries["canary"].to_numpy()[queries] >= 0)[:, None]}
        own, other = (tier[queries] for tier in atlas.supporters(world, rows))
        same_name = np.logical_or(*(tier[queries] for tier in atlas.namesakes(world, rows)))
        kinds |= {"same fact, same language": own, "same fact, other language": other, "same name only": same_name}
    elif world.name == "ladder":
        tiers = {name: tier[queries] for name, tier in ladder.tiers(world, rows).items()}
        kinds = {"same rule, shared agent or event": tiers["T1"], "same rule, shared answer": tiers["T2"]}
        kinds |= {"same rule, nothing shared": tiers["T3"]}
        kinds["other rule, shared word"] = tiers["T0r"] | tiers["T0a"] | tiers["T0e"]
    elif world.name == "realtext":
        places = np.stack([place[queries] for place in aligned(world, rows).values()])
        kinds = {"translation": (np.arange(len(rows)) == places[..., None]).any(0)}
        asked, spoken = (table["language"].to_numpy(zero_copy_only=False) for table in (world.queries, world.sequences))
        kinds["same language"] = asked[queries][:, None] == spoken[rows][None]
    else:
        raise UserError(f"no relations are known in the world {world.name!r}: atlas, ladder and realtext have them")
    rest = "other language" if world.name == "realtext" else "unrelated"
    return kinds | {rest: ~np.logical_or.reduce(list(kinds.values()))}


def overlap(world: World, rows: np.ndarray, queries: np.ndarray, k1: float = 1.5, b: float = 0.0) -> np.ndarray:
    """TF-IDF score [Q, N] of the sequences at `rows` for prompt and completion of the queries at `queries`.

    Equation 28 and 29 of the paper (k1 = 1.5, no length normalisation); b above 0 makes it BM25.
    """
    return bm25(_words(world.queries.take(queries)), _words(world.sequences.take(rows)), k1, b)


def prefilter(
    world: World,
    values: np.ndarray,
    rows: np.ndarray,
    queries: np.ndarray,
    shares: Sequence[float],
    lexical: np.ndarray | None = None,
    k: int = 10,
) -> pandas.DataFrame:
    """One row per query, share of the scan kept, and relation of the top k to the query (and one for "all" of them).

    values [Q, N] are influence scores, lexical [Q, N] what the filter goes by (`overlap` by default). Columns: query,
    share, relation, top (sequences of that relation in the top k), kept (how many of them the filter keeps, as expected where
    lexical scores tie), whole (probability that the whole top k is kept; of relation "all" only).
    Recall of a relation is the sum of kept over the sum of top.
    """
    import pandas

    lexical = overlap(world, rows, queries) if lexical is None else np.asarray(lexical)
    size, found = values.shape[1], []
    top = top_members(values, min(k, size) / size)
    kinds, places = {ALL: np.ones_like(top), **relations(world, rows, queries)}, _places(lexical)
    for share in shares:
        number = top_count(size, share)
        passes = _share_kept(*places, number)
        for name, member in kinds.items():
            both = top & member
            about = {"query": queries, "share": share, "relation": name, "top": both.sum(1), "kept": (both * passes).sum(1)}
            whole = _all_kept(*places, top, number) if name == ALL else np.nan
            found.append(pandas.DataFrame({**about, "whole": whole}))
    return pandas.concat(found, ignore_index=True)


def _words(table) -> list[list[int]]:
    """Token ids of each row up to its last target, without the first (a document's start)."""
    last = [int(np.flatnonzero(mask)[-1]) for mask in token_matrix(table, "loss_mask")]
    return [row[1 : end + 1].tolist() for row, end in zip(token_matrix(table), last, strict=True)]
