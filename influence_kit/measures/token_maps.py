"""Whether a token map points at what it should: the answer in a sequence that supports the query.

A map holds a score for each position of a sequence, [M, T] for M pairs of a query and a sequence. Scores of `token_scores`
belong to the *updating* position, whose gradient changes the weights; the token that is predicted there is the next one.
`by_token` reads such a map under either alignment, as scores of tokens:

    updating     the score at position t is the token's at t
    predicted    it is that of the token at t + 1
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from influence_kit.errors import UserError
from influence_kit.measures.lexical import document_frequency

if TYPE_CHECKING:
    import pandas

ALIGNMENTS = ("updating", "predicted")


def by_token(scores: np.ndarray, alignment: str) -> np.ndarray:
    """Scores of tokens [M, T] from scores of updating positions [M, T]. Raises UserError for an unknown alignment."""
    if alignment not in ALIGNMENTS:
        raise UserError(f"alignment={alignment!r} is not one of {', '.join(ALIGNMENTS)}")
    scores = np.asarray(scores, float)
    if alignment == "updating":
        return scores
    return np.concatenate([np.zeros_like(scores[:, :1]), scores[:, :-1]], 1)


def share(scores: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """Share of the |influence| of each map that marked tokens hold, [M]; nan for an empty map or where nothing is marked."""
    mass = np.abs(np.asarray(scores, float))
    total, marked = mass.sum(1), np.asarray(marked, bool)
    usable = (total > 0) & marked.any(1)
    return np.divide((mass * marked).sum(1), total, out=np.full(len(mass), np.nan), where=usable)


def hit(scores: np.ndarray, key: np.ndarray) -> np.ndarray:
    """1.0 where the token with the largest |score| is a key token, else 0.0: [M]; ties go to the first, nan as in `share`."""
    mass, key = np.abs(np.asarray(scores, float)), np.asarray(key, bool)
    found = key[np.arange(len(mass)), mass.argmax(1)].astype(float)
    return np.where((mass.max(1) > 0) & key.any(1), found, np.nan)


def preferred(scores: np.ndarray, span: np.ndarray, rival: np.ndarray) -> np.ndarray:
    """1.0 where the span holds more |influence| than its rival, .5 where as much, else 0.0: [M]; nan where either is empty."""
    mass = np.abs(np.asarray(scores, float))
    ours, theirs = (mass * span).sum(1), (mass * rival).sum(1)
    usable = span.any(1) & rival.any(1) & (mass.max(1) > 0)
    return np.where(usable, 0.5 + 0.5 * np.sign(ours - theirs), np.nan)


def share_before(scores: np.ndarray, key: np.ndarray, most: int = 5) -> np.ndarray:
    """Share of the |influence| of each map at the updating positions 0, 1, … most - 1 before the key: [M, most].

    scores by updating position, unaligned: 1 is where the key is predicted. nan where a pair has not just one key token, or
    the map is empty; 0 where a sequence does not reach back so far.
    """
    mass, key = np.abs(np.asarray(scores, float)), np.asarray(key, bool)
    total, usable = mass.sum(1), (key.sum(1) == 1) & (mass.sum(1) > 0)
    found = np.full((len(mass), most), np.nan)
    for pair in np.flatnonzero(usable):
        back = int(key[pair].argmax()) - np.arange(most)
        found[pair] = np.where(back >= 0, mass[pair, np.maximum(back, 0)], 0) / total[pair]
    return found


def chance(marked: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """What a token drawn at random hits, and what even |influence| would hold: share of the candidates marked, [M].

    nan where nothing is marked.
    """
    marked, candidates = np.asarray(marked, bool), np.asarray(candidates, bool)
    number = candidates.sum(1)
    usable = (number > 0) & marked.any(1)
    return np.divide((marked & candidates).sum(1), number, out=np.full(len(marked), np.nan), where=usable)


def read_maps(
    maps: dict[str, np.ndarray], key: np.ndarray, span: np.ndarray, rival: np.ndarray, candidates: np.ndarray
) -> pandas.DataFrame:
    """One row per pair and way of reading it; hit, key_share, span_share, asked (over its rival), and chances beside.

    maps: of the `maps` stage, `ekfac`, `plain` and `other` by updating position, `replaced` by token. key, span, rival bool
    [M, T] (see `corpora.deep.marks`); candidates bool [M, T]: tokens that are targets. Columns: pair, method, alignment
    ("token" where replacing the token itself was scored), hit, key_share, span_share, asked, chance (of hit and key_share),
    span_chance. Pairs without a key are left out.
    """
    import pandas

    even, wide = chance(key, candidates), chance(span, candidates)
    tables = []
    for method in ("ekfac", "plain", "other", "replaced"):
        for alignment in ("token",) if method == "replaced" else ALIGNMENTS:
            scores = maps[method] if method == "replaced" else by_token(maps[method], alignment)
            columns = {"pair": np.arange(len(scores)), "method": method, "alignment": alignment}
            columns |= {"hit": hit(scores, key), "key_share": share(scores, key), "span_share": share(scores, span)}
            columns |= {"asked": preferred(scores, span, rival), "chance": even, "span_chance": wide}
            tables.append(pandas.DataFrame(columns)[key.any(1)])
    return pandas.concat(tables, ignore_index=True)


def shared_tokens(
    queries: np.ndarray, sequences: np.ndarray, candidates: np.ndarray, documents: np.ndarray, rare: float = 0.05
) -> np.ndarray:
    """bool [M, T]: candidate tokens of each sequence that its query holds too and that are rare.

    queries, sequences [M, T] token ids of pairs; documents [N, T] token ids by which rarity is judged: in less than the share
    `rare` of them.
    """
    frequency = np.zeros(int(max(queries.max(), sequences.max(), documents.max())) + 1)
    counted = document_frequency(documents)
    frequency[: len(counted)] = counted
    uncommon = frequency < rare * len(documents)
    same = (sequences[:, :, None] == queries[:, None, :]).any(2)
    return same & uncommon[sequences] & np.asarray(candidates, bool)
