"""The carrier of every corpus: training sequences in order, held-out ones, queries, and what their tokens stand for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NoReturn, Protocol

import numpy as np
import pyarrow as pa

from influence_kit.errors import UserError

BOS = "<bos>"
TABLES = ("sequences", "held_out", "queries")


@dataclass(frozen=True)
class World:
    """A corpus whose rows carry what was planted in them.

    Attributes:
        name: Which kind of world it is, a key of `WORLDS` where one of its dataclasses made it.
        sequences: One row a training sequence, in training order. All three tables have `input_ids` and `loss_mask` of
            fixed length; loss_mask is True on what is predicted.
        held_out: The same columns, never trained on.
        queries: One row a query, loss_mask True on the completion. `scored`, where there is such a column, marks those
            that influence is computed for.
        vocabulary: Words by id (word-level worlds); empty where there is a tokenizer.
        tokenizer: Tokenizers JSON (real text); empty where there is a vocabulary.
        parameters: What it was made from, as JSON can hold it.
    """

    name: str
    sequences: pa.Table
    held_out: pa.Table
    queries: pa.Table
    vocabulary: tuple[str, ...]
    tokenizer: str
    parameters: dict

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids."""
        if self.vocabulary:
            return len(self.vocabulary)
        return len(json.loads(self.tokenizer)["model"]["vocab"])

    @property
    def context(self) -> int:
        """T, the length in tokens of the longest row."""
        return max(token_matrix(getattr(self, name)).shape[1] for name in TABLES)

    def save(self, folder: Path) -> None:
        """Write three Arrow streams (which `datasets.Dataset.from_file` memory-maps), world.json and tokenizer.json."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in TABLES:
            table: pa.Table = getattr(self, name)
            with (
                pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink,
                pa.ipc.new_stream(sink, table.schema) as writer,
            ):
                writer.write_table(table, max_chunksize=65_536)
        about = {"name": self.name, "vocabulary": list(self.vocabulary), "parameters": self.parameters}
        (folder / "world.json").write_text(json.dumps(about, ensure_ascii=False, sort_keys=True))
        (folder / "tokenizer.json").write_text(self.tokenizer)

    @staticmethod
    def load(folder: Path) -> World:
        """Memory-map what `save` wrote."""
        about = json.loads((folder / "world.json").read_text())
        tables = [pa.ipc.open_stream(pa.memory_map(str(folder / f"{name}.arrow"))).read_all() for name in TABLES]
        tokenizer = (folder / "tokenizer.json").read_text()
        words = tuple(about["vocabulary"])
        return World(about["name"], *tables, words, tokenizer, about["parameters"])  # type: ignore[call-arg]


class Blueprint(Protocol):
    """What a world is made from: a frozen dataclass that says how large the world will be before it is made.

    Attributes:
        asks: The kinds of query that its scans are read for, as in the column `kind` of its queries, unless a reader
            names another one; empty where queries are all of one kind and have no such column.
        documents: Number of training sequences.
        length: Tokens of a sequence, the first one included.
        words: Number of token ids; at most so many where a tokenizer is trained.
    """

    asks: ClassVar[tuple[str, ...]]

    @property
    def documents(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def words(self) -> int: ...


def refuse(blueprint: object, name: str, wanted: str) -> NoReturn:
    """Raise a UserError that says which parameter is wrong, its value, and what it must be."""
    value = getattr(blueprint, name)
    raise UserError(f"{type(blueprint).__name__}: {name}={value!r} must be {wanted}")


def at_least(least: int, blueprint: object, *names: str) -> None:
    """Refuse parameters below a number."""
    for name in names:
        if getattr(blueprint, name) < least:
            refuse(blueprint, name, f"{least} or more")


def token_columns(input_ids: np.ndarray, loss_mask: np.ndarray | None = None) -> dict[str, pa.Array]:
    """Arrow columns `input_ids` fixed_size_list<int32>[T] and `loss_mask` fixed_size_list<bool>[T].

    Args:
        input_ids: Token ids [N, T].
        loss_mask: What is predicted, bool [N, T]; everything by default.
    """
    length = input_ids.shape[1]
    if loss_mask is None:
        loss_mask = np.ones(input_ids.shape, bool)
    return {
        "input_ids": pa.FixedSizeListArray.from_arrays(pa.array(input_ids.astype(np.int32).ravel()), length),
        "loss_mask": pa.FixedSizeListArray.from_arrays(pa.array(loss_mask.astype(bool).ravel()), length),
    }


def token_matrix(table: pa.Table, column: str = "input_ids") -> np.ndarray:
    """A fixed-length column as an array [N, T]."""
    length = table.schema.field(column).type.list_size
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[column].chunks]
    return np.concatenate(parts).reshape(-1, length) if parts else np.zeros((0, length), np.int32)


def batch_of(table: pa.Table, rows: Sequence[int] | np.ndarray | None = None) -> dict:
    """Torch tensors `input_ids` int64 [N, T] and `loss_mask` bool [N, T] of all or the given rows."""
    import torch

    chosen = slice(None) if rows is None else np.asarray(rows)
    return {
        "input_ids": torch.from_numpy(token_matrix(table)[chosen].astype(np.int64)),
        "loss_mask": torch.from_numpy(token_matrix(table, "loss_mask")[chosen].copy()),
    }
