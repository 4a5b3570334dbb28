"""Profiles: what one run of the kit computes, as YAML that is checked down to its leaves before any work."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Iterable, Sequence
from functools import cache
from numbers import Integral
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from influence_kit.corpora.texts.dialogue import Dialogue
from influence_kit.corpora.texts.own import model_source
from influence_kit.corpora.texts.parallel import ParallelText
from influence_kit.corpora.texts.sources import SOURCES as WRITTEN
from influence_kit.corpora.texts.wesnoth import SOURCES as SPOKEN
from influence_kit.corpora.worlds.atlas import Atlas
from influence_kit.corpora.worlds.cast import Cast
from influence_kit.corpora.worlds.deep import Deep
from influence_kit.corpora.worlds.ladder import Ladder
from influence_kit.corpora.worlds.procedures import Procedures
from influence_kit.errors import UserError
from influence_kit.files import working_folder
from influence_kit.findings.extras import extras
from influence_kit.hub import hub_source
from influence_kit.recipes import ARCHITECTURES, Recipe, tuples
from influence_kit.weights import gguf_source, is_gguf

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
# What can be asked in each: the kinds of its queries.
QUERY_KINDS: dict[type, tuple[str, ...]] = {
    Atlas: ("fact", "alone", "translation", "canary"),
    Ladder: ("rule",),
    Cast: ("query",),
    Deep: ("fact", "translation", "quote", "rule", "role-play"),
    Procedures: ("maths", "code"),
}
REAL_TEXT = ("text", "little_text", "dialogue", "real")  # sections that read what has to be downloaded
LARGEST_SEED = 2**32 - 1  # that every generator of random numbers takes

LARGEST = 10**12  # of any count: no machine gets there, and everything that counts can hold it

T = TypeVar("T")
# YAML has lists, frozen models have tuples.
Several = Annotated[tuple[T, ...], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]
Folder = Annotated[str, AfterValidator(lambda path: str(working_folder() / Path(path).expanduser()) if path else "")]
Share = Annotated[float, Field(gt=0, lt=1)]
Word = Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]  # part of a package's name
Count = Annotated[int, Field(ge=1, le=LARGEST)]
# Parts of dataclasses that may be less than any number from 0 on, where they do not say so themselves.
LIMITS: dict[type, dict[str, Any]] = {
    Recipe: {
        **dict.fromkeys(("batch_size", "passes", "evaluations"), Count),
        "clip": Annotated[float, Field(gt=0)],
        "betas": tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]],
    },
    Atlas: {
        **dict.fromkeys(("most_supporters", "held_out", "queries"), Count),
        "repetitions": tuple[Count, ...],
    },
    ParallelText: {
        **dict.fromkeys(("pairs", "held_out", "queries", "scan", "length", "vocabulary"), Count),
        "languages": tuple[Word, ...],
    },
    Dialogue: {**dict.fromkeys(("length", "vocabulary"), Count), "campaigns": tuple[Word, ...]},
}


def _refuse_unknown(values: dict, known: Iterable[str]) -> None:
    for name in values:
        if name not in known:
            raise ValueError(f"unknown parameter {name!r}; known are {', '.join(sorted(known)) or 'none'}")


class _Strict(BaseModel):
    """No key that nobody knows, no text for a number, no number that is infinite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, content):
        if isinstance(content, dict):
            _refuse_unknown(content, cls.model_fields)
        return content


