"""Queries x training sequences: influence scores by sequence, layer and token.

    I(q, z) = grad log p(q)^T (G + lambda)^-1 grad log p(z)        (the paper's Eq 5, 25, 30)

in nats for epsilon = 1: positive means that more weight on z raises log p(completion | prompt). Both losses are sums over
target tokens. One copy of z added to N training sequences is epsilon = 1 / N, so *nats per copy* = I / N. EK-FAC's
absolute scale needs a referee; ranks and ratios are what it is good for.

One pass over the training sequences serves every query. It can be shared by several processes (`processes.py`), be killed
and gone on with (`resume`), and keep only the ends of each query's ranking (`top_scores`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .directions import Directions, rotated_sides
from .factors import Factors, Rotator, inverse
from .gradients import Recorder, device_of, frozen
from .passes import sequence_gradients
from .processes import all_gather, all_reduce, barrier, rank_and_size, shard
from .resume import State, digest, witnesses
from .scores import FORMS, Scores, Source, TopScores, ends
from .sequences import Progress, batch_rows, count, read_batch

CHUNKS = 512  # parts of a scan: what a killed one goes on from, and what processes share


def score(
    model: nn.Module,
    factors: Factors,
    queries: Mapping[str, Tensor],
    sequences: Mapping[str, Tensor],
    damping: float = 0.1,
    batch_size: int = 32,
    *,
    by_layer: bool = False,
    self_influence: bool = True,
    rank: int | float | None = None,
    memory: float = 2e9,
    corpus_size: int | None = None,
    resume: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Influence of every sequence on every query.

    queries, sequences: `input_ids` int64 [., T] with optional `loss_mask` bool; a query's mask marks its completion.
    damping: lambda of each layer as a share of the mean of its eigenvalues (the paper's 0.1).
    batch_size: sequences read at a time; more are faster where directions are read from a file, once a batch.
    by_layer: also keep [Q, N, L].
    self_influence: also keep |phi_n|^2, for RelatIF and cosine. It needs every token in the eigenbasis: where sequences
        are short against the layers, leaving it out halves the scan.
    rank: hold query directions at this rank, or at the lowest that keeps their relative error under a number below 1
        (the paper's query batching); the errors are in the result.
    memory: bytes of query directions held in memory; beyond it they are read from a temporary file for every batch.
    corpus_size: sequences of the whole training corpus, default N.
    resume: a folder (one that all processes see) for the state from which a killed scan goes on, with any number of
        processes. progress: called with (sequences done, sequences to do).

    Under `torchrun` with a process group, ranks share the sequences; all get the same scores.

    Raises ValueError when the factors belong to other layers or shapes than the model's, or a query has no target.
    Cost: one pass over the queries; one over the sequences, each (L + Q) P M' multiplications a layer beyond the model's
    own forward pass and backward pass to the tracked outputs, and L (P^2 + M'^2) more for self_influence.
    """
    scan = _Scan(model, factors, queries, sequences, damping, batch_size, by_layer, self_influence, rank, memory)
    total, found = count(sequences), scan.directions.count
    values = torch.zeros(found, total, dtype=scan.directions.norms.dtype)
    norms = torch.zeros(total, dtype=values.dtype) if self_influence else None
    layer_values = torch.zeros(found, total, len(scan.factors.layers), dtype=values.dtype) if by_layer else None
    with scan.state(resume, "score") as state:
        for rows, part in scan.chunks(state, lambda rows, part: part, progress):
            values[:, rows] = part["values"]
            if norms is not None:
                norms[rows] = part["self_influence"]
            if layer_values is not None:
                layer_values[:, rows] = part["by_layer"]
        all_reduce([tensor for tensor in (values, norms, layer_values) if tensor is not None])
    return Scores(
        values,
        norms,
        scan.directions.norms,
        tuple(scan.factors.layers),
        corpus_size or total,
        layer_values,
        scan.directions.errors,
        Source(model, factors, queries, sequences, damping),
    )


