"""The query side of a score, solved: (G + lambda) x = grad log p(query) by preconditioned conjugate gradients.

EK-FAC inverts each layer by itself, and its products of covariances stand for what they are not. Here G is the Gauss-Newton
matrix of a sample of training sequences over all tracked layers together, by exact products (`products.py`); lambda is EK-FAC's.
The scan stays as it is: only the direction that meets the sequences' gradients is another.

An iteration is a product over the sample for every query, preconditioned by gradients with labels drawn from the model, one a
sequence or a thousand in all (Woodbury's identity), where these fit in memory, and by EK-FAC where they do not. What limits the result is the sample:
x fits *its* curvature, and the residual on other sequences says how far that carries.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from .factors import Factors, rotate_columns, rotate_rows
from .files import digest
from .processes import barrier, rank_and_size
from .products import GaussNewton, sampled_inverse
from .resume import State
from .sequences import Progress, batch_rows, check, corpus_digest, count, read_batch, row_digests
from .shelf import Buffers, Shelf, free_disk

ENOUGH = 1_000  # sequences: with fewer, a solution fits its sample more than the corpus
DRAWN = 4_096  # most drawn gradients in a preconditioner: their matrix is decomposed in float64
VECTORS = 7  # [D] a query that a solve holds: v, x, r, z, the direction, its product, and one in between
GROWN = 4  # times the lowest residual, where that is above 1: diverged
PRECONDITIONERS = ("auto", "drawn", "ekfac")


@dataclass(frozen=True)
class Refinement:
    """How far a solve came.

    Args:
        iterations: Of conjugate gradients.
        preconditioner: "drawn" or "ekfac".
        sequences: n, of the sample.
        residual: |v - (G + lambda) x| / |v| [Q] with G of the sample, as the iterations have it.
        fresh_sequences: Of sequences that the sample lacks; 0 where there were none.
        fresh_residual: The same [Q] with G of those; nan without.
    """

    iterations: int
    preconditioner: str
    sequences: int
    residual: Tensor
    fresh_sequences: int
    fresh_residual: Tensor


class Refined:
    """The solutions x of some queries, layer by layer: what `score`, `top_scores` and `Index.query` take for `refine` too, so that
    several of them rest on one solve.

    Attributes:
        about: How far the solve came.
        norms: The root of v x [Q], which is |phi_q| where x is EK-FAC's.
    """

    def __init__(
        self, about: Refinement, norms: Tensor, factors: Factors, asked: dict, shelf: Shelf, state: State
    ) -> None:
        self.about, self.norms, self._factors, self._asked = about, norms, factors, asked
        self._shelf, self._state, self._buffers, self._rows = shelf, state, Buffers(), range(len(norms))

    def only(self, query: int) -> Refined:
        """That of a single query."""
        asked = self._asked | {"queries": self._asked["queries"][query : query + 1]}
        found = Refined(self.about, self.norms[query : query + 1], self._factors, asked, self._shelf, self._state)
        found._rows = self._rows[query : query + 1]
        return found

    def turned(self, name: str, queries: slice) -> Tensor:
        """x [B, P, M'] of some queries in one layer, in its eigenbasis."""
        layer, rows = self._factors.layers[name], self._rows[queries]
        found = layer.eigenvalues.new_empty(len(rows), *layer.eigenvalues.shape)
        for place, row in enumerate(rows):
            found[place] = self._shelf.get(f"{row}/{name}", self._buffers)
        found = found if layer.outputs is None else rotate_rows(found, layer.outputs)
        return found if layer.inputs is None else rotate_columns(found, layer.inputs)

    def of(self, queries: Mapping[str, Tensor], damping: float) -> Refined:
        """Itself. Raises ValueError where it was solved for other queries, or at another damping."""
        if self._asked != _asked(queries, damping):
            raise ValueError("refine was solved for other queries, or at another damping: solve for these")
        return self

    def forget(self) -> None:
        """Delete what a killed run would go on from."""
        self._state.forget()


def _asked(queries: Mapping[str, Tensor], damping: float) -> dict:
    return {"queries": row_digests(read_batch(queries, slice(0, count(queries)))).tolist(), "damping": damping}


class Diverges(ValueError):
    """Queries whose solve does not converge.

    Args:
        queries: Which of those that were asked for; others, that were to be solved for later, may be such too.
        told: What is left of the first one's equation, and the remedy.
    """

    def __init__(self, queries: list[int], told: str) -> None:
        super().__init__(told)
        self.queries = queries


def refine(
    model: nn.Module,
    factors: Factors,
    queries: Mapping[str, Tensor],
    sample: Mapping[str, Tensor],
    iterations: int,
    *,
    others: Mapping[str, Tensor] | None = None,
    damping: float = 0.1,
    preconditioner: str = "auto",
    batch_size: int = 32,
    memory: float = 2e9,
    resume: str | os.PathLike | None = None,
    progress: Progress | None = None,
) -> Refined:
    """Solve for the directions of some queries.

    Under `torchrun` ranks share the sample, and all hold all solutions.

    Args:
        model: The one that the factors were fitted on, in float32 or float64, its tracked layers on one device.
        factors: From `fit_ekfac`, on any sequences: they damp, and precondition.
        queries: As for `score`.
        sample: Training sequences, as for `score`, whose curvature is inverted.
        iterations: K, at which the solve is broken off.
        others: Training sequences. Those that the sample lacks, as many as it has at most, are taken for the second residual.
        damping: lambda of each layer as a share of the mean of its eigenvalues.
        preconditioner: "drawn", "ekfac", or "auto": "drawn", from as many sequences as half of `memory` has room for, or the
            other where these are too few.
        batch_size: Sequences read at a time where gradients are taken.
        memory: Bytes of vectors over the weights held at a time; queries are solved for by as many as fit.
        resume: A folder (one that all processes see) for the state from which a killed solve goes on, to the same result.
        progress: Called with (iterations done, iterations to do), counted once a query.

    Raises:
        ValueError: What cannot be solved with.
        Diverges: Queries whose solve does not converge.

    Cost: iterations + 1 products (`GaussNewton.product`) a query and sequence of the sample, and with n drawn gradients
    n^2 D + n^3 multiplications once, 2 n D an iteration and query.
    """
    _refuse(model, queries, sample, iterations, damping, preconditioner)
    curvature = GaussNewton(model, factors, sample, damping)
    apart = None if others is None else _not_in(others, sample)
    fresh = None if apart is None else GaussNewton(model, factors, apart, damping)
    drawn = 0 if preconditioner == "ekfac" else _drawn(curvature, memory / 2 if preconditioner == "auto" else math.inf)
    key = "" if resume is None else _key(curvature, queries, drawn)
    solver = _Solver(curvature, iterations, drawn, batch_size, State(resume, key), progress, count(queries))
    shelf, own, far, norms = Shelf(memory, free_disk()), [], [], []
    size = len(curvature.damping_of) * curvature.damping_of.element_size()
    for rows in batch_rows(solver.total, max(int(memory / 2 / (VECTORS * size)), 1)):
        batch = read_batch(queries, rows)
        v = curvature.gradients({"input_ids": batch.tokens, "loss_mask": batch.loss_mask}, batch_size)
        x, residual = solver.solve(v, rows)
        norms.append((v * x).sum(1).sqrt().cpu())
        own.append(residual.cpu())
        far.append(torch.full_like(own[-1], torch.nan) if fresh is None else _left(fresh, x, v).cpu())
        for name, part in curvature.split(x).items():
            for query, one in enumerate(part, rows.start):
                shelf.put(f"{query}/{name}", one.clone())
    kind, others_found = "drawn" if drawn else "ekfac", 0 if fresh is None else fresh.total
    about = Refinement(iterations, kind, curvature.total, torch.cat(own), others_found, torch.cat(far))
    if unsolved := int((about.residual > 1).sum()):
        warnings.warn(
            f"{unsolved} of {solver.total} queries have a residual above 1 after refine={iterations}: far from solved",
            stacklevel=2,
        )
    return Refined(about, torch.cat(norms), curvature.factors, _asked(queries, damping), shelf, solver.state)


def refined_by(
    asked: int | Refined,
    sample: Mapping[str, Tensor] | None,
    model: nn.Module,
    factors: Factors,
    queries: Mapping[str, Tensor],
    damping: float,
    **how,
) -> Refined | None:
    """What `refine` and `refine_on` of a scan ask for, None for 0; `how`: as for `refine`."""
    if isinstance(asked, Refined):
        return asked.of(queries, damping)
    if isinstance(asked, bool) or not isinstance(asked, int) or asked < 0:
        raise ValueError(f"refine={asked!r} must be a whole number of iterations, 0 or more")
    if asked == 0:
        return None
    if sample is None:
        raise ValueError(f"refine={asked} needs refine_on: {ENOUGH:,} sequences of the training corpus, or more")
    return refine(model, factors, queries, sample, asked, damping=damping, **how)


def _refuse(model, queries, sample, iterations: int, damping: float, preconditioner: str) -> None:
    """Raise ValueError for what cannot be solved with, and warn of a small sample."""
    if iterations < 1:
        raise ValueError(f"refine={iterations!r} must be a whole number of iterations, 0 or more")
    if preconditioner not in PRECONDITIONERS:
        raise ValueError(f"preconditioner={preconditioner!r} is not known; choose one of {', '.join(PRECONDITIONERS)}")
    if not damping > 0:
        raise ValueError(f"damping={damping!r} must be above 0 to refine: a sample's curvature alone has no inverse")
    if (dtype := next(model.parameters()).dtype) not in (torch.float32, torch.float64):
        raise ValueError(f"refining needs float32 or float64, the model is {str(dtype)[6:]}: give model.float()")
    check(queries, model, "queries", asking=True)
    check(sample, model, "refine_on")
    if (number := count(sample)) == 0:
        raise ValueError(f"refine_on has no sequences: give at least {ENOUGH:,} of the training corpus")
    if number < ENOUGH:
        warnings.warn(
            f"refine_on has {number} sequences: below {ENOUGH:,} a solution fits its sample more than the corpus",
            stacklevel=3,
        )


def _drawn(curvature: GaussNewton, memory: float) -> int:
    """From how many sequences gradients are drawn: as many as there are, or as let drawn gradients and their matrix fit; 0 where
    fewer than ENOUGH gradients would."""
    draws, size = _draws(curvature), len(curvature.damping_of) * curvature.damping_of.element_size()
    most = min(curvature.total, DRAWN)
    room = (math.sqrt(size**2 + 4 * 24 * min(memory, 1e15)) - size) / (2 * 24)  # of k: k size + 24 k^2 <= memory
    fitting = min(most, int(room / draws))
    return fitting if fitting == most or fitting * draws >= ENOUGH else 0


def _draws(curvature: GaussNewton) -> int:
    """Gradients drawn a sequence: one, or so many that there are ENOUGH."""
    return max(ENOUGH // curvature.total, 1)


def _not_in(others: Mapping[str, Tensor], sample: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Evenly spaced sequences of others that the sample lacks, as many as it has at most; None where it lacks none."""
    number, total = count(sample), count(others)
    if total == 0:
        return None
    # Twice as many are looked at as are wanted: where the sample is more than half of all, fewer are found.
    batch = read_batch(others, slice(0, total, max(total // (2 * number), 1)))
    free = (~np.isin(row_digests(batch), row_digests(read_batch(sample, slice(0, number))))).nonzero()[0]
    chosen = free[np.arange(min(number, len(free))) * len(free) // max(min(number, len(free)), 1)]
    found = {"input_ids": batch.tokens[chosen], "loss_mask": batch.loss_mask[chosen]}
    return found if len(chosen) else None


def _key(curvature: GaussNewton, queries: Mapping[str, Tensor], drawn: int) -> str:
    """All that a solution rests on but the number of iterations, which its state knows."""
    corpora = [corpus_digest(each) for each in (queries, curvature.sequences)]
    return digest(curvature.model, curvature.factors.fingerprint(), corpora, curvature.damping, drawn)


@dataclass(frozen=True)
class Iterate:
    """Where conjugate gradients are.

    Args:
        x: The solution so far [Q, D].
        r: v - (G + lambda) x.
        direction: The next.
        rz: r z [Q], where z is r preconditioned.
        size: |v| [Q].
        lowest: The lowest |r| / |v| so far [Q].
        done: Steps made.
    """

    x: Tensor
    r: Tensor
    direction: Tensor
    rz: Tensor
    size: Tensor
    lowest: Tensor
    done: int = 0

    @staticmethod
    def begin(v: Tensor, precondition: Callable[[Tensor], Tensor]) -> Iterate:
        """x = 0, for v [Q, D]."""
        z = precondition(v)
        rz, size = (v * z).sum(1), v.norm(dim=1).clamp(min=torch.finfo(v.dtype).tiny)
        return Iterate(torch.zeros_like(v), v.clone(), z.clone(), rz, size, torch.full_like(rz, torch.inf))

    def step(self, product: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor]) -> Iterate:
        """One product further. Rows with nothing left to solve stay."""
        moved = product(self.direction)
        length = torch.where(self.rz == 0, 0.0, self.rz / (self.direction * moved).sum(1))
        x, r = self.x + length[:, None] * self.direction, self.r - length[:, None] * moved
        z = precondition(r)
        rz = (r * z).sum(1)
        direction = z + torch.where(self.rz == 0, 0.0, rz / self.rz)[:, None] * self.direction
        lowest = torch.minimum(self.lowest, r.norm(dim=1) / self.size)
        return Iterate(x, r, direction, rz, self.size, lowest, self.done + 1)


def _left(curvature: GaussNewton, x: Tensor, v: Tensor) -> Tensor:
    """|v - (G + lambda) x| / |v|, [Q]."""
    return (v - curvature.product(x)).norm(dim=1) / v.norm(dim=1).clamp(min=torch.finfo(v.dtype).tiny)


@dataclass
class _Solver:
    """Solves for one block of queries after another; a killed one is gone on with."""

    curvature: GaussNewton
    iterations: int
    drawn: int  # sequences with gradients in the preconditioner
    batch_size: int
    state: State
    progress: Progress | None
    total: int  # queries

    @cached_property
    def precondition(self) -> Callable[[Tensor], Tensor]:
        """Something near (G + lambda)^-1."""
        if not self.drawn:
            return self.curvature.precondition
        return sampled_inverse(self.curvature, _draws(self.curvature), batch_size=self.batch_size, most=self.drawn)

    def solve(self, v: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """x [B, D] for the gradients v [B, D] of these of all queries, and what residual it has [B].

        Raises ValueError where that has grown.
        """
        name = f"refined-{rows.start:06}-{rows.stop:06}"
        found = self._kept(name, v) or Iterate.begin(v, self.precondition)
        kept, enough = found.done, torch.finfo(v.dtype).eps
        while found.done < self.iterations and bool((found.r.norm(dim=1) > enough * found.size).any()):
            found = found.step(self.curvature.product, self.precondition)
            if self.state.due():
                self._keep(name, found)
                kept = found.done
            if self.progress:
                done = rows.start * self.iterations + (rows.stop - rows.start) * found.done
                self.progress(done, self.total * self.iterations)
        if kept < found.done:
            self._keep(name, found)
        left = found.r.norm(dim=1) / found.size
        if bad := (~(left <= (GROWN * found.lowest).clamp(min=1))).nonzero().flatten().tolist():
            raise Diverges(
                [rows.start + place for place in bad],
                f"query {rows.start + bad[0]} does not converge: {left[bad[0]]:.3g} of its gradient is left after {self.iterations} "
                f"iterations, {found.lowest[bad[0]]:.3g} was at best; raise damping={self.curvature.damping:g}, or give refine_on "
                f"more than {self.curvature.total} sequences",
            )
        return found.x, left

    def _kept(self, name: str, v: Tensor) -> Iterate | None:
        parts = self.state.load(name)
        barrier()  # all have looked before one writes
        if parts is None or int(parts["done"]) > self.iterations:
            return None
        return Iterate(*(parts[each.name].to(v) for each in fields(Iterate)[:-1]), done=int(parts["done"]))  # type: ignore[arg-type, misc]

    def _keep(self, name: str, found: Iterate) -> None:
        if rank_and_size()[0] == 0:
            parts = {each.name: torch.as_tensor(getattr(found, each.name)) for each in fields(Iterate)}
            self.state.save(name, parts)
