"""Sequences as they are given, checked and read: which tokens there are, and which of them are targets.

A target is a token that is predicted from the position before it. Columns that say which tokens are:

    loss_mask       1 (True) at targets
    labels          Hugging Face's: the token itself at targets, -100 elsewhere; not shifted
    attention_mask  0 at padding, which lies on the right; without one of the others, all other tokens are targets

and without any of these every token is one. The first token of a sequence never is: nothing predicts it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Progress = Callable[[int, int], None]  # called with (sequences done, sequences to do)

NO_TARGET = -100  # in `labels`
AT_ONCE = 1 << 20  # tokens read at a time where a whole corpus is checked or recognised
READ = ("loss_mask", "labels", "attention_mask", "position_ids")  # beside input_ids
# Columns that say in other programs' words what is a target: to ignore them would be to err.
UNREAD = ("completion_mask", "assistant_masks", "assistant_mask", "prompt_mask", "label_mask", "target_mask")


class Batch(NamedTuple):
    """Some sequences.

    Args:
        tokens: Token ids [B, T], int64.
        loss_mask: Which tokens are targets [B, T], bool.
        length: L, the number of positions before the last target: later ones move no loss and are never computed.
    """

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


def count(sequences: Mapping[str, Tensor]) -> int:
    """N, the number of sequences in a mapping or Dataset."""
    _columns(sequences)
    return len(sequences) if _is_dataset(sequences) else _length("input_ids", sequences["input_ids"])


def length_of(sequences: Mapping[str, Tensor]) -> int:
    """T, the number of tokens of a sequence; 0 where there are none."""
    return read_batch(sequences, slice(0, 1)).tokens.shape[1] if count(sequences) else 0


def read_batch(sequences: Mapping[str, Tensor], rows: slice, device: torch.device | str = "cpu") -> Batch:
    """Some rows of the sequences, checked.

    Args:
        sequences: Columns `input_ids` [N, T] and, optionally, `loss_mask`, `labels`, `attention_mask` [N, T]: any mapping of
            tensors, arrays or lists, a tokenizer's BatchEncoding, or a datasets.Dataset.
        rows: Which; from a Dataset no others are read.
        device: Where the tensors shall lie.

    Raises:
        ValueError: What is given does not say which tokens there are, or contradicts itself.
    """
    found = _read(sequences, rows)
    tokens = _whole_numbers("input_ids", found.pop("input_ids"))
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise ValueError(
            f"input_ids must be [N, T] with T of at least 2; rows {rows.start}.. have shape {tuple(tokens.shape)}"
        )
    for name, values in found.items():
        if values.shape != tokens.shape:
            raise ValueError(f"{name} {tuple(values.shape)} and input_ids {tuple(tokens.shape)} must have one shape")
    _refuse(tokens < 0, rows, lambda at: f"holds the id {int(tokens[at])}: ids are 0 or more, padding too", "input_ids")
    mask = _targets(tokens, found, rows)
    length = int((mask.any(0) * torch.arange(mask.shape[1], device=mask.device)).max().clamp(min=1))
    return Batch(tokens.to(device), mask.to(device), length)


def _targets(tokens: Tensor, columns: dict[str, Tensor], rows: slice) -> Tensor:
    """Which tokens are targets, bool [B, T], by all the columns that say so; they must agree."""
    real = torch.ones_like(tokens, dtype=torch.bool)
    if "attention_mask" in columns:
        real = _zero_or_one("attention_mask", columns["attention_mask"], rows)
        begins = real & ~real.roll(1, 1)
        begins[:, 0] = False
        _refuse(
            begins,
            rows,
            lambda at: "is 1 after a 0: " + ("padding must be on the right" if not real[at[0], 0] else "it has a hole"),
            "attention_mask",
        )
    if "position_ids" in columns:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        _refuse(
            (columns["position_ids"] != places) & real,
            rows,
            lambda at: (
                f"is {int(columns['position_ids'][at])} at token {at[1]}: only sequences that count 0, 1, 2 ... are read"
            ),
            "position_ids",
        )
    said = {}
    if "loss_mask" in columns:
        said["loss_mask"] = _zero_or_one("loss_mask", columns["loss_mask"], rows)
    if "labels" in columns:
        labels = _whole_numbers("labels", columns["labels"])
        said["labels"] = labels != NO_TARGET
        other = said["labels"] & (labels != tokens)
        other[:, 0] = False
        _refuse(
            other,
            rows,
            lambda at: (
                f"is {int(labels[at])} at token {at[1]}, where input_ids is {int(tokens[at])}: a label is the token "
                "itself (not the next one), or -100 where nothing is to be predicted"
            ),
            "labels",
        )
    for name, mask in said.items():
        mask = said[name] = mask.clone()
        mask[:, 0] = False  # nothing predicts the first token
        _refuse(mask & ~real, rows, lambda at: f"has a target at token {at[1]}, where attention_mask has padding", name)
    if len(said) == 2:
        differ = said["loss_mask"] ^ said["labels"]
        _refuse(differ, rows, lambda at: f"and loss_mask disagree at token {at[1]}: give one of them", "labels")
    mask = next(iter(said.values()), real.clone())
    mask[:, 0] = False
    return mask


def _whole_numbers(name: str, values: Tensor) -> Tensor:
    if values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        kind = str(values.dtype).removeprefix("torch.")
        raise ValueError(f"{name} must be whole numbers, not {kind}")
    return values.long()


def _zero_or_one(name: str, values: Tensor, rows: slice) -> Tensor:
    if values.dtype != torch.bool:
        values = values if values.is_floating_point() or values.is_complex() else values.long()
        wrong = (values != 0) & (values != 1)
        hint = "; -100 belongs in a column `labels`" if name == "loss_mask" else ""
        _refuse(wrong, rows, lambda at: f"is {values[at].item()} at token {at[1]}, not 0 or 1{hint}", name)
    return values.bool()


def _refuse(wrong: Tensor, rows: slice, said: Callable[[tuple[int, int]], str], name: str) -> None:
    """Raise ValueError at the first place [B, T] that is wrong, by name, row and what is said of it."""
    if wrong.any():
        row, token = wrong.nonzero()[0].tolist()
        raise ValueError(f"{name} of row {(rows.start or 0) + row} {said((row, token))}")


def _columns(sequences: Any) -> list[str]:
    """Names of the columns that count, `input_ids` first.

    Raises ValueError for what has no such columns, or has one that means something which is not read.
    """
    if _is_dataset(sequences):
        if not hasattr(sequences, "__len__"):
            raise ValueError(
                "a streaming dataset cannot be read row by row, and has no length: load it without streaming"
            )
        if isinstance(sequences.column_names, dict):
            raise ValueError(
                f"a dataset with splits ({', '.join(sequences.column_names)}) was given: choose one of them"
            )
        names = list(sequences.column_names or ())
    elif isinstance(sequences, Mapping):
        names = [name for name in sequences if sequences[name] is not None]
    else:
        kind = type(sequences).__name__
        raise ValueError(f"sequences must be a mapping of columns or a datasets.Dataset with `input_ids`, not a {kind}")
    if "input_ids" not in names:
        raise ValueError(
            f"no column input_ids among {', '.join(map(str, names[:10])) or 'none'}: token ids [N, T] go there"
        )
    if unread := [name for name in UNREAD if name in names]:
        raise ValueError(
            f"a column {unread[0]!r} is not read: call it loss_mask if it is 1 at targets, or take it away"
        )
    return ["input_ids", *(name for name in READ if name in names)]


def _is_dataset(sequences: object) -> bool:
    return hasattr(sequences, "column_names") and hasattr(sequences, "with_format")


def _length(name: str, column: Any) -> int:
    try:
        return len(column)
    except TypeError as error:
        raise ValueError(f"{name} must be [N, T], not a single {type(column).__name__}") from error


def _cut(name: str, column: Any, rows: slice) -> Tensor:
    try:
        return _tensor(name, column[rows])
    except (TypeError, LookupError, RuntimeError) as error:
        kind = type(column).__name__
        raise ValueError(
            f"{name} is a {kind} that cannot be cut into rows: give a tensor, an array or lists [N, T]"
        ) from error


def _read(sequences: Any, rows: slice) -> dict[str, Tensor]:
    """The columns' values [B, T] as they are given, as tensors."""
    names = _columns(sequences)
    if hasattr(sequences, "column_names"):
        if (
            getattr(sequences, "format", {}).get("type") is None
        ):  # lists of numbers, which take four times as long to read
            sequences = sequences.with_format("numpy", columns=names)
        found = sequences[rows]
        return {name: _tensor(name, found[name]) for name in names}
    return {name: _cut(name, sequences[name], rows) for name in names}


