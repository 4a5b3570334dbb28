"""What making a stage is estimated to take, for `--plan`, for what starts first and for what fits into memory together.

From counts of weights, tokens and steps; no stage's result depends on any of it.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path

from influence_kit.corpora.texts.dialogue import Dialogue
from influence_kit.corpora.texts.parallel import ParallelText
from influence_kit.corpora.worlds import WORLDS
from influence_kit.recipes import Recipe, how_many_together, steps_of, tuples
from influence_kit.runner.machine import gpus
from influence_kit.runner.stages import Cost, Stage

FLOPS = {
    "cpu": 6e10,
    "cuda": 2e13,
}  # operations a second of one core, as seen over a whole run; of an H200, half of what it was seen to sustain
PRODUCT = 0.06  # seconds of a curvature product for one query on a thousand sequences
STEP = 0.004  # seconds of overhead of one training step
QUERIES = 110  # scored
# Seconds on two cores and bytes of the stages that read a model from elsewhere, seen at 135 million weights.
FOREIGN = {
    "candidates": (20, 2e9),
    "factors": (540, 3.5e9),
    "scan": (150, 4e9),
    "steps": (110, 3.5e9),
    "random": (80, 4.5e9),
    "rounded": (95, 4e9),
    "cards": (50, 4e9),
}
SEEN = 540_000_000  # bytes of that model's weights
BASE = 600_000_000  # bytes of a process that has loaded torch
DIRECTIONS = 6_000_000_000  # bytes of query directions and their workspace held at most; the rest lies in files


def cost_of(stage: Stage) -> Cost:
    """Seconds on one process, bytes of memory and of disk."""
    made = {
        "text": _text,
        "weights": _packed,
        "world": _world,
        "model": _model,
        "influence": _scan,
        "chapter": _chapter,
        **dict.fromkeys(FOREIGN, _foreign),
    }
    return made.get(stage.kind, _extra)(stage)


def rate(stage: Stage) -> float:
    """Operations a second: on a GPU that is here, half of what a large product is measured to reach."""
    return FLOPS["cpu"] if stage.gpu is None else _measured(stage.gpu)


@cache
def _measured(gpu: str) -> float:
    import torch

    if gpu not in gpus():
        return FLOPS["cuda"]
    square = torch.randn(4096, 4096, device=gpu)
    square @ square
    torch.cuda.synchronize(gpu)
    began = time.perf_counter()
    for _ in range(10):
        square @ square
    torch.cuda.synchronize(gpu)
    return 10 * 2 * 4096**3 / (time.perf_counter() - began) / 2


def _text(stage: Stage) -> Cost:
    return Cost(60, BASE, 60_000_000)


def _packed(stage: Stage) -> Cost:
    return Cost(90, 4_000_000_000, 2_000_000_000)


def _foreign(stage: Stage) -> Cost:
    seconds, memory = FOREIGN[stage.kind]
    if "width" in stage.inputs.get("weights", stage).parameters:  # a little model, for tests
        return Cost(5, BASE, 10_000_000)
    folder = Path(str(stage.parameters.get("source", "")))
    files = list(folder.glob("*.safetensors")) if folder.is_dir() else []
    share = sum(file.stat().st_size for file in files) / SEEN if files else 1.0
    disk = 1_500_000_000 if stage.kind == "factors" else 10_000_000
    few = stage.kind == "scan" and "pool" not in stage.parameters["scored"]  # sentences or paragraphs alone
    return Cost(5 + share * seconds / (4 if few else 1), int(BASE + share * memory), int(share * disk) + 1_000_000)


def _chapter(stage: Stage) -> Cost:
    return Cost(30, 1_500_000_000, 5_000_000)


def _world(stage: Stage) -> Cost:
    sequences, length, _ = shape(stage)
    real = stage.function.__name__ not in ("make", *WORLDS)
    return Cost(0.1 + sequences * length / (1e5 if real else 2e6), BASE, 8 * sequences * length)


def _model(stage: Stage) -> Cost:
    if "recipe" not in stage.parameters:  # somebody else trained it
        return Cost(600, 16_000_000_000, 8_000_000_000)
    sequences, length, vocabulary = shape(stage.inputs["world"])
    recipe = Recipe(**tuples(stage.parameters["recipe"]))
    weights, embeddings = _weights(stage, vocabulary)
    steps = steps_of(sequences, recipe)
    seconds = steps * STEP + 6 * (weights + embeddings) * steps * recipe.batch_size * length / rate(stage)
    disk = 4 * (weights + embeddings) * len(recipe.checkpoints) + 100_000
    return Cost(seconds, BASE + 20 * weights + 16 * recipe.batch_size * length * vocabulary, disk)


def _scan(stage: Stage) -> Cost:
    model = stage.inputs["model"]
    if "recipe" not in model.parameters:
        return Cost(3600, 32_000_000_000, 4_000_000_000)
    sequences, length, vocabulary = shape(stage.inputs["world"])
    weights, embeddings = _weights(model, vocabulary)
    width, depth = model.parameters["width"], model.parameters["depth"]
    scanned, fitted = min(stage.parameters["sequences"], sequences), min(stage.parameters["fit"], sequences)
    maps = 8 * depth * width**2
    each = 4 * length * (weights + embeddings) + 4 * depth * length * 21 * width**2  # a pass, and tokens rotated
    seconds = 0.5 + (scanned * (each + 2 * QUERIES * maps) + 2 * fitted * each) / rate(stage)
    directions = min(12 * maps * QUERIES, DIRECTIONS)
    memory = BASE + 4 * maps * 40 + directions + 12 * 32 * length * vocabulary
    return Cost(seconds, memory, 4 * (QUERIES * scanned + maps + depth * 34 * width**2) + 8 * fitted * length)


def _extra(stage: Stage) -> Cost:
    """A finding's own stage: half of a scan (seen: a tenth of one to all of it), and what it trains again."""
    if "model" not in stage.inputs:
        return Cost(10, BASE, 10_000_000)
    model = stage.inputs["model"]
    scan = _scan(stage.inputs["influence"]) if "influence" in stage.inputs else Cost(10, 2 * BASE, 10_000_000)
    own = stage.parameters
    if not isinstance(own.get("model"), dict):
        solved = own["iterations"] * own["queries"] * len(own["asked"]) * PRODUCT if "asked" in own else 0
        return Cost(scan.seconds / 2 + solved, scan.memory_bytes, scan.disk_bytes)
    _, length, vocabulary = shape(stage.inputs["world"])
    changed = 1 + 2 * own["queries"] * len(own["counts"]) if "counts" in own else 0
    trainings = (own.get("subsets", 0) / 2 + changed) * own.get("repeats", 1)
    # seen: a tenth of the time a model, where that many fit together
    together = how_many_together(Recipe(**tuples(own["model"]["recipe"])), length, vocabulary)
    seconds = _model(model).seconds / min(10.0, (1 + together) / 2) * trainings
    return Cost(seconds + own.get("responses", 0) + (0 if trainings else 30), scan.memory_bytes, scan.disk_bytes)


def _weights(model: Stage, vocabulary: int) -> tuple[int, int]:
    width, depth = model.parameters["width"], model.parameters["depth"]
    return 12 * depth * width**2, vocabulary * width


def shape(world: Stage) -> tuple[int, int, int]:
    """Sequences of a world, their length in tokens and the vocabulary's size, by what its parameters say alone."""
    if "world" in world.inputs:  # another world, changed in place
        return shape(world.inputs["world"])
    kinds = {"parallel": ParallelText, "dialogue": Dialogue}
    cls = kinds.get(world.function.__name__) or WORLDS[world.function.__module__.rpartition(".")[2]]
    made = cls(**tuples(world.parameters))
    return made.documents, made.length, made.words