class Size(_Strict):
    """One model of a family: width, depth and peak learning rate, and an architecture other than the family's; or `pretrained`, a
    folder, a hub's NAME@COMMIT, a .gguf file or `wheel:NAME==VERSION` (real text only), with the GGUF file's sha256 and the name of terms that are
    accepted, where these are needed, and the token that texts begin with: "best" by loss, "bos", "none", or an id."""

    width: int = Field(16, ge=8, le=LARGEST)
    depth: Count = 1
    learning_rate: float = Field(3e-3, gt=0, le=10)
    architecture: Literal["", *ARCHITECTURES] = ""  # type: ignore[valid-type]
    sha256: str = ""
    terms: str = ""
    pretrained: str = ""  # after what it is checked with
    opening: Literal["best", "bos", "none"] | Annotated[int, Field(ge=0)] = "best"

    @field_validator("width")
    @classmethod
    def _of_heads(cls, width: int) -> int:
        if width != 8 and width % 16:
            raise ValueError(f"{width} must be 8 or a multiple of 16")
        return width

    @field_validator("pretrained")
    @classmethod
    def _where(cls, pretrained: str, info: ValidationInfo) -> str:
        try:
            if is_gguf(pretrained):
                return gguf_source(pretrained, info.data.get("sha256", ""), info.data.get("terms", ""))
            here = (working_folder() / Path(pretrained).expanduser()).is_dir()
            source = model_source(pretrained) if pretrained and (here or "@" not in pretrained) else pretrained
            return source if here or not source else hub_source(source, info.data.get("terms", ""))
        except UserError as error:
            raise ValueError(str(error)) from error


