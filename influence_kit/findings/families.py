"""The models of a profile as stages: worlds, trainings, scans, and what findings make of these. Which of them a chapter reads, it says itself."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from influence_kit.corpora.texts.dialogue import Dialogue
from influence_kit.corpora.texts.parallel import ParallelText
from influence_kit.errors import UserError
from influence_kit.files import sha256
from influence_kit.findings import common
from influence_kit.findings.extras import extras
from influence_kit.findings.profiles import (
    PLANTED,
    DialogueGrid,
    Family,
    PlantedGrid,
    Profile,
    ScanSettings,
    Size,
    TextGrid,
)
from influence_kit.hub import hub_source, is_pinned, short_name
from influence_kit.measures.checkpoints import READ
from influence_kit.recipes import Recipe, tuples
from influence_kit.runner.stages import LIBRARIES, Stage
from influence_kit.weights import WHEEL, gguf_source, is_gguf

END = 1.0
AGAIN = 1000  # what a further training of the same world adds to its seed
Fraction = float | str  # of training, or READ


@dataclass(frozen=True)
class Planned:
    """One model of the grid: where it was trained, its seed and size, its scans by fraction of training (or READ: chosen
    by the loss of the queries), and what else is made of such a scan, by kind and fraction."""

    corpus: str
    arm: str
    seed: int
    size: Size
    world: Stage
    model: Stage
    influence: dict[Fraction, Stage] = field(hash=False, compare=False)
    extra: dict[tuple[str, Fraction], Stage] = field(default_factory=dict, hash=False, compare=False)

    @property
    def stages(self) -> list[Stage]:
        """Everything this model is made of."""
        below = [self.world]
        while below[0].inputs:
            below = [*below[0].inputs.values(), *below]
        return [*below, self.model, *self.influence.values(), *self.extra.values()]


def planted_grid(
    profile: Profile,
    corpus: str,
    arms: Sequence[str] = ("base",),
    fractions: Iterable[Fraction] = (END,),
    widths: Iterable[int] | None = None,
    seeds: Iterable[int] | None = None,
    extra: Iterable[str] = (),
) -> list[Planned]:
    """Models of a planted world's family ("atlas", "ladder", …), ordered by arm, size and seed.

    Arms that the profile leaves out are left out, and so are worlds; `fractions=()` makes models without any scan. `extra`:
    kinds of stages to make of each scan, as far as the profile's `extra` has them.
    """
    if corpus not in PLANTED:
        raise UserError(f"no world is called {corpus!r}: choose one of {', '.join(PLANTED)}")
    return _of_arms(profile, getattr(profile, corpus), corpus, arms, fractions, widths, seeds, extra)


def dialogue_grid(
    profile: Profile,
    arms: Sequence[str] = ("base",),
    fractions: Iterable[Fraction] = (END,),
    widths: Iterable[int] | None = None,
    seeds: Iterable[int] | None = None,
    extra: Iterable[str] = (),
) -> list[Planned]:
    """Models of the family that reads spoken lines, chosen as in `planted_grid`; none where the profile has no such lines."""
    return _of_arms(profile, profile.dialogue, "dialogue", arms, fractions, widths, seeds, extra)


def _of_arms(profile, grid: PlantedGrid | None, corpus, arms, fractions, widths, seeds, extra) -> list[Planned]:
    found: list[Planned] = []
    if grid is None:
        return found
    for name in arms:
        arm = grid.arms.get(name)
        if arm is None and name != "base":
            continue
        allowed = arm.widths if arm and arm.widths else tuple(size.width for size in grid.family.sizes)
        for size in grid.family.sizes:
            if size.width not in (allowed if widths is None else set(allowed) & set(widths)):
                continue
            for seed in profile.seeds if seeds is None else seeds:
                world = (
                    _spoken(grid, name, seed) if isinstance(grid, DialogueGrid) else _planted(grid, corpus, name, seed)
                )
                found.append(_trained(profile, grid, corpus, name, seed, size, world, fractions, extra))
    return found


def text_grid(
    profile: Profile,
    fractions: Iterable[Fraction] = (END,),
    widths: Iterable[int] | None = None,
    seeds: Iterable[int] | None = None,
    extra: Iterable[str] = (),
    section: str = "text",
) -> list[Planned]:
    """Models of the real-text family ("text", or "little_text", the one small enough to train many times); none where the
    profile has no such section."""
    grid = getattr(profile, section)
    if grid is None:
        return []
    sizes = [size for size in grid.family.sizes if widths is None or size.width in widths]
    chosen = profile.seeds if seeds is None else seeds
    return [
        _trained(profile, grid, section, "base", seed, size, _parallel(grid, seed), fractions, extra)
        for size in sizes
        for seed in chosen
    ]


def section(profile: Profile, world: str, chapter: str) -> PlantedGrid:
    """A profile's section for a world that a chapter cannot do without. Raises UserError where there is none."""
    found = getattr(profile, world)
    if found is None:
        raise UserError(
            f"profile {profile.name!r} has no `{world}` section, which chapter {chapter} reads: add one (as in laptop.yaml), or "
            "name the chapters you want by --only"
        )
    return found


