"""What findings add to a profile's grid: stages of their own, found in their modules by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Extra:
    """How a finding's own stage is made: what it computes with beside its own parameters.

    scan: whether it reads a scan of the model, or the world and the model alone; recipe: whether it is told, as `model`, how the
    model was trained, to train it again.
    """

    function: Callable
    scan: bool = True
    recipe: bool = False


@cache
def extras() -> dict[str, Extra]:
    """The stages that findings add, by the kind that a profile's `extra` names: `STAGES` of each of their modules."""
    found: dict[str, Extra] = {}
    for module in pkgutil.iter_modules(importlib.import_module("influence_kit.findings").__path__):
        stages = getattr(importlib.import_module(f"influence_kit.findings.{module.name}"), "STAGES", {})
        found |= {kind: made if isinstance(made, Extra) else Extra(made) for kind, made in stages.items()}
    return found
