"""What planted worlds share: words, noise, and tables of documents."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml

from influence_kit.corpora.world import token_columns
from influence_kit.errors import UserError

# Words lie in lists/*.yaml. A list's hash stands here, so that worlds are made again when a word in it changes.
LISTS = {"atlas": "fcb8fa0bb023", "cast": "503257ce20f0", "ladder": "d58f1156e59a"}


@cache
def listed(name: str) -> dict[str, Any]:
    """What lists/<name>.yaml holds, each text in it as the tuple of its words.

    Raises:
        UserError: the file is not the one whose hash stands in LISTS.
    """
    text = Path(__file__).with_name("lists").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    found = hashlib.sha256(text.encode()).hexdigest()[:12]
    if found != LISTS[name]:
        raise UserError(
            f"lists/{name}.yaml has changed: write {found!r} for {name!r} in LISTS of {Path(__file__).name}"
        )

    def split(part: Any) -> Any:
        return {key: split(value) for key, value in part.items()} if isinstance(part, dict) else tuple(part.split())

    return split(yaml.safe_load(text))


def first(number: int, words: Sequence[str]) -> list[str]:
    """The first words of a list; one that is too short starts over as "heron-2", "heron-3" and so on."""
    rounds = -(-number // len(words))
    return [word if turn == 1 else f"{word}-{turn}" for turn in range(1, rounds + 1) for word in words][:number]


def skip(rng: np.random.Generator, choices: int, parts: int, kinds: Iterable[Hashable]) -> None:
    """Draw what a made-up word would be drawn from, for each of `kinds`, no two alike of a kind.

    Words were made up once. What is drawn after them, all that numbers come from, stays what it was with a seed.

    Args:
        rng: What is advanced.
        choices: Number of syllables to choose from.
        parts: Syllables of a word.
        kinds: A word's kind, for each word.
    """
    met = set()
    for kind in kinds:
        while (word := (kind, *rng.integers(0, choices, parts).tolist())) in met:
            pass
        met.add(word)


def add(vocabulary: list[str], words: Iterable[str]) -> np.ndarray:
    """Ids of words that are put at the vocabulary's end.

    Raises:
        UserError: one of them is there already.
    """
    start = len(vocabulary)
    for word in words:
        if word in vocabulary:
            raise UserError(f"{word!r} stands for two things: a world's words have to be distinct")
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
