"""Scores solved further than EK-FAC beside EK-FAC's own, of the same queries: is a finding the model's, or the estimator's?"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from influence_kit.corpora.world import World, batch_of
from influence_kit.errors import UserError
from influence_kit.findings.common import fraction_of
from influence_kit.findings.profiles import Profile
from influence_kit.findings.trained import Trained, read_scan
from influence_kit.measures.checkpoints import READ

if TYPE_CHECKING:
    import pandas

AFFORDABLE = 32  # the largest width: wider ones were not seen to converge on a thousand sequences
SALT = 0x501E  # of the draw of sequences
CONVERGED = 0.5  # of the equation, left on fresh sequences: more, and scores say nothing
WAYS = ("EK-FAC", "solved further")


def solved(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Solve the directions of some of a scan's queries further (`engine.refine`) and score what the scan scored. Write scores.safetensors
    (values [Q, N] in nats at epsilon = 1, rows [N] and queries [Q], positions in the world's tables) and solves.parquet (query, residual, fresh_residual, iterations).
    A query whose solve does not converge has no scores, nor have those of other kinds at its place; what is left of their equations is nan.

    Args:
        parameters: asked (kinds of queries), queries (how many of each kind, the first of the scan), sequences (solved on, and as many fresh; none of the
            scan's), iterations, and an extra's own.
    """
    import torch
    from safetensors.torch import save_file

    from influence_kit import models
    from influence_kit.engine.factors import Factors
    from influence_kit.engine.refine import Diverges, refine
    from influence_kit.engine.scans import score

    world = World.load(inputs["world"])
    scan = read_scan(inputs["influence"], world.sequences.num_rows)
    kinds = world.queries["kind"].to_numpy(zero_copy_only=False)[scan.queries]
    asked = [np.flatnonzero(kinds == kind)[: parameters["queries"]] for kind in parameters["asked"]]
    places = scan.queries[np.stack([found[: min(map(len, asked))] for found in asked], 1)]  # [place, kind]
    lost: list[int] = []
    unseen = np.setdiff1d(np.arange(world.sequences.num_rows), scan.rows)
    drawn = np.random.default_rng([parameters["seed"], SALT]).permutation(unseen)
    on, fresh = (np.sort(part) for part in np.split(drawn[: 2 * parameters["sequences"]], 2))
    model = models.load(inputs["model"], fraction_of(parameters, inputs, world), parameters["device"])
    factors = Factors.load(inputs["influence"] / "factors.safetensors")
    damping, solve = parameters["damping"], None
    while solve is None:
        queries = np.sort(places.ravel())
        if not len(queries):
            raise UserError(
                f"solved: of no query of the kinds {parameters['asked']} does the solve converge: give more sequences than "
                f"{parameters['sequences']} in the profile, or leave solved out"
            )
        try:
            solve = refine(
                model,
                factors,
                batch_of(world.queries, queries),
                batch_of(world.sequences, on),
                parameters["iterations"],
                others=batch_of(world.sequences, fresh),
                damping=damping,
                preconditioner="ekfac",
                progress=lambda done, to_do: progress(0.9 * done / to_do, 1, "solve"),
            )
        except Diverges as error:
            gone = np.isin(places, queries[error.queries]).any(1)
            lost += places[gone].ravel().tolist()
            places = places[~gone]
    seen = batch_of(world.sequences, scan.rows)
    values = score(
        model, factors, batch_of(world.queries, queries), seen, damping, self_influence=False, refine=solve
    ).values
    tensors = {"values": values, "rows": torch.from_numpy(scan.rows), "queries": torch.from_numpy(queries)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "scores.safetensors")
    left = {name: getattr(solve.about, name).tolist() for name in ("residual", "fresh_residual")}
    nothing = [float("nan")] * len(lost)
    left = {name: values + nothing for name, values in left.items()}
    every = [*queries.tolist(), *lost]
    table = pa.table({"query": every, **left, "iterations": [parameters["iterations"]] * len(every)})
    pq.write_table(table, out / "solves.parquet")


STAGES = {"solved": solved}


def chosen(profile: Profile, world: str) -> dict:
    """Of a world's models, those that are solved further: as `planted_grid` takes it."""
    grid = getattr(profile, world)
    widths = sorted(size.width for size in grid.family.sizes) if grid else []
    affordable = [width for width in widths if width <= AFFORDABLE] or widths[:1]
    return {"widths": affordable, "seeds": profile.few, "extra": ("solved",)}


def beside(runs: Iterable[Trained]) -> dict[str, list[Trained]]:
    """The same models read by EK-FAC's scores and by those solved further, of the queries that both have; none where a
    profile solves no further."""
    able = [run for run in runs if any(kind == "solved" for kind, _ in run.planned.extra)]
    return {way: [run.by("solved", own=way == WAYS[0]) for run in able] for way in WAYS if able}


def unsolved(runs: Iterable[Trained], fraction: float | str = READ) -> pandas.DataFrame:
    """How much of the equation is left on fresh sequences, as a share of the query's gradient: a row a model and query, with
    fresh_residual, iterations, size, seed and arm."""
    import pandas

    tables = []
    for run in runs:
        if any(kind == "solved" for kind, _ in run.planned.extra):
            found = pandas.read_parquet(run.extra("solved", fraction) / "solves.parquet")
            tables.append(found.assign(size=run.parameters, seed=run.seed, arm=run.arm))
    return pandas.concat(tables) if tables else pandas.DataFrame()


def told(runs: Iterable[Trained], fraction: float | str = READ):
    """What is left of the equation by size, and whether that is little enough to believe the scores, as a sentence."""
    from IPython.display import Markdown

    from influence_kit.reading.style import size_label

    table = unsolved(runs, fraction)
    if table.empty:
        return Markdown("")
    medians = table.groupby("size")["fresh_residual"].median()
    parts = ", ".join(f"{value:.2f} at {size_label(size)} weights" for size, value in medians.items())
    good = medians[medians < CONVERGED]
    told = "so scores solved further are to be believed at " + (
        "every size shown"
        if len(good) == len(medians)
        else ", ".join(f"{size_label(size)} weights" for size in good.index)
    )
    lost = int(table["fresh_residual"].isna().sum())
    apart = (
        f" {lost} of {len(table)} queries are left out: their solve, or that of their other form, does not converge."
        if lost
        else ""
    )
    return Markdown(
        f"After {table['iterations'].max()} iterations, of the equation of the median of {len(table)} queries (all models and seeds) {parts} is left on other sequences; "
        + (
            f"{told}."
            if len(good)
            else f"at none less than {CONVERGED:g}: these scores have not converged, and say nothing."
        )
        + apart
    )