def trained_again(
    profile: Profile, world: str, chapter: str, *arms: str, seeds: Iterable[int] | None = None
) -> list[Planned]:
    """Models of arms that a chapter trains again as its referee, without scans. Raises UserError where the profile lacks an arm."""
    for arm in arms:
        if arm not in section(profile, world, chapter).arms:
            raise UserError(
                f"profile {profile.name!r} has no {world} arm `{arm}`, which chapter {chapter} trains again: add one (as in "
                "laptop.yaml), or name the chapters you want by --only"
            )
    return planted_grid(profile, world, arms, fractions=(), seeds=seeds)


def _contents(folder: Path, pattern: str = "**/*") -> list[list[str]]:
    """Names and sha256 of a folder's files: other contents make another stage, whatever their size and time."""
    return [
        [path.relative_to(folder).as_posix(), _hashed(path, *_stamp(path))]
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    ]


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


@cache
def _hashed(path: Path, *stamp: int) -> str:
    """sha256 of a file, taken once while its stamp stays: every stage of a plan asks for it."""
    return sha256(path)


def text_stage(grid: TextGrid | None) -> Stage:
    """The stage that fetches or reads real text."""
    if grid is None:
        raise UserError("this profile has no real text: leave out --without-real-text, or give it a `text` part")
    languages = list(grid.world.get("languages", ParallelText().languages))
    parameters = {"source": grid.source, "folder": grid.folder, "languages": languages}
    if grid.folder:  # so that other files in the same place make another text
        parameters["files"] = _contents(Path(grid.folder))
    return Stage("text", common.text, parameters, label="real text", early=True)


def weights_stage(source: str, sha256: str = "", terms: str = "") -> Stage | None:
    """The stage that makes a folder in the transformers layout of a GGUF file, alone or in wheels, or of a hub's commit; None for
    other sources.

    Args:
        source: A folder, a hub name, NAME@COMMIT, a path, or `wheel:NAME==VERSION` (see `weights`, `hub`).
        sha256: Of the GGUF file (hex): needed with wheels.
        terms: Name of the terms that are accepted, where the licence is no open one.

    Raises:
        UserError: As `weights.gguf_source` and `hub.hub_source`.
    """
    if is_pinned(source):
        label = f"weights of {short_name(source)}"
        return Stage("weights", common.at_commit, {"source": hub_source(source, terms)}, label=label, early=True)
    if not is_gguf(source):
        return None
    source = gguf_source(source, sha256, terms)
    if not source.startswith(WHEEL):  # so that another file in the same place makes another model
        sha256 = sha256 or _hashed(Path(source), *_stamp(Path(source)))
    parameters, libraries = {"source": source, "sha256": sha256, "terms": terms}, (*LIBRARIES, "gguf")
    label = f"weights of {Path(source).name}"
    return Stage("weights", common.weights, parameters, libraries=libraries, label=label, early=True)


def _planted(grid: PlantedGrid, corpus: str, arm: str, seed: int) -> Stage:
    """The stage that generates a planted world: `make` of its module, with the parameters of its dataclass."""
    world = PLANTED[corpus](**grid.of_arm(arm, seed))
    label = f"{type(world).__name__} world, {arm}, seed {seed}"
    made = Stage("world", sys.modules[type(world).__module__].make, asdict(world), label=label)
    if arm == "base" or not grid.arms[arm].without:
        return made
    return Stage("world", common.without_copies, {"seed": seed}, {"world": made}, label=label)


def lines_stage(grid: DialogueGrid) -> Stage:
    """The stage that fetches or reads spoken lines, those of all campaigns that any arm reads."""
    named = [arm.world.get("campaigns", ()) for arm in grid.arms.values()]
    campaigns = sorted({*grid.world.get("campaigns", Dialogue().campaigns), *(name for part in named for name in part)})
    parameters = {"source": grid.source, "folder": grid.folder, "campaigns": campaigns}
    if grid.folder:  # so that other files in the same place make other lines
        parameters["files"] = _contents(Path(grid.folder), "*.deb")
    return Stage("text", common.lines, parameters, label="spoken lines", early=True)


def _spoken(grid: DialogueGrid, arm: str, seed: int) -> Stage:
    """The stage that makes a world of spoken lines."""
    world = Dialogue(**grid.of_arm(arm, seed))
    label = f"spoken world, {arm}, seed {seed}"
    return Stage("world", common.dialogue, asdict(world), {"text": lines_stage(grid)}, label=label)


def _parallel(grid: TextGrid, seed: int) -> Stage:
    parameters = asdict(ParallelText(**tuples({**grid.world, "seed": seed})))
    return Stage(
        "world",
        common.parallel,
        parameters,
        {"text": text_stage(grid)},
        label=f"text world, seed {seed}",
    )


