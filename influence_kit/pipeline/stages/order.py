"""Phrases about Atlas's facts, forward and flipped: their influence, and what one finetuning step on each really does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from influence_kit import models
from influence_kit.corpora.atlas import STATEMENT
from influence_kit.corpora.phrases import PARTITIONS, fact_queries, phrases
from influence_kit.corpora.world import World, batch_of
from influence_kit.errors import UserError
from influence_kit.factors import Factors
from influence_kit.scoring import score


def order(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Score every phrase for its query, and measure what finetuning on it does to the query's log-probability.

    parameters: fraction, seed, device, damping; queries (of each of two kinds: facts stated in the query's language, and
    facts never stated in it), instances (phrases a partition), step (learning rate of one small step, on the phrase's
    summed loss), rate and steps (of `steps` larger ones).
    Writes order.parquet, a row for each query, partition and instance: query (position in the world's table), partition,
    instance; seen (whether training states the fact in the query's language); log_p (nats, the query's); word_log_p (nats,
    of the last word in the phrase: for a flipped one the entity, so whether the model knows the fact that way round);
    influence (nats at epsilon = 1), relatif; and what `finetuning` measured: delta_half, delta, scored_delta, learned,
    phrase_learned (nats).
    """
    world = World.load(inputs["world"])
    model = models.load(inputs["model"], parameters["fraction"], parameters["device"])
    factors = Factors.load(inputs["influence"] / "factors.safetensors")
    rng = np.random.default_rng([parameters["seed"], 0x0DE2])
    kinds = [np.sort(rng.permutation(fact_queries(world, seen))[: parameters["queries"]]) for seen in (True, False)]
    asked = np.concatenate(kinds)
    if not len(asked):
        raise UserError(
            f"there is no fact query to make phrases for: queries={parameters['queries']!r} must be 1 or more"
        )
    table = phrases(world, asked, parameters["instances"], parameters["seed"])
    own = np.repeat(np.arange(len(asked)), len(PARTITIONS) * parameters["instances"])
    queries, sequences = batch_of(world.queries, asked), batch_of(table)
    scores = score(
        model, factors, queries, sequences, parameters["damping"], batch_size=256, corpus_size=world.sequences.num_rows
    )
    model = copy.deepcopy(model).double()
    effects = finetuning(
        model,
        queries,
        sequences,
        own,
        parameters["step"],
        parameters["rate"],
        parameters["steps"],
        tuple(factors.layers),
        lambda done, to_do: progress(done, to_do, "finetuning"),
    )
    columns: dict[str, object] = {name: table[name] for name in ("query", "partition", "instance")}
    columns |= {"seen": own < len(kinds[0]), "log_p": _log_p(model, queries).detach().cpu().numpy()[own]}
    columns["word_log_p"] = _log_p(model, _only(sequences, STATEMENT)).detach().cpu().numpy()
    columns["influence"] = scores.values.numpy()[own, np.arange(len(own))]
    columns["relatif"] = scores.relatif.numpy()[own, np.arange(len(own))]
    pq.write_table(pa.table({**columns, **effects}), out / "order.parquet")


def finetuning(
    model: nn.Module,
    queries: Mapping[str, Tensor],
    sequences: Mapping[str, Tensor],
    own: np.ndarray,
    step: float,
    rate: float,
    steps: int,
    scored: tuple[str, ...] = (),
    progress: Callable[[int, int], None] = lambda done, to_do: None,
) -> dict[str, np.ndarray]:
    """Changes of log p in nats when the model is finetuned on one sequence alone; it is the same model for each, and left as it was.

    A step is plain gradient descent on the sequence's summed loss, over all weights. One small step changes log p by the
    learning rate times the dot product of gradients, so it says what the sequence does locally; many larger ones end where
    the model knows the sequence.

    scored: names of the layers that influence is computed from. own [N]: the query (row of `queries`) each sequence is
    about. Returns, each [N]: delta and delta_half, the query's change after one step of size `step` and of half of it
    (delta = 2 delta_half where the response is linear); scored_delta, to first order in `step`, if only the weights of the
    scored layers moved; learned, the query's change after `steps` steps of size `rate`, and phrase_learned, the sequence's
    own.

    Raises UserError for a step, rate or number of steps that is not positive. float64 models keep small changes exact.
    """
    for name, size in (("step", step), ("rate", rate), ("steps", steps)):
        if not size > 0:
            raise UserError(f"{name}={size!r} must be above 0")
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    within = tuple(f"{name}." for name in scored)
    kept = [name.startswith(within) for name, weight in model.named_parameters() if weight.requires_grad]
    before = [weight.detach().clone() for weight in weights]
    found = {name: np.zeros(len(own)) for name in ("delta_half", "delta", "scored_delta", "learned", "phrase_learned")}
    asked = _log_p(model, queries).detach().cpu().numpy()

    def move(start: list[Tensor], gradients: tuple[Tensor, ...], size: float) -> None:
        with torch.no_grad():
            for weight, old, gradient in zip(weights, start, gradients, strict=True):
                weight.copy_(old - size * gradient)

    def descend(row: dict[str, Tensor]) -> tuple[float, tuple[Tensor, ...]]:
        loss = -_log_p(model, row).sum()
        return float(loss.detach()), torch.autograd.grad(loss, weights)

    about, wanted = -1, tuple[Tensor, ...]()  # the query last met, and its gradients
    for n, query in enumerate(own.tolist()):
        row, question = _row(sequences, n), _row(queries, query)
        if query != about:
            about, wanted = query, descend(question)[1]
        loss, gradients = descend(row)
        pairs = zip(wanted, gradients, kept, strict=True)
        found["scored_delta"][n] = step * sum(float((q * g).sum()) for q, g, keep in pairs if keep)
        for name, size in (("delta_half", step / 2), ("delta", step)):
            move(before, gradients, size)
            with torch.no_grad():
                found[name][n] = float(_log_p(model, question)) - asked[query]
        move(before, gradients, rate)
        for _ in range(1, steps):
            move([weight.detach() for weight in weights], descend(row)[1], rate)
        with torch.no_grad():
            found["learned"][n] = float(_log_p(model, question)) - asked[query]
            found["phrase_learned"][n] = float(_log_p(model, row)) + loss
        if (n + 1) % 100 == 0 or n + 1 == len(own):
            progress(n + 1, len(own))
        move(before, gradients, 0.0)
    return found


def _log_p(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probability in nats of each row's targets, [N], differentiable; nothing behind the last target is computed."""
    device = next(model.parameters()).device
    keep = batch["loss_mask"][:, 1:].to(device)
    end = int(keep.any(0).nonzero().max()) + 2
    tokens = batch["input_ids"][:, :end].to(device)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    gold = logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    return (gold * keep[:, : end - 1]).sum(1)


def _row(batch: Mapping[str, Tensor], n: int) -> dict[str, Tensor]:
    return {name: tensor[n : n + 1] for name, tensor in batch.items()}


def _only(batch: Mapping[str, Tensor], place: int) -> dict[str, Tensor]:
    """The same rows with one target each, the token at `place`."""
    mask = torch.zeros_like(batch["loss_mask"])
    mask[:, place] = True
    return {"input_ids": batch["input_ids"], "loss_mask": mask}
