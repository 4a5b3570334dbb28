"""Profiles: what one run of the kit computes, as validated YAML; unknown keys are refused."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from influence_kit.corpora.texts.dialogue import Dialogue
from influence_kit.corpora.texts.parallel import ParallelText
from influence_kit.corpora.texts.wesnoth import SOURCES as SPOKEN
from influence_kit.corpora.worlds.atlas import Atlas
from influence_kit.corpora.worlds.cast import Cast
from influence_kit.corpora.worlds.deep import Deep
from influence_kit.corpora.worlds.ladder import Ladder
from influence_kit.corpora.worlds.procedures import Procedures
from influence_kit.errors import UserError
from influence_kit.findings.extras import extras
from influence_kit.recipes import ARCHITECTURES, Recipe, tuples

FOLDER = Path(__file__).parent / "profiles"
# The worlds with planted truth, by the name of their section in a profile, which is also that of their stage.
# `little_atlas` is small enough to train hundreds of times and to invert exactly.
PLANTED: dict[str, type] = {
    "atlas": Atlas,
    "ladder": Ladder,
    "cast": Cast,
    "deep": Deep,
    "procedures": Procedures,
    "little_atlas": Atlas,
}
# What an arm's `without` can take away, and from which world: functions of `stages/removal.py`.
REMOVALS: dict[str, type] = {"translations": Atlas, "copies": Atlas, "procedure": Procedures, "names": Procedures}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Size(_Strict):
    """One model of a family: width, depth and peak learning rate, and an architecture other than the family's; or `pretrained`, a
    folder or hub name (real text only)."""

    width: int = Field(16, ge=16, multiple_of=16)
    depth: int = Field(1, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    architecture: str = ""
    pretrained: str = ""


class Family(_Strict):
    """Models of one architecture that differ in size only, and how all of them are trained."""

    architecture: str = "gpt_neox"
    sizes: tuple[Size, ...]
    recipe: dict[str, Any] = {}

    @model_validator(mode="after")
    def _known(self):
        for name in (self.architecture, *(size.architecture or self.architecture for size in self.sizes)):
            if name not in ARCHITECTURES:
                raise ValueError(f"architecture {name!r} is not one of {', '.join(ARCHITECTURES)}")
        _check(Recipe, self.recipe, "recipe", never=("seed", "learning_rate"))
        return self


class ScanSettings(_Strict):
    """How a model is scored: sequences for the factors and for the scan, damping, tracked layers, extra checkpoints."""

    fit: int = Field(3000, ge=1)
    sequences: int = Field(12_000, ge=1)
    path: int = Field(6_000, ge=1)  # sequences scanned before the end of training, and in arms but `shuffled`
    fractions: tuple[float, ...] = ()  # of training, beside 0 (untrained) and 1 (the end)
    damping: float = Field(0.1, ge=0)
    layers: str = "mlp"


class Arm(_Strict):
    """A variation of a world, and which widths of the family are trained on it (all by default).

    without: one of REMOVALS trains on the world as it stands, with some of it replaced in place.
    """

    world: dict[str, Any] = {}
    without: Literal["", "translations", "copies", "procedure", "names"] = ""
    widths: tuple[int, ...] | None = None


class _Grid(_Strict):
    """A world's parameters, its family, its scan, and what else is made of a scan: stages by kind, with their parameters."""

    world: dict[str, Any] = {}
    family: Family
    scan: ScanSettings = ScanSettings()
    extra: dict[str, dict[str, Any]] = {}

    @field_validator("extra")
    @classmethod
    def _made_by_stages(cls, extra: dict[str, dict[str, Any]]):
        for kind in extra:
            if kind not in extras():
                raise ValueError(f"extra: no finding makes a stage {kind!r}; known are {', '.join(sorted(extras()))}")
        return extra


class PlantedGrid(_Grid):
    """A world with planted truth and its arms ("base" is the world as it stands)."""

    arms: dict[str, Arm] = {}

    @model_validator(mode="after")
    def _known(self):
        if any(size.pretrained for size in self.family.sizes):
            raise ValueError("a planted world has words of its own: pretrained models read real text only")
        widths = {size.width for size in self.family.sizes}
        for name, arm in self.arms.items():
            if name == "base":
                raise ValueError("arms: 'base' is the world as it stands; give the arm another name")
            if unknown := set(arm.widths or ()) - widths:
                raise ValueError(f"arms: {name} asks for widths {sorted(unknown)}, the family has {sorted(widths)}")
        return self

    def of_arm(self, arm: str, seed: int) -> dict[str, Any]:
        """The world's parameters in an arm, as its dataclass takes them."""
        changes = self.arms[arm].world if arm != "base" else {}
        return tuples({**self.world, **changes, "seed": seed})


class TextGrid(_Grid):
    """Real text, and where it comes from."""

    source: str = "libreoffice"
    folder: str = ""

    @model_validator(mode="after")
    def _known(self):
        _check(ParallelText, self.world, "world", never=("seed",))
        if self.scan.fractions and any(size.pretrained for size in self.family.sizes):
            raise ValueError("pretrained models have no checkpoints along training: scan.fractions must be empty")
        return self


class DialogueGrid(PlantedGrid):
    """Spoken lines, where they come from, and arms."""

    source: str = "wesnoth"
    folder: str = ""

    @model_validator(mode="after")
    def _lines(self):
        if self.source not in SPOKEN:
            raise ValueError(f"source {self.source!r} is not one of {', '.join(SPOKEN)}")
        if (self.source == "debs") != bool(self.folder):
            raise ValueError("a folder goes with the source 'debs', and 'debs' needs one")
        for changes in ({}, *(arm.world for arm in self.arms.values())):
            _check(Dialogue, {**self.world, **changes}, "world", never=("seed",))
        return self


class Profile(_Strict):
    """Everything that decides what a run computes."""

    name: str
    purpose: str
    seeds: tuple[int, ...]
    minutes: float
    memory_gb: float
    device: str = "cpu"
    atlas: PlantedGrid
    ladder: PlantedGrid | None = None
    cast: PlantedGrid | None = None
    deep: PlantedGrid | None = None
    procedures: PlantedGrid | None = None
    little_atlas: PlantedGrid | None = None
    text: TextGrid | None = None
    little_text: TextGrid | None = None
    dialogue: DialogueGrid | None = None

    @field_validator(*PLANTED)
    @classmethod
    def _of_its_world(cls, grid: PlantedGrid | None, about: ValidationInfo) -> PlantedGrid | None:
        if grid is not None:
            for changes in ({}, *(arm.world for arm in grid.arms.values())):
                _check(PLANTED[str(about.field_name)], {**grid.world, **changes}, "world", never=("seed",))
            world = PLANTED[str(about.field_name)]
            for name, arm in grid.arms.items():
                if arm.without and REMOVALS[arm.without] is not world:
                    raise ValueError(f"arms: {name} removes {arm.without}, which {REMOVALS[arm.without].__name__} has and {world.__name__} has not")
        return grid


def _check(cls: type, values: dict[str, Any], what: str, never: tuple[str, ...]) -> None:
    known = {field.name for field in fields(cls)} - set(never)
    for name in values:
        if name not in known:
            raise ValueError(f"{what}: unknown parameter {name!r}; known are {', '.join(sorted(known))}")
    try:
        cls(**tuples(values))
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
    return profile if real_text else profile.model_copy(update={"text": None, "little_text": None, "dialogue": None})
