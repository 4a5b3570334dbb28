"""Preconditioned query gradients V = (G + lambda)^-1 grad log p(query), one [P, M'] a layer: *directions* in short.

A sequence's score is the inner product of V with its gradient, sum_t g_t^T V a_t. Held whole, V takes P M' numbers a query
and layer; at rank r (the paper's Sec. 3.2.2) r (P + M').

Where the training tokens far outnumber the queries it is V that leaves the eigenbasis, once, so that the scan multiplies
nothing but the gradients themselves; where they do not, or where whitened norms are wanted, tokens are rotated instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .blas import matmul
from .factors import Factors, Rotated, Rotator, inverse, rotate_columns, rotate_rows
from .gradients import Recorder, TokenGradients, device_of, dtype_of, frozen
from .passes import rows_within, sequence_gradients
from .sequences import batch_rows, count, read_batch
from .shelf import Buffers, Shelf, aligned_width, free_disk, release_freed

if TYPE_CHECKING:
    from .refine import Refined

OVERSAMPLED = 8  # columns beyond the rank in the randomised decomposition
POWER_STEPS = 2
LEANING = 16  # how much rather V is turned, once, than tokens in every scan
QUERY_BLOCK, GPU_QUERY_BLOCK = 1 << 24, 1 << 26  # elements of query gradients formed at a time
TOKEN_BLOCK = 1 << 24  # elements of token products formed at a time at low rank


def rotated_sides(factors: Factors, queries: int, tokens: int, norms: bool) -> dict[str, Rotated]:
    """For each layer the sides that the scan rotates: all where whitened norms are wanted, else those where rotating the
    tokens of all this process's sequences takes under 1 / LEANING of the multiplications that turning V out of the eigenbasis
    takes."""
    chosen = {}
    for name, layer in factors.layers.items():
        p, m = layer.eigenvalues.shape
        chosen[name] = Rotated(*(norms or LEANING * tokens < queries * other for other in (m, p)))
    return chosen


class Directions:
    """V of all queries for every layer: in memory, in a temporary file beyond it, or at low rank.

    norms [Q]: |phi_q| of the whitened query gradients. errors [Q]: |V - V_r| / |V| at low rank, else None.
    """

    def __init__(
        self,
        model: nn.Module,
        factors: Factors,
        queries: Mapping[str, Tensor],
        damping: float,
        rotated: Mapping[str, Rotated],
        rank: int | float | None = None,
        batch_size: int = 32,
        memory: float = 2e9,
        refined: Refined | None = None,
    ) -> None:
        """One pass over the queries. refined: solutions that stand for EK-FAC's. `factors` lie beside the model (`Factors.beside`). rank: a whole number, or the
        relative error to stay under. Raises ValueError for a query without a target, or a rank that is neither."""
        if rank is not None and not (rank >= 1 if isinstance(rank, int) else 0 < rank < 1):
            raise ValueError(f"rank={rank!r} must be a whole number >= 1, or a relative error between 0 and 1")
        self.layers, self.rotated, self.rank, self.count = factors.layers, rotated, rank, count(queries)
        self._shelf, self._buffers = Shelf(memory, free_disk()), Buffers()
        self._pieces: dict[str, list[tuple[slice, str]]] = {name: [] for name in self.layers}
        self._bias: dict[str, Tensor] = {}
        modules, rotator = dict(model.named_modules()), Rotator()
        self._scratch = Buffers()
        device = device_of(model)
        squares, lost, whole = (torch.zeros(self.count, dtype=dtype_of(model), device=device) for _ in range(3))
        largest = max(layer.eigenvalues.numel() for layer in self.layers.values())
        tracked = {name: modules[name] for name in self.layers}
        longest = read_batch(queries, slice(0, self.count)).length + 1
        block = QUERY_BLOCK if device.type == "cpu" else GPU_QUERY_BLOCK
        within = min(rows_within(model, self.layers, longest, batch_size), max(block // largest, 1))
        with frozen(model), Recorder(tracked) as recorder:
            for rows in batch_rows(self.count, within):
                batch = read_batch(queries, rows, device)
                empty = ~batch.loss_mask.any(1)
                if empty.any():
                    raise ValueError(
                        f"query {rows.start + int(empty.nonzero()[0])} has no target token: its loss_mask is empty"
                    )
                for name, found in sequence_gradients(model, recorder, batch)[0].items():
                    gradient = rotator.gradients(self.layers[name], found)
                    if refined is None:
                        place = self._scratch("direction", tuple(gradient.shape), gradient)
                        direction = torch.div(gradient, self.layers[name].damped(damping), out=place)
                    else:
                        direction = refined.turned(name, rows)
                    squares[rows] += torch.linalg.vecdot(gradient, direction).sum(1).to(device)
                    if rank is None:
                        self._keep(name, rows, direction, found.bias)
                        continue
                    left, right, error = low_rank(
                        direction.nan_to_num(0, 0, 0), rank
                    )  # `norms` tell what was not finite
                    lost[rows] += error.to(device)
                    whole[rows] += direction.square().sum((1, 2)).to(device)
                    self._keep_low(name, rows, left, right)
        del self._scratch, rotator
        release_freed()
        squares, lost, whole = (each.cpu() for each in (squares, lost, whole))
        self.norms = squares.sqrt()
        self.errors = None if rank is None else (lost / whole.clamp(min=torch.finfo(whole.dtype).tiny)).sqrt()

    def _keep(self, name: str, rows: slice, direction: Tensor, bias: bool) -> None:
        """V [B, P, M'] out of the eigenbasis on the sides that the scan leaves alone; into one tensor [Q, P M'] where memory
        has room for all queries of the layer, else piece by piece.

        Where inputs are not rotated the bias's column is kept apart: it meets column sums of g, and no column of ones is needed.
        """
        layer, rotated = self.layers[name], self.rotated[name]
        aside = bias and not rotated.inputs
        if not rotated.inputs and layer.inputs is not None:
            direction = rotate_columns(direction, layer.inputs, back=True, buffers=self._scratch)
        if aside:
            column = direction[..., -1]
            if layer.outputs is not None and not rotated.outputs:
                column = rotate_columns(column, layer.outputs, back=True)
            self._bias.setdefault(name, direction.new_empty(self.count, direction.shape[1]))[rows] = column
            direction = direction[..., :-1]
        slot = self._slot(name, rows, direction)
        target = slot[..., : direction.shape[2]]
        if rotated.outputs or layer.outputs is None:
            target.copy_(direction)
        elif len(layer.outputs) == 1:
            for one, place in zip(direction, target, strict=True):
                matmul(layer.outputs[0], one, place)
        else:
            target.copy_(rotate_rows(direction, layer.outputs, back=True))
        if f"{name}/V" not in self._shelf:
            self._pieces[name].append((rows, f"{name}/V {rows.start}"))
            self._shelf.put(f"{name}/V {rows.start}", slot.flatten(1))

    def _slot(self, name: str, rows: slice, direction: Tensor) -> Tensor:
        """Where V of these queries goes, [B, P, W] in aligned rows: a part of the whole layer's, or a tensor of its own."""
        whole, (p, m) = f"{name}/V", direction.shape[1:]
        width = aligned_width(m)
        if not self._pieces[name] and self._shelf.memory >= self.count * p * width * direction.element_size():
            # Not zeros: their pages would be written twice.
            empty = direction.new_empty(self.count, p, width)
            empty[..., m:] = 0
            self._shelf.put(whole, empty.flatten(1))
            self._pieces[name].append((slice(0, self.count), whole))
        if whole in self._shelf:
            return self._shelf.get(whole, self._buffers)[rows].view(-1, p, width)
        return direction.new_zeros(len(direction), p, width)

    def _keep_low(self, name: str, rows: slice, left: Tensor, right: Tensor) -> None:
        """[P, B r] and [M', B r]; out of the eigenbasis where the scan leaves a side alone, which is cheap at low rank."""
        layer, rotated = self.layers[name], self.rotated[name]
        # One product over all queries: a batch of narrow ones takes several times as long.
        left, right = left.permute(1, 0, 2).flatten(1), right.flatten(0, 1)
        if not rotated.outputs and layer.outputs is not None:
            left = rotate_rows(left, layer.outputs, back=True)
        if not rotated.inputs and layer.inputs is not None:
            right = rotate_columns(right, layer.inputs, back=True)
        self._pieces[name].append((rows, f"{name} {rows.start}"))
        self._shelf.put(f"{name} {rows.start}/left", left.contiguous())
        self._shelf.put(f"{name} {rows.start}/right", right.T.contiguous())

    def contract(
        self, name: str, found: TokenGradients, rotator: Rotator, damping: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """One layer's share of the scores [Q, B] of a batch, and of its whitened squared norms [B] under the eigenvalues with
        this `damping` (zeros without it; with it both sides must be rotated)."""
        layer, rotated = self.layers[name], self.rotated[name]
        scores = found.outputs.new_zeros(self.count, len(found.outputs))
        norms = found.outputs.new_zeros(len(found.outputs))
        if self.rank is not None:
            scores = self._low_rank_scores(name, *rotator.tokens(layer, found, rotated))
            if damping is None:
                return scores, norms
        pieces = (
            [] if self.rank is not None else [(q, self._shelf.get(k, self._buffers)) for q, k in self._pieces[name]]
        )
        if name in self._bias:
            column_sums = found.outputs.sum(1)
            if rotated.outputs and layer.outputs is not None:
                column_sums = rotate_columns(column_sums, layer.outputs)
            scores += self._bias[name] @ column_sums.T
            found = found._replace(bias=False)
        # Of every layer at once it would be as much again as all eigenvalues.
        whitening = None if damping is None else inverse(layer.damped(damping))
        for some, rows, gradient in rotator.pieces(layer, found, rotated):
            start, flat = (rows.start or 0) * gradient.shape[2], gradient.flatten(1)
            for asked, V in pieces:
                scores[asked, some] += matmul(V[:, start : start + flat.shape[1]], flat.T)
            if whitening is not None:
                norms[some] += flat.square_() @ whitening[rows].flatten()
        return scores, norms

    def of_query(self, name: str, query: int) -> Tensor:
        """V [P, M'] of one query and layer, where the scan rotates both sides."""
        rows, key = next(piece for piece in self._pieces[name] if piece[0].start <= query < piece[0].stop)
        p, m = self.layers[name].eigenvalues.shape
        return self._shelf.get(key, self._buffers)[query - rows.start].view(p, -1)[:, :m]

    def _low_rank_scores(self, name: str, a: Tensor, g: Tensor) -> Tensor:
        """sum_t (g_t^T L_q) . (R_q a_t), [Q, B]: L r (P + M' + 1) multiplications a query and sequence."""
        shape, tokens = a.shape[:2], a.shape[0] * a.shape[1]
        scores = a.new_zeros(self.count, shape[0])
        for asked, key in self._pieces[name]:
            left, right = (self._shelf.get(f"{key}/{side}", self._buffers) for side in ("left", "right"))
            number = asked.stop - asked.start
            rank = left.shape[1] // number
            step = max(TOKEN_BLOCK // (tokens * rank), 1)
            for start in range(0, number, step):
                columns = slice(start * rank, (start + step) * rank)
                product = matmul(g.flatten(0, 1), left[:, columns]).mul_(matmul(a.flatten(0, 1), right[:, columns]))
                queries = slice(asked.start + start, min(asked.start + start + step, asked.stop))
                scores[queries] = product.view(*shape, -1, rank).sum((1, 3)).T
        return scores


def low_rank(V: Tensor, rank: int | float) -> tuple[Tensor, Tensor, Tensor]:
    """V [B, P, M'] ~ left [B, P, r] right [B, r, M'], and |V - left right|^2 [B] (exact for the factors returned).

    Randomised range finder with two power steps (Halko et al. 2011), seeded. A `rank` below 1 is the relative error that
    every matrix must stay under: the rank is doubled until it does.
    """
    size, most = V.square().sum((1, 2)), min(V.shape[1:])
    r = min(rank, most) if isinstance(rank, int) else min(8, most)
    while True:
        width = min(r + OVERSAMPLED, most)
        generator = torch.Generator().manual_seed(width)
        probe = torch.randn(V.shape[2], width, generator=generator, dtype=torch.float64).to(V)
        span = torch.linalg.qr(V @ probe)[0]
        for _ in range(POWER_STEPS):
            span = torch.linalg.qr(V @ (V.mT @ span))[0]
        seen = span.mT @ V
        squares, u = torch.linalg.eigh(seen.double() @ seen.double().mT)  # ascending; takes a tenth of an SVD's time
        u = u[:, :, -r:].to(V)
        error = (size - squares[:, -r:].sum(1)).clamp(min=0).to(V)
        if isinstance(rank, int) or r == most or bool((error <= rank**2 * size).all()):
            return span @ u, u.mT @ seen, error
        r = min(2 * r, most)
