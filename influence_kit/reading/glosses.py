"""What a text in another language says, in English: for a reader of cards, never for a number."""

from __future__ import annotations

from functools import cache

import numpy
import pyarrow as pa
import pyarrow.compute as pc

from influence_kit.corpora.world import World, token_matrix
from influence_kit.corpora.worlds.words import listed

ENGLISH = "en-us"


def in_english(world: World, table: pa.Table, row: int) -> str:
    """A row of a world's table in English; empty where it is English already, or its translation is not known.

    A German text of Atlas (or of Deep's Atlas) is told word for word, a paragraph of parallel text by the English one of
    the same pair, which the world has among its sequences or, where it is asked in English, its queries.
    """
    language = table["language"][row].as_py() if "language" in table.column_names else None
    if world.vocabulary:
        if language != 1:
            return ""
        told = token_matrix(table.slice(row, 1), "loss_mask")[0].nonzero()[0].max() + 1
        words = [world.vocabulary[token] for token in token_matrix(table.slice(row, 1))[0][1:told]]
        return " ".join(_translated(word) for word in words)
    if language in (None, ENGLISH) or "pair_id" not in table.column_names:
        return ""
    for known, column in ((world.sequences, "text"), (world.queries, "completion")):
        same = pc.and_(pc.equal(known["pair_id"], table["pair_id"][row]), pc.equal(known["language"], ENGLISH))
        if len(found := numpy.flatnonzero(same.to_numpy(zero_copy_only=False))):
            return known[column][int(found[0])].as_py()
    return ""


def _translated(word: str) -> str:
    bare, _, turn = word.rpartition("-")
    if word not in _dictionary() and bare in _dictionary() and turn.isdigit():  # a list that started over
        return f"{_dictionary()[bare]}-{turn}"
    return _dictionary().get(word, word)


@cache
def _dictionary() -> dict[str, str]:
    """English by German word of Atlas."""
    words = listed("atlas")
    relations = [pairs for relation in words["relations"].values() for pairs in relation.values()]
    pairs = [
        pair.split("/") for part in (*relations, words["fillers"], words["stops"], words["equals"]) for pair in part
    ]
    return {german: english for english, german in pairs}
