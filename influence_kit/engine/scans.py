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
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from .directions import Directions, rotated_sides
from .factors import Factors, Rotator
from .files import digest
from .gradients import Recorder, device_of, frozen
from .passes import rows_within, sequence_gradients
from .processes import all_gather, all_reduce, barrier, rank_and_size, shard
from .refine import Refined, refined_by
from .resume import State
from .scores import FORMS, Scores, TopScores, ends
from .sequences import Progress, batch_rows, check, corpus_digest, count, gather, length_of, read_batch

CHUNKS = 512  # parts of a scan: what a killed one goes on from, and what processes share
NAMED = 5  # sequences whose scores are not finite, named in a warning
Parts = dict[str, Tensor]  # values [Q, n] and, where asked for, self_influence [n] and by_layer [Q, n, L]


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
    refine: int | Refined = 0,
    refine_on: Mapping[str, Tensor] | None = None,
    resume: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Influence of every sequence on every query.

    Under `torchrun` with a process group, ranks share the sequences; all get the same scores.

    Args:
        model: The one that the factors were fitted on.
        factors: From `fit_ekfac`.
        queries: `input_ids` [Q, T], with a `loss_mask` or `labels` [Q, T] that mark each query's completion.
        sequences: `input_ids` [N, T] with optional `loss_mask`, `labels` or `attention_mask` [N, T] (see `sequences.py`).
        damping: lambda of each layer as a share of the mean of its eigenvalues (the paper's 0.1).
        batch_size: Sequences read at a time; more are faster where directions are read from a file, once a batch.
        by_layer: Also keep [Q, N, L].
        self_influence: Also keep |phi_n|^2, for RelatIF and cosine. It needs every token in the eigenbasis: where sequences
            are short against the layers, leaving it out halves the scan.
        rank: Hold query directions at this rank, or at the lowest that keeps their relative error under a number below 1
            (the paper's query batching); the errors are in the result.
        memory: Bytes of query directions held in memory; beyond it they are read from a temporary file for every batch.
        corpus_size: Sequences of the whole training corpus, default N.
        refine: Iterations of conjugate gradients that solve for the queries' directions with the curvature of all tracked
            layers together, by exact products (`refine.py`); 0 for EK-FAC's. Or what `engine.refine.refine` gave.
        refine_on: A sample of the training corpus, 1,000 sequences or more, that this curvature is of. The result's `refinement`
            holds what is left unsolved, on the sample and on sequences that it lacks. Forms divide by EK-FAC's norms still.
        resume: A folder (one that all processes see) for the state from which a killed scan goes on, with any number of
            processes. What was computed of other weights, queries or rows is computed again.
        progress: Called with (sequences done, sequences to do).

    Returns:
        The scores. Those that are not finite are warned of, and rank last.

    Raises:
        ValueError: Factors of other layers or shapes than the model's, a query without a target, sequences that do not say
            which tokens there are or that the model cannot read, a refined solve that does not converge.

    Cost: one pass over the queries; one over the sequences, each (L + Q) P M' multiplications a layer beyond the model's
    own forward pass and backward pass to the tracked outputs, and L (P^2 + M'^2) more for self_influence. To refine,
    1 1/3 passes over refine_on for every query and iteration (and for one more).
    """
    sweep = Sweep.of(
        model,
        factors,
        queries,
        sequences,
        damping=damping,
        batch_size=batch_size,
        by_layer=by_layer,
        norms=self_influence,
        rank=rank,
        memory=memory,
        refine=refine,
        refine_on=refine_on,
        resume=resume,
    )
    total, found = count(sequences), sweep.directions.count
    values = torch.zeros(found, total, dtype=sweep.directions.norms.dtype)
    norms = torch.zeros(total, dtype=values.dtype) if self_influence else None
    layer_values = torch.zeros(found, total, len(sweep.factors.layers), dtype=values.dtype) if by_layer else None
    with sweep.state(resume, "score") as state:
        for rows, part in sweep.chunks(state, lambda rows, part: part, progress):
            values[:, rows] = part["values"]
            if norms is not None:
                norms[rows] = part["self_influence"]
            if layer_values is not None:
                layer_values[:, rows] = part["by_layer"]
        all_reduce([tensor for tensor in (values, norms, layer_values) if tensor is not None])
    bad = (~values.isfinite()).any(0).nonzero().flatten()
    warn_of_unusable(len(bad), bad[:NAMED].tolist(), total)
    return Scores(
        values,
        norms,
        sweep.directions.norms,
        tuple(sweep.factors.layers),
        corpus_size or total,
        layer_values,
        sweep.directions.errors,
        partial(_tokens_of, model, factors, queries, sequences, damping, sweep.refined),
        sweep.refined and sweep.refined.about,  # type: ignore[arg-type]
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
    refine: int | Refined = 0,
    refine_on: Mapping[str, Tensor] | None = None,
    resume: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> TopScores:
    """The k most and k least influential sequences of every query, from one pass that keeps nothing else.

    For corpora whose scores [Q, N] do not fit.

    Args:
        k: How many of either end are kept.
        form: raw, relatif or cosine.

    The other arguments, and what is raised, are `score`'s.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is not known; choose one of {', '.join(FORMS)}")
    if k < 1:
        raise ValueError(f"k={k!r} must be at least 1")
    sweep = Sweep.of(
        model,
        factors,
        queries,
        sequences,
        damping=damping,
        batch_size=batch_size,
        norms=form != "raw",
        rank=rank,
        memory=memory,
        refine=refine,
        refine_on=refine_on,
        resume=resume,
    )
    total = count(sequences)

    def both_ends(rows: slice, part: Parts) -> Parts:
        values = Scores(part["values"], part.get("self_influence"), sweep.directions.norms, (), total).form(form)
        both, places = values[:, None].expand(-1, 2, -1), torch.arange(rows.start, rows.stop)
        best, chosen = ends(both, places.expand_as(both), k)
        return {"values": best, "sequences": chosen, "unusable": places[~values.isfinite().all(0)]}

    nothing = torch.zeros(sweep.directions.count, 2, 0, dtype=sweep.directions.norms.dtype)
    values, rows = ends(nothing, nothing.long(), k)
    unusable = torch.full((NAMED + 1,), total)  # the first ones, and how many there are
    unusable[-1] = 0
    with sweep.state(resume, "top", k, form) as state:
        for _, part in sweep.chunks(state, both_ends, progress):
            values, rows = ends(torch.cat([values, part["values"]], 2), torch.cat([rows, part["sequences"]], 2), k)
            unusable[:-1] = torch.cat([unusable[:-1], part["unusable"]]).sort().values[:NAMED]
            unusable[-1] += len(part["unusable"])
        values, rows = ends(torch.cat(list(all_gather(values)), 2), torch.cat(list(all_gather(rows)), 2), k)
        told = all_gather(unusable)
    bad = int(told[:, -1].sum())
    warn_of_unusable(bad, told[:, :-1].flatten().sort().values[: min(bad, NAMED)].tolist(), total)
    return TopScores(values, rows, form, corpus_size or total, refinement=sweep.refined and sweep.refined.about)  # type: ignore[arg-type]


def token_scores(
    model: nn.Module,
    factors: Factors,
    query: Mapping[str, Tensor],
    sequences: Mapping[str, Tensor],
    damping: float = 0.1,
    batch_size: int = 32,
    *,
    refine: int | Refined = 0,
    refine_on: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Influence of every position of some sequences on one query (Eq 31).

    Entry t is Ds_t^T V a_t: what the *updating* position t contributes, through every target it helps predict, first of
    all token t + 1.

    Args:
        query: A single row.
        sequences: k rows.

    Returns:
        Token scores [k, T]; row sums are the sequence scores.

    The other arguments, and what is raised, are `score`'s.
    """
    if count(query) != 1:
        raise ValueError(f"token_scores takes one query, got {count(query)} rows")
    check_numbers(damping, batch_size)
    check(query, model, "query", asking=True)
    longest = check(sequences, model)
    factors = factors.beside(model)
    refined = refined_by(refine, refine_on, model, factors, query, damping)
    directions = Directions(model, factors, query, damping, rotated_sides(factors, 1, 0, True), refined=refined)
    check_norms(directions.norms)
    modules, rotator = _modules(model, factors), Rotator()
    batch_size = rows_within(model, modules, longest, batch_size)
    summed = torch.zeros(count(sequences), length_of(sequences), dtype=directions.norms.dtype)
    with frozen(model), Recorder(modules) as recorder:
        for rows in batch_rows(count(sequences), batch_size):
            batch = read_batch(sequences, rows, device_of(model))
            for name, found in sequence_gradients(model, recorder, batch)[0].items():
                a, g = rotator.tokens(factors.layers[name], found)
                summed[rows, : batch.length] += ((g @ directions.of_query(name, 0)) * a).sum(2).cpu()
    return summed


def _tokens_of(
    model, factors, queries, sequences, damping: float, refined: Refined | None, query: int, rows: Sequence[int]
) -> Tensor:
    solved = 0 if refined is None else refined.only(query)
    return token_scores(model, factors, gather(queries, [query]), gather(sequences, rows), damping, refine=solved)


@dataclass(frozen=True, eq=False)
class Sweep:
    """One pass over the sequences for all queries, in parts that processes share and that a folder can keep.

    Args:
        model: Any that the factors fit.
        factors: Beside the model (`Factors.beside`).
        sequences: What is read.
        directions: Preconditioned query gradients.
        damping: Of the eigenvalues, for whitened norms; None without them.
        batch_size: Sequences read at a time.
        by_layer: Whether every layer's share is kept.
        about: All that the results rest on beside weights and sequences.
        refined: What the directions are, where they are not EK-FAC's.
    """

    model: nn.Module
    factors: Factors
    sequences: Mapping[str, Tensor]
    directions: Directions
    damping: float | None
    batch_size: int
    by_layer: bool
    about: tuple
    refined: Refined | None = None

    @staticmethod
    def of(
        model: nn.Module,
        factors: Factors,
        queries: Mapping[str, Tensor],
        sequences: Mapping[str, Tensor],
        *,
        damping: float,
        batch_size: int,
        by_layer: bool = False,
        norms: bool = False,
        rank: int | float | None = None,
        memory: float = 2e9,
        refine: int | Refined = 0,
        refine_on: Mapping[str, Tensor] | None = None,
        resume: str | os.PathLike | None = None,
    ) -> Sweep:
        """Checks everything and takes the queries' pass. Arguments as `score`'s; `norms`: its self_influence. Batches are
        smaller than asked for where memory has no room for their token gradients."""
        check_numbers(damping, batch_size)
        check(queries, model, "queries", asking=True)
        longest = check(sequences, model)
        beside, total = factors.beside(model), count(sequences)
        tokens = total * max(longest - 1, 0) // rank_and_size()[1]
        rotated = rotated_sides(beside, count(queries), tokens, norms)
        how = {"others": sequences, "batch_size": batch_size, "memory": memory, "resume": resume}
        refined = refined_by(refine, refine_on, model, factors, queries, damping, **how)
        directions = Directions(model, beside, queries, damping, rotated, rank, batch_size, memory, refined)
        check_norms(directions.norms)
        about = (corpus_digest(queries), damping, batch_size, by_layer, norms, rank)
        about += () if refined is None else (directions.norms.tolist(),)  # type: ignore[assignment]
        return Sweep(
            model, beside, sequences, directions, damping if norms else None, batch_size, by_layer, about, refined
        )

    @contextmanager
    def state(self, folder: str | os.PathLike | None, *purpose: object) -> Iterator[State]:
        """Where finished parts are kept until the whole scan is done."""
        key = "" if folder is None else digest(self.model, self.factors.fingerprint(), purpose, self.about)
        state = State(folder, key)
        yield state
        barrier()
        state.forget()
        if self.refined is not None:
            self.refined.forget()

    def chunks(
        self, state: State, reduce: Callable[[slice, Parts], Parts], progress: Progress | None
    ) -> Iterator[tuple[slice, Parts]]:
        """This process's share of the sequences, one part after another.

        Args:
            state: Where parts are kept: one of other rows is made again.
            reduce: What to keep of (sequences, their scores).

        Returns:
            (sequences, what `reduce` made of them).
        """
        total, rotator = count(self.sequences), Rotator()
        each = self.batch_size * max(1, -(-total // (self.batch_size * CHUNKS)))
        done, share = 0, 1 / rank_and_size()[1]
        with frozen(self.model), Recorder(_modules(self.model, self.factors)) as recorder:
            for rows in shard(batch_rows(total, each)):
                name = f"{rows.start:012}-{rows.stop:012}"
                read = "" if state.folder is None else corpus_digest(self.sequences, rows)
                part = state.load(name, read)
                if part is None:
                    parts = []
                    for some in batch_rows(rows.stop - rows.start, self.batch_size):
                        asked = slice(rows.start + some.start, rows.start + some.stop)
                        parts += [self._batch(recorder, rotator, found) for found in self._within(asked)]
                        if progress:
                            progress(min(done + some.stop, total), max(round(total * share), 1))
                    part = reduce(
                        rows, {n: torch.cat([p[n] for p in parts], int(n != "self_influence")) for n in parts[0]}
                    )
                    state.save(name, part, read)
                done += rows.stop - rows.start
                yield rows, part

    def _within(self, rows: slice) -> Iterator[slice]:
        """These rows, as many at a time as have room at the length of the longest of them."""
        longest, size = read_batch(self.sequences, rows).length + 1, rows.stop - rows.start
        for some in batch_rows(size, rows_within(self.model, _modules(self.model, self.factors), longest, size)):
            yield slice(rows.start + some.start, rows.start + some.stop)

    def _batch(self, recorder: Recorder, rotator: Rotator, rows: slice) -> Parts:
        batch = read_batch(self.sequences, rows, device := device_of(self.model))
        shares, norms = [], []
        for name, found in sequence_gradients(self.model, recorder, batch)[0].items():
            scores, norm = self.directions.contract(name, found, rotator, self.damping)
            shares.append(scores.to(device))
            norms.append(norm.to(device))
        part = {"values": torch.stack(shares).sum(0).cpu()}
        if self.damping is not None:
            part["self_influence"] = torch.stack(norms).sum(0).cpu()
        if self.by_layer:
            part["by_layer"] = torch.stack(shares, 2).cpu()
        return part


def _modules(model: nn.Module, factors: Factors) -> dict[str, nn.Module]:
    """The layers that the factors belong to."""
    return {name: model.get_submodule(name) for name in factors.layers}


def check_numbers(damping: float, batch_size: int) -> None:
    """Raise ValueError unless damping is a finite number >= 0, and batch_size >= 1."""
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping={damping!r} must be zero or positive: it is a share of the mean eigenvalue")
    batch_rows(1, batch_size)


def check_norms(norms: Tensor) -> None:
    """Raise ValueError unless all queries' whitened gradients, of these norms [Q], are finite."""
    if bad := (~norms.isfinite()).nonzero().flatten().tolist():
        raise ValueError(f"{len(bad)} of {len(norms)} queries have gradients that are not finite, first query {bad[0]}")


def warn_of_unusable(number: int, first: list[int], total: int) -> None:
    """Say that some sequences have scores that are not finite, and which."""
    if number:
        named = ", ".join(map(str, first)) + (" ..." if number > len(first) else "")
        warnings.warn(
            f"{number} of {total} sequences have scores that are not finite (sequences {named}): they rank last",
            stacklevel=3,
        )
