"""The grid of a profile: which worlds, models and scans there are, as stages. What each chapter reads: `chapters`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from influence_kit.corpora.texts.dialogue import Dialogue
from influence_kit.corpora.texts.parallel import ParallelText
from influence_kit.corpora.worlds.atlas import STATEMENT, Atlas
from influence_kit.errors import UserError
from influence_kit.findings.profiles import PLANTED, DialogueGrid, Family, PlantedGrid, Profile, Scan, Size, TextGrid
from influence_kit.findings.stages import tuples
from influence_kit.recipes import Recipe, how_many_together, steps_of
from influence_kit.runner.stages import Cost, Stage

HOME = "influence_kit.findings.stages"
FLOPS = 4e10  # sustained by one core; an estimate for `--plan` only
STEP = 0.012  # seconds of overhead of one training step
QUERIES = 110  # scored; an estimate as well
END = 1.0
REFEREES = ("bank", "response", "reweighted", "rivals")


@dataclass(frozen=True)
class Trained:
    """One model of the grid: where it was trained, its seed and size, its scans by fraction of training, and what else is
    made of such a scan, by kind and fraction."""

    corpus: str
    arm: str
    seed: int
    size: Size
    world: Stage
    model: Stage
    influence: dict[float, Stage] = field(hash=False, compare=False)
    extra: dict[tuple[str, float], Stage] = field(default_factory=dict, hash=False, compare=False)

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
    fractions: Iterable[float] = (END,),
    widths: Iterable[int] | None = None,
    seeds: Iterable[int] | None = None,
    extra: Iterable[str] = (),
) -> list[Trained]:
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
    fractions: Iterable[float] = (END,),
    widths: Iterable[int] | None = None,
    seeds: Iterable[int] | None = None,
    extra: Iterable[str] = (),
) -> list[Trained]:
    """Models of the family that reads spoken lines, chosen as in `planted_grid`; none where the profile has no such lines."""
    return _of_arms(profile, profile.dialogue, "dialogue", arms, fractions, widths, seeds, extra)


def _of_arms(profile, grid: PlantedGrid | None, corpus, arms, fractions, widths, seeds, extra) -> list[Trained]:
    found: list[Trained] = []
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
                world = _spoken(grid, name, seed) if isinstance(grid, DialogueGrid) else _planted(grid, corpus, name, seed)
                found.append(_trained(profile, grid, corpus, name, seed, size, world, fractions, extra))
    return found


def text_grid(
    profile: Profile,
    fractions: Iterable[float] = (END,),
    widths: Iterable[int] | None = None,
    seeds: Iterable[int] | None = None,
    extra: Iterable[str] = (),
    section: str = "text",
) -> list[Trained]:
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


def text_stage(grid: TextGrid | None) -> Stage:
    """The stage that fetches or reads real text."""
    if grid is None:
        raise UserError("this profile has no real text: leave out --without-real-text, or give it a `text` part")
    languages = list(grid.world.get("languages", ParallelText().languages))
    parameters = {"source": grid.source, "folder": grid.folder, "languages": languages}
    if grid.folder:  # so that other files in the same place make another text
        files = sorted(path for path in Path(grid.folder).rglob("*") if path.is_file())
        parameters["files"] = [[path.name, path.stat().st_size] for path in files]
    cost = Cost(30, 600_000_000, 60_000_000)
    return Stage("text", f"{HOME}.text:text", parameters, cost=cost, label="real text", early=True)


def _planted(grid: PlantedGrid, corpus: str, arm: str, seed: int) -> Stage:
    """The stage that generates a planted world: `stages/<corpus>.py` with the parameters of its dataclass."""
    world = PLANTED[corpus](**grid.of_arm(arm, seed))
    documents, length, _ = _size(world)
    tokens = documents * length
    cost = Cost(2 + tokens / 2e6, 400_000_000, 5 * tokens)
    kind = PLANTED[corpus].__name__
    label = f"{kind} world, {arm}, seed {seed}"
    made = Stage("world", f"{HOME}.{kind.lower()}:{kind.lower()}", asdict(world), cost=cost, label=label)
    if arm == "base" or not (without := grid.arms[arm].without):
        return made
    return Stage("world", f"{HOME}.removal:{without}", {"seed": seed}, {"world": made}, cost=cost, label=label)


def lines_stage(grid: DialogueGrid) -> Stage:
    """The stage that fetches or reads spoken lines, those of all campaigns that any arm reads."""
    named = [arm.world.get("campaigns", ()) for arm in grid.arms.values()]
    campaigns = sorted({*grid.world.get("campaigns", Dialogue().campaigns), *(name for part in named for name in part)})
    parameters = {"source": grid.source, "folder": grid.folder, "campaigns": campaigns}
    if grid.folder:  # so that other files in the same place make other lines
        files = sorted(path for path in Path(grid.folder).glob("*.deb"))
        parameters["files"] = [[path.name, path.stat().st_size] for path in files]
    cost = Cost(60, 400_000_000, 20_000_000)
    return Stage("text", f"{HOME}.dialogue:lines", parameters, cost=cost, label="spoken lines", early=True)


def _spoken(grid: DialogueGrid, arm: str, seed: int) -> Stage:
    """The stage that makes a world of spoken lines."""
    world = Dialogue(**grid.of_arm(arm, seed))
    cost = Cost(5, 600_000_000, 10 * world.lines * world.length)
    label = f"spoken world, {arm}, seed {seed}"
    return Stage("world", f"{HOME}.dialogue:dialogue", asdict(world), {"text": lines_stage(grid)}, cost=cost, label=label)


def _parallel(grid: TextGrid, seed: int) -> Stage:
    parameters = asdict(ParallelText(**tuples({**grid.world, "seed": seed})))
    tokens = parameters["pairs"] * len(parameters["languages"]) * parameters["length"]
    cost = Cost(10 + tokens / 1e5, 600_000_000, 8 * tokens)
    return Stage(
        "world",
        f"{HOME}.text:parallel",
        parameters,
        {"text": text_stage(grid)},
        cost=cost,
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
    fractions: Iterable[float],
    extra: Iterable[str] = (),
) -> Trained:
    if size.pretrained:
        return _pretrained(profile, grid.scan, seed, size, world, fractions)
    kind = f"{corpus} {size.architecture}".strip()
    name = f"{kind} {arm} {size.width}x{size.depth}, seed {seed}"
    model = _model(grid.family, grid.scan, seed, size, world, name, profile.device)
    scans = {
        fraction: _influence(profile, grid.scan, arm, seed, world, model, fraction, name) for fraction in fractions
    }
    made = {
        (kind, fraction): _extra(kind, grid.extra[kind], scan, fraction, name)
        for kind in extra
        if kind in grid.extra
        for fraction, scan in scans.items()
    }
    return Trained(corpus, arm, seed, size, world, model, scans, made)


def _extra(kind: str, own: dict, scan: Stage, fraction: float, name: str) -> Stage:
    """A stage of `stages/<kind>.py`, which reads the world, the model and a scan of it."""
    parameters = {key: scan.parameters[key] for key in ("fraction", "seed", "damping", "layers", "device")}
    label = f"{kind} of {name}, {fraction:.0%} of training"
    inputs = {**scan.inputs, "influence": scan}
    cost = replace(scan.cost, seconds=scan.cost.seconds / 2)  # seen: a tenth of a scan to all of it
    if kind in REFEREES:  # these train again, or need to know how the model was trained; only one of them reads a scan
        inputs, parameters = inputs if kind == "reweighted" else scan.inputs, {**parameters, "model": scan.inputs["model"].parameters}
        trained = scan.inputs["model"].cost.seconds / _faster_together(scan.inputs["model"])
        trainings = own.get("subsets", 0) / 2 + (1 + 2 * own.get("queries", 0) * len(own.get("counts", ()))) * (kind == "reweighted")
        cost = replace(cost, seconds=trained * trainings * own.get("repeats", 1) + own.get("responses", 0) + 20 * scan.cost.seconds * (kind in ("response", "rivals")))
    return Stage(kind, f"{HOME}.{kind}:{kind}", {**own, **parameters}, inputs, cost=cost, label=label)


def _faster_together(model: Stage) -> float:
    """How much less time the same model takes where many are trained at once; seen: a tenth where that many fit."""
    _, length, vocabulary = shape(model.inputs["world"])
    recipe = Recipe(**tuples(model.parameters["recipe"]))
    return min(10.0, (1 + how_many_together(recipe, length, vocabulary)) / 2)


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
    parameters = {"architecture": size.architecture or family.architecture, "width": size.width, "depth": size.depth, "device": device}
    parameters["recipe"] = asdict(Recipe(**tuples(recipe)))
    sequences, length, vocabulary = shape(world)
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
    sequences, length, vocabulary = shape(world)
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


def shape(world: Stage) -> tuple[int, int, int]:
    """Sequences of a world, their length in tokens and the vocabulary's size, estimated from the stage's parameters alone."""
    if "world" in world.inputs:  # another world, changed in place
        return shape(world.inputs["world"])
    name = world.function.rpartition(":")[2]
    return _size({**PLANTED, "parallel": ParallelText, "dialogue": Dialogue}[name](**tuples(world.parameters)))


def _size(world) -> tuple[int, int, int]:
    if isinstance(world, ParallelText):
        return world.pairs * len(world.languages), world.length, world.vocabulary
    if isinstance(world, Atlas):  # reckoned here: an edit to atlas.py would train all its models again
        words = world.relations * (world.values + 2 * world.templates) + world.filler_words
        length = world.facts_per_document * (STATEMENT + 1) + 1
        return world.documents, length, 2 * words + world.entities + world.noise_words
    return world.documents, world.length, world.words
