"""Whitened gradients phi = (Lambda + lambda)^(-1/2) * (Q_S^T D Q_A) of sequences, and the few coordinates kept of them.

Inner products of these are influence scores: phi_q . phi_n = grad log p(q)^T (G + lambda)^-1 grad log p(n). Where not all
coordinates can be kept, those with the largest mean phi^2 over PILOT sequences are: that mean is what a coordinate adds to
self-influence. Coordinates are counted through all layers, row by row of each layer's [P, M'].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .codes import mix
from .factors import Factors, Rotator, inverse
from .gradients import Recorder, device_of, dtype_of, frozen
from .passes import rows_within, sequence_gradients
from .processes import all_reduce, shard
from .sequences import batch_rows, count, gather, read_batch

if TYPE_CHECKING:
    from .refine import Refined

PILOT = 1024  # sequences, evenly spaced, whose gradients choose the coordinates


class Features:
    """Whitened gradients of a model's sequences: chosen, given signs, and mixed."""

    def __init__(self, model: nn.Module, factors: Factors, damping: float) -> None:
        """Raises ValueError where the factors belong to other layers or shapes than the model's."""
        self.model, self.factors, self.rotator = model, factors.beside(model), Rotator()
        self.inverse = {name: inverse(layer.damped(damping)) for name, layer in self.factors.layers.items()}
        modules = dict(model.named_modules())
        self.recorder = Recorder({name: modules[name] for name in self.factors.layers})
        self._places: dict[str, tuple[Tensor, Tensor, int]] = {}

    def pieces(self, sequences: Mapping[str, Tensor], rows: slice) -> Iterator[tuple[str, slice, slice, Tensor]]:
        """(layer, sequences of the batch, rows of P, rotated gradients [b, p W]), valid until the next; not yet whitened."""
        longest, size = read_batch(sequences, rows).length + 1, rows.stop - rows.start
        for part in batch_rows(size, rows_within(self.model, self.factors.layers, longest, size)):
            read = slice(rows.start + part.start, rows.start + part.stop)
            with frozen(self.model), self.recorder:
                batch = read_batch(sequences, read, device_of(self.model))
                found = sequence_gradients(self.model, self.recorder, batch)[0]
            for name, tokens in found.items():
                for some, lines, piece in self.rotator.pieces(self.factors.layers[name], tokens):
                    first, last, _ = some.indices(part.stop - part.start)
                    where = slice(part.start + first, part.start + last)
                    yield name, where, slice(*lines.indices(len(self.inverse[name]))), piece.flatten(1)

    def choose(
        self, sequences: Mapping[str, Tensor], bits: int, dims: int, batch_size: int, seed: int
    ) -> dict[str, Tensor]:
        """Which coordinates are kept. Ranks share the pilot, and all choose the same.

        Args:
            sequences: Those to be indexed.
            bits: Of a coordinate's code.
            dims: How many coordinates are kept at most.
            batch_size: Sequences read at a time.
            seed: Of the signs.

        Returns:
            `kept`: coordinates, ascending [n], int64; `signs`: of each [n], float32, ones at 16 bits.
        """
        total, rows = sum(layer.eigenvalues.numel() for layer in self.factors.layers.values()), count(sequences)
        number = min(total, dims)
        kept = torch.arange(number)
        if number < total:
            pilot = gather(sequences, sorted({i * rows // PILOT for i in range(PILOT)}))
            sums = {name: torch.zeros_like(each, dtype=torch.float64) for name, each in self.inverse.items()}
            for some in shard(batch_rows(count(pilot), batch_size)):
                for name, _, lines, flat in self.pieces(pilot, some):
                    squares = flat.square().nan_to_num_(0, 0, 0)  # one sequence that is not finite must not choose
                    sums[name][lines] += squares.sum(0).view(lines.stop - lines.start, -1)
            all_reduce(sums.values())
            widths = [layer.eigenvalues.shape[1] for layer in self.factors.layers.values()]
            moments = [(sums[n] * each)[:, :m].flatten().cpu() for (n, each), m in zip(self.inverse.items(), widths)]
            kept = torch.cat(moments).topk(number).indices.sort().values
        signs = 2.0 * torch.randint(0, 2, (number,), generator=torch.Generator().manual_seed(seed)) - 1
        return {"kept": kept, "signs": signs if bits < 16 else torch.ones(number)}

    def project(
        self,
        sequences: Mapping[str, Tensor],
        rows: slice,
        projection: dict[str, Tensor],
        bits: int,
        dims: int,
        refined: Refined | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mixed coordinates of some sequences.

        Args:
            sequences: Where they are.
            rows: Which, b of them.
            projection: What `choose` made, the same at every call.
            bits: Of a coordinate's code.
            dims: Places for coordinates; those beyond the projection's hold zero before mixing.
            refined: Solutions for the sequences, which are queries, that stand for EK-FAC's.

        Returns:
            Coordinates [b, dims] and |phi|^2 [b], float32, on the CPU.
        """
        if not self._places:
            self._locate(projection)
        size, device = rows.stop - rows.start, device_of(self.model)
        found = torch.zeros(size, dims, dtype=dtype_of(self.model), device=device)
        squares = torch.zeros(size, dtype=found.dtype, device=device)
        pieces = self.pieces(sequences, rows) if refined is None else self._solved(refined, rows)
        for name, some, lines, flat in pieces:
            positions, weights, place = self._places[name]
            start, stop = (line * self.inverse[name].shape[1] for line in (lines.start, lines.stop))
            first, last = torch.searchsorted(positions, torch.tensor([start, stop], device=flat.device)).tolist()
            taken = flat.index_select(1, positions[first:last] - start).mul_(weights[first:last])
            found[some, place + first : place + last] = taken.to(device)
            squares[some] += (flat.square() @ self.inverse[name][lines].flatten()).to(device)
        return (mix(found) if bits < 16 else found).cpu().float(), squares.cpu().float()

    def _solved(self, refined: Refined, rows: slice) -> Iterator[tuple[str, slice, slice, Tensor]]:
        """As `pieces`: (Lambda + lambda) x, the gradients of which EK-FAC would have made the solutions x."""
        for name, each in self.inverse.items():
            x = refined.turned(name, rows)
            piece = x.new_zeros(*x.shape[:2], each.shape[1])
            piece[..., : x.shape[2]] = x / each[:, : x.shape[2]]
            yield name, slice(None), slice(0, len(each)), piece.flatten(1)

    def _locate(self, projection: dict[str, Tensor]) -> None:
        """For each layer: positions of its coordinates in the aligned gradient [P W], signed whitening weights, first place."""
        start = 0
        for name, each in self.inverse.items():
            rows, width = self.factors.layers[name].eigenvalues.shape
            first, last = torch.searchsorted(projection["kept"], torch.tensor([start, start + rows * width])).tolist()
            chosen, signs = (projection[part][first:last].to(each.device) for part in ("kept", "signs"))
            flat = (chosen - start) // width * each.shape[1] + (chosen - start) % width
            self._places[name] = flat, signs * each.flatten()[flat].sqrt(), first
            start += rows * width
