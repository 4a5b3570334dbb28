"""Proximal Bregman responses of a small model to some of its training sequences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from influence_kit.corpora.world import World
from influence_kit.engine.sequences import count
from influence_kit.findings.stages.influence import scored_queries
from influence_kit.findings.stages.rivals import scored, setting_of
from influence_kit.referees.pbrf import ProximalResponse, Response, Unconverged


def response(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Solve for the response to one more copy, in the whole corpus, of each of some sequences: half of them those that EK-FAC calls the most
    influential on some query, half at random. Write response.safetensors: log_p [M, Q] (nats at eps = 1), places int64 [M]
    (columns of the rivals' scores), queries int64 [Q]; solved.parquet: place, gradient (left of it), evaluations.

    parameters: those of `rivals`, of which it needs the same sample; responses (M), tolerance, and an extra's own.
    A response that does not converge is none: nan, and what was left of its gradient says so. Each is kept as soon as it is there.
    """
    world = World.load(inputs["world"])
    setting = setting_of(world, parameters, inputs["model"], out / "resume" / "factors.safetensors")
    places = chosen(setting.score(setting.fit()).values, parameters["responses"], parameters["seed"])
    solver = ProximalResponse(setting.model, setting.fit(), setting.sample, setting.damping)
    found = []
    for number, place in enumerate(places):
        path = out / "resume" / f"{number:04}.safetensors"
        if not path.exists():
            sequence = {name: tensor[place : place + 1] for name, tensor in setting.sequences.items()}
            one = responded(solver, sequence, setting.queries, 1 / world.sequences.num_rows, parameters["tolerance"])
            about = torch.tensor([one.gradient, float(one.evaluations)], dtype=torch.float64)
            save_file({"log_p": one.log_p.contiguous(), "about": about}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        found.append(load_file(path))
        progress(number + 1, len(places), "responses")
    tensors = {"log_p": torch.stack([each["log_p"] for each in found]), "places": torch.from_numpy(places)}
    save_file({**tensors, "queries": torch.from_numpy(scored_queries(world))}, out / "response.safetensors")
    left, evaluations = (np.array([float(each["about"][i]) for each in found]) for i in (0, 1))
    columns = {"place": places, "row": scored(world, parameters)[places], "gradient": left, "evaluations": evaluations}
    pq.write_table(pa.table(columns), out / "solved.parquet")


def responded(
    solver: ProximalResponse, sequence: dict, queries: Mapping[str, torch.Tensor], eps: float, tolerance: float
) -> Response:
    """The response to one sequence; of nan where it does not converge."""
    try:
        return solver.respond(sequence, queries, eps, tolerance)
    except Unconverged as refused:
        nothing = torch.full((count(queries),), torch.nan, dtype=torch.float64)
        return Response(nothing, refused.gradient, refused.evaluations)


def chosen(scores: torch.Tensor, number: int, seed: int) -> np.ndarray:
    """Columns int64 [number] of scores [Q, N]: for a half of them, queries in turn and the largest |score| that is not taken yet,
    the rest at random."""
    order, taken = scores.abs().argsort(dim=1, descending=True, stable=True).numpy(), []
    for turn in range(number // 2):
        row = order[turn % len(order)]
        taken.append(next(int(place) for place in row if place not in taken))
    rest = np.setdiff1d(np.arange(scores.shape[1]), taken)
    more = np.random.default_rng([seed, 0x9B2F]).permutation(rest)[: number - len(taken)]
    return np.sort(np.concatenate([np.array(taken, dtype=np.int64), more]))
