"""One pass forward and back over a batch: every tracked layer's token gradients, in pieces that memory has room for.

What a pass holds grows with its tokens, times the widths of all linear maps, and times the vocabulary. Both are cut:

    sequences   no more at a time than have activations of `Room.activations` bytes
    logits      where a piece's are more than `Room.logits` numbers, the model runs without its head; head, labels, loss and the
                loss's gradient with respect to the head's input are then taken for some targets at a time. Models that do
                something to their head's output (scale it, cap it) are run whole instead, by fewer sequences.

Below these limits nothing is cut. A batch's own token gradients are bounded by `rows_within`, which those who read batches ask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .gradients import Recorder, TokenGradients, device_of, dtype_of, forward, sequence_losses, widened
from .layers import is_linear_map, shape_of
from .sequences import Batch, batch_rows

# What autograd keeps of a token, in numbers, over the widths M + P of all linear maps but the head: .9 seen in Llama and
# GPT-NeoX, 1.7 in GPT-2, whose activation function is made of eight.
KEPT = 1.5
# Labels to be predicted: int64 [B, T], None for the tokens themselves, or drawn from the logits [n, V] at places [n] of [B L].
Labels = Tensor | Callable[[Tensor, Tensor], Tensor] | None


class Room(NamedTuple):
    """What a pass may hold: bytes of a batch's token gradients and of a piece's activations, numbers of logits."""

    gradients: int
    activations: int
    logits: int


CPU_ROOM = Room(1 << 28, 1 << 29, 1 << 22)


@cache
def room(device: torch.device) -> Room:
    """On a GPU, which needs many tokens at a time to be busy, a share of its memory."""
    if device.type != "cuda":
        return CPU_ROOM
    memory = torch.cuda.get_device_properties(device).total_memory
    return Room(memory // 8, memory // 4, 1 << 28)


def rows_within(model: nn.Module, layers: Iterable[str], tokens: int, batch_size: int) -> int:
    """How many of `batch_size` sequences of so many tokens are read at a time, so that their token gradients fit.

    Args:
        model: Says where and in which dtype they are.
        layers: Names of the tracked ones.
        tokens: T of a sequence.
        batch_size: At most.
    """
    modules, most = dict(model.named_modules()), room(device_of(model))
    each = (tokens - 1) * sum(sum(shape_of(modules[name])) for name in layers) * dtype_of(model).itemsize
    rows = max(min(batch_size, most.gradients // max(each, 1)), 1)
    piece = max(int(most.activations // (max(tokens - 1, 1) * costs_of(model).token)), 1)
    return rows if rows < piece else rows // piece * piece  # no piece for a remainder


@dataclass(frozen=True)
class Costs:
    """What a token's activations take in bytes; the head, where there is one, and the size of the vocabulary."""

    token: float
    head: nn.Module | None
    vocabulary: int