class Family(_Strict):
    """Models of one architecture that differ in size only, and how all of them are trained."""

    architecture: Literal[*ARCHITECTURES] = "gpt_neox"  # type: ignore[valid-type]
    sizes: Several[Size] = Field(min_length=1)
    recipe: dict[str, Any] = {}

    @field_validator("recipe")
    @classmethod
    def _of_a_recipe(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        _check(Recipe, recipe, never=("seed", "learning_rate", "checkpoints"))
        return recipe


class ScanSettings(_Strict):
    """How a model is scored: sequences for the factors and for the scan, damping, tracked layers, extra checkpoints."""

    fit: Count = 3000
    sequences: Count = 12_000
    path: Count = 6_000  # sequences scanned before the end of training, and in arms but `shuffled`
    fractions: Several[Share] = ()  # of training, beside 0 (untrained) and 1 (the end)
    kept: Several[Share] = ()  # more checkpoints, of which the one to read is chosen
    nats: float = Field(0.5, gt=0)  # the loss of the queries at the checkpoint to read
    kinds: Several[str] = ()  # of those queries; by default those that the world asks
    damping: float = Field(0.1, ge=0)
    layers: str = Field("mlp", min_length=1)

    @field_validator("fractions", "kept")
    @classmethod
    def _in_order(cls, fractions: tuple[float, ...]) -> tuple[float, ...]:
        if list(fractions) != sorted(set(fractions)):
            raise ValueError(f"{list(fractions)} must rise, each fraction once")
        return fractions

    @field_validator("layers")
    @classmethod
    def _a_pattern(cls, layers: str) -> str:
        try:
            re.compile(layers)
        except re.error as error:
            raise ValueError(
                f"{layers!r} must be mlp, all, or a regular expression of layers' names ({error})"
            ) from error
        return layers


class Arm(_Strict):
    """A variation of a world, and which widths of the family are trained on it (all by default).

    without: `copies` trains on Atlas as it stands, with the copies of half of its canaries replaced in place.
    again: 1, 2, … train on the world as it stands, from another initialisation and in another order of the later passes.
    """

    world: dict[str, Any] = {}
    without: Literal["", "copies"] = ""
    again: int = Field(0, ge=0)
    widths: Several[int] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _same_world(self):
        if self.again and (self.world or self.without):
            raise ValueError(f"again={self.again} trains on the world as it stands: leave out world and without")
        return self


class _Grid(_Strict):
    """A world's parameters, its family, its scan, and what else is made of a scan: stages by kind, with their parameters."""

    world: dict[str, Any] = {}
    family: Family
    scan: ScanSettings = ScanSettings()
    extra: dict[str, dict[str, Any]] = {}

    @field_validator("extra")
    @classmethod
    def _made_by_stages(cls, extra: dict[str, dict[str, Any]], about: ValidationInfo):
        for kind, own in extra.items():
            if kind not in extras():
                raise ValueError(f"no finding makes a stage {kind!r}; known are {', '.join(sorted(extras()))}")
            _like(own, _shipped_extras().get(kind, []), kind)
            for name in ("fractions", "tracin"):
                kept = {*about.data["scan"].fractions, 1.0} if "scan" in about.data else set(own.get(name, ()))
                if missing := set(own.get(name, ())) - kept:
                    raise ValueError(
                        f"{kind}.{name} asks for {sorted(missing)}, but checkpoints are kept at {sorted(kept)}: "
                        "add them to scan.fractions"
                    )
        return extra

    def check_kinds(self, known: tuple[str, ...]) -> None:
        """Raise ValueError where kinds of queries are named that the world does not ask."""
        asked = {"scan.kinds": self.scan.kinds}
        asked |= {f"extra.{kind}.asked": own.get("asked", ()) for kind, own in self.extra.items()}
        for place, kinds in asked.items():
            if unknown := [short(kind) for kind in kinds if kind not in known]:
                allowed = f"must be of {', '.join(known)}" if known else "must be empty: these queries are of one kind"
                raise ValueError(f"{place}: {', '.join(unknown)} {allowed}")


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
                raise ValueError(
                    f"arms: {name} asks for widths {sorted(unknown)}, the family has {sorted(widths)}: choose of these"
                )
        return self

    def of_arm(self, arm: str, seed: int) -> dict[str, Any]:
        """The world's parameters in an arm, as its dataclass takes them."""
        changes = self.arms[arm].world if arm != "base" else {}
        return tuples({**self.world, **changes, "seed": seed})

    def check_worlds(self, cls: type) -> None:
        """Raise ValueError unless the world and each arm of it are what the world's dataclass takes."""
        for place, changes in [("world", {}), *((f"arms.{name}.world", arm.world) for name, arm in self.arms.items())]:
            _check(cls, {**self.world, **changes}, f"{place}: ", never=("seed",))


class TextGrid(_Grid):
    """Real text, and where it comes from."""

    source: str = WRITTEN[0]
    folder: Folder = ""

    @model_validator(mode="after")
    def _known(self):
        _check_source(self, WRITTEN)
        _check(ParallelText, self.world, "world: ", never=("seed",))
        self.check_kinds(())
        if self.scan.fractions and any(size.pretrained for size in self.family.sizes):
            raise ValueError("pretrained models have no checkpoints along training: scan.fractions must be empty")
        return self


class DialogueGrid(PlantedGrid):
    """Spoken lines, where they come from, and arms."""

    source: str = SPOKEN[0]
    folder: Folder = ""

    @model_validator(mode="after")
    def _lines(self):
        _check_source(self, SPOKEN)
        self.check_worlds(Dialogue)
        self.check_kinds(())
        return self


class Untrained(_Strict):
    """What is done with random weights: sequences for the factors, and for the scan."""

    fit: Count
    sequences: Count


class RealModel(_Strict):
    """A language model from elsewhere, the texts that are scored for what it says, and how (chapter 12).

    A size without `pretrained` is a model of random weights, for tests. Of each source `numbers` sequences of `shortest` to
    `longest` tokens are taken, `translated` of each other language of the help; `aligned` paragraphs in every language. Factors are
    fitted on `fit` sequences of `length` tokens, of these texts and `more` of a source, which are not scored; `rank` is that of
    queries' directions; `step` is added to every weight.
    Models of `family` are read as `model` is, and their numbers stand beside its by size.
    """

    model: Size
    name: str = ""  # in figures; by default what its file says
    family: Several[Size] = ()
    languages: Several[Word]
    campaigns: Several[Word]
    numbers: dict[Literal["help", "translated", "lines", "sayings", "jargon"], Count]
    more: dict[Literal["help", "lines", "sayings", "jargon"], Count] = {}
    aligned: Annotated[int, Field(ge=3, le=LARGEST)]
    shortest: Count
    longest: Count
    fit: Count
    length: Annotated[int, Field(ge=8, le=LARGEST)]
    layers: str = Field("mlp", min_length=1)
    damping: float = Field(0.1, ge=0)
    rank: Count
    step: float = Field(gt=0, lt=1)
    untrained: Untrained
    draws: Count
    shown: Count

    @model_validator(mode="after")
    def _of_the_help(self):
        if "en-us" not in self.languages or len(set(self.languages)) < max(2, len(self.languages)):
            raise ValueError(f"languages={list(self.languages)} must be different ones, en-us among them")
        if missing := {"help", "translated", "lines", "sayings", "jargon"} - set(self.numbers):
            raise ValueError(f"numbers lacks {', '.join(sorted(missing))}: give it")
        return self


class Profile(_Strict):
    """Everything that decides what a run computes. Its name is that of its file."""

    name: str
    purpose: str = ""
    seeds: Several[Annotated[int, Field(ge=0, le=LARGEST_SEED)]] = Field(min_length=1)
    minutes: float = Field(gt=0)
    memory_gb: float = Field(gt=0)
    chapters: Several[str] = Field((), description="Numbers of those that it is for; all where none is named.")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    atlas: PlantedGrid
    ladder: PlantedGrid | None = None
    cast: PlantedGrid | None = None
    deep: PlantedGrid | None = None
    procedures: PlantedGrid | None = None
    little_atlas: PlantedGrid | None = None
    text: TextGrid | None = None
    little_text: TextGrid | None = None
    dialogue: DialogueGrid | None = None
    real: RealModel | None = None

    @property
    def few(self) -> tuple[int, ...]:
        """The first three seeds: enough for what is exploratory or a control and costs training, too few for a finding."""
        return self.seeds[:3]

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{list(seeds)} must be different whole numbers")
        return seeds

    @field_validator(*PLANTED)
    @classmethod
    def _of_its_world(cls, grid: PlantedGrid | None, about: ValidationInfo) -> PlantedGrid | None:
        if grid is not None:
            world = PLANTED[str(about.field_name)]
            grid.check_worlds(world)
            grid.check_kinds(QUERY_KINDS[world])
            for name, arm in grid.arms.items():
                if arm.without and world is not Atlas:
                    raise ValueError(
                        f"arms: {name} removes {arm.without}, which Atlas has and {world.__name__} has not"
                    )
        return grid


# --- parameters of dataclasses, and of stages that findings add


def _check_source(grid: TextGrid | DialogueGrid, known: Sequence[str]) -> None:
    """Raise ValueError unless text is downloaded (the first of the sources), or comes from a folder."""
    if grid.source not in known:
        raise ValueError(f"source {grid.source!r} is not one of {', '.join(known)}")
    if (grid.source == known[0]) == bool(grid.folder):
        fed = " or ".join(map(repr, known[1:]))
        raise ValueError(
            f"source {grid.source!r}, folder {grid.folder!r}: a folder goes with the source {fed}, and {fed} needs one"
        )


@cache
def _types(cls: type) -> dict[str, TypeAdapter]:
    """What each field of a dataclass takes, by its type; numbers are counts, shares or sizes: none is below zero."""

    def sound(hint: Any) -> Any:
        if hint in (int, float):
            return Annotated[hint, Field(ge=0, le=LARGEST)]
        if typing.get_origin(hint) is tuple:
            return tuple[*(part if part is ... else sound(part) for part in typing.get_args(hint))]  # type: ignore[misc]
        return hint

    hints = {name: sound(hint) for name, hint in typing.get_type_hints(cls).items()} | LIMITS.get(cls, {})
    config = ConfigDict(strict=True, allow_inf_nan=False)
    return {field.name: TypeAdapter(hints[field.name], config=config) for field in dataclasses.fields(cls)}


def _check(cls: type, values: dict[str, Any], place: str = "", never: Sequence[str] = ()) -> None:
    """Raise ValueError unless a dataclass takes these values as YAML gives them, inner worlds and its own checks included."""
    try:
        _check_types(cls, values, "", never)
        cls(**tuples(values))
    except (ValueError, TypeError, UserError) as error:
        raise ValueError(f"{place}{error}") from error


def _check_types(cls: type, values: dict[str, Any], place: str, never: Sequence[str] = ()) -> None:
    types = {name: of for name, of in _types(cls).items() if name not in never}
    _refuse_unknown(values, types)
    for name, value in tuples(values).items():
        if name in PLANTED and isinstance(value, dict):  # a world in a world
            _check_types(PLANTED[name], value, f"{name}.")
        try:
            types[name].validate_python(value)
        except ValidationError as error:
            raise ValueError("; ".join(_told(one, f"{place}{name}") for one in error.errors())) from error


@cache
def _shipped_extras() -> dict[str, list[dict]]:
    """What the profiles that ship give each stage that findings add."""
    given: dict[str, list[dict]] = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        for section in yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)).values():
            for kind, own in (section.get("extra") or {} if isinstance(section, dict) else {}).items():
                given.setdefault(kind, []).append(own)
    return given