def _tensor(name: str, values: object) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        if isinstance(values, (list, tuple)) and values and isinstance(values[0], Tensor):
            return torch.stack(list(values))
        return torch.from_numpy(np.array(values))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{name} is no table of numbers [N, T]: rows must have one length (pad them on the right, and say so in "
            "attention_mask) and hold numbers"
        ) from error


def gather(sequences: Mapping[str, Tensor], rows: Iterable[int]) -> dict[str, Tensor]:
    """Single rows of a mapping or Dataset, together.

    Args:
        sequences: As for `read_batch`.
        rows: Numbers of sequences, from the end where negative.

    Returns:
        `input_ids` and `loss_mask` [n, T].

    Raises:
        ValueError: No row, or a row that is not there.
    """
    total = count(sequences)
    found = [read_batch(sequences, slice(row, row + 1)) for row in (_row(each, total) for each in rows)]
    if not found:
        raise ValueError("no sequences given: name at least one")
    return {"input_ids": torch.cat([b.tokens for b in found]), "loss_mask": torch.cat([b.loss_mask for b in found])}


def _row(given: int, total: int) -> int:
    try:
        row = (
            None
            if isinstance(given, bool) or getattr(given, "dtype", None) in (bool, torch.bool)
            else operator.index(given)
        )
    except TypeError:
        row = None
    if row is None or not -total <= row < total:
        raise ValueError(f"sequence {given!r} is not there: there are {total}, numbered from 0")
    return row % total


