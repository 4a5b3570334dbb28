"""Training again without what is most influential on a query, by influence, and what all queries then answer."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from influence_kit import models
from influence_kit.corpora.world import World, batch_of
from influence_kit.errors import UserError
from influence_kit.pipeline.stages import tuples

APART = 1000  # between the seeds of repeated trainings, as in `bank`


def left_out(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """For some scored queries and each of some counts, replace that many of the most influential sequences in place and train again,
    in the same order; write left_out.safetensors: log_p [K, C, R, Q] (nats, of the scored queries, for each of R training seeds, the
    model's own first), whole [R, Q] (the same after training on everything), predicted [K, C, Q] (nats, what influence foretells of
    such a change), asked int64 [K] (which of the Q queries it was done for), counts int64 [C].

    parameters: model (those of the stage that trained it), queries, counts, repeats, seed, and an extra's own. Sequences that stand in
    are among the half of the scan with the weakest influence on the query. Each answer is kept as soon as it is there.
    """
    world, trained = World.load(inputs["world"]), parameters["model"]
    recipe = replace(models.Recipe(**tuples(trained["recipe"])), checkpoints=(1.0,), evaluations=1)
    size = (trained["width"], trained["depth"])
    config = models.configure(trained["architecture"], world.vocabulary_size, *size, world.context)
    sequences, held_out = batch_of(world.sequences), batch_of(world.held_out)
    scan = load_file(inputs["influence"] / "scores.safetensors")
    values, rows = scan["values"].double().numpy(), scan["rows"].numpy()
    queries = batch_of(world.queries, scan["queries"].numpy())
    asked = np.linspace(0, len(values) - 1, min(parameters["queries"], len(values))).astype(int)
    kept = out / "resume"
    kept.mkdir(parents=True, exist_ok=True)
    repeats, total = range(parameters["repeats"]), (1 + len(asked) * len(parameters["counts"])) * parameters["repeats"]

    def answers(name: str, order: np.ndarray) -> torch.Tensor:
        """log_p [R, Q] after training on the corpus' sequences in this order."""
        found = []
        for repeat in repeats:
            path, folder = kept / f"{name}-{repeat}.safetensors", kept / f"{name}-{repeat}"
            if not path.exists():
                folder.mkdir(exist_ok=True)
                changed = {column: tensor[torch.from_numpy(order)] for column, tensor in sequences.items()}
                again = replace(recipe, seed=recipe.seed + APART * repeat)
                models.train(config, changed, held_out, again, folder, device=parameters["device"])
                log_p, _ = models.evaluate(models.load(folder, 1.0), queries)
                temporary = path.with_suffix(".part")
                save_file({"log_p": log_p.contiguous()}, temporary)
                temporary.replace(path)
                shutil.rmtree(folder)
            found.append(load_file(path)["log_p"])
            progress(len(list(kept.glob("*.safetensors"))), total, "retrained models")
        return torch.stack(found)

    order = np.arange(world.sequences.num_rows)
    whole, log_p, predicted = answers("whole", order), [], []
    for query in asked:
        for count in parameters["counts"]:
            gone, instead = stand_ins(values[query], count, parameters["seed"])
            changed = order.copy()
            changed[rows[gone]] = rows[instead]
            log_p.append(answers(f"{query:04}-{count}", changed))
            predicted.append(torch.from_numpy((values[:, instead].sum(1) - values[:, gone].sum(1)) / len(order)))
    shape = (len(asked), len(parameters["counts"]))
    tensors = {"log_p": torch.stack(log_p).unflatten(0, shape), "whole": whole, "predicted": torch.stack(predicted).unflatten(0, shape)}
    tensors |= {"asked": torch.from_numpy(asked), "counts": torch.tensor(parameters["counts"])}
    save_file(tensors, out / "left_out.safetensors")


def stand_ins(values: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the `count` highest of a query's scores [N], and of as many that stand in for them: drawn from the
    half with the smallest absolute values. Raises UserError where half of N is fewer."""
    if not 1 <= count <= len(values) // 2:
        raise UserError(f"{count} sequences cannot be left out of {len(values)}: give a count between 1 and half of them")
    gone = np.argsort(-values, kind="stable")[:count]
    weak = np.setdiff1d(np.argsort(np.abs(values), kind="stable")[: len(values) // 2], gone)
    return gone, np.random.default_rng([seed, 0x1E07, count]).choice(weak, count, replace=len(weak) < count)
