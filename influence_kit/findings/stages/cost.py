"""EK-FAC beside LiSSA: what an inverse-Hessian-vector product costs, and how near each comes to the exact one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open

from influence_kit import models
from influence_kit.corpora.world import World, batch_of
from influence_kit.engine.factors import Factors
from influence_kit.engine.fitting import fit_ekfac
from influence_kit.engine.layers import is_linear_map, shape_of
from influence_kit.errors import UserError
from influence_kit.measures.correlations import correlations
from influence_kit.measures.cost import ekfac_work, lissa_work
from influence_kit.referees.curvature import PRODUCT, GaussNewton, sampled_inverse, solve
from influence_kit.referees.lissa import lissa, top_eigenvalue

SALT = 0xC057
POWER = {"batches": 4, "steps": 10}  # of power iteration, for LiSSA's scale
HALVINGS = 4  # of that scale, before LiSSA is given up
TIMED = 8  # steps of LiSSA timed at once


def cost(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Solve for some queries by EK-FAC, by LiSSA at many depths and to convergence; write cost, about and seconds.parquet.

    All methods invert the same matrix: the Gauss-Newton matrix of one sample of training sequences, damped as EK-FAC damps it;
    EK-FAC's factors are fitted on that sample.

    cost.parquet, a row per query, method ("EK-FAC", "LiSSA", "gradient dot"), batch (LiSSA's minibatch) and depth: agreement
    (correlation of the scores with those of the exact solution), alignment (cosine between the two in the norm of G + lambda),
    residual |v - (G + lambda) x| / |v|, work (sequence gradients a query). about.parquet, one row a minibatch size: scale (LiSSA's alpha), tuning (its work, once), fit and
    each (EK-FAC's work as the scan fitted it, and a query's), iterations of the exact solution and growth of its energy over
    the last of them, weights. These two repeat to the byte. A scale at which LiSSA diverges is halved; what that cost is not counted.
    seconds.parquet: part ("fit" of EK-FAC on the sample, scaled up to the scan's own fit; "query" of it; a LiSSA "step" a
    query), batch, seconds: medians over turns on the machine at hand, each turn timing every part once.

    parameters: queries, sequences (the sample), scored, batches, depth (most steps), draws, most, tolerance (label sets of
    the exact solution's preconditioner, its most iterations, the growth at which it stops), turns, and an extra's own.
    """
    world, rng = World.load(inputs["world"]), np.random.default_rng([parameters["seed"], SALT])
    model = models.load(inputs["model"], parameters["fraction"], parameters["device"])
    with safe_open(str(inputs["influence"] / "scores.safetensors"), "pt") as file:
        scanned, asked = (file.get_tensor(name).numpy() for name in ("rows", "queries"))
    fitted_on = Factors.load(inputs["influence"] / "factors.safetensors").details["sequences"]
    asked = np.sort(rng.permutation(asked)[: parameters["queries"]])
    queries, scored = (
        batch_of(world.queries, asked),
        batch_of(world.sequences, rng.permutation(scanned)[: parameters["scored"]]),
    )
    sample = batch_of(world.sequences, np.sort(rng.permutation(world.sequences.num_rows)[: parameters["sequences"]]))

    def fit() -> Factors:
        return fit_ekfac(model, sample, parameters["layers"], seed=parameters["seed"])

    curvature = GaussNewton(model, fit(), sample, parameters["damping"])
    v = curvature.gradients(queries)
    depths = [2**i for i in range(parameters["depth"].bit_length())]
    depths = [depth for depth in depths if depth <= parameters["depth"]]
    near = sampled_inverse(curvature, parameters["draws"], parameters["seed"])
    exact, growth, iterations = solve(curvature, v, parameters["tolerance"], parameters["most"], near)
    del near
    progress(0.4, 1, "exact solution")
    energies = (v * exact).sum(1).tolist()
    reference = curvature.scores(exact, scored).cpu().numpy()
    length = int(sample["input_ids"].shape[1]) - 1
    weights = sum(math.prod(shape_of(module)) for module in model.modules() if is_linear_map(module))
    shapes = list(curvature.shapes.values())
    fit_work, each = ekfac_work(shapes, weights, length, fitted_on)
    rows, about = [], []

    def keep(method: str, batch: int, depth: int, x: torch.Tensor, work: float) -> None:
        same = correlations(curvature.scores(x, scored).cpu().numpy(), reference)
        residual, energy = (each.tolist() for each in curvature.quality(x, v))
        for i, query in enumerate(asked):
            alignment = (max(energy[i], 0) / energies[i]) ** 0.5
            numbers = {"agreement": float(same[i]), "alignment": alignment, "residual": residual[i], "work": work}
            rows.append({"query": int(query), "method": method, "batch": batch, "depth": depth, **numbers})

    keep("EK-FAC", 0, 0, curvature.precondition(v), each)
    keep("gradient dot", 0, 0, v, 1.0)
    scales = {}
    for n, batch in enumerate(parameters["batches"]):
        scales[batch], found = _as_far_as_it_converges(curvature, v, depths, batch, parameters["seed"])
        for depth, x in zip(depths, found, strict=True):
            keep("LiSSA", batch, depth, x, lissa_work(depth, batch, PRODUCT))
        tuning = POWER["batches"] * POWER["steps"] * batch * PRODUCT
        about.append(
            {
                "batch": batch,
                "scale": scales[batch],
                "tuning": tuning,
                "fit": fit_work,
                "each": each,
                "weights": weights,
            }
        )
        about[-1] |= {"iterations": iterations, "growth": float(growth.max())}
        progress(0.4 + 0.5 * (n + 1) / len(parameters["batches"]), 1, "LiSSA")
    pq.write_table(pa.Table.from_pylist(rows), out / "cost.parquet")
    pq.write_table(pa.Table.from_pylist(about), out / "about.parquet")
    timed: dict[tuple[str, int], Callable] = {
        ("fit", 0): fit,
        ("query", 0): lambda: curvature.precondition(curvature.gradients(queries)),
    }
    timed |= {("step", b): lambda b=b: lissa(curvature, v, [TIMED], scales[b], b, parameters["seed"]) for b in scales}
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in timed}
    for _ in range(parameters["turns"]):
        for key, act in timed.items():
            began = time.perf_counter()
            act()
            taken[key].append(time.perf_counter() - began)
    parts = {"fit": fitted_on / parameters["sequences"], "query": 1 / len(asked), "step": 1 / (TIMED * len(asked))}
    seconds = [{"part": part, "batch": b, "seconds": median(times) * parts[part]} for (part, b), times in taken.items()]
    pq.write_table(pa.Table.from_pylist(seconds), out / "seconds.parquet")


def _as_far_as_it_converges(
    curvature: GaussNewton, v: torch.Tensor, depths: list[int], batch: int, seed: int
) -> tuple[float, torch.Tensor]:
    """LiSSA's scale and its answers: the largest scale that power iteration calls safe, or half of it, and so on, where a minibatch has a
    larger eigenvalue than those that power iteration saw. Raises UserError where HALVINGS do not help."""
    scale = 1 / top_eigenvalue(curvature, batch, seed=seed, **POWER)
    for _ in range(HALVINGS):
        try:
            return scale, lissa(curvature, v, depths, scale, batch, seed=seed)
        except UserError:
            scale /= 2
    return scale, lissa(curvature, v, depths, scale, batch, seed=seed)
