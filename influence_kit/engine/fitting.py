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
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .blas import eigh, matmul
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
Sums = dict[str, Tensor]  # "A <layer> <block>" and "S <layer> <block>", lower triangles in float64


def fit_ekfac(
    model: nn.Module,
    sequences: Mapping[str, Tensor],
    layers: str = "mlp",
    labels: str | Tensor = "sampled",
    batch_size: int = 32,
    seed: int = 0,
    method: str = "ekfac",
    blocks: int = 1,
    memory: float = 2e9,
    resume: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> Factors:
    """Fit the curvature of `model`'s tracked layers on `sequences`.

    model: any causal language model that maps token ids [B, T] to logits [B, T, V].
    sequences: `input_ids` int64 [N, T] and optional `loss_mask` bool [N, T] (True where the token is a target);
        padding on the right.
    labels: "sampled" (true Fisher; drawn once, the same for any batch size, stored in the result), "data" (the
        empirical Fisher) or int64 [N, T] given pseudo-labels (label t is predicted from position t - 1).
    method: "ekfac"; "kfac" (Lambda = mean tokens a sequence x Lambda_S kron Lambda_A); "diagonal" (second moment of the
        gradient in the parameters' own basis); "identity" (plain gradient dot products).
    blocks: number of diagonal blocks of A and of S (the paper's Appendix A): memory of the bases falls by it, their
        eigendecomposition by its square.
    memory: bytes of token gradients kept between the two passes; what does not fit goes to a temporary file as far as
        half of the free disk lasts, and the rest is computed again.
    resume: a folder (one that all processes see) for the state from which a killed fit goes on, to the same factors.
    progress: called with (sequences done, sequences to do) over both passes.

    Under `torchrun` with a process group, ranks share the batches and the eigendecompositions; all get the same factors.

    Source: the paper's Eq 12-21. Raises ValueError for layers, labels or methods that do not fit the model or data.
    Cost: a forward and backward pass over `sequences` (two where token gradients are not kept), L (P^2 + M'^2 + P M')
    multiplications a sequence and layer for each pass, and eigh of an M'xM' and a PxP matrix a layer in float64.
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
    check(sequences, model)
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
        within = rows_within(model, chosen, source.labels.shape[1], batch_size)
        batches = shard(batch_rows(total, within))
        passes = 1 if method in ("kfac", "diagonal") else 2
        spectra: dict[str, tuple[Tensor, Tensor]] = {}
        if method != "diagonal":
            sums = _covariances(source, state, batches, blocks, lambda done: report(done, passes * total))
            spectra = _spectra(sums, int(source.counted.sum()), dtype_of(model))
            del sums
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
    release_freed()
    barrier()
    state.forget()
    fitted = {n: LayerFactors(*bases[n], eigenvalues[n]) for n in chosen}
    return Factors(fitted, drawn, details).to(dtype=dtype_of(model))


def _identity(module: nn.Module) -> LayerFactors:
    p, m = shape_of(module)
    return LayerFactors(None, None, torch.ones(p, m + (module.bias is not None), device=device_of(module)))


def _covariances(
    source: PseudoGradients, state: State, batches: list[slice], blocks: int, report: Callable[[int], None]
) -> Sums:
    """First pass: draw the labels, and sum (a; 1) (a; 1)^T and Ds Ds^T over counted tokens. Products are of the working
    dtype, sums of float64. Layers that read the same input share A."""
    sums, done = _loaded(source, state, "covariances")
    for index, rows in enumerate(batches):
        if index < done:
            continue
        found, counted = source.read(rows)
        for name, (a, g, bias) in found.items():
            if source.leaders[name] == name:
                _add_product(sums, f"A {name}", _chosen(a, counted), bias, blocks)
            _add_product(sums, f"S {name}", _chosen(g, counted), False, blocks)
        if state.due():
            _save(source, state, "covariances", sums, index + 1)
        report(rows.stop)
    _save(source, state, "covariances", sums, len(batches))
    if not sums:  # more ranks than batches: this one has read nothing
        sums = _no_sums(source, blocks)
    sums = dict(sorted(sums.items()))  # the same order on every rank, whatever was resumed
    all_reduce([*sums.values(), source.labels, source.counted])
    if int(source.counted.sum()) == 0:
        raise ValueError("loss_mask selects no target in any sequence: nothing to fit factors on")
    _refuse_unless_finite(sums)
    return sums


def _chosen(x: Tensor, counted: Tensor | None) -> Tensor:
    """The rows [n, W] of x [B, L, W] at the given places of [B L]; all of them where none are given."""
    return x.flatten(0, 1) if counted is None else x.flatten(0, 1).index_select(0, counted.to(x.device))


def _add_product(sums: Sums, name: str, x: Tensor, bias: bool, blocks: int) -> None:
    """Add x^T x [W', W'] to the blocks of a sum, lower triangles only, a column of ones by column sums."""
    start = 0
    for i, size in enumerate(_sizes(x.shape[1] + bias, blocks)):
        key = f"{name} {i:04}"
        if key not in sums:
            sums[key] = torch.zeros(size, size, dtype=torch.float64, device=x.device)
        total = sums[key] = sums[key].to(x.device)  # one that a killed fit left lies on the CPU
        width = size - (bias and start + size > x.shape[1])
        part = x[:, start : start + width]
        step = max(width // 8, 128)
        for row in range(0, width, step):
            columns = part[:, row : row + step]
            product = part.new_empty(width - row, columns.shape[1])
            total[row:width, row : row + len(product.T)] += matmul(part[:, row:].T, columns, product)
        if width < size:
            total[-1, :width] += part.sum(0)
            total[-1, -1] += len(x)
        start += size


def _sizes(width: int, blocks: int) -> list[int]:
    """Sizes of diagonal blocks, as even as can be, larger ones first."""
    return [len(part) for part in torch.empty(width).tensor_split(min(blocks, width))]


def _no_sums(source: PseudoGradients, blocks: int) -> Sums:
    """Sums of nothing, in every shape."""
    sums: Sums = {}
    for name, module in source.recorder.layers.items():
        p, m = shape_of(module)
        empty = torch.zeros(0, max(p, m), dtype=dtype_of(source.model), device=device_of(module))
        if source.leaders[name] == name:
            _add_product(sums, f"A {name}", empty[:, :m], module.bias is not None, blocks)
        _add_product(sums, f"S {name}", empty[:, :p], False, blocks)
    return sums


def _spectra(sums: Sums, tokens: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    """Eigenvalues [m] in float64 and eigenvectors [m, m] of every block, decomposed in float64 and kept in `dtype`; the sums
    are used up. Ranks share the work."""
    rank, size = rank_and_size()
    found = {}
    for index, name in enumerate(list(sums)):
        total = sums.pop(name)
        if index % size == rank:
            values, vectors = eigh(total.div_(tokens))
        else:
            values, vectors = total.new_empty(len(total)), total
        found[name] = (values, aligned(vectors.to(dtype)))
    for index, pair in enumerate(found.values()):
        for tensor in pair:
            broadcast(tensor, index % size)
    return found


def _basis(spectra: dict[str, tuple[Tensor, Tensor]], name: str) -> Basis | None:
    return tuple(vectors for key, (_, vectors) in spectra.items() if key.rpartition(" ")[0] == name) or None


def _values(spectra: dict[str, tuple[Tensor, Tensor]], name: str) -> Tensor:
    return torch.cat([values for key, (values, _) in spectra.items() if key.rpartition(" ")[0] == name]).clamp(min=0)


def _second_moments(
    source: PseudoGradients,
    state: State,
    batches: list[slice],
    bases: dict[str, tuple[Basis | None, Basis | None]],
    report: Callable[[int], None],
) -> dict[str, Tensor]:
    """Second pass: Lambda = mean over sequences of the squared rotated gradient, [P, M'] a layer, float64 sums."""
    modules, sums = source.recorder.layers, {}
    for name, module in modules.items():
        p, m = shape_of(module)
        width = m + (module.bias is not None)
        sums[name] = torch.zeros(p, width, dtype=torch.float64, device=device_of(module))
    layers = Factors({n: LayerFactors(*bases[n], sums[n]) for n in modules}).beside(source.model).layers
    rotator = Rotator(source.buffers)
    loaded, done = _loaded(source, state, "eigenvalues")
    for name, tensor in loaded.items():
        sums[name].copy_(tensor)
    for index, rows in enumerate(batches):
        if index < done:
            continue
        for name, found in source.read(rows)[0].items():
            for _, some, gradient in rotator.pieces(layers[name], found):
                sums[name][some] += gradient.square_().sum(0)[:, : sums[name].shape[1]]
        if state.due():
            _save(source, state, "eigenvalues", sums, index + 1)
        report(rows.stop)
    all_reduce(sums.values())
    _refuse_unless_finite(sums)
    return {name: total / count(source.sequences) for name, total in sums.items()}


def _refuse_unless_finite(sums: Mapping[str, Tensor]) -> None:
    for name, total in sums.items():
        if not total.isfinite().all():
            layer = name.split(" ")[1] if " " in name else name
            raise ValueError(
                f"layer {layer!r} has inputs or gradients that are not finite in some sequence: nothing can be fitted on them"
            )


def _save(source: PseudoGradients, state: State, name: str, sums: Mapping[str, Tensor], done: int) -> None:
    about = {"labels": source.labels, "counted": source.counted, "done": torch.tensor(done)}
    state.save(by_rank(name), {**about, **{f"sum {key}": tensor for key, tensor in sums.items()}})


def _loaded(source: PseudoGradients, state: State, name: str) -> tuple[Sums, int]:
    """The sums that a killed fit left, and how many batches they hold."""
    kept = state.load(by_rank(name))
    if kept is None:
        return {}, 0
    source.labels, source.counted = kept["labels"].to(source.device), kept["counted"]
    sums = {key[4:]: tensor for key, tensor in kept.items() if key.startswith("sum ")}
    return sums, int(kept["done"])