def _like(value: Any, examples: list, place: str) -> None:
    """Raise ValueError unless a value is built as the examples are: the same keys, the same kind of number, none below zero unless
    one of theirs is, none zero unless one of theirs is. What a stage takes is what the profiles that ship give it."""
    if not examples:
        return
    kinds = {_kind(example) for example in examples}
    if _kind(value) not in kinds and not (_kind(value) == "whole number" and "number" in kinds):
        raise ValueError(
            f"{place}={short(value)} must be a {' or '.join(sorted(kinds))}, such as {examples[0]!r}{_hint(value)}"
        )
    if isinstance(value, dict):
        known = {name for example in examples for name in example}
        try:
            _refuse_unknown(value, known)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        for name in sorted(known):
            parts = [example[name] for example in examples if name in example]
            if name in value:
                _like(value[name], parts, f"{place}.{name}")
            elif len(parts) == len(examples):
                raise ValueError(f"{place}.{name} is missing: give it, such as {parts[0]!r}")
    elif isinstance(value, list):
        if not value and all(examples):
            raise ValueError(f"{place} is empty: give one or more, such as {examples[0]!r}")
        for item in value:
            _like(item, [part for example in examples for part in example], f"an entry of {place}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        least = min(examples)
        if not min(least, 0) <= value <= LARGEST or (value == 0 and least > 0):
            raise ValueError(f"{place}={value} must be above 0 and at most {LARGEST:g}, such as {examples[0]}")


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", list: "list", dict: "mapping"}
    return names.get(type(value), "thing of another kind")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


# --- files


class _Once(yaml.SafeLoader):
    """YAML in which a key that stands twice is refused: the last one would win without a word."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def profile_names() -> list[str]:
    """Names of the profiles that ship with the kit."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def profile_file(name: str) -> Path:
    """The file of a profile: one that ships, by its name, or one of the user's own, by its path from where the user stands.

    Raises:
        UserError: There is none, and where it was looked for.
    """
    if not name.endswith((".yaml", ".yml")):
        if name in profile_names():
            return FOLDER / f"{name}.yaml"
        near = working_folder() / f"{name}.yaml"
        hint = f"give the path of a YAML file{f', such as {near}' if near.is_file() else ''}"
        raise UserError(f"profile {name!r} is not known: choose one of {', '.join(profile_names())}, or {hint}")
    path = working_folder() / Path(name).expanduser()
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(
            f"profile {name!r}: {path} {what}; give the path of a YAML file, or one of {', '.join(profile_names())}"
        )
    return path


def ships(path: Path) -> bool:
    """Whether a profile's file is one that ships with the kit."""
    return path.resolve().parent == FOLDER.resolve()


def read_yaml(path: Path) -> dict[str, Any]:
    """A profile's file as it stands.

    Raises:
        UserError: Not UTF-8, not YAML, a key that stands twice, or no mapping.
    """
    try:
        content = yaml.load(path.read_bytes().decode("utf-8-sig"), _Once)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"profile {path} is not UTF-8 (byte {error.object[error.start]:#x}, line {line}): save it as UTF-8"
        ) from error
    except (yaml.YAMLError, RecursionError, ValueError, OSError) as error:
        told = " ".join(str(error).replace('"<unicode string>", ', "").split())
        raise UserError(f"profile {path} is not YAML that can be read, mend it: {told}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"profile {path} holds {short(content)}, not keys and values: begin with a copy of {FOLDER / 'laptop.yaml'}"
        )
    return content


