"""What planted worlds share: words that are made up, noise, and tables of documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from influence_kit.corpora.world import token_columns

SYLLABLES = ("ba be da do fa fi ga go ka ke la li ma mo na ne pa po ra re sa si ta to va ve za zu").split()


def coin(rng: np.random.Generator, syllables: int, ending: str = "") -> str:
    """A word of random syllables."""
    return "".join(rng.choice(SYLLABLES, syllables)) + ending


def add(vocabulary: list[str], words: Iterable[str]) -> np.ndarray:
    """Ids of words that are put at the vocabulary's end; one that is there already gets an apostrophe, or several."""
    start = len(vocabulary)
    for word in words:
        while word in vocabulary:
            word += "'"
        vocabulary.append(word)
    return np.arange(start, len(vocabulary))


def zipf(rng: np.random.Generator, ids: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Words drawn independently, the r-th of them in proportion to 1 / r."""
    weights = 1 / np.arange(1, len(ids) + 1)
    return rng.choice(ids, size=size, p=weights / weights.sum())


def in_words(vocabulary: Sequence[str], input_ids: np.ndarray, loss_mask: np.ndarray) -> dict[str, list[str]]:
    """Columns `prompt` and `completion` of queries: their words before and where the mask is True.

    Args:
        vocabulary: Words by id.
        input_ids: Token ids [Q, T], the first one a document's start.
        loss_mask: True on the completion, bool [Q, T].
    """
    found: dict[str, list[str]] = {"prompt": [], "completion": []}
    for row, told in zip(input_ids, loss_mask):
        found["prompt"].append(" ".join(vocabulary[token] for token in row[1 : told.argmax()]))
        found["completion"].append(" ".join(vocabulary[token] for token in row[told]))
    return found


def as_table(rows: Mapping[str, Any], loss_mask: np.ndarray) -> pa.Table:
    """Documents as a table: `tokens` become token columns, every other array or list a column of its name.

    Args:
        rows: `tokens` [N, T], and columns [N] of whole numbers (kept as int32), booleans or texts.
        loss_mask: bool [N, T], or [T] for all of them.
    """
    columns = token_columns(rows["tokens"], np.broadcast_to(loss_mask, rows["tokens"].shape))
    for name, values in rows.items():
        if name != "tokens":
            kinds = {"b": pa.bool_(), "i": pa.int32()}
            columns[name] = pa.array(values, kinds.get(np.asarray(values).dtype.kind, pa.string()))
    return pa.table(columns)
