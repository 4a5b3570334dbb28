"""Influence by block of the model: what each transformer block adds to the scores of a scan."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import from_numpy

from influence_kit import models
from influence_kit.corpora.world import World, batch_of
from influence_kit.engine.factors import Factors
from influence_kit.engine.scans import score
from influence_kit.errors import UserError
from influence_kit.findings.stages.written import write_scores


def layers(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Score the scan again, by layer; write scores.safetensors as `influence` does, with layer_values [Q, N, B] by block.

    parameters: fraction, seed, device, damping; sequences (at most so many of the scan's, 0 for all of them).
    """
    world = World.load(inputs["world"])
    model = models.load(inputs["model"], parameters["fraction"], parameters["device"])
    factors = Factors.load(inputs["influence"] / "factors.safetensors")
    scan = load_file(inputs["influence"] / "scores.safetensors")
    rows, queries = scan["rows"], scan["queries"].numpy()
    if limit := parameters.get("sequences", 0):
        generator = torch.Generator().manual_seed(parameters["seed"])
        rows = rows[torch.randperm(len(rows), generator=generator)[:limit].sort().values]
    scores = score(
        model,
        factors,
        batch_of(world.queries, queries),
        batch_of(world.sequences, rows.numpy()),
        parameters["damping"],
        by_layer=True,
        corpus_size=world.sequences.num_rows,
        resume=out / "resume",
        progress=lambda done, to_do: progress(done / to_do, 1, "scan by layer"),
    )
    assert scores.by_layer is not None
    place = from_numpy(blocks(scores.layers))
    summed = scores.by_layer.new_zeros(*scores.values.shape, int(place.max()) + 1).index_add_(2, place, scores.by_layer)
    write_scores(out, replace(scores, by_layer=summed), rows.numpy(), queries)


def blocks(names: Iterable[str]) -> np.ndarray:
    """The transformer block of each layer, int64 [L], counted from 0 in the order of the numbers in their names.

    Raises UserError for a layer that belongs to no numbered block.
    """
    numbers = []
    for name in names:
        found = re.search(r"\.(\d+)\.", name)
        if found is None:
            raise UserError(
                f"layer {name!r} has no block number in its name: scan layers of blocks only, such as 'mlp'"
            )
        numbers.append(int(found[1]))
    return np.unique(numbers, return_inverse=True)[1].astype(np.int64)
