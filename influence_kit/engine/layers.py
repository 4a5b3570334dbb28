"""Which linear maps of a model carry influence, and their shapes."""

from __future__ import annotations

import math
import re

from torch import nn

MLP_PATTERN = r"(^|\.)(mlp|feed_forward|ffn)\."
HEAD_PATTERN = r"(^|\.)(lm_head|embed_out|score|output_projection)$"
WIDEST = 20_000  # an eigenbasis of this side takes 3.2 GB in float64; a 50k-wide head would take 20 GB and days


def is_linear_map(module: nn.Module) -> bool:
    """True for `nn.Linear` and for GPT-2's `Conv1D`, a linear map that stores its weight transposed."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and module.weight.ndim == 2)  # type: ignore[return-value]


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(P, M): width of the output and of the input of a linear map, bias not counted."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def tracked_layers(model: nn.Module, layers: str = "mlp", blocks: int = 1) -> dict[str, nn.Module]:
    """The linear maps whose weights carry influence, by dotted name, in the model's order.

    `layers`: "mlp" (the paper's choice), "all" (every linear map but the output head), or a regular expression
    searched in the dotted name. `blocks`: into how many eigenbases each side will be cut.

    Raises ValueError when nothing matches, when a weight is shared with another module (its gradient would be only half of
    the truth), or when a side is too wide for an eigenbasis.
    """
    linear = {name: module for name, module in model.named_modules() if is_linear_map(module)}
    if layers == "mlp":
        chosen = {name: module for name, module in linear.items() if re.search(MLP_PATTERN, name)}
    elif layers == "all":
        chosen = {name: module for name, module in linear.items() if not re.search(HEAD_PATTERN, name)}
    else:
        try:
            chosen = {name: module for name, module in linear.items() if re.search(layers, name)}
        except re.error as error:
            raise ValueError(f"layers={layers!r} is not a regular expression: {error}") from error
    if not chosen:
        names = ", ".join(list(linear)[:6]) or "none"
        raise ValueError(f"layers={layers!r} matches no linear map; the model's first ones are: {names}")
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            first = owners.setdefault(id(weight), name)
            for tied in {first, name} & set(chosen) if first != name else ():
                raise ValueError(
                    f"layer {tied!r} shares its weight ({first!r} and {name!r} are tied): its gradient has a part that a "
                    "linear map does not see; leave it out with a narrower `layers` pattern"
                )
    for name, module in chosen.items():
        widest = math.ceil((max(shape_of(module)) + 1) / blocks)
        if widest > WIDEST:
            raise ValueError(
                f"layer {name!r} is {shape_of(module)[0]} x {shape_of(module)[1]}: one {widest} x {widest} float64 "
                f"eigenbasis takes {8 * widest**2 / 1e9:.0f} GB, and its eigendecomposition as much again; leave it out "
                "with a narrower `layers` pattern, or cut the layer into `blocks`"
            )
    return chosen
