"""Training again with what is most influential on a query left out, or put in twice, and what all queries then answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from influence_kit.corpora.world import World, batch_of
from influence_kit.errors import UserError
from influence_kit.findings.stages.retrained import retrained

WAYS = ("out", "in")


def reweighted(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """For some scored queries and each of some counts, change the weight of that many of the most influential sequences and train again,
    in the same order: *out*, weak sequences stand in their places; *in*, they stand in the places of those weak ones too.

    Writes reweighted.safetensors: log_p [2, K, C, R, Q] (nats, of the scored queries, out and in, for each of R training seeds, the
    model's own first), whole [R, Q] (the same after training on the corpus as it is), predicted [2, K, C, Q] (nats, what influence
    foretells of such a change), asked int64 [K] (which of the Q queries it was done for), counts int64 [C].

    parameters: model (those of the stage that trained it), queries, counts, repeats, seed, and an extra's own. Weak sequences are drawn
    from the half of the scan with the least influence on the query.
    """
    world = World.load(inputs["world"])
    scan = load_file(inputs["influence"] / "scores.safetensors")
    values, rows = scan["values"].double().numpy(), scan["rows"].numpy()
    queries = batch_of(world.queries, scan["queries"].numpy())
    asked, counts = np.linspace(0, len(values) - 1, min(parameters["queries"], len(values))).astype(int), parameters["counts"]
    whole = np.arange(world.sequences.num_rows)
    corpora, predicted = [whole], []
    for way in WAYS:
        for query in asked:
            for count in counts:
                strong, weak = strongest_and_weak(values[query], count, parameters["seed"])
                lost, instead = (strong, weak) if way == "out" else (weak, strong)
                changed = whole.copy()
                changed[rows[lost]] = rows[instead]
                corpora.append(changed)
                predicted.append(torch.from_numpy((values[:, instead].sum(1) - values[:, lost].sum(1)) / len(whole)))
    log_p = retrained(parameters["model"], world, corpora, parameters["repeats"], queries, out / "resume", progress)
    shape = (len(WAYS), len(asked), len(counts))
    tensors = {"log_p": log_p[1:].unflatten(0, shape).contiguous(), "whole": log_p[0].clone(), "predicted": torch.stack(predicted).unflatten(0, shape)}
    save_file({**tensors, "asked": torch.from_numpy(asked), "counts": torch.tensor(counts)}, out / "reweighted.safetensors")


def strongest_and_weak(values: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the `count` highest of a query's scores [N], and of as many weak ones: drawn from the N / 2 of the others with the smallest
    absolute values. Raises UserError where half of N is fewer."""
    if not 1 <= count <= len(values) // 2:
        raise UserError(f"{count} sequences cannot be left out of {len(values)}: give a count between 1 and half of them")
    strong = np.argsort(-values, kind="stable")[:count]
    order = np.argsort(np.abs(values), kind="stable")
    weak = np.sort(order[~np.isin(order, strong)][: len(values) // 2])
    return strong, np.random.default_rng([seed, 0x1E07, count]).choice(weak, count, replace=False)
