"""Pseudo-labels: drawn from the model's own distribution, seeded by row, and the token gradients under them.

The Gauss-Newton Hessian of a language model is its Fisher matrix only under labels that the model itself draws; true
labels give the *empirical* Fisher, which is another matrix (the paper's Sec. 2.2.1).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .gradients import Recorder, TokenGradients, device_of
from .passes import Labels, sequence_gradients
from .sequences import Batch, count, read_batch
from .shelf import Buffers, Shelf

# Probabilities turned into a distribution function at a time: 32 MB on a CPU, half a gigabyte on a GPU.
CPU_BLOCK, GPU_BLOCK = 1 << 22, 1 << 26
WIDE, BLOCK = 1 << 14, 256  # a vocabulary that is searched by blocks, and tokens in one


def uniforms(seed: int, rows: slice, length: int) -> Tensor:
    """float64 [B, T] in [0, 1): one stream a row, so that neither batch size, padding nor sharding changes a draw."""
    streams = []
    for row in range(rows.start, rows.stop):
        generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + row * 0xD1B54A32D192ED03) % 2**63)
        streams.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(streams)


def sample_labels(logits: Tensor, draws: Tensor) -> Tensor:
    """Labels drawn from softmax(logits) by inverting its distribution function.

    Args:
        logits: [..., V].
        draws: float64 [...] in [0, 1).

    Returns:
        Labels int64 [...].
    """
    vocabulary, at = logits.shape[-1], draws.to(logits.device).reshape(-1, 1)
    step = max((CPU_BLOCK if at.device.type == "cpu" else GPU_BLOCK) // vocabulary, 1)
    find = _by_blocks if vocabulary > WIDE else _at_once
    rows = zip(logits.reshape(-1, vocabulary).split(step), at.split(step), strict=True)
    return torch.cat([find(some, drawn) for some, drawn in rows]).view(draws.shape).clamp_(max=vocabulary - 1)


def _at_once(logits: Tensor, draws: Tensor) -> Tensor:
    cumulative = logits.double().softmax(-1).cumsum_(-1)
    return torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)


def _by_blocks(logits: Tensor, draws: Tensor) -> Tensor:
    """The same in two steps, block of tokens and token, so that most of a large vocabulary is only summed: an eighth of the
    time on a GPU. Weights are of the logits' own precision, sums of float64."""
    weights = logits.new_zeros(len(logits), -(-logits.shape[1] // BLOCK) * BLOCK)
    torch.exp(logits - logits.amax(1, keepdim=True), out=weights[:, : logits.shape[1]])
    weights = weights.view(len(logits), -1, BLOCK)
    sums = weights.sum(2, dtype=torch.float64).cumsum_(1)
    goal = draws * sums[:, -1:]
    block = torch.searchsorted(sums, goal, right=True).clamp_(max=sums.shape[1] - 1)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp_(min=0)), 0)
    within = weights.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0].double().cumsum_(1)
    return block * BLOCK + torch.searchsorted(within, goal - before, right=True).clamp_(max=BLOCK - 1)


def drawn_at(draws: Tensor) -> Labels:
    """What a pass is to predict: labels drawn from its logits at `draws` [B, L]."""
    flat = draws.flatten()
    return lambda logits, places: sample_labels(logits, flat.to(places.device)[places])


class PseudoGradients:
    """Token gradients under pseudo-labels, batch by batch: computed once where the shelf has room, else at every reading.

    labels int64 [N, T] and counted int64 [N] (positions that can move a sequence's loss) fill up as batches are read.
    leaders: for each layer the first one that reads the same input, both with or both without a bias: they share A.
    """

    def __init__(
        self,
        model: nn.Module,
        recorder: Recorder,
        sequences: Mapping[str, Tensor],
        labels: str | Tensor,
        seed: int,
        shelf: Shelf,
    ) -> None:
        self.model, self.recorder, self.sequences, self.seed, self.shelf = model, recorder, sequences, seed, shelf
        self.device, self.buffers = device_of(model), Buffers()
        first, total = read_batch(sequences, slice(0, 1), self.device), count(sequences)
        length = first.tokens.shape[1]
        if isinstance(labels, Tensor):
            if labels.shape != (total, length):
                raise ValueError(f"labels {tuple(labels.shape)} do not match input_ids [{total}, {length}]")
        elif labels not in ("sampled", "data"):
            raise ValueError(f"labels={labels!r} is not known; choose 'sampled', 'data' or a tensor int64 [N, T]")
        self.kind = labels
        self.labels = torch.zeros(total, length, dtype=torch.int64, device=self.device)
        self.counted = torch.zeros(total, dtype=torch.int64)
        found, _ = sequence_gradients(model, recorder, first)
        met: dict[tuple[int, bool], str] = {}
        self.leaders = {name: met.setdefault((id(each.inputs), each.bias), name) for name, each in found.items()}
        self._bias = {name: each.bias for name, each in found.items()}

    def read(self, rows: slice) -> tuple[dict[str, TokenGradients], Tensor | None]:
        """The batch's token gradients by layer, and the places of [B L] that count, int64: None for all."""
        batch = read_batch(self.sequences, rows)
        counted = batch.counted  # asked for on the CPU: a GPU would have to be waited for
        places = None if bool(counted.all()) else counted.flatten().nonzero().flatten().to(self.device)
        names = [f"{rows.start}/{name}" for name in self.leaders]
        if f"{names[0]} g" in self.shelf:
            return self._kept(rows), places
        drawn = self._labels(rows, batch.length)
        batch = Batch(batch.tokens.to(self.device), batch.loss_mask.to(self.device), batch.length)
        found, labels = sequence_gradients(self.model, self.recorder, batch, drawn)
        self.labels[rows], self.counted[rows] = labels, counted.sum(1)
        parts = {f"{rows.start}/{self.leaders[name]} a": each.inputs for name, each in found.items()}
        parts |= {f"{rows.start}/{name} g": each.outputs for name, each in found.items()}
        if self.shelf.fits(parts.values()):
            for name, tensor in parts.items():
                self.shelf.put(name, tensor)
        return found, places

    def _kept(self, rows: slice) -> dict[str, TokenGradients]:
        inputs = {
            lead: self.shelf.get(f"{rows.start}/{lead} a", self.buffers)
            for lead in dict.fromkeys(self.leaders.values())
        }
        return {
            name: TokenGradients(inputs[lead], self.shelf.get(f"{rows.start}/{name} g", self.buffers), self._bias[name])
            for name, lead in self.leaders.items()
        }

    def _labels(self, rows: slice, length: int) -> Labels:
        """What the batch is to predict; a second reading draws nothing anew."""
        if isinstance(self.kind, Tensor):
            return self.kind[rows].to(self.device)
        if self.kind == "data":
            return None
        if self.counted[rows].any():
            return self.labels[rows].to(self.device)
        return drawn_at(uniforms(self.seed, rows, self.labels.shape[1])[:, 1 : length + 1].to(self.device))
