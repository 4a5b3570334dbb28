"""What a model says after it is finetuned on one sequence alone: the truth that influence foretells.

Every sequence has a copy of the model to itself. Copies of little models take their steps together, their weights
stacked: alone they would wait for Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from influence_kit.errors import UserError

Cut = tuple[Tensor, Tensor]  # tokens and targets, see `_cut`
MOST = 64  # sequences that take their steps together
ENTRIES = 2**22  # of the weights of all their models, at most: a few hundred MB with gradients


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
    """Changes of log p in nats when a model, the same for each and left as it was, is finetuned on one sequence alone.

    A step is plain gradient descent on the sequence's summed loss, over all weights. One small step changes log p by
    the learning rate times the dot product of gradients, so it says what the sequence does locally; many larger ones
    end where the model knows the sequence.

    Args:
        model: A causal LM; in float64 small changes stay exact.
        queries: `input_ids` int64 [Q, T], `loss_mask` bool [Q, T].
        sequences: The same of N sequences.
        own: The query (row of `queries`) each sequence is about, int64 [N].
        step: Size of the one small step.
        rate: Size of the larger steps.
        steps: Number of the larger steps.
        scored: Names of the layers that influence is computed from.
        progress: Called with the number of sequences done, and of all.

    Returns:
        Each [N], nats: `delta` and `delta_half`, the query's change after one step of size `step` and of half of it
        (delta = 2 delta_half where the response is linear); `scored_delta`, to first order in `step`, if only the
        weights of the scored layers moved; `learned`, the query's change after the larger steps, and `phrase_learned`,
        the sequence's own.

    Raises:
        UserError: A step, rate or number of steps that is not positive.

    Cost: `steps` + 2 backward passes and 4 forward passes a sequence.
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


def log_p(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probability in nats of each row's targets [N], in the model's own precision and differentiable."""
    tokens, keep = _cut(model, batch, torch.arange(len(batch["input_ids"])))
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    gold = logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
    return (gold * keep).sum(1)


def _finetuned(
    model: nn.Module,
    start: dict[str, Tensor],
    phrase: Cut,
    question: Cut,
    sizes: tuple[float, float, int],
    within: tuple[str, ...],
) -> dict[str, Tensor]:
    """What `finetuning` returns, of sequences [K] that take their steps together."""
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
    told = _each_log_p(model, leaves, rows)
    return told.detach(), dict(zip(leaves, torch.autograd.grad(told.sum(), list(leaves.values())), strict=True))


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