def sequence_gradients(
    model: nn.Module, recorder: Recorder, batch: Batch, labels: Labels = None
) -> tuple[dict[str, TokenGradients], Tensor]:
    """Token gradients of every tracked layer, and the labels.

    Args:
        model: Frozen (`gradients.frozen`).
        recorder: Of the tracked layers, entered.
        batch: B sequences, L positions.
        labels: What is to be predicted: int64 [B, T], None for the tokens themselves, or a function from logits [n, V] and
            their places int64 [n] in the flat [B L] to labels int64 [n] (drawn from the model).

    Returns:
        By layer a [B, L, M] and g [B, L, P]; and the labels int64 [B, T]. Drawn ones may keep the token where no target is.

    Cost: a forward pass and a backward pass to the first tracked layer. Memory: the token gradients themselves, and what
    the module's first lines say.
    """
    if recorder.costs is None:
        recorder.costs = costs_of(model)
    costs, most = recorder.costs, room(batch.tokens.device)
    rows = max(int(most.activations // (batch.length * costs.token)), 1)  # type: ignore[attr-defined]
    cut = costs.vocabulary * batch.length * min(rows, len(batch.tokens)) > most.logits  # type: ignore[attr-defined]
    if cut:
        if recorder.plain is None:
            recorder.plain = is_plain(model, costs.head, batch)  # type: ignore[attr-defined]
            recorder.forget()
        if not recorder.plain:
            rows, cut = max(most.logits // (costs.vocabulary * batch.length), 1), False  # type: ignore[attr-defined]
    one = (lambda *given: _by_parts(costs.head, *given)) if cut else _whole  # type: ignore[attr-defined]
    if rows >= len(batch.tokens):
        return one(model, recorder, batch, labels)
    together: dict[str, TokenGradients] = {}
    answers = []
    for some in batch_rows(len(batch.tokens), rows):
        piece = Batch(batch.tokens[some], batch.loss_mask[some], batch.length)
        found, told = one(model, recorder, piece, _labels_of(labels, some, batch.length))
        answers.append(told)
        if not together:
            inputs = {id(a): a.new_empty(len(batch.tokens), *a.shape[1:]) for a, _, _ in found.values()}
            together = {
                name: TokenGradients(inputs[id(a)], g.new_empty(len(batch.tokens), *g.shape[1:]), bias)
                for name, (a, g, bias) in found.items()
            }
        for name, (a, g, _) in found.items():
            together[name].inputs[some], together[name].outputs[some] = a, g
    return together, torch.cat(answers)


def _labels_of(labels: Labels, some: slice, length: int) -> Labels:
    """Those of some sequences."""
    if not callable(labels):
        return None if labels is None else labels[some]
    return lambda logits, places: labels(logits, places + some.start * length)


def costs_of(model: nn.Module) -> Costs:
    """What a pass of this model costs."""
    embeddings = getattr(model, "get_output_embeddings", None)
    head = embeddings() if embeddings is not None else None
    if head is not None and not is_linear_map(head):
        head = None
    maps = [module for module in model.modules() if is_linear_map(module) and module is not head]
    token = KEPT * sum(sum(shape_of(module)) for module in maps) * dtype_of(model).itemsize
    return Costs(max(token, 1), head, 0 if head is None else shape_of(head)[0])


def _whole(
    model: nn.Module, recorder: Recorder, batch: Batch, labels: Labels
) -> tuple[dict[str, TokenGradients], Tensor]:
    """All logits at once."""
    end = batch.length
    logits = forward(model, batch.tokens[:, :end])
    if callable(labels):
        places = torch.arange(logits[..., 0].numel(), device=logits.device)
        drawn = labels(logits.detach().flatten(0, 1), places).view(logits.shape[:2])
        labels = batch.tokens.clone()
        labels[:, 1 : end + 1] = drawn.to(labels.device)
    elif labels is None:
        labels = batch.tokens
    losses = sequence_losses(logits, labels[:, 1 : end + 1], batch.loss_mask[:, 1 : end + 1])
    return recorder.gradients(losses.sum(), (len(batch.tokens), end)), labels


def _by_parts(
    head: nn.Module, model: nn.Module, recorder: Recorder, batch: Batch, labels: Labels
) -> tuple[dict[str, TokenGradients], Tensor]:
    """Logits of some targets at a time, from what the head would have been given."""
    end = batch.length
    hidden = before_head(model, head, batch.tokens[:, :end]).flatten(0, -2)  # [B L, H]
    told = (batch.tokens if labels is None or callable(labels) else labels).clone()
    targets, wanted = told[:, 1 : end + 1].clone().flatten(), batch.loss_mask[:, 1 : end + 1].flatten()
    gradient, step = torch.zeros_like(hidden), max(room(hidden.device).logits // 2 // shape_of(head)[0], 1)
    for places in wanted.nonzero().flatten().to(hidden.device).split(step):
        x = hidden.detach()[places].requires_grad_()
        logits = head(x)
        if callable(labels):
            targets[places.to(targets.device)] = labels(widened(logits.detach()), places).to(targets.device)
        aims = targets[places.to(targets.device)].to(logits.device)[:, None]
        # The loss's gradient with respect to the logits, softmax - one-hot, without all that cross_entropy keeps for it.
        apart = widened(logits.detach()).softmax(-1)
        apart.scatter_add_(1, aims, apart.new_full((1, 1), -1.0).expand_as(aims))
        gradient[places] = torch.autograd.grad(logits, x, apart.to(logits.dtype))[0].to(gradient)
        del logits, apart
    told[:, 1 : end + 1] = targets.view(-1, end)
    return recorder.gradients((hidden * gradient).sum(), (len(batch.tokens), end)), told


def before_head(model: nn.Module, head: nn.Module, tokens: Tensor) -> Tensor:
    """What the head would be given for tokens [B, L], [B, L, H] or [B L, H]; it multiplies nothing."""
    given: list[Tensor] = []

    def keep(module, arguments):
        given.append(arguments[0])
        return (arguments[0][..., :0, :],)

    handle = head.register_forward_pre_hook(keep)
    try:
        forward(model, tokens)
    finally:
        handle.remove()
    return given[0]


def is_plain(model: nn.Module, head: nn.Module, batch: Batch) -> bool:
    """Whether the model's logits are its head's output as it is: asked with one sequence."""
    seen = []
    handle = head.register_forward_hook(lambda module, arguments, output: seen.append((len(arguments), output)))
    try:
        with torch.no_grad():
            logits = forward(model, batch.tokens[:1, : batch.length])
    finally:
        handle.remove()
    return len(seen) == 1 and seen[0][0] == 1 and torch.equal(widened(seen[0][1]), logits)