def _trained(
    profile: Profile,
    grid: PlantedGrid | TextGrid,
    corpus: str,
    arm: str,
    seed: int,
    size: Size,
    world: Stage,
    fractions: Iterable[Fraction],
    extra: Iterable[str] = (),
) -> Planned:
    if size.pretrained:
        return _pretrained(profile, grid.scan, seed, size, world, fractions)
    kind = f"{corpus} {size.architecture}".strip()
    name = f"{kind} {arm} {size.width}x{size.depth}, seed {seed}"
    again = 0 if arm == "base" or isinstance(grid, TextGrid) else grid.arms[arm].again
    model = _model(grid.family, grid.scan, seed + AGAIN * again, size, world, name, profile.device)
    like = "base" if again else arm  # a model trained again is scanned as the first one was
    scans = {
        fraction: _influence(profile, grid.scan, corpus, like, seed, world, model, fraction, name)
        for fraction in fractions
    }
    made = {
        (kind, fraction): _extra(kind, grid.extra[kind], scan, fraction, name)
        for kind in extra
        if kind in grid.extra
        for fraction, scan in scans.items()
    }
    return Planned(corpus, arm, seed, size, world, model, scans, made)


def _extra(kind: str, own: dict, scan: Stage, fraction: Fraction, name: str) -> Stage:
    """A finding's own stage, about one checkpoint of a model."""
    made = extras()[kind]
    taken = ("fraction", "nats", "kinds", "seed", "damping", "layers", "device")
    parameters = {key: scan.parameters[key] for key in taken if key in scan.parameters}
    parameters |= {"model": scan.inputs["model"].parameters} if made.recipe else {}
    inputs = scan.inputs | ({"influence": scan} if made.scan else {})
    return Stage(kind, made.function, {**own, **parameters}, inputs, label=f"{kind} of {name}, {_when(fraction)}")


def _pretrained(
    profile: Profile, scan: ScanSettings, seed: int, size: Size, world: Stage, fractions: Iterable[Fraction]
) -> Planned:
    """A model from elsewhere, and the real-text world in its own tokens."""
    name = f"{short_name(size.pretrained)}, seed {seed}"
    source: dict = {"source": size.pretrained}
    if Path(size.pretrained).is_dir():
        source["files"] = _contents(Path(size.pretrained))
    weights = weights_stage(size.pretrained, size.sha256, size.terms)
    given = {} if weights is None else {"weights": weights}
    own = {**source, "length": world.parameters["length"], "opening": size.opening}
    world = Stage("world", common.retokenise, own, {"world": world, **given}, label=f"text world for {name}")
    label = f"load {name}"
    model = Stage("model", common.pretrained, {**source, "seed": seed}, {"world": world, **given}, label=label)
    scans = {}
    for fraction in fractions:
        parameters: dict = {"fraction": fraction, "seed": seed, "fit": scan.fit, "sequences": scan.sequences}
        parameters |= {"damping": scan.damping, "layers": scan.layers, "device": profile.device}
        inputs, label = {"world": world, "model": model}, f"score {name}, {fraction:.0%} of training"
        scans[fraction] = Stage("influence", common.influence, parameters, inputs, label=label)
    return Planned("text", "base", seed, size, world, model, scans)


def _model(family: Family, scan: ScanSettings, seed: int, size: Size, world: Stage, name: str, device: str) -> Stage:
    checkpoints = sorted({0.0, *scan.fractions, *scan.kept, END})
    recipe = {**family.recipe, "seed": seed, "learning_rate": size.learning_rate, "checkpoints": checkpoints}
    parameters = {
        "architecture": size.architecture or family.architecture,
        "width": size.width,
        "depth": size.depth,
        "device": device,
    }
    parameters["recipe"] = asdict(Recipe(**tuples(recipe)))
    return Stage(
        "model",
        common.train,
        parameters,
        {"world": world},
        label=f"train {name}",
    )


def _influence(
    profile, scan: ScanSettings, corpus, arm: str, seed: int, world: Stage, model: Stage, fraction: Fraction, name: str
) -> Stage:
    whole = fraction in (0.0, END) and arm in ("base", "shuffled")
    parameters = {
        "fraction": fraction,
        "seed": seed,
        "fit": scan.fit,
        "sequences": scan.sequences if whole else scan.path,
        "damping": scan.damping,
        "layers": scan.layers,
        "device": profile.device,
    }
    if fraction == READ:
        parameters |= {"nats": scan.nats, "kinds": list(scan.kinds or getattr(PLANTED.get(corpus), "asks", ()))}
    label = f"score {name}, {_when(fraction)}"
    return Stage("influence", common.influence, parameters, {"world": world, "model": model}, label=label)


def _when(fraction: Fraction) -> str:
    return "where it is read" if isinstance(fraction, str) else f"{fraction:.0%} of training"
