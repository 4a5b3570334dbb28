"""What fitting, scanning and indexing take at any size, before anything runs: operations, bytes and, at a speed, time.

Operations are those of matrix products (a multiply-add is two), counted as the engine does them on sequences of T tokens,
so L = T - 1 positions, and layers [P, M'] (M' counts a bias). Elementwise work, the sampling of labels and what ranks send
each other are left out. Memory and temporary files are one rank's, what stays on disk is all ranks' together.
"""

import copy
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from .blas import matmul
from .codes import MIXED, NORMS, layout
from .directions import LEANING, OVERSAMPLED, POWER_STEPS, QUERY_BLOCK
from .features import PILOT
from .fitting import fit_ekfac
from .index import Index, build_index
from .layers import WIDEST
from .passes import KEPT, room
from .scans import score
from .shelf import aligned_width

VOCABULARY = 50_000
RATIO = 64  # a decoder is about as many times as wide as it is deep, and its width a multiple of it
EIGH = 30  # float32 operations in the time that an m-wide float64 eigh takes, over m^3: seen on a CPU core
FILE_SPEED = 2e9  # bytes a second of temporary files and of the index
DTYPES = {"float64": (8, 8), "float32": (4, 4), "bfloat16": (2, 4), "float16": (2, 4)}  # bytes of a weight, of all else
SIZES = {"PB": 1e15, "TB": 1e12, "GB": 1e9, "MB": 1e6}
TIMES = {"days": 86400, "h": 3600, "min": 60, "s": 1}


def _default(function: Callable, name: str):
    return inspect.signature(function).parameters[name].default


FIT_MEMORY = _default(fit_ekfac, "memory")
RESCORED = _default(Index.query, "rescore")


class Layer(NamedTuple):
    """One tracked linear map: P, M', and whether it reads the same tensor as a layer before it."""

    outputs: int
    inputs: int
    shared: bool = False


@dataclass(frozen=True)
class Decoder:
    """A transformer whose blocks hold 12 width^2 weights: 4 of attention, 8 of an MLP four times as wide."""

    width: int
    depth: int
    layers: str = "mlp"
    vocabulary: int = VOCABULARY

    @property
    def shapes(self) -> list[Layer]:
        """The tracked layers: those of the MLPs, or all but the head."""
        d = self.width
        attention = [Layer(3 * d, d), Layer(d, d)] if self.layers == "all" else []
        return [*attention, Layer(4 * d, d), Layer(d, 4 * d)] * self.depth

    def passes(self, positions: int) -> float:
        """Operations of a forward and a backward pass over one sequence: weights are frozen, and the graph begins behind
        the first tracked layer. Attention is counted in full, not its causal half."""
        d, behind = self.width, self.depth - (self.layers == "mlp")
        linear = 2 * self.vocabulary * d + d**2 * (12 * (2 * self.depth - 1) + (9 if self.layers == "all" else 4))
        return 2.0 * positions * (linear + positions * d * (2 * self.depth + 4 * behind))


@dataclass(frozen=True)
class Work:
    """`sequences` of `length` tokens are scanned for `queries` by `ranks`, with factors fitted on `fit` sequences.

    rank: of query directions, None for whole ones; memory: bytes of them that a rank holds. top: keep so many of either
    end of each query's ranking, None for all scores. disk: bytes that a rank's temporary files may take. batch_size: None for
    the engine's own, which differ.
    """

    sequences: int
    length: int = 512
    queries: int = 64
    fit: int = 100_000
    ranks: int = 1
    blocks: int = 1
    rank: int | None = None
    batch_size: int | None = None
    index_bytes: int = 8192
    top: int | None = None
    self_influence: bool = False
    memory: float = 2e9
    disk: float = 0.0
    dtype: str = "float32"


class Speed(NamedTuple):
    """Of one rank: operations a second, seconds of a 1,000-wide float64 eigh, and where these are from."""

    operations: float
    eigh: float
    source: str


@dataclass(frozen=True)
class Stage:
    """What a stage takes of the busiest rank; cubes: m^3 summed over eigendecompositions, traffic: bytes through files."""

    name: str
    operations: float
    memory: float
    temporary: float = 0.0
    disk: float = 0.0
    traffic: float = 0.0
    cubes: float = 0.0

    def seconds(self, speed: Speed) -> float:
        """Time: computing, decomposing and waiting for files take turns, as in the engine."""
        return self.operations / speed.operations + self.cubes / 1e9 * speed.eigh + self.traffic / FILE_SPEED