def check(
    sequences: Mapping[str, Tensor], model: nn.Module | None = None, name: str = "sequences", asking: bool = False
) -> int:
    """Read all rows once, so that nothing is refused in the middle of a long pass.

    Args:
        sequences: As for `read_batch`.
        model: What they are for: its vocabulary and its context limit them, where it says how large these are.
        name: What to call them in a message.
        asking: Whether every row must have a target.

    Returns:
        Tokens of the longest row, its last target the last of them: what is padded further costs nothing.

    Raises:
        ValueError: One line: what is wrong, in which row.

    Cost: reading the columns.
    """
    longest = 0
    vocabulary, context = (None, None) if model is None else (vocabulary_of(model), context_of(model))
    try:
        for rows, batch in _in_pieces(sequences):
            tokens, mask, length = batch
            longest = max(longest, length + 1)
            if vocabulary is not None:
                said = partial(_unknown, tokens, vocabulary)
                _refuse(tokens >= vocabulary, rows, said, "input_ids")
            if context is not None and length > context:
                raise ValueError(
                    f"rows {rows.start}.. have targets after {length} tokens: the model's context is {context}"
                )
            if asking and (empty := ~mask.any(1)).any():
                raise ValueError(
                    f"query {rows.start + int(empty.nonzero()[0])} has no target token: its loss_mask is empty"
                )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error.__cause__
    return longest


def given_labels(labels: object, sequences: Mapping[str, Tensor], model: nn.Module) -> Tensor:
    """Labels [N, T] as int64, whatever they lie in.

    Raises:
        ValueError: They are of another shape than the sequences, or at some target no token that the model knows.
    """
    given = _whole_numbers("labels", _tensor("labels", labels)).cpu()
    vocabulary = vocabulary_of(model) or torch.iinfo(torch.int64).max
    for rows, (tokens, mask, _) in _in_pieces(sequences):
        some = given[rows]
        if some.shape != tokens.shape or len(given) != count(sequences):
            raise ValueError(
                f"labels {tuple(given.shape)} do not match input_ids [{count(sequences)}, {tokens.shape[1]}]"
            )
        wrong = ((some < 0) | (some >= vocabulary)) & (mask.cpu() | (some != NO_TARGET))
        wrong[:, 0] = False
        _refuse(wrong, rows, partial(_unknown, some, vocabulary), "labels")
    return given


def _unknown(tokens: Tensor, vocabulary: int, at: tuple[int, int]) -> str:
    return f"holds the id {int(tokens[at])} at token {at[1]}: the model knows the ids from 0 to {vocabulary - 1} alone"


def _in_pieces(sequences: Mapping[str, Tensor]) -> Iterator[tuple[slice, Batch]]:
    """(rows, Batch) of all sequences, many at a time; raises ValueError where columns or rows differ in length."""
    total = count(sequences)
    if isinstance(sequences, Mapping):
        for each in _columns(sequences):
            if (own := _length(each, sequences[each])) != total:
                raise ValueError(f"{each} has {own} rows, input_ids has {total}")
    length = length_of(sequences)
    for rows in batch_rows(total, max(AT_ONCE // max(length, 1), 1)):
        batch = read_batch(sequences, rows)
        if batch.tokens.shape[1] != length:
            raise ValueError(
                f"rows {rows.start}.. have {batch.tokens.shape[1]} tokens, row 0 has {length}: pad all to one length, on the "
                "right, and say so in attention_mask"
            )
        yield rows, batch


def row_digests(batch: Batch) -> np.ndarray:
    """uint64 [B]: what a sequence's loss rests on, in a number: its tokens up to the last target, and which are targets.

    Padding, and by which columns targets were given, makes no difference.
    """
    tokens, mask = batch.tokens.cpu().numpy(), batch.loss_mask.cpu().numpy()
    ends = np.where(mask.any(1), mask.shape[1] - mask[:, ::-1].argmax(1), 0)
    found = [blake2b(t[:n].tobytes() + m[:n].tobytes(), digest_size=8).digest() for t, m, n in zip(tokens, mask, ends)]
    return np.frombuffer(b"".join(found), "<u8")


def corpus_digest(sequences: Mapping[str, Tensor], rows: slice | None = None) -> str:
    """A name of 16 hex digits that all rows make in their order, or those of a slice."""
    found = blake2b(digest_size=8)
    for batch in (b for _, b in _in_pieces(sequences)) if rows is None else [read_batch(sequences, rows)]:
        found.update(row_digests(batch).tobytes())
    return found.hexdigest()


def vocabulary_of(model: nn.Module) -> int | None:
    """How many token ids the model knows: rows of its input embedding (of the largest one, in a plain module); None without."""
    try:
        found = [model.get_input_embeddings()]  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        found = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    sizes = [module.weight.shape[0] for module in found if getattr(module, "weight", None) is not None]
    return max(sizes, default=None)


def context_of(model: nn.Module) -> int | None:
    """The longest sequence that the model was made for, where its configuration says so."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions"):
        if isinstance(found := getattr(config, name, None), int) and found > 0:
            return found
    return None
