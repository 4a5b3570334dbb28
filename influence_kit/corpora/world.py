"""The carrier of every corpus: training sequences in order, held-out sequences, queries, and the way back to text."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

BOS = "<bos>"
TABLES = ("sequences", "held_out", "queries")


@dataclass(frozen=True)
class World:
    """A corpus whose rows carry what was planted in them.

    sequences: one row a training sequence, in training order; held_out: the same columns, never trained on;
    queries: one row a query, loss_mask True on the completion. All have `input_ids` and `loss_mask` of fixed length.
    vocabulary: words by id (word-level worlds); tokenizer: tokenizers JSON (real text); one of the two is empty.
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

    def pieces(self, input_ids: Sequence[int]) -> list[str]:
        """The text of each token, for reading."""
        if self.vocabulary:
            return [self.vocabulary[i] for i in input_ids]
        # By name: how text is shown is no part of what a stage that trains or scores depends on.
        tokens = importlib.import_module("influence_kit.corpora.tokens")
        return tokens.pieces(list(map(int, input_ids)), self.tokenizer)

    def save(self, folder: Path) -> None:
        """Write three Arrow streams (which `datasets.Dataset.from_file` memory-maps) and world.json."""
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
        return World(about["name"], *tables, tuple(about["vocabulary"]), tokenizer, about["parameters"])  # type: ignore[call-arg]


def token_columns(input_ids: np.ndarray, loss_mask: np.ndarray | None = None) -> dict[str, pa.Array]:
    """Arrow columns `input_ids` fixed_size_list<int32>[T] and `loss_mask` fixed_size_list<bool>[T] from [N, T] arrays."""
    length = input_ids.shape[1]
    if loss_mask is None:
        loss_mask = np.ones(input_ids.shape, bool)
    return {
        "input_ids": pa.FixedSizeListArray.from_arrays(pa.array(input_ids.astype(np.int32).ravel()), length),
        "loss_mask": pa.FixedSizeListArray.from_arrays(pa.array(loss_mask.astype(bool).ravel()), length),
    }


def token_matrix(table: pa.Table, column: str = "input_ids") -> np.ndarray:
    """[N, T] array of a fixed-length column."""
    length = table.schema.field(column).type.list_size
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[column].chunks]
    return np.concatenate(parts).reshape(-1, length) if parts else np.zeros((0, length), np.int32)


def batch_of(table: pa.Table, rows: Sequence[int] | np.ndarray | None = None) -> dict:
    """{"input_ids": int64 [N, T], "loss_mask": bool [N, T]} torch tensors of all or the given rows."""
    import torch

    chosen = slice(None) if rows is None else np.asarray(rows)
    return {
        "input_ids": torch.from_numpy(token_matrix(table)[chosen].astype(np.int64)),
        "loss_mask": torch.from_numpy(token_matrix(table, "loss_mask")[chosen].copy()),
    }