def load_profile(name: str, seeds: Sequence[int] | None = None, real_text: bool = True) -> Profile:
    """A profile, checked down to its leaves.

    Args:
        name: One that ships with the kit, or the path of a YAML file of the same form (from where the user stands).
        seeds: In place of the profile's.
        real_text: False leaves out what needs downloaded text.

    Raises:
        UserError: Names what is unknown or malformed, its value, and what is allowed.
    """
    path = profile_file(name)
    if not re.fullmatch(r"\w[\w .-]*", path.stem):
        raise UserError(
            f"profile {path}: its name is that of its results' folder: use letters, digits, '-', '_', '.' alone"
        )
    content = read_yaml(path)
    if content.get("name", path.stem) != path.stem:
        raise UserError(
            f"profile {path} says name: {content['name']}, but a profile's name is its file's, {path.stem}: take the line out"
        )
    try:
        profile = Profile(**{str(key): value for key, value in content.items()} | {"name": path.stem})
    except ValidationError as error:
        places = [one["loc"] for one in error.errors()]
        inner = [
            one for one in error.errors() if not any(p[:-1] and p[: len(one["loc"])] == one["loc"] != p for p in places)
        ]
        told = [_told(one) for one in inner]
        more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
        raise UserError(f"profile {path.name}: " + "; ".join(told[:3]) + more) from error
    if seeds is not None:
        profile = profile.model_copy(update={"seeds": _seeds(seeds)})
    return profile if real_text else profile.model_copy(update=dict.fromkeys(REAL_TEXT))


