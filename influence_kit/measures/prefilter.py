"""What a lexical filter before the scan loses: how much of the full scan's top it keeps, by what ties that top to the query.

The paper scored only the 10,000 sequences with the highest TF-IDF (Sec. 3.2.1; Eq 28 and 29) and found the unfiltered top 10
among them for most queries (Sec. 5.2.2). Here every sequence of the scan is scored, so that what a filter would have lost is
known, and so is what it is to the query.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.world import World
from influence_kit.measures.lexical import overlap
from influence_kit.measures.lifts import top_count, top_members
from influence_kit.measures.relations import relations

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
            about = {
                "query": queries,
                "share": share,
                "relation": name,
                "top": both.sum(1),
                "kept": (both * passes).sum(1),
            }
            whole = _all_kept(*places, top, number) if name == ALL else np.nan
            found.append(pandas.DataFrame({**about, "whole": whole}))
    return pandas.concat(found, ignore_index=True)
