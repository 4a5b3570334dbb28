"""A reader's own model and texts, tried before the minutes that a chapter's stages take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from influence_kit.corpora.texts.own import model_source, own_world
from influence_kit.errors import UserError, first_line

PARAMETERS = ("model", "texts", "prompt", "completion", "length", "limit")


def check_own(given: Mapping[str, object]) -> bool:
    """Whether a chapter is given a model or texts of the user's own, which could then be read, and be tracked.

    Raises:
        UserError: They cannot.
    """
    own = {name: given[name] for name in PARAMETERS if name in given}
    if not any(own.get(name) for name in ("model", "texts", "completion")):
        return False
    own_world(**{"model": "", "texts": "", "prompt": "", "completion": ""} | own)  # type: ignore[arg-type]
    source = model_source(str(own["model"]))
    if Path(source).is_dir():  # what is on a hub is fetched once it is needed
        from influence_kit.engine.layers import tracked_layers
        from influence_kit.models import load_pretrained

        try:
            tracked_layers(load_pretrained(source))
        except ValueError as error:
            raise UserError(
                f"model={own['model']!r}: {first_line(error)}; the chapter reads MLP layers as `layers='mlp'` finds them: from "
                "Python choose others (README, Bring a model)"
            ) from error
    return True