def decoder(parameters: float, layers: str = "mlp") -> Decoder:
    """The decoder of about this many parameters, embeddings not counted: 12 width^2 depth, width near 64 depth."""
    if parameters < (least := 12 * RATIO**2):
        raise ValueError(f"--parameters={parameters:.12g} is less than one block {RATIO} wide: give {least} or more")
    width = RATIO * max(1, round((parameters * RATIO / 12) ** (1 / 3) / RATIO))
    return Decoder(width, max(1, round(parameters / (12 * width**2))), layers)


def _parts(width: int, blocks: int) -> list[int]:
    """Sizes of a side's diagonal blocks."""
    blocks = min(blocks, width)
    return [width // blocks + (i < width % blocks) for i in range(blocks)]


def _triangle(width: int, blocks: int) -> int:
    """Numbers in a covariance's lower triangle, in strips of an eighth of a block: so many multiply-adds a token."""
    strips = [(m, max(m // 8, 128), row) for m in _parts(width, blocks) for row in range(0, m, max(m // 8, 128))]
    return sum(min(step, m - row) * (m - row) for m, step, row in strips)


class _Sizes:
    """What several stages need: numbers of the factors, bytes of a batch, operations of a rotation."""

    def __init__(self, shapes: Sequence[tuple], model: Decoder, work: Work) -> None:
        self.layers, self.work, self.L = [Layer(*shape) for shape in shapes], work, work.length - 1
        weight, self.number = DTYPES[work.dtype]
        self.inputs = [layer.inputs for layer in self.layers if not layer.shared]
        self.sides = self.inputs + [layer.outputs for layer in self.layers]  # in the order that ranks share them
        self.square = {n: sum(m**2 for m in _parts(n, work.blocks)) for n in {n for s in self.layers for n in s[:2]}}
        self.bases, self.numbers = sum(self.square[n] for n in self.sides), sum(P * M for P, M, _ in self.layers)
        self.labels = 8.0 * work.fit * work.length
        self.factors = self.number * (self.bases + self.numbers) + self.labels
        self.passes = model.passes(self.L)
        self.weights = float(weight * model.width * (12 * model.width * model.depth + model.vocabulary))
        # As in passes.py: what is recorded of a token, what autograd keeps of all its maps (16 widths a block), and its logits.
        self.recorded = self.number * sum(P + M for P, M, _ in self.layers)
        self.kept, self.logits = self.number * KEPT * 16 * model.width * model.depth, 3 * self.number * model.vocabulary
        self.formed = sum(self.rotation(layer) for layer in self.layers) + 2.0 * self.L * self.numbers

    def batch_size(self, function: Callable) -> int:
        return self.work.batch_size or _default(function, "batch_size")

    def batch(self, function: Callable, most: int | None = None) -> float:
        """Bytes of the weights and of a batch, of `most` sequences or as many as this function of the engine reads: token
        gradients, and the pieces that a pass over them is taken in."""
        limits, rows = room(torch.device("cpu")), most or self.batch_size(function)
        rows = max(min(rows, int(limits.gradients // (self.L * self.recorded))), 1)
        piece = max(min(rows, int(limits.activations // (self.L * self.kept))), 1)
        logits = min(piece * self.L * self.logits, 3 * self.number * limits.logits)
        return self.weights + self.L * (rows * self.recorded + piece * self.kept) + logits

    def rotation(self, layer: Layer, outputs: bool = True, inputs: bool = True, by_tokens: bool = False) -> float:
        """Operations of rotating a sequence's gradient: of each side its tokens or, where that is fewer, the gradient."""
        P, M, shared = layer
        g, a = (self.L if by_tokens else min(self.L, other) for other in (M, P))
        return 2.0 * (outputs * g * self.square[P] + inputs * (not shared or a < self.L) * a * self.square[M])


def estimate(shapes: Sequence[tuple], model: Decoder, work: Work) -> list[Stage]:
    """The stages, for tracked layers of any `Layer` shapes and the passes of this model."""
    sizes = _Sizes(shapes, model, work)
    return [*_fit(sizes), *_scan(sizes), *_index(sizes)]


def _fit(s: _Sizes) -> list[Stage]:
    """Token gradients are kept between the passes as far as memory and disk last, and computed again beyond. Sums of
    covariances' triangles (8 bytes) make room, one square at a time, for eigenvectors in the working dtype."""
    batch, fitted, blocks = s.batch(fit_ekfac), s.work.fit / s.work.ranks, s.work.blocks
    needed = fitted * s.L * sum(s.sides) * s.number
    kept = min(FIT_MEMORY + s.work.disk, needed)
    filed = max(kept - FIT_MEMORY, 0)
    triangles = sum(_triangle(n, blocks) for n in s.sides)
    cubes = [float(sum(m**3 for m in _parts(n, blocks))) for n in s.sides]
    busiest = max(sum(cubes[rank :: s.work.ranks]) for rank in range(min(s.work.ranks, len(cubes))))
    widest = max(_parts(max(s.sides), blocks))
    held, workspace = kept - filed + s.labels, 24 * widest**2
    squared = 8 * (triangles - _triangle(widest, 1) + widest**2)  # what is decomposed takes the place of its triangle
    later = s.number * s.bases + 8 * s.numbers
    again = fitted * ((1 - kept / needed) * s.passes + s.formed)
    return [
        Stage("fit pass", fitted * (s.passes + 2.0 * s.L * triangles), batch + held + 8 * triangles, filed, 0, filed),
        Stage("eigendecomposition", 0, s.weights + held + squared + workspace, filed, cubes=busiest),
        Stage("eigenvalue pass", again, batch + held + later, filed, s.factors, filed),
    ]


def _scan(s: _Sizes) -> list[Stage]:
    """Every rank makes all directions; what of them is in a file is read for every batch."""
    work, Q, r, norms = s.work, s.work.queries, s.work.rank, s.work.self_influence
    asked, scanned, held = s.passes + s.formed, s.passes, []
    for layer in s.layers:
        P, M, _ = layer
        tokens = work.sequences * s.L // work.ranks
        outputs, inputs = (norms or LEANING * tokens < Q * other for other in (M, P))  # as in rotated_sides
        back_P, back_M = (not outputs) * s.square[P], (not inputs) * s.square[M]
        if r is None:
            held.append(P * (aligned_width(M) if inputs else M))
            asked += 2.0 * (back_P * M + back_M * P)
            scanned += s.rotation(layer, outputs, inputs) + 2.0 * (s.L + Q) * P * M
        else:
            low, probes = min(r, P, M), min(r + OVERSAMPLED, P, M)
            held.append(low * (P + M))
            asked += 2.0 * (P * M * probes * 2 * (1 + POWER_STEPS) + low * (P * probes + back_P + back_M))
            scanned += s.rotation(layer, outputs, inputs, by_tokens=True) + 2.0 * Q * s.L * low * (P + M)
            if norms:  # rotated inputs are at hand, unless it is the gradient that is rotated
                scanned += s.rotation(layer, True, s.L > P) + 2.0 * s.L * P * M
        scanned += 2.0 * norms * P * M
    directions, each = float(s.number * Q * sum(held)), work.sequences / work.ranks
    filed = max(directions - work.memory, 0)
    beside = s.batch(score) + s.factors + directions - filed + (filed > 0) * s.number * Q * max(held)
    largest = max(P * M for P, M, _ in s.layers)
    solving = s.number * (s.numbers + 4 * max(QUERY_BLOCK, largest))
    scores = s.number * work.sequences * (Q + norms) if work.top is None else 2 * Q * work.top * (s.number + 8)
    scanning = beside + norms * 2 * s.number * largest + scores  # the damped eigenvalues of a layer, and their inverse
    return [
        Stage("queries", Q * asked, beside + solving, filed, 0, filed),
        Stage("scan", each * scanned, scanning, filed, scores, filed * each / s.batch_size(score)),
    ]


def _index(s: _Sizes) -> list[Stage]:
    """A scan with self-influence writes coordinates of whitened gradients, after another over PILOT sequences where not all
    fit. A query reads all codes, on every rank, and unpacks each for as much as a product with it: N dims (1 + Q)
    multiply-adds. Its candidates, RESCORED at either end, are then scanned for it."""
    N, bits, dims, kept = s.work.sequences, *_kept(s)
    gradient, mixing = s.passes + s.formed + 2.0 * s.numbers, 2.0 * MIXED * dims * (bits < 16)
    index = float(N * (dims * bits // 8 + NORMS))
    once = s.factors - s.labels + 12 * kept
    pilot = min(PILOT, N) if kept < s.numbers else 0
    # Beside factors: the inverse of Lambda, and of each coordinate its number, sign, position and weight.
    beside = s.factors + s.number * s.numbers + (20 + s.number) * kept
    choosing = (pilot > 0) * 24 * s.numbers  # sums in float64, weighted, and in a row
    few = copy.copy(s)
    few.work = replace(s.work, sequences=min(2 * RESCORED, N), queries=1, rank=None, self_influence=True, top=None)
    few.work = replace(few.work, batch_size=s.batch_size(Index.query))
    asked, scanned = _scan(few)
    rescoring = asked.operations + scanned.operations
    build = N / s.work.ranks * (gradient + mixing) + pilot / s.work.ranks * (s.passes + s.formed)
    return [
        Stage(
            "index build",
            build,
            s.batch(build_index) + beside + choosing,
            0,
            index + 8.0 * N + once,
            index / s.work.ranks,
        ),
        Stage("one index query", gradient + mixing + 4.0 * N * dims, s.batch(Index.query, 1) + beside, traffic=index),
        Stage("its rescoring", rescoring, max(asked.memory, scanned.memory) + 4.0 * N),
    ]


def _kept(s: _Sizes) -> tuple[int, int, int]:
    """(bits, places, coordinates) that an index keeps of a sequence."""
    try:
        bits, dims = layout(s.numbers, s.work.index_bytes)
    except ValueError as error:
        raise ValueError(f"--index-bytes: {error}") from error
    return bits, dims, min(dims, s.numbers)


def problems(stages: Sequence[Stage], shapes: Sequence[tuple], work: Work) -> list[str]:
    """What the engine would refuse, or lose its time with, each with a remedy."""
    found, widest, beyond = [], max(max(shape[:2]) for shape in shapes) + 1, stages[3].temporary
    if (side := math.ceil(widest / work.blocks)) > WIDEST:
        enough = math.ceil(widest / WIDEST)
        found.append(f"refused: an eigenbasis {side:,} wide, more than {WIDEST:,}: give --blocks {enough} or more")
    if beyond:
        room = f"more than {_in(work.disk, SIZES)} of --disk" if beyond > work.disk else "read for every batch"
        what = f"{_in(beyond, SIZES)} of query directions beyond --memory, {room}"
        remedy = "give a low --rank, fewer --queries, or more --memory"
        found.append(f"{'refused' if beyond > work.disk else 'slow'}: {what}: {remedy}")
    return found


def speed_of(operations: float | None = None) -> Speed:
    """A rank's speed as given, or this machine's: float32 products for a second, and an eigh."""
    if operations is not None:
        return Speed(operations, EIGH * 1e9 / operations, "given; eigh in a CPU core's proportion")
    device, side = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 1024)
    x, y = torch.randn(side, side, device=device), torch.randn(1000, 1000, device=device, dtype=torch.float64)
    torch.linalg.eigh(y[:99, :99]), matmul(x, x)[0, 0].item()  # first calls take longer, and reading waits for a GPU
    began, done = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < 1:
        matmul(x, x)[0, 0].item()
        done += 1
    began = time.perf_counter()
    torch.linalg.eigh(y + y.T)[1][0, 0].item()
    where = "on its GPU" if device == "cuda" else f"threads: {torch.get_num_threads()}"
    return Speed(2 * side**3 * done / took, time.perf_counter() - began, f"measured on this machine, {where}")


def describe(model: Decoder, work: Work, speed: Speed) -> str:
    """The stages as a table for the terminal, totals with a scan and with an index instead, and what is assumed."""
    stages = estimate(model.shapes, model, work)
    bits, dims, kept = _kept(sizes := _Sizes(model.shapes, model, work))
    lines = [f"{'stage':<18}" + "".join(f"{head:>13}" for head in ("time", "memory", "temporary", "disk"))]
    groups = [(stage.name, [stage]) for stage in stages]
    for name, some in [*groups, ("all with scan", stages[:5]), ("all with index", stages[:3] + stages[5:])]:
        taken = max(s.memory for s in some), max(s.temporary for s in some), sum(s.disk for s in some)
        cells = [_in(sum(s.seconds(speed) for s in some), TIMES), *(_in(each, SIZES) for each in taken)]
        lines.append(f"{name:<18}" + "".join(f"{cell:>13}" for cell in cells))
    notes = f"""\
Time, memory and temporary files are those of each rank, of {work.ranks:,}; disk is all ranks' together.
Asked: {work.sequences:,} sequences of {work.length:,} tokens, {work.queries:,} queries, factors from {work.fit:,} sequences, {work.dtype}.
Model: {model.depth} blocks {model.width:,} wide with 12 width^2 parameters each (an MLP 4 times as wide; depth near width / {RATIO}),
  {model.vocabulary:,} tokens; layers: {model.layers}.
Speed: {speed.operations:.2g} operations/s, {speed.eigh:.2g} s an eigh 1,000 wide in float64, growing with the cube ({speed.source});
  files {_in(FILE_SPEED, SIZES)}/s. Left out: elementwise work, the sampling of labels, what ranks send each other.
Index: {dims * bits // 8 + NORMS:,} bytes a sequence: {kept:,} of the whitened gradient's {sizes.numbers:,} coordinates, bits of each: {bits}.
  Building it is a scan with self-influence{f", after one of {min(PILOT, work.sequences):,} sequences that chooses" if kept < sizes.numbers else ""}. A query reads all of it, on every rank;
  rescoring makes exact what it found, {RESCORED} at either end."""
    return "\n".join([*lines, notes, *problems(stages, model.shapes, work)])


def _in(value: float, units: Mapping[str, float]) -> str:
    unit = next((unit for unit, each in units.items() if value >= each), list(units)[-1])
    return f"{value / units[unit]:,.1f} {unit}"
