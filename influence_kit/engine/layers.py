"""Which linear maps of a model carry influence, their shapes, and a word on what is left out."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import torch
from torch import nn

MLP_PATTERN = r"(^|\.)(mlp|feed_forward|ffn)\."
HEAD_PATTERN = r"(^|\.)(lm_head|embed_out|score|output_projection)$"
WIDEST = 20_000  # an eigenbasis of this side takes 3.2 GB in float64; a 50k-wide head would take 20 GB and days
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # weights in other types are packed


def is_linear_map(module: nn.Module) -> bool:
    """True for `nn.Linear` and for GPT-2's `Conv1D`, a linear map that stores its weight transposed."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and module.weight.ndim == 2)  # type: ignore[return-value]


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(P, M): width of the output and of the input of a linear map, bias not counted."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def tracked_layers(model: nn.Module, layers: str = "mlp", blocks: int = 1) -> dict[str, nn.Module]:
    """The linear maps whose weights carry influence.

    Under "mlp" and "all" a map is left out whose weight is packed in few bits, or frozen in a model that trains others (an
    adapter's base). A warning says so, with counts, as it does of experts that are fused in one parameter and of a tied head.

    Args:
        model: Any module.
        layers: "mlp" (the paper's choice), "all" (every linear map but the output head), or a regular expression searched in
            the dotted name.
        blocks: Into how many eigenbases each side will be cut.

    Returns:
        Modules by dotted name, in the model's order.

    Raises:
        ValueError: Nothing matches, a weight is shared with another module (its gradient would be only half of the truth) or
            packed, or a side is too wide for an eigenbasis.
    """
    linear, left = {name: module for name, module in model.named_modules() if is_linear_map(module)}, ""
    if layers in ("mlp", "all"):
        asked = {
            n: m
            for n, m in linear.items()
            if (re.search(MLP_PATTERN, n) if layers == "mlp" else not re.search(HEAD_PATTERN, n))
        }
        chosen = {name: module for name, module in asked.items() if not _why_left_out(model, module)}
        left = _left_out(model, layers, chosen)
    else:
        try:
            chosen = {name: module for name, module in linear.items() if re.search(layers, name)}
        except re.error as error:
            raise ValueError(f"layers={layers!r} is not a regular expression: {error}") from error
    if not chosen:
        names = left or f"the model's first ones are: {', '.join(list(linear)[:6]) or 'none'}"
        raise ValueError(f"layers={layers!r} matches no linear map that can be tracked; {names}")
    if left:
        warnings.warn(f"layers={layers!r} {left}", stacklevel=2)
    for name, module in chosen.items():
        if (why := _why_left_out(model, module)).startswith("packed"):
            raise ValueError(
                f"layer {name!r} has a weight that is {why}: load the model unpacked, or leave it out with a narrower "
                "`layers` pattern"
            )
    _refuse_tied(model, chosen)
    _refuse_too_wide(chosen, blocks)
    return chosen


def _refuse_tied(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
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


def _refuse_too_wide(chosen: dict[str, nn.Module], blocks: int) -> None:
    for name, module in chosen.items():
        widest = math.ceil((max(shape_of(module)) + 1) / blocks)
        if widest > WIDEST:
            raise ValueError(
                f"layer {name!r} is {shape_of(module)[0]} x {shape_of(module)[1]}: one {widest} x {widest} float64 "
                f"eigenbasis takes {8 * widest**2 / 1e9:.0f} GB, and its eigendecomposition as much again; leave it out "
                "with a narrower `layers` pattern, or cut the layer into `blocks`"
            )


def _size(module: Any, weight: Any) -> int:
    """Number of weights, also where several lie in one number."""
    return module.in_features * module.out_features if isinstance(module, nn.Linear) else weight.numel()


def _why_left_out(model: nn.Module, module: Any) -> str:
    """Why "mlp" and "all" leave a linear map out; empty where they do not."""
    weight = module.weight
    if weight.dtype not in PLAIN or weight.ndim != 2:
        return f"packed in {str(weight.dtype).removeprefix('torch.')}"
    if not weight.requires_grad and any(parameter.requires_grad for parameter in model.parameters()):
        return "frozen, where others are trained"
    return ""


def _left_out(model: nn.Module, layers: str, chosen: dict[str, nn.Module]) -> str:
    """What `layers` seems to ask for and does not get, with the number of weights, the reason, and an example; else empty."""
    own = {id(module.weight) for module in chosen.values()}
    embedded = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[str, tuple[int, str]] = {}
    for name, module in model.named_modules():
        for part, weight in module.named_parameters(recurse=False):
            full, linear = f"{name}.{part}", is_linear_map(module)
            asked = re.search(MLP_PATTERN, full) or (linear and layers == "all")
            if not asked or weight.ndim < 2 or id(weight) in own or isinstance(module, nn.Embedding):
                continue
            if linear and re.search(HEAD_PATTERN, name):
                why = "tied to the embedding" if id(weight) in embedded else ""
            elif linear:
                why = _why_left_out(model, module)
            else:
                why = "fused in one parameter" if weight.ndim > 2 else "in no linear map"
            if why:
                size, first = found.get(why, (0, full))
                found[why] = size + _size(module, weight), first
    if not found:
        return ""
    tracked = sum(_size(module, module.weight) for module in chosen.values())
    total = tracked + sum(size for size, _ in found.values())
    listed = ", ".join(f"{size:,} {why} ({first})" for why, (size, first) in found.items())
    return f"tracks {tracked:,} of {total:,} {'MLP weights' if layers == 'mlp' else 'weights'}; not tracked: {listed}"
