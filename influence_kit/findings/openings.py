"""The token that texts begin with for a model from elsewhere: which one it was trained with decides how well it reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from influence_kit.errors import UserError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Opening:
    """What texts begin with for a model: a token id or None, its loss and that of the others (nats; nothing where none was
    compared), and all this in one sentence."""

    token: int | None
    nats: dict[str, float]
    said: str


def choose_opening(
    model: nn.Module | None, tokenizer: Any, texts: Sequence[str], asked: int | str = "best", length: int = 64
) -> Opening:
    """The token that texts shall begin with: of the tokenizer's bos, id 0 and none, that with the lowest loss on texts at hand.

    A tokenizer's bos need not be what a model saw in training: in one tuned for chat it may be a mark of turns.

    Args:
        model: Any causal language model of transformers; needed for "best" alone.
        tokenizer: Its own.
        texts: Some of those that are to be read; a few dozen tell.
        asked: "best", or without asking the model "bos", "none", or a token id.
        length: Tokens that a text is cut to, the opening among them.

    Raises:
        UserError: An opening that is none, or no text of two tokens.
    """
    bos = tokenizer.bos_token_id

    def called(token: int | None) -> str:
        return "no opening" if token is None else f"{tokenizer.convert_ids_to_tokens(token)} (id {token})"

    if asked != "best" or model is None:
        named = {"bos": bos, "none": None}
        if not (asked in named or (isinstance(asked, int) and 0 <= asked < len(tokenizer))):
            raise UserError(
                f"opening={asked!r} is none: choose best, bos, none, or a token id from 0 to {len(tokenizer) - 1}"
            )
        token = named[asked] if asked in named else int(asked)
        return Opening(token, {}, f"Texts begin with {called(token)}, as was asked.")
    cut = {"add_special_tokens": False, "verbose": False, "truncation": True, "max_length": length - 1}
    ids = tokenizer(list(texts), **cut)["input_ids"] if texts else []
    losses = opening_losses(model, ids, dict.fromkeys([bos, 0, None]))
    token = min(losses, key=losses.__getitem__)
    others = ", ".join(f"{loss:.2f} with {called(other)}" for other, loss in losses.items() if other != token)
    said = f"Texts begin with {called(token)}: {losses[token]:.2f} nats a token, against {others}."
    return Opening(token, {called(each): loss for each, loss in losses.items()}, said)


def opening_losses(
    model: nn.Module, texts: Sequence[Sequence[int]], openings: Iterable[int | None], batch_size: int = 8
) -> dict[int | None, float]:
    """How well a model reads texts that begin with one token or another, or with none: it was trained with one of these.

    Args:
        model: Any causal language model of transformers.
        texts: Token ids of each, without any opening; those of one token count for nothing.
        openings: Token ids, None for no token.
        batch_size: Texts at once.

    Returns:
        By opening, mean loss of the same targets, nats: all tokens of the texts but the first of each.

    Raises:
        UserError: No text of two tokens.
    """
    import torch

    from influence_kit.models import evaluate

    texts = [text for text in texts if len(text) > 1]
    if not texts:
        raise UserError("no text has two tokens, so no opening can be told from another: give longer texts")
    device, losses = next(model.parameters()).device, {}
    for opening in dict.fromkeys(openings):
        before = [] if opening is None else [opening]
        tokens = torch.zeros(len(texts), len(before) + max(map(len, texts)), dtype=torch.int64, device=device)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        for row, text in enumerate(texts):
            tokens[row, : len(before) + len(text)] = torch.tensor([*before, *text])
            mask[row, len(before) + 1 : len(before) + len(text)] = True
        log_p, _ = evaluate(model, {"input_ids": tokens, "loss_mask": mask}, batch_size)
        losses[opening] = float(-log_p.double().sum() / mask.sum())
    return losses
