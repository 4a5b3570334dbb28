"""Fitting EK-FAC: covariances -> eigenbases -> corrected eigenvalues (Grosse et al. 2023, Sec. 2.2.2 and 3.1).

For a linear map with inputs a_t [M (+1 with a bias)] and output pseudo-gradients Ds_t [P]:

    A = mean over tokens of a a^T        S = mean over tokens of Ds Ds^T        (float64 eigenbases Q_A, Q_S)
    D_n = sum_t Ds_{n,t} a_{n,t}^T       Lambda = mean over sequences of (Q_S^T D_n Q_A)^2, elementwise
    G ~ (Q_S kron Q_A) diag(Lambda) (Q_S kron Q_A)^T

Pseudo-gradients use labels drawn from the model's own output distribution: G is then the Fisher, equal to the
Gauss-Newton Hessian. The paper's printed Eq 20 and second line of Eq 21 have Q where Q^T is needed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .blas import eigh, matmul, products_of
from .factors import Basis, Factors, LayerFactors, Rotator
from .files import digest
from .gradients import Recorder, device_of, dtype_of, frozen
from .labels import PseudoGradients
from .layers import shape_of, tracked_layers
from .passes import rows_within
from .processes import all_reduce, barrier, broadcast, rank_and_size, shard
from .resume import State, by_rank
from .sequences import Progress, batch_rows, check, corpus_digest, count, given_labels
from .shelf import Shelf, aligned, free_disk, release_freed

METHODS = ("ekfac", "kfac", "diagonal", "identity")
Sums = dict[str, Tensor]  # by name "A <layer> <block>" or "S <layer> <block>" in the first pass, by layer in the second
Spectra = dict[str, tuple[Tensor, Tensor]]  # eigenvalues [m] and eigenvectors [m, m] by such a name


def fit_ekfac(
    model: nn.Module,
    sequences: Mapping[str, Tensor],
    layers: str = "mlp",
    labels: str | Tensor = "sampled",
    batch_size: int = 32,
    seed: int = 0,
    method: str = "ekfac",
    blocks: int = 1,
    memory: float = 2.5e8,
    resume: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> Factors:
    """Fit the curvature of `model`'s tracked layers on `sequences` (the paper's Eq 12-21).

    Under `torchrun` with a process group, ranks share the batches and the eigendecompositions; all get the same factors.

    Args:
        model: Any causal language model that maps token ids [B, T] to logits [B, T, V].
        sequences: `input_ids` int64 [N, T] and what says which tokens are targets (see `sequences.py`); padding on the right.
        layers: Which linear maps are tracked (see `tracked_layers`).
        labels: "sampled" (true Fisher; drawn once, the same for any batch size, stored in the result), "data" (the
            empirical Fisher) or int64 [N, T] given pseudo-labels (label t is predicted from position t - 1).
        batch_size: Sequences read at a time, fewer where their token gradients would not fit (see `passes.py`).
        seed: Of the labels that are drawn.
        method: "ekfac"; "kfac" (Lambda = mean tokens a sequence x Lambda_S kron Lambda_A); "diagonal" (second moment of the
            gradient in the parameters' own basis); "identity" (plain gradient dot products).
        blocks: Number of diagonal blocks of A and of S (the paper's Appendix A): memory of the bases falls by it, their
            eigendecomposition by its square.
        memory: Bytes of token gradients kept between the two passes. On a CPU what does not fit goes to a temporary file as
            far as half of the free disk lasts; the rest is computed again.
        resume: A folder (one that all processes see) for the state from which a killed fit goes on, to the same factors.
        progress: Called with (sequences done, sequences to do) over both passes.

    Raises:
        ValueError: Layers, labels or a method that do not fit the model or data.

    Cost: a forward and backward pass over `sequences` (two where token gradients are not kept), L (P^2 + M'^2 + P M')
    multiplications a sequence and layer for each pass, and eigh of an M'xM' and a PxP matrix a layer in float64. Memory
    beside the model, `memory` and a pass's own: 4 bytes a number of the bases and 8 of Lambda.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; choose one of {', '.join(METHODS)}")
    if blocks < 1:
        raise ValueError(f"blocks={blocks!r} must be at least 1")
    chosen = tracked_layers(model, layers, blocks)
    total = count(sequences)
    if total == 0:
        raise ValueError("no sequences to fit factors on: input_ids has no rows")
    batch_rows(total, batch_size)
    longest = check(sequences, model)
    if not isinstance(labels, str):
        labels = given_labels(labels, sequences, model)
    details = {"method": method, "layers": layers, "blocks": blocks, "seed": seed, "sequences": total}
    if method == "identity":
        return Factors({n: _identity(m) for n, m in chosen.items()}, None, details | {"labels": "none", "tokens": 0})
    details["labels"] = labels if isinstance(labels, str) else "given"
    report = progress or (lambda done, to_do: None)
    with frozen(model), Recorder(chosen) as recorder:
        about = (details, batch_size, labels, rank_and_size()[1])
        key = "" if resume is None else digest(model, corpus_digest(sequences), *about)
        state = State(resume, key)
        # A GPU computes gradients again sooner than it could have them back from a file.
        disk = free_disk() if device_of(model).type == "cpu" else 0
        source = PseudoGradients(model, recorder, sequences, labels, seed, Shelf(memory, disk))
        within = rows_within(model, chosen, longest, batch_size)
        batches = shard(batch_rows(total, within))
        passes = 1 if method in ("kfac", "diagonal") else 2
        spectra: Spectra = {}
        if method != "diagonal":
            sides = _sides(source, blocks)
            sums = _covariances(source, state, batches, sides, lambda done: report(done, passes * total))
            spectra = _spectra(sums, sides, int(source.counted.sum()), dtype_of(model))
        bases = {n: (_basis(spectra, f"A {source.leaders[n]}"), _basis(spectra, f"S {n}")) for n in chosen}
        if method == "kfac":
            each = source.counted.sum() / total
            eigenvalues = {
                n: each * _values(spectra, f"S {n}")[:, None] * _values(spectra, f"A {source.leaders[n]}")
                for n in chosen
            }
        else:
            before = total * (passes - 1)
            eigenvalues = _second_moments(
                source, state, batches, bases, lambda done: report(before + done, passes * total)
            )
        if method == "diagonal":
            all_reduce([source.labels, source.counted])
    drawn, details["tokens"] = source.labels.cpu(), int(source.counted.sum())
    del source
    barrier()
    state.forget()
    fitted = {n: LayerFactors(*bases[n], eigenvalues.pop(n).to(dtype_of(model))) for n in chosen}
    release_freed()
    return Factors(fitted, drawn, details)


def _identity(module: nn.Module) -> LayerFactors:
    p, m = shape_of(module)
    return LayerFactors(None, None, torch.ones(p, m + (module.bias is not None), device=device_of(module)))


class Side(NamedTuple):
    """A diagonal block of a covariance: which columns of x it is of, and whether a column of ones comes after them."""

    columns: slice
    ones: bool
    device: torch.device

    @property
    def width(self) -> int:
        """How many columns, that of ones not counted."""
        return self.columns.stop - self.columns.start

    def strips(self) -> Iterator[tuple[int, int, slice]]:
        """The lower triangle cut into strips of an eighth: first column, number of columns, place in the flat sum. On a GPU,
        which narrow products leave idle, into halves."""
        step = max(self.width // 8, 128) if self.device.type == "cpu" else max(self.width // 2, 1024)
        start = 0
        for first in range(0, self.width, step):
            columns = min(step, self.width - first)
            stop = start + (self.width - first) * columns
            yield first, columns, slice(start, stop)
            start = stop

    def numbers(self) -> int:
        """What is summed: the strips and, for the column of ones, a last row."""
        return max((where.stop for *_, where in self.strips()), default=0) + self.ones * (self.width + 1)


def _sides(source: PseudoGradients, blocks: int) -> dict[str, Side]:
    """All that is summed and decomposed, in the same order on every rank. Layers that read the same input share A."""
    found = {}
    for name, module in source.recorder.layers.items():
        p, m = shape_of(module)
        widths = {f"S {name}": (p, False)}
        if source.leaders[name] == name:
            widths[f"A {name}"] = (m, module.bias is not None)
        for key, (width, ones) in widths.items():
            start = 0
            for i, part in enumerate(torch.empty(width + ones).tensor_split(min(blocks, width + ones))):
                stop = start + len(part)
                side = Side(slice(start, min(stop, width)), ones and stop > width, device_of(module))
                found[f"{key} {i:04}"], start = side, stop
    return dict(sorted(found.items()))


def _covariances(
    source: PseudoGradients,
    state: State,
    batches: list[slice],
    sides: dict[str, Side],
    report: Callable[[int], None],
) -> Sums:
    """First pass: draw the labels, and sum (a; 1) (a; 1)^T and Ds Ds^T over counted tokens. Products are of the working
    dtype, sums of float64, of lower triangles alone."""
    sums = {name: torch.zeros(side.numbers(), dtype=torch.float64, device=side.device) for name, side in sides.items()}
    done = _loaded(source, state, "covariances", sums)
    dtype = products_of(source.model)
    of_one: dict[str, list[str]] = {}
    for name in sides:
        of_one.setdefault(name.rpartition(" ")[0], []).append(name)
    for index, rows in enumerate(batches):
        if index < done:
            continue
        found, counted = source.read(rows)
        for layer, each in found.items():
            for letter, x in (("A", each.inputs), ("S", each.outputs)):
                if names := of_one.get(f"{letter} {layer}"):
                    chosen = _chosen(x, counted).to(dtype)
                    for name in names:
                        _add_product(sums[name], chosen, sides[name])
        if state.due():
            _save(source, state, "covariances", sums, index + 1)
        report(rows.stop)
    _save(source, state, "covariances", sums, len(batches))
    all_reduce([*sums.values(), source.labels, source.counted])
    if int(source.counted.sum()) == 0:
        raise ValueError("loss_mask selects no target in any sequence: nothing to fit factors on")
    _refuse_unless_finite(sums)
    return sums


def _chosen(x: Tensor, counted: Tensor | None) -> Tensor:
    """The rows [n, W] of x [B, L, W] at the given places of [B L]; all of them where none are given."""
    return x.flatten(0, 1) if counted is None else x.flatten(0, 1).index_select(0, counted.to(x.device))


def _add_product(total: Tensor, x: Tensor, side: Side) -> None:
    """Add x^T x to a flat sum, strip by strip, and what a column of ones gives by column sums."""
    part, summed = x[:, side.columns], x.dtype if x.dtype == torch.float64 else torch.float32
    for first, columns, where in side.strips():
        product = part.new_empty(side.width - first, columns, dtype=summed)
        total[where].view_as(product).add_(matmul(part[:, first:].T, part[:, first : first + columns], product))
    if side.ones:
        total[-side.width - 1 : -1] += part.sum(0, dtype=summed)
        total[-1] += len(x)


def _square(total: Tensor, side: Side) -> Tensor:
    """A flat sum as a matrix [m, m], right in its lower triangle."""
    size = side.width + side.ones
    square = total.new_zeros(size, size)
    for first, columns, where in side.strips():
        square[first : side.width, first : first + columns] = total[where].view(-1, columns)
    if side.ones:
        square[-1] = total[-size:]
    return square


def _spectra(sums: Sums, sides: dict[str, Side], tokens: int, dtype: torch.dtype) -> Spectra:
    """Eigenvalues [m] in float64 and eigenvectors [m, m] of every block, decomposed in float64 and kept in `dtype`; the sums
    are used up. Ranks share the work."""
    rank, size = rank_and_size()
    found = {}
    for index, (name, side) in enumerate(sides.items()):
        square = _square(sums.pop(name), side)
        values, vectors = eigh(square.div_(tokens)) if index % size == rank else (square[0].clone(), square)
        found[name] = (values, aligned(vectors.to(dtype)))
        if square.nbytes > 1 << 20:
            del square, vectors
            release_freed()  # what is small enough to stay with glibc is many such
    for index, pair in enumerate(found.values()):
        for tensor in pair:
            broadcast(tensor, index % size)
    return found


def _basis(spectra: Spectra, name: str) -> Basis | None:
    return tuple(vectors for key, (_, vectors) in spectra.items() if key.rpartition(" ")[0] == name) or None


def _values(spectra: Spectra, name: str) -> Tensor:
    return torch.cat([values for key, (values, _) in spectra.items() if key.rpartition(" ")[0] == name]).clamp(min=0)


def _second_moments(
    source: PseudoGradients,
    state: State,
    batches: list[slice],
    bases: dict[str, tuple[Basis | None, Basis | None]],
    report: Callable[[int], None],
) -> dict[str, Tensor]:
    """Second pass: Lambda = mean over sequences of the squared rotated gradient, [P, M'] a layer, summed in float64."""
    modules, dtype, sums, shaped = source.recorder.layers, dtype_of(source.model), {}, {}
    for name, module in modules.items():
        p, m = shape_of(module)
        sums[name] = torch.zeros(p, m + (module.bias is not None), dtype=torch.float64, device=device_of(module))
        # Of these eigenvalues only the shape is asked.
        shaped[name] = LayerFactors(*bases[name], sums[name].new_zeros(1, 1, dtype=dtype).expand_as(sums[name]))
    layers, rotator = Factors(shaped).beside(source.model).layers, Rotator(source.buffers)
    done = _loaded(source, state, "eigenvalues", sums)
    for index, rows in enumerate(batches):
        if index < done:
            continue
        for name, found in source.read(rows)[0].items():
            for _, some, gradient in rotator.pieces(layers[name], found):
                sums[name][some] += _squares(gradient)[:, : sums[name].shape[1]]
        if state.due():
            _save(source, state, "eigenvalues", sums, index + 1)
        report(rows.stop)
    all_reduce(sums.values())
    _refuse_unless_finite(sums)
    return {name: (sums.pop(name) / count(source.sequences)).to(dtype) for name in modules}


def _refuse_unless_finite(sums: Sums) -> None:
    for name, total in sums.items():
        if not total.isfinite().all():
            layer = name.split(" ")[1] if " " in name else name
            raise ValueError(
                f"layer {layer!r} has inputs or gradients that are not finite in some sequence: nothing can be fitted on them"
            )


def _squares(gradient: Tensor) -> Tensor:
    """Sum of squares over the first axis, [p, W]; uses the gradient up."""
    if gradient.device.type == "cpu":
        return gradient.square_().sum(0)
    return torch.linalg.vector_norm(gradient, dim=0).square_()  # reads once and writes nothing


def _save(source: PseudoGradients, state: State, name: str, sums: Sums, done: int) -> None:
    about = {"labels": source.labels, "counted": source.counted, "done": torch.tensor(done)}
    state.save(by_rank(name), {**about, **{f"sum {key}": tensor for key, tensor in sums.items()}})


def _loaded(source: PseudoGradients, state: State, name: str, sums: Sums) -> int:
    """Puts the sums that a killed fit left where they go on; how many batches they hold."""
    kept = state.load(by_rank(name))
    if kept is None:
        return 0
    source.labels, source.counted = kept["labels"].to(source.device), kept["counted"]
    for key, tensor in sums.items():
        tensor.copy_(kept[f"sum {key}"])
    return int(kept["done"])