def changed_from(name: str, seeds: Sequence[int] | None = None, real_text: bool = True) -> dict[str, Any]:
    """What a run changes of the profiles that ship, by the same arguments as `load_profile`; empty: nothing."""
    file, plain = profile_file(name), load_profile(name)
    changed: dict[str, Any] = {} if ships(file) else {"profile": file.name}
    if seeds is not None and tuple(seeds) != plain.seeds:
        changed["seeds"] = list(seeds)
    if not real_text and any(getattr(plain, section) for section in REAL_TEXT):
        changed["real_text"] = False
    return changed


def _seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """Seeds that a person gave in place of a profile's."""
    if isinstance(seeds, str) or not isinstance(seeds, Iterable):
        raise UserError(f"seeds={seeds!r} is no list: write [11, 12], and for papermill -y 'seeds: [11, 12]'")
    seeds = list(seeds)
    sound = all(
        isinstance(seed, Integral) and not isinstance(seed, bool) and 0 <= seed <= LARGEST_SEED for seed in seeds
    )
    if not seeds or not sound or len(set(seeds)) < len(seeds):
        raise UserError(
            f"seeds={short(seeds)} must be different whole numbers from 0 to {LARGEST_SEED}: for example --seeds 11,12,13"
        )
    return tuple(map(int, seeds))


def _told(error: Any, place: str = "") -> str:
    """One thing that is wrong with a profile: where, which value, what is allowed."""
    where, value = ".".join([*([place] if place else []), *map(str, error["loc"])]), error["input"]
    if error["type"] == "value_error":  # one of the checks above: it names the value itself
        return f"{where}: {error['ctx']['error']}".removeprefix(": ")
    if error["type"] == "missing":
        return f"{where} is missing: give it"
    told = re.sub(r"^(Input|String|Tuple) should", "must", error["msg"].partition(" or instance of")[0])
    for ours, theirs in (
        ("whole number", "integer"),
        ("list", "tuple"),
        ("mapping (key: value)", "dictionary"),
        ("text", "string"),
    ):
        told = told.replace(f"valid {theirs}", f"{ours}")
    return f"{where}={short(value)} {told}{_hint(value)}"


def _hint(value: Any) -> str:
    return " (YAML reads 1e-3 as text: write 1.0e-3)" if isinstance(value, str) and _is_number(value) else ""
