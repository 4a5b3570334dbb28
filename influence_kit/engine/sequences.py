"""Sequences as they are given (`input_ids`, `loss_mask`), read and checked batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Progress = Callable[[int, int], None]  # called with (sequences done, sequences to do)


class Batch(NamedTuple):
    """Token ids [B, T], the mask [B, T] of the tokens that are targets (predicted from the position before), and L, the
    number of positions before the last target: later ones move no loss and are never computed."""

    tokens: Tensor
    loss_mask: Tensor
    length: int

    @property
    def counted(self) -> Tensor:
        """bool [B, L]: positions that can move the loss of their sequence, i.e. those with a target after them.

        Right padding and the last position fall out, whatever the padding id is.
        """
        return self.loss_mask[:, 1 : self.length + 1].flip(1).cumsum(1).flip(1) > 0


def batch_rows(total: int, batch_size: int) -> list[slice]:
    """The rows [0, total) cut into batches."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r} must be at least 1")
    return [slice(start, min(start + batch_size, total)) for start in range(0, total, batch_size)]


def read_batch(sequences: Mapping[str, Tensor], rows: slice, device: torch.device | str = "cpu") -> Batch:
    """Some rows of `sequences` (`input_ids` int [N, T], optional `loss_mask` bool [N, T]), as a Batch.

    Accepts any mapping or datasets.Dataset whose columns slice to arrays. Padding must be on the right.
    """
    columns = sequences.column_names if hasattr(sequences, "column_names") else list(sequences)
    tokens = _column(sequences, "input_ids", rows).long()
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(
            f"input_ids must be [N, T] with T of at least 2; rows {rows.start}.. have shape {tuple(tokens.shape)}"
        )
    mask = _column(sequences, "loss_mask", rows).bool() if "loss_mask" in columns else torch.ones_like(tokens).bool()
    if mask.shape != tokens.shape:
        raise ValueError(f"loss_mask {tuple(mask.shape)} and input_ids {tuple(tokens.shape)} must have one shape")
    mask = mask.clone()
    mask[:, 0] = False  # nothing predicts the first token
    length = int((mask.any(0) * torch.arange(mask.shape[1])).max().clamp(min=1))
    return Batch(tokens.to(device), mask.to(device), length)


def gather(sequences: Mapping[str, Tensor], rows: Iterable[int]) -> dict[str, Tensor]:
    """Single rows of a mapping or Dataset, together: `input_ids` and `loss_mask` [n, T]."""
    found = [read_batch(sequences, slice(row, row + 1)) for row in rows]
    return {"input_ids": torch.cat([b.tokens for b in found]), "loss_mask": torch.cat([b.loss_mask for b in found])}


def count(sequences: Mapping[str, Tensor]) -> int:
    """N, the number of sequences in a mapping or Dataset."""
    return len(sequences) if hasattr(sequences, "column_names") else len(sequences["input_ids"])


def _column(sequences: Mapping[str, Tensor], name: str, rows: slice) -> Tensor:
    values = sequences[rows][name] if hasattr(sequences, "column_names") else sequences[name][rows]  # type: ignore[index]
    return torch.as_tensor(values)
