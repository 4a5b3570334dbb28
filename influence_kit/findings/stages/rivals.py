"""Scores of EK-FAC and its rivals for one checkpoint, and what each cost."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from influence_kit import models
from influence_kit.corpora.world import World, batch_of
from influence_kit.engine.factors import Factors
from influence_kit.findings.stages import tuples
from influence_kit.findings.stages.influence import scan_rows, scored_queries
from influence_kit.recipes import schedule
from influence_kit.referees.rivals import Method, Setting, damping_sweep, methods_for, variants

SALT = 0x217A


def rivals(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Write scores.safetensors: one tensor [Q, N] a method, numbered as in methods.json (a list of names), rows [N] and
    queries [Q] (positions in the world's tables); and seconds.parquet (method, seconds: of everything the method does, on the
    machine at hand; the only numbers here that do not repeat).

    parameters: sample (sequences that curvature is taken from), sequences (scored; a world's own `scan` column goes first),
    exact (also solve with the Gauss-Newton matrix itself), dampings, fits, fractions (of training: EK-FAC's variants),
    lissa (depth, minibatch), tracin (fractions of training), model (of the stage that trained it), and an extra's own.
    """
    world = World.load(inputs["world"])
    setting = setting_of(world, parameters, inputs["model"], out / "resume" / "factors.safetensors")
    rows, asked = scored(world, parameters), scored_queries(world)
    methods: dict[str, Method] = methods_for(setting.model, parameters["exact"])
    methods |= damping_sweep(tuple(parameters.get("dampings", ())))
    methods |= variants(tuple(parameters.get("fits", ())), tuple(parameters.get("fractions", ())))
    kept, seconds = out / "resume", []
    for number, (name, method) in enumerate(methods.items()):
        path = kept / f"{number:03}.safetensors"
        if not path.exists():
            began = time.perf_counter()
            values = method(setting)
            taken = torch.tensor(time.perf_counter() - began)
            save_file({"values": values.cpu().float().contiguous(), "seconds": taken}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        progress(number + 1, len(methods), name)
    found = {f"{number:03}": load_file(kept / f"{number:03}.safetensors") for number in range(len(methods))}
    tensors = {number: each["values"] for number, each in found.items()}
    tensors |= {"rows": torch.from_numpy(rows), "queries": torch.from_numpy(asked)}
    save_file(tensors, out / "scores.safetensors")
    (out / "methods.json").write_text(json.dumps(list(methods)))
    seconds = [float(each["seconds"]) for each in found.values()]
    pq.write_table(pa.table({"method": list(methods), "seconds": seconds}), out / "seconds.parquet")


def written(folder: Path) -> dict[str, np.ndarray]:
    """Scores [Q, N] by method, of a folder that `rivals` wrote."""
    tensors = load_file(folder / "scores.safetensors")
    names = json.loads((folder / "methods.json").read_text())
    return {name: tensors[f"{number:03}"].numpy() for number, name in enumerate(names)}


def scored(world: World, parameters: dict) -> np.ndarray:
    """Positions of the sequences to score."""
    return scan_rows(world, parameters["sequences"], np.random.default_rng([parameters["seed"], SALT]))


def setting_of(world: World, parameters: dict, trained: Path, kept: Path) -> Setting:
    """What methods get, the same for all stages that are told the same parameters; EK-FAC's factors are kept at `kept`."""
    rng = np.random.default_rng([parameters["seed"], SALT, 1])
    sample = batch_of(world.sequences, np.sort(rng.permutation(world.sequences.num_rows)[: parameters["sample"]]))
    recipe = models.Recipe(**tuples(parameters["model"]["recipe"]))
    steps = models.steps_of(world.sequences.num_rows, recipe)
    rates = [
        (at, recipe.learning_rate * schedule(min(round(at * steps), steps - 1), steps, recipe.warmup_steps))
        for at in parameters.get("tracin", [1.0])
    ]
    plain = {"damping": parameters["damping"], "layers": parameters["layers"], "seed": parameters["seed"]}
    setting = Setting(
        lambda at: models.load(trained, at, parameters["device"]),
        batch_of(world.queries, scored_queries(world)),
        batch_of(world.sequences, scored(world, parameters)),
        sample,
        **plain,
        corpus_size=world.sequences.num_rows,
        checkpoints=tuple(rates),
        **{name: parameters["lissa"][name] for name in ("depth", "minibatch") if "lissa" in parameters},
    )
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        setting.fit().save(kept)
    return replace(setting, factors=Factors.load(kept))
