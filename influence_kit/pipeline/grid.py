"""The grid of a profile: which worlds, models and scans there are, and which of them each chapter reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from influence_kit.corpora.atlas import STATEMENT, Atlas
from influence_kit.corpora.parallel import ParallelText
from influence_kit.errors import UserError
from influence_kit.models import Recipe, steps_of
from influence_kit.pipeline.cache import Cost, Stage
from influence_kit.pipeline.profiles import Family, Profile, Scan, Size, TextGrid
from influence_kit.pipeline.stages import tuples

HOME = "influence_kit.pipeline.stages"
FLOPS = 4e10  # sustained by one core; an estimate for `--plan` only
STEP = 0.012  # seconds of overhead of one training step
QUERIES = 80
END = 1.0


@dataclass(frozen=True)
class Trained:
    """One model of the grid: where it was trained, its seed and size, and its scans by fraction of training."""

    corpus: str
    arm: str
    seed: int
    size: Size
    world: Stage
    model: Stage
    influence: dict[float, Stage] = field(hash=False, compare=False)

    @property
    def stages(self) -> list[Stage]:
        """Everything this model is made of."""
        below = [self.world]
        while below[0].inputs:
            below = [*below[0].inputs.values(), *below]
        return [*below, self.model, *self.influence.values()]


def atlas_grid(
    profile: Profile,
    arms: Sequence[str] = ("base",),
    fractions: Iterable[float] = (END,),
    widths: Iterable[int] | None = None,
    seeds: Iterable[int] | None = None,
) -> list[Trained]:
    """Models of the Atlas family, ordered by arm, size and seed; arms that the profile leaves out are left out."""
    grid, found = profile.atlas, []
    for name in arms:
        arm = grid.arms.get(name)
        if arm is None and name != "base":
            continue
        changes = arm.world if arm else {}
        allowed = arm.widths if arm and arm.widths else tuple(size.width for size in grid.family.sizes)
        for size in grid.family.sizes:
            if size.width not in (allowed if widths is None else set(allowed) & set(widths)):
                continue
            for seed in profile.seeds if seeds is None else seeds:
                found.append(
                    _trained(profile, "atlas", name, seed, size, _atlas(profile, name, changes, seed), fractions)
                )
    return found


def text_grid(
    profile: Profile,
    fractions: Iterable[float] = (END,),
    widths: Iterable[int] | None = None,
    seeds: Iterable[int] | None = None,
) -> list[Trained]:
    """Models of the real-text family; none where the profile has no real text."""
    if profile.text is None:
        return []
    sizes = [size for size in profile.text.family.sizes if widths is None or size.width in widths]
    chosen = profile.seeds if seeds is None else seeds
    return [
        _trained(profile, "text", "base", seed, size, _parallel(profile, seed), fractions)
        for size in sizes
        for seed in chosen
    ]


def _texts(profile: Profile) -> TextGrid:
    if profile.text is None:
        raise UserError(f"profile {profile.name!r} has no real text: leave out --without-real-text, or give it a `text` part")
    return profile.text


def text_stage(profile: Profile) -> Stage:
    """The stage that fetches or reads real text."""
    grid = _texts(profile)
    languages = list(grid.world.get("languages", ParallelText().languages))
    parameters = {"source": grid.source, "folder": grid.folder, "languages": languages}
    if grid.folder:  # so that other files in the same place make another text
        files = sorted(path for path in Path(grid.folder).rglob("*") if path.is_file())
        parameters["files"] = [[path.name, path.stat().st_size] for path in files]
    cost = Cost(30, 600_000_000, 60_000_000)
    return Stage("text", f"{HOME}.text:text", parameters, cost=cost, label="real text", early=True)


def _atlas(profile: Profile, name: str, changes: dict, seed: int) -> Stage:
    parameters = asdict(Atlas(**tuples({**profile.atlas.world, **changes, "seed": seed})))
    size = parameters["documents"] * (parameters["facts_per_document"] * (STATEMENT + 1) + 1)
    label = f"Atlas world, {name}, seed {seed}"
    return Stage(
        "world", f"{HOME}.atlas:atlas", parameters, cost=Cost(2 + size / 2e6, 400_000_000, 5 * size), label=label
    )


def _parallel(profile: Profile, seed: int) -> Stage:
    parameters = asdict(ParallelText(**tuples({**_texts(profile).world, "seed": seed})))
    tokens = parameters["pairs"] * len(parameters["languages"]) * parameters["length"]
    cost = Cost(10 + tokens / 1e5, 600_000_000, 8 * tokens)
    return Stage(
        "world",
        f"{HOME}.text:parallel",
        parameters,
        {"text": text_stage(profile)},
        cost=cost,
        label=f"text world, seed {seed}",
    )


def _trained(
    profile: Profile, corpus: str, arm: str, seed: int, size: Size, world: Stage, fractions: Iterable[float]
) -> Trained:
    grid = profile.atlas if corpus == "atlas" else _texts(profile)
    if size.pretrained:
        return _pretrained(profile, grid.scan, seed, size, world, fractions)
    name = f"{corpus} {arm} {size.width}x{size.depth}, seed {seed}"
    model = _model(grid.family, grid.scan, seed, size, world, name, profile.device)
    scans = {
        fraction: _influence(profile, grid.scan, arm, seed, world, model, fraction, name) for fraction in fractions
    }
    return Trained(corpus, arm, seed, size, world, model, scans)


def _pretrained(
    profile: Profile, scan: Scan, seed: int, size: Size, world: Stage, fractions: Iterable[float]
) -> Trained:
    """A model from elsewhere, and the real-text world in its own tokens."""
    name, source = f"{Path(size.pretrained).name}, seed {seed}", {"source": size.pretrained}
    own = {**source, "length": world.parameters["length"]}
    cost = Cost(60, 2_000_000_000, world.cost.disk_bytes)
    world = Stage(
        "world", f"{HOME}.pretrained:retokenise", own, {"world": world}, cost=cost, label=f"text world for {name}"
    )
    label = f"load {name}"
    cost = Cost(600, 16_000_000_000, 8_000_000_000)
    model = Stage(
        "model", f"{HOME}.pretrained:pretrained", {**source, "seed": seed}, {"world": world}, cost=cost, label=label
    )
    scans = {}
    for fraction in fractions:
        parameters: dict = {"fraction": fraction, "seed": seed, "fit": scan.fit, "sequences": scan.sequences}
        parameters |= {"damping": scan.damping, "layers": scan.layers, "device": profile.device}
        inputs, label = {"world": world, "model": model}, f"score {name}, {fraction:.0%} of training"
        cost = Cost(3600, 32_000_000_000, 4_000_000_000)
        scans[fraction] = Stage("influence", f"{HOME}.influence:influence", parameters, inputs, cost=cost, label=label)
    return Trained("text", "base", seed, size, world, model, scans)


def _model(family: Family, scan: Scan, seed: int, size: Size, world: Stage, name: str, device: str) -> Stage:
    checkpoints = sorted({0.0, *scan.fractions, END})
    recipe = {**family.recipe, "seed": seed, "learning_rate": size.learning_rate, "checkpoints": checkpoints}
    parameters = {"architecture": family.architecture, "width": size.width, "depth": size.depth, "device": device}
    parameters["recipe"] = asdict(Recipe(**tuples(recipe)))
    sequences, length, vocabulary = _shape(world)
    weights = 12 * size.depth * size.width**2
    steps = steps_of(sequences, Recipe(**tuples(recipe)))
    tokens = steps * Recipe(**tuples(recipe)).batch_size * length
    seconds = steps * STEP + 6 * (weights + vocabulary * size.width) * tokens / FLOPS
    disk = 4 * (weights + vocabulary * size.width) * len(checkpoints) + 100_000
    memory = 600_000_000 + 20 * weights + 16 * Recipe(**tuples(recipe)).batch_size * length * vocabulary
    return Stage(
        "model",
        f"{HOME}.train:train",
        parameters,
        {"world": world},
        cost=Cost(seconds, memory, disk),
        label=f"train {name}",
    )


def _influence(
    profile, scan: Scan, arm: str, seed: int, world: Stage, model: Stage, fraction: float, name: str
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
    sequences, length, vocabulary = _shape(world)
    width, depth = model.parameters["width"], model.parameters["depth"]
    scanned, fitted = min(parameters["sequences"], sequences), min(scan.fit, sequences)
    maps = 8 * depth * width**2
    model_flops = 4 * length * (12 * depth * width**2 + vocabulary * width)
    rotation = 2 * depth * 2 * length * (17 * width**2 + 4 * width**2)
    seconds = (
        3 + (scanned * (model_flops + rotation + 2 * QUERIES * maps) + 2 * fitted * (model_flops + rotation)) / FLOPS
    )
    memory = 600_000_000 + 4 * maps * (QUERIES * 3 + 40) + 12 * 32 * length * vocabulary
    disk = 4 * (QUERIES * scanned + maps + depth * 34 * width**2) + 8 * fitted * length
    label = f"score {name}, {fraction:.0%} of training"
    cost = Cost(seconds, memory, disk)
    return Stage(
        "influence", f"{HOME}.influence:influence", parameters, {"world": world, "model": model}, cost=cost, label=label
    )


def _shape(world: Stage) -> tuple[int, int, int]:
    """Sequences, their length in tokens and the vocabulary's size, estimated from a world's parameters."""
    p = world.parameters
    if "documents" in p:
        vocabulary = (
            2 * (p["relations"] * (p["values"] + 2 * p["templates"]) + p["filler_words"])
            + p["entities"]
            + p["noise_words"]
        )
        return p["documents"], p["facts_per_document"] * (STATEMENT + 1) + 1, vocabulary
    return p["pairs"] * len(p["languages"]), p["length"], p["vocabulary"]


def _start_here(profile: Profile) -> list[Trained]:
    return atlas_grid(
        profile,
        seeds=profile.seeds[:1],
        widths=[profile.atlas.family.sizes[min(1, len(profile.atlas.family.sizes) - 1)].width],
    )


def _worlds_and_models(profile: Profile) -> list[Trained]:
    return atlas_grid(profile, ("base", "shuffled"), fractions=()) + text_grid(profile, fractions=())


def _heavy_tails(profile: Profile) -> list[Trained]:
    trained = atlas_grid(profile, fractions=(0.0, END))
    return trained + atlas_grid(profile, ("shuffled",)) + text_grid(profile, (0.0, END))


def _cross_lingual(profile: Profile) -> list[Trained]:
    along = (*profile.atlas.scan.fractions, END)
    arms = [arm for arm in profile.atlas.arms if arm != "shuffled"]
    found = atlas_grid(profile, fractions=along) + atlas_grid(profile, arms)
    return found + (text_grid(profile, (*profile.text.scan.fractions, END)) if profile.text else [])


def text_is_in_reach(todo: Sequence[Stage]) -> None:
    """Before any work: raise UserError when real text has to be fetched and cannot be."""
    for stage in todo:
        if stage.kind != "text":
            continue
        if stage.parameters["folder"] and not Path(stage.parameters["folder"]).exists():
            raise UserError(
                f"text folder {stage.parameters['folder']} does not exist: mend the profile or pass --without-real-text"
            )
        if stage.parameters["source"] == "libreoffice":
            from influence_kit.corpora.debian import available

            if problem := available():
                raise UserError(
                    f"real text cannot be fetched: {problem}; run on Debian or Ubuntu (or in a container of one), put the "
                    "libreoffice-help-<language>_*.deb files into a folder and name it in a profile of your own "
                    "(text: {source: debs, folder: …}), or pass --without-real-text"
                )


def device_is_there(todo: Sequence[Stage]) -> None:
    """Before any work: raise UserError when stages want a GPU and there is none."""
    wanted = {stage.parameters.get("device", "cpu") for stage in todo} - {"cpu"}
    if not wanted:
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"this profile computes on {', '.join(sorted(wanted))} and torch finds no GPU: use --profile laptop"
        )


CHECKS = (text_is_in_reach, device_is_there)
READS: dict[str, Callable[[Profile], list[Trained]]] = {
    "00_start_here": _start_here,
    "01_worlds_and_models": _worlds_and_models,
    "03_heavy_tails": _heavy_tails,
    "05_cross_lingual": _cross_lingual,
}
CHAPTERS = list(READS)


def stages_for(profile: Profile, chapter: str) -> list[Stage]:
    """All stages a chapter reads, inputs before what is made of them, each once."""
    unique = {stage.fingerprint: stage for trained in READS[chapter](profile) for stage in trained.stages}
    return list(unique.values())
