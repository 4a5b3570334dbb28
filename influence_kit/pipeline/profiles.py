"""Profiles: what one run of the kit computes, as validated YAML; unknown keys are refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from influence_kit.corpora.atlas import Atlas
from influence_kit.corpora.parallel import ParallelText
from influence_kit.errors import UserError
from influence_kit.models import ARCHITECTURES, Recipe

FOLDER = Path(__file__).parent / "profiles"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Size(_Strict):
    """One model of a family: width, depth and peak learning rate, or `pretrained`, a folder or hub name (real text only)."""

    width: int = Field(16, ge=16, multiple_of=16)
    depth: int = Field(1, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    pretrained: str = ""


class Family(_Strict):
    """Models of one architecture that differ in size only, and how all of them are trained."""

    architecture: str = "gpt_neox"
    sizes: tuple[Size, ...]
    recipe: dict[str, Any] = {}

    @model_validator(mode="after")
    def _known(self):
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture {self.architecture!r} is not one of {', '.join(ARCHITECTURES)}")
        _check(Recipe, self.recipe, "recipe", never=("seed", "learning_rate"))
        return self


class Scan(_Strict):
    """How a model is scored: sequences for the factors and for the scan, damping, tracked layers, extra checkpoints."""

    fit: int = Field(3000, ge=1)
    sequences: int = Field(12_000, ge=1)
    path: int = Field(6_000, ge=1)  # sequences scanned at checkpoints before the end
    fractions: tuple[float, ...] = ()  # of training, beside 0 (untrained) and 1 (the end)
    damping: float = Field(0.1, ge=0)
    layers: str = "mlp"


class Arm(_Strict):
    """A variation of a world, and which widths of the family are trained on it (all by default)."""

    world: dict[str, Any] = {}
    widths: tuple[int, ...] | None = None


class AtlasGrid(_Strict):
    """The Atlas world, its family, its scan and its arms ("base" is the world as it stands)."""

    world: dict[str, Any] = {}
    family: Family
    scan: Scan = Scan()
    arms: dict[str, Arm] = {}

    @model_validator(mode="after")
    def _known(self):
        if any(size.pretrained for size in self.family.sizes):
            raise ValueError("Atlas has words of its own: pretrained models read real text only")
        for changes in ({}, *(arm.world for arm in self.arms.values())):
            _check(Atlas, {**self.world, **changes}, "world", never=("seed",))
        return self


class TextGrid(_Strict):
    """Real text: where it comes from, the world made of it, its family and scan."""

    source: str = "libreoffice"
    folder: str = ""
    world: dict[str, Any] = {}
    family: Family
    scan: Scan = Scan()

    @model_validator(mode="after")
    def _known(self):
        _check(ParallelText, self.world, "world", never=("seed",))
        if self.scan.fractions and any(size.pretrained for size in self.family.sizes):
            raise ValueError("pretrained models have no checkpoints along training: scan.fractions must be empty")
        return self


class Profile(_Strict):
    """Everything that decides what a run computes."""

    name: str
    purpose: str
    seeds: tuple[int, ...]
    minutes: float
    memory_gb: float
    device: str = "cpu"
    atlas: AtlasGrid
    text: TextGrid | None = None


def _check(cls: type, values: dict[str, Any], what: str, never: tuple[str, ...]) -> None:
    known = {field.name for field in fields(cls)} - set(never)
    for name in values:
        if name not in known:
            raise ValueError(f"{what}: unknown parameter {name!r}; known are {', '.join(sorted(known))}")
    try:
        cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except (TypeError, UserError) as error:
        raise ValueError(str(error)) from error


def profile_names() -> list[str]:
    """Names of the profiles that ship with the kit."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_profile(name: str, seeds: tuple[int, ...] | list[int] | None = None, real_text: bool = True) -> Profile:
    """The profile of that name, or a path to a YAML file of the same form; `seeds` replaces its seeds.

    Raises UserError naming what is unknown or malformed, and what is known.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise UserError(
            f"profile {name!r} is not known: choose one of {', '.join(profile_names())}, or give the path of a YAML file"
        )
    try:
        profile = Profile(**yaml.safe_load(path.read_text()))
    except (ValidationError, yaml.YAMLError, TypeError) as error:
        if isinstance(error, ValidationError):
            lines = ["{}: {}".format(".".join(map(str, e["loc"])), e["msg"]) for e in error.errors()]
        else:
            lines = [str(error).replace("\n", " ")]
        raise UserError(f"profile {path.name}: " + "; ".join(lines)) from error
    if seeds is not None:
        if not seeds or len(set(seeds)) < len(seeds) or any(seed < 0 for seed in seeds):
            raise UserError(
                f"seeds={list(seeds)} must be different whole numbers, 0 or more: for example --seeds 11,12,13"
            )
        profile = profile.model_copy(update={"seeds": tuple(seeds)})
    return profile if real_text else profile.model_copy(update={"text": None})
