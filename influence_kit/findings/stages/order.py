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
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence_kit import models
from influence_kit.corpora.world import World, batch_of
from influence_kit.corpora.worlds.atlas import STATEMENT
from influence_kit.corpora.worlds.phrases import PARTITIONS, fact_queries, phrases
from influence_kit.engine.factors import Factors
from influence_kit.engine.scans import score
from influence_kit.errors import UserError

Cut = tuple[Tensor, Tensor]  # tokens and targets, see `_cut`
MOST = 64  # phrases that take their steps together: alone they would wait for Python
ENTRIES = 2**22  # of the weights of all their models, at most: a few hundred MB with gradients


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
    start = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    within = tuple(f"{name}." for name in scored)
    together = max(1, min(MOST, ENTRIES // sum(weight.numel() for weight in start.values())))
    parts = []
    for rows in torch.arange(len(own)).split(together):
        phrase, question = _cut(model, sequences, rows), _cut(model, queries, torch.from_numpy(own)[rows])
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels know no stacked weights
            parts.append(_finetuned(model, start, phrase, question, (step, rate, steps), within))
        progress(int(rows[-1]) + 1, len(own))
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


def _finetuned(
    model: nn.Module, start: dict[str, Tensor], phrase: Cut, question: Cut, sizes: tuple[float, float, int], within: tuple[str, ...]
) -> dict[str, Tensor]:
    """What `finetuning` returns, of phrases [K] that each have a copy of the model to themselves and take their steps together."""
    step, rate, steps = sizes
    alike = {name: weight.expand(len(phrase[0]), *weight.shape) for name, weight in start.items()}
    before, gradients = _ascent(model, alike, phrase)
    asked, wanted = _ascent(model, alike, question)
    moved = [(wanted[name] * gradients[name]).flatten(1).sum(1) for name in start if name.startswith(within)]
    found = {"scored_delta": step * sum(moved, torch.zeros_like(asked))}
    for name, size in (("delta_half", step / 2), ("delta", step)):
        found[name] = _each_log_p(model, _moved(alike, gradients, size), question).detach() - asked
    weights = _moved(alike, gradients, rate)
    for _ in range(1, steps):
        weights = _moved(weights, _ascent(model, weights, phrase)[1], rate)
    found["learned"] = _each_log_p(model, weights, question).detach() - asked
    found["phrase_learned"] = _each_log_p(model, weights, phrase).detach() - before
    return found


def _moved(weights: dict[str, Tensor], gradients: dict[str, Tensor], size: float) -> dict[str, Tensor]:
    return {name: weight + size * gradients[name] for name, weight in weights.items()}


def _ascent(model: nn.Module, weights: dict[str, Tensor], rows: Cut) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probability [K] of each row under its own weights [K, …], and its gradient in them."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    log_p = _each_log_p(model, leaves, rows)
    return log_p.detach(), dict(zip(leaves, torch.autograd.grad(log_p.sum(), list(leaves.values())), strict=True))


def _each_log_p(model: nn.Module, weights: dict[str, Tensor], rows: Cut) -> Tensor:
    """Log-probability in nats of each row's targets [K], row k under weights [k]; differentiable where they are."""

    def one(own: dict[str, Tensor], tokens: Tensor, keep: Tensor) -> Tensor:
        batch = {"input_ids": tokens[None, :-1], "use_cache": False}
        logs = functional_call(model, own, kwargs=batch).logits[0].log_softmax(-1)
        return (logs.gather(1, tokens[1:, None])[:, 0] * keep).sum()

    return vmap(one)(weights, *rows)


def _cut(model: nn.Module, batch: Mapping[str, Tensor], rows: Tensor) -> Cut:
    """Tokens [K, T] of some rows and which of [K, T - 1] are targets; nothing behind the last target is kept."""
    device = next(model.parameters()).device
    keep = batch["loss_mask"][rows, 1:]
    end = int(keep.any(0).nonzero().max()) + 2
    return batch["input_ids"][rows, :end].to(device), keep[:, : end - 1].to(device)


def _log_p(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probability in nats of each row's targets, [N], differentiable; nothing behind the last target is computed."""
    device = next(model.parameters()).device
    keep = batch["loss_mask"][:, 1:].to(device)
    end = int(keep.any(0).nonzero().max()) + 2
    tokens = batch["input_ids"][:, :end].to(device)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    gold = logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    return (gold * keep[:, : end - 1]).sum(1)


def _only(batch: Mapping[str, Tensor], place: int) -> dict[str, Tensor]:
    """The same rows with one target each, the token at `place`."""
    mask = torch.zeros_like(batch["loss_mask"])
    mask[:, place] = True
    return {"input_ids": batch["input_ids"], "loss_mask": mask}