def top_scores(
    model: nn.Module,
    factors: Factors,
    queries: Mapping[str, Tensor],
    sequences: Mapping[str, Tensor],
    k: int = 100,
    damping: float = 0.1,
    batch_size: int = 32,
    *,
    form: str = "raw",
    rank: int | float | None = None,
    memory: float = 2e9,
    corpus_size: int | None = None,
    resume: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> TopScores:
    """The k most and k least influential sequences of every query, from one pass that keeps nothing else.

    For corpora whose scores [Q, N] do not fit. form: raw, relatif or cosine. The other arguments are `score`'s.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is not known; choose one of {', '.join(FORMS)}")
    if k < 1:
        raise ValueError(f"k={k!r} must be at least 1")
    scan = _Scan(model, factors, queries, sequences, damping, batch_size, False, form != "raw", rank, memory)
    size = corpus_size or count(sequences)

    def both_ends(rows: slice, part: dict[str, Tensor]) -> dict[str, Tensor]:
        scores = Scores(part["values"], part.get("self_influence"), scan.directions.norms, (), size)
        values = scores.values if form == "raw" else getattr(scores, form)
        both = values[:, None].expand(-1, 2, -1)
        best, places = ends(both, torch.arange(rows.start, rows.stop).expand_as(both), k)
        return {"values": best, "sequences": places}

    nothing = torch.zeros(scan.directions.count, 2, 0, dtype=scan.directions.norms.dtype)
    values, rows = ends(nothing, nothing.long(), k)
    with scan.state(resume, "top", k, form) as state:
        for _, part in scan.chunks(state, both_ends, progress):
            values, rows = ends(torch.cat([values, part["values"]], 2), torch.cat([rows, part["sequences"]], 2), k)
        values, rows = ends(torch.cat(list(all_gather(values)), 2), torch.cat(list(all_gather(rows)), 2), k)
    return TopScores(values, rows, form, size)


def token_scores(
    model: nn.Module,
    factors: Factors,
    query: Mapping[str, Tensor],
    sequences: Mapping[str, Tensor],
    damping: float = 0.1,
    batch_size: int = 32,
) -> Tensor:
    """Influence of every position of k sequences on one query, [k, T]; row sums are the sequence scores (Eq 31).

    Entry t is Ds_t^T V a_t: what the *updating* position t contributes, through every target it helps predict, first of
    all token t + 1. `query` holds a single row.
    """
    if count(query) != 1:
        raise ValueError(f"token_scores takes one query, got {count(query)} rows")
    check_damping(damping)
    factors = factors.beside(model)
    directions = Directions(model, factors, query, damping, rotated_sides(factors, 1, 0, True))
    modules, rotator = dict(model.named_modules()), Rotator()
    length = read_batch(sequences, slice(0, 1)).tokens.shape[1]
    summed = torch.zeros(count(sequences), length, dtype=directions.norms.dtype)
    with frozen(model), Recorder({name: modules[name] for name in factors.layers}) as recorder:
        for rows in batch_rows(count(sequences), batch_size):
            batch = read_batch(sequences, rows, device_of(model))
            for name, found in sequence_gradients(model, recorder, batch)[0].items():
                a, g = rotator.tokens(factors.layers[name], found)
                summed[rows, : batch.length] += ((g @ directions.of_query(name, 0)) * a).sum(2).cpu()
    return summed


class _Scan:
    """The pass over the sequences, in parts that processes share and that a folder can keep."""

    def __init__(self, model, factors, queries, sequences, damping, batch_size, by_layer, norms, rank, memory) -> None:
        check_damping(damping)
        self.model, self.sequences, self.batch_size, self.by_layer = model, sequences, batch_size, by_layer
        self.about = (queries, damping, batch_size, by_layer, norms, rank)
        self.factors = factors.beside(model)
        tokens = count(sequences) * (read_batch(sequences, slice(0, 1)).tokens.shape[1] - 1) if count(sequences) else 0
        rotated = rotated_sides(self.factors, count(queries), tokens // rank_and_size()[1], norms)
        self.directions = Directions(model, self.factors, queries, damping, rotated, rank, batch_size, memory)
        self.inverse = {n: inverse(layer.damped(damping)) for n, layer in self.factors.layers.items()} if norms else {}

    @contextmanager
    def state(self, folder: str | os.PathLike | None, *purpose: object) -> Iterator[State]:
        """Where finished parts are kept until the whole scan is done."""
        key = ""
        if folder is not None:
            queries, *others = self.about
            tokens, mask, _ = read_batch(queries, slice(0, count(queries)))
            curvature = [layer.eigenvalues for layer in self.factors.layers.values()]
            key = digest(self.model, *witnesses(self.sequences), purpose, others, tokens, mask, *curvature)
        state = State(folder, key)
        yield state
        barrier()
        state.forget()

    def chunks(
        self, state: State, reduce: Callable[[slice, dict[str, Tensor]], dict[str, Tensor]], progress: Progress | None
    ) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """(sequences, what `reduce` makes of their values [Q, n], self_influence [n] and by_layer [Q, n, L])."""
        total, rotator = count(self.sequences), Rotator()
        each = self.batch_size * max(1, -(-total // (self.batch_size * CHUNKS)))
        modules = dict(self.model.named_modules())
        done, share = 0, 1 / rank_and_size()[1]
        with frozen(self.model), Recorder({name: modules[name] for name in self.factors.layers}) as recorder:
            for rows in shard(batch_rows(total, each)):
                name = f"{rows.start:012}-{rows.stop:012}"
                part = state.load(name)
                if part is None:
                    parts = []
                    for some in batch_rows(rows.stop - rows.start, self.batch_size):
                        found = slice(rows.start + some.start, rows.start + some.stop)
                        parts.append(self._batch(recorder, rotator, found))
                        if progress:
                            progress(min(done + some.stop, total), max(round(total * share), 1))
                    part = reduce(
                        rows, {n: torch.cat([p[n] for p in parts], int(n != "self_influence")) for n in parts[0]}
                    )
                    state.save(name, part)
                done += rows.stop - rows.start
                yield rows, part

    def _batch(self, recorder: Recorder, rotator: Rotator, rows: slice) -> dict[str, Tensor]:
        batch = read_batch(self.sequences, rows, device := device_of(self.model))
        shares, norms = [], []
        for name, found in sequence_gradients(self.model, recorder, batch)[0].items():
            scores, norm = self.directions.contract(name, found, rotator, self.inverse.get(name))
            shares.append(scores.to(device))
            norms.append(norm.to(device))
        part = {"values": torch.stack(shares).sum(0).cpu()}
        if self.inverse:
            part["self_influence"] = torch.stack(norms).sum(0).cpu()
        if self.by_layer:
            part["by_layer"] = torch.stack(shares, 2).cpu()
        return part


def check_damping(damping: float) -> None:
    """Raise ValueError unless damping is a number >= 0."""
    if not damping >= 0:
        raise ValueError(f"damping={damping!r} must be zero or positive: it is a share of the mean eigenvalue")
