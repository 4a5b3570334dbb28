"""The engine on a GPU: parity with the CPU, the time of each part beside a plain training pass, and tokens a second.

    PYTHONPATH=. python tests/benchmarks/gpu.py --out gpu.json                  # one GPU, at most 8 minutes
    PYTHONPATH=. python tests/benchmarks/gpu.py --device cpu --tiny             # the same steps in seconds, anywhere
    PYTHONPATH=. python tests/benchmarks/gpu.py --only parity eigh "2 x 512"    # some of the steps
    PYTHONPATH=. python tests/benchmarks/gpu.py --readme figures/gpu/benchmark.json   # README's table, from what --out wrote

Smallest shapes first. Every line is printed as JSON as soon as it is known, and `--out` holds all lines so far. A step that the
remaining time does not allow is left out and named; one that fails is named with its error, and the next begins. Precisions:
fp32; tf32 (float32 products rounded to 10 bits, summed in float32); bf16 (the model's own passes; the engine's products are
tf32 and its sums float32 and float64). Needs torch, transformers, numpy, scipy, safetensors and threadpoolctl; kronfluence is
run beside where it can be imported.
"""

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch

from influence_kit.engine import fitting
from influence_kit.engine.directions import Directions
from influence_kit.engine.fitting import fit_ekfac
from influence_kit.engine.gradients import Recorder, device_of, forward, frozen, sequence_losses
from influence_kit.engine.index import build_index
from influence_kit.engine.layers import tracked_layers
from influence_kit.engine.passes import sequence_gradients
from influence_kit.engine.scans import score, top_scores
from influence_kit.engine.sequences import batch_rows, read_batch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@dataclass(frozen=True)
class Shape:
    """A model, a corpus of random tokens, and how it is read."""

    architecture: str
    depth: int
    width: int
    vocabulary: int
    sequences: int
    length: int
    queries: int
    batch_size: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


SHAPES = {
    "2 x 512": Shape("gpt_neox", 2, 512, 512, 256, 128, 64, 64),
    "12 x 768": Shape("gpt2", 12, 768, 50257, 256, 512, 64, 32),
    "24 x 1024": Shape("gpt2", 24, 1024, 50257, 64, 512, 16, 16),
}
GOAL = Shape("gpt_neox", 12, 768, 50304, 4096, 512, 64, 32)  # 160M weights
TINY = {"2 x 16": Shape("gpt_neox", 2, 16, 31, 12, 10, 3, 4), "3 x 24": Shape("gpt2", 3, 24, 41, 8, 12, 2, 4)}
TINY_GOAL = Shape("gpt_neox", 2, 16, 31, 24, 10, 3, 8)


@dataclass
class Bench:
    """Where it runs, how long it may, and what is known so far."""

    device: str
    tiny: bool
    seconds: float
    out: Path | None
    began: float
    lines: list

    def say(self, step: str, **facts) -> dict:
        """Print a line, and write all lines so far."""
        line = {"step": step, "at": round(time.perf_counter() - self.began, 1), **facts}
        self.lines.append(line)
        print(json.dumps(line), flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps(self.lines, indent=1) + "\n")
        return line

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began)

    def clock(self) -> float:
        """Seconds, once the device has done all that it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, function: Callable, *arguments, **named) -> tuple[float, object]:
        at = self.clock()
        result = function(*arguments, **named)
        return self.clock() - at, result

    @property
    def precisions(self) -> tuple[str, ...]:
        return ("fp32", "tf32", "bf16") if self.device == "cuda" else ("fp32", "bf16")

    @property
    def memory(self) -> float:
        """Bytes that directions may take."""
        return 0.4 * torch.cuda.mem_get_info()[1] if self.device == "cuda" else 2e9


@contextmanager
def precision(name: str) -> Iterator[torch.dtype]:
    """The dtype of a model's weights, and how float32 products are rounded, while it lasts."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if name in ("fp32", "fp64") else "high")
    try:
        yield {"bf16": torch.bfloat16, "fp64": torch.float64}.get(name, torch.float32)
    finally:
        torch.set_float32_matmul_precision(before)


def tokens(shape: Shape, rows: int, seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, shape.vocabulary, (rows, shape.length), generator=generator)}


def model_of(shape: Shape, device: str):
    """A random float32 model, the same on every device: far from uniform; where it is deep, nearer to its initial weights,
    since four times those make a chaotic function of it."""
    from random_models import random_model

    model = random_model(shape.architecture, 1, shape.width, shape.depth, shape.vocabulary, shape.length)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and shape.depth > 4:
                parameter.div_(3)
    return model.to(device)


def swept() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def apart(found, expected) -> float:
    """The largest difference, in units of the largest number."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).abs().max() / expected.abs().max())


def correlation(found, expected) -> float:
    """Of all scores."""
    return float(torch.corrcoef(torch.stack([found.double().cpu().flatten(), expected.double().cpu().flatten()]))[0, 1])


# --- the steps


def parity(bench: Bench) -> None:
    """Scores, norms, rankings and an index's answers of three architectures, here against the CPU."""
    import tempfile

    for architecture in ("gpt_neox", "llama", "gpt2"):
        shape = Shape(architecture, 2, 32, 61, 40, 24, 4, 16)
        data, queries, found = tokens(shape, 40, 2), tokens(shape, 4, 3), {}
        for device in ("cpu", bench.device):
            model = model_of(shape, device)
            factors = fit_ekfac(model, data, batch_size=shape.batch_size)
            scores = score(model, factors, queries, data)
            ends = top_scores(model, factors, queries, data, k=5)
            with tempfile.TemporaryDirectory() as folder:
                answer = build_index(model, factors, data, folder).query(model, queries, 5, sequences=data, rescore=20)
            found[device, "run"] = (factors.labels, scores, ends, answer)
        (labels, scores, ends, answer), other = found["cpu", "run"], found[bench.device, "run"]
        bench.say(
            "parity",
            architecture=architecture,
            same_labels=bool(torch.equal(labels, other[0].cpu())),
            scores=apart(other[1].values, scores.values),
            self_influence=apart(other[1].self_influence, scores.self_influence),
            same_top=bool(torch.equal(ends.sequences, other[2].sequences)),
            same_index_answers=bool(torch.equal(answer.sequences, other[3].sequences)),
        )


def rates(bench: Bench) -> None:
    """What the device does at best: products by precision, and copies."""
    if bench.device != "cuda":
        return
    for name in ("fp64", "fp32", "tf32", "bf16"):
        with precision(name) as dtype:
            x = torch.randn(4096, 4096, device="cuda").to(dtype)
            x @ x
            seconds, _ = bench.timed(lambda x=x: [x @ x for _ in range(8)])
        bench.say("rate", precision=name, tflops=round(8 * 2 * 4096**3 / seconds / 1e12, 1))
    x = torch.randn(1 << 28, device="cuda")
    x.clone()
    seconds, _ = bench.timed(x.clone)
    bench.say("rate", copy_tb_a_second=round(2 * x.nbytes / seconds / 1e12, 2))


def on_streams(matrices: list, workers: int) -> list:
    """Eigendecompositions on several streams of the GPU at once."""

    def one(matrix):
        with torch.cuda.stream(torch.cuda.Stream()):
            found = torch.linalg.eigh(matrix)
            torch.cuda.current_stream().synchronize()
        return found

    torch.cuda.synchronize()
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, matrices))


def on_threads(matrices: list, workers: int) -> list:
    """Eigendecompositions on the CPU's cores, one thread each."""
    from scipy.linalg import eigh
    from threadpoolctl import threadpool_limits

    def one(matrix):
        values, vectors = eigh(matrix.cpu().numpy(), driver="evd", overwrite_a=True, check_finite=False)
        return torch.from_numpy(values).to(matrix), torch.from_numpy(vectors).to(matrix)

    with threadpool_limits(1), ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, matrices))


def eigendecompositions(bench: Bench) -> None:
    """Ways to decompose covariances of one size: seconds each, and how well the vectors diagonalise."""
    for side in (768, 2048, 3072) if not bench.tiny else (24,):
        decompose(bench, side)


def decompose(bench: Bench, side: int) -> None:
    """Several ways for one matrix, whose spectrum falls over ten orders as those of activations do."""
    generator = torch.Generator().manual_seed(side)
    x = torch.randn(side, side, generator=generator, dtype=torch.float64).to(bench.device)
    q = torch.linalg.qr(x)[0]
    matrix = (q * torch.logspace(0, -10, side, dtype=torch.float64, device=bench.device)) @ q.T
    matrix, cores = (matrix + matrix.T) / 2, min(8, torch.get_num_threads())
    many = [matrix.clone() for _ in range(8)]
    ways: dict[str, tuple[int, Callable[[], list]]] = {
        "float64": (2, lambda: [torch.linalg.eigh(m) for m in many[:2]]),
        "float32": (2, lambda: [torch.linalg.eigh(m.float()) for m in many[:2]]),
        "float64, a batch of 4": (4, lambda: list(zip(*torch.linalg.eigh(torch.stack(many[:4]))))),
    }
    if bench.device == "cuda":
        ways |= {f"float64, {n} streams": (8, lambda n=n: on_streams(many, n)) for n in (2, 4)}
        ways["float32, 4 streams"] = (8, lambda: on_streams([m.float() for m in many], 4))
    if side < 2048:
        ways[f"CPU, {cores} threads"] = (8, lambda: on_threads(many, cores))
    torch.linalg.eigh(matrix[:64, :64])
    for name, (number, run) in ways.items():
        if bench.left < 60 and not bench.tiny:
            return
        seconds, found = bench.timed(run)
        rest = found[0][1].double().T @ matrix @ found[0][1].double()
        rest.diagonal().zero_()
        error = float(rest.norm() / matrix.norm())
        bench.say("eigh", side=side, way=name, seconds_each=round(seconds / number, 4), off_diagonal=error)


def products(bench: Bench) -> None:
    """The products of a scan: per-sequence gradients, rotations, and what queries cost."""
    for name in bench.precisions[:2]:
        with precision(name):
            multiply(bench, name, *((3072, 784, 511, 32, 64) if not bench.tiny else (24, 16, 9, 4, 3)))
        swept()


def multiply(bench: Bench, name: str, p: int, m: int, length: int, rows: int, asked: int) -> None:
    """Milliseconds of each product for layers [p, m], `rows` sequences and `asked` queries."""

    def make(*shape: int):
        return torch.randn(*shape, device=bench.device)

    a, g, V, basis = make(rows, length, m), make(rows, length, p), make(asked, p * m), make(p, p)
    flat, out = make(rows, p * m), make(rows, p, m)
    by_row = V.view(asked, p, m).transpose(0, 1), flat.view(rows, p, m).permute(1, 2, 0)
    ways = {
        "gradients": lambda: torch.matmul(g.mT, a, out=out),
        "gradients, rows apart": lambda: torch.matmul(g.mT, a[..., :-15], out=out[..., :-15]),
        "rotation of g": lambda: g.flatten(0, 1) @ basis,
        "covariance, whole": lambda: g.flatten(0, 1).T @ g.flatten(0, 1),
        "squares": lambda: flat.clone().square_().sum(0),
        "queries, one product": lambda: V @ flat.T,
        "queries, a product a row": lambda: torch.bmm(*by_row).sum(0),
        "norms": lambda: flat @ V[0],
    }
    for what, run in ways.items():
        run()
        seconds, _ = bench.timed(lambda run=run: [run() for _ in range(3)])
        bench.say("product", precision=name, what=what, milliseconds=round(1e3 * seconds / 3, 3))


def training_pass(bench: Bench, model, data: dict, batch_size: int, part: int = 1) -> float:
    """Seconds of plain forward and backward passes with the gradients of all weights over every `part`-th batch, times that."""
    batches = batch_rows(len(data["input_ids"]), batch_size)[::part]

    def run(batches: list[slice]) -> None:
        for rows in batches:
            batch = read_batch(data, rows, device_of(model))
            logits = forward(model, batch.tokens)[:, :-1]
            model.zero_grad()
            sequence_losses(logits, batch.tokens[:, 1:], batch.loss_mask[:, 1:]).sum().backward()

    run(batches[:1])
    seconds = bench.timed(run, batches)[0] * part
    model.zero_grad(set_to_none=True)
    return seconds


def passes_alone(bench: Bench, model, data: dict, batch_size: int) -> float:
    """Seconds of the forward and backward passes that give token gradients."""

    def run() -> None:
        with frozen(model), Recorder(tracked_layers(model)) as recorder:
            for rows in batch_rows(len(data["input_ids"]), batch_size):
                sequence_gradients(model, recorder, read_batch(data, rows, device_of(model)))

    return bench.timed(run)[0]


@contextmanager
def stopwatch(bench: Bench) -> Iterator[dict[str, float]]:
    """Seconds of the engine's parts, by name, while it lasts."""
    seconds: dict[str, float] = {}

    def watched(name: str, function: Callable) -> Callable:
        def run(*arguments, **named):
            took, result = bench.timed(function, *arguments, **named)
            seconds[name] = seconds.get(name, 0) + took
            return result

        return run

    with (
        patch.object(fitting, "_covariances", watched("covariance pass", fitting._covariances)),
        patch.object(fitting, "_spectra", watched("eigendecompositions", fitting._spectra)),
        patch.object(fitting, "_second_moments", watched("eigenvalue pass", fitting._second_moments)),
        patch.object(Directions, "__init__", watched("directions", Directions.__init__)),
    ):
        yield seconds


def engine(bench: Bench, model, data: dict, queries: dict, batch_size: int, **named) -> tuple[dict, object]:
    """Seconds of fitting and scoring by part, and the scores."""
    swept()
    with stopwatch(bench) as seconds:
        fit, factors = bench.timed(fit_ekfac, model, data, batch_size=batch_size, **named)
        scan, scores = bench.timed(
            score, model, factors, queries, data, batch_size=batch_size, self_influence=False, memory=bench.memory
        )
    parts = {name: round(took, 3) for name, took in seconds.items()}
    parts |= {"scan": round(scan - seconds["directions"], 3), "factors": round(fit, 3), "scoring": round(scan, 3)}
    if bench.device == "cuda":
        parts["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return parts, scores


def measure(bench: Bench, name: str, shape: Shape) -> None:
    """Every part in every precision beside a training pass, and the error of scores against float64 where that is cheap."""
    data, queries = tokens(shape, shape.sequences, 2), tokens(shape, shape.queries, 3)
    few = {"input_ids": data["input_ids"][: max(shape.batch_size // 2, 2)]}
    some = {"input_ids": queries["input_ids"][:4]}
    labels = tokens(shape, len(few["input_ids"]), 4)["input_ids"]
    model, exact = model_of(shape, bench.device), None
    if shape.depth <= 12:
        with precision("fp64") as dtype:
            exact = engine(bench, model.to(dtype), few, some, shape.batch_size, labels=labels)[1].values
    weights = sum(each.numel() for each in model.parameters())
    for way in bench.precisions:
        with precision(way) as dtype:
            model = model_of(shape, bench.device).to(dtype)
            warm = engine(bench, model, few, some, shape.batch_size, labels=labels)[1]
            trained = training_pass(bench, model, data, shape.batch_size)
            alone = passes_alone(bench, model, data, shape.batch_size)
            parts, _ = engine(bench, model, data, queries, shape.batch_size)
        total = parts["factors"] + parts["scoring"]
        line = {"training pass": round(trained, 3), "forward and backward": round(alone, 3), **parts}
        line["of three training passes"] = round(total / 3 / trained, 2)
        line["tokens a second"] = round(shape.tokens / total)
        if exact is not None:
            line["error against float64"] = apart(warm.values, exact)
            line["correlation with float64"] = correlation(warm.values, exact)
        bench.say(name, precision=way, weights=weights, tokens=shape.tokens, **line)
        if bench.left < 3 * total:
            return


def kernels(bench: Bench, shape: Shape) -> None:
    """What the device does in each pass over two batches: seconds it takes, seconds it is busy, and with what."""
    from torch.profiler import ProfilerActivity, profile

    rows = 2 * shape.batch_size
    data, queries = tokens(shape, rows, 2), tokens(shape, 4, 3)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (bench.device == "cuda")

    def watched(name: str, function: Callable, way: str) -> Callable:
        def run(*arguments, **named):
            with profile(activities=activities) as seen:
                took, result = bench.timed(function, *arguments, **named)
            events = [e for e in seen.key_averages() if e.device_type != torch.autograd.DeviceType.CPU]
            events.sort(key=lambda event: -event.self_device_time_total)
            most = {e.key[:70]: [round(e.self_device_time_total / 1e3, 1), e.count] for e in events[:14]}
            busy = sum(e.self_device_time_total for e in events) / 1e6
            launched = sum(e.count for e in events)
            bench.say(
                "kernels",
                precision=way,
                part=name,
                seconds=round(took, 3),
                busy=round(busy, 3),
                kernels=launched,
                ms=most,
            )
            return result

        return run

    def scan(model, factors) -> None:
        score(model, factors, queries, data, batch_size=shape.batch_size, self_influence=False, memory=bench.memory)

    for way in bench.precisions[1:]:
        with precision(way) as dtype:
            model = model_of(shape, bench.device).to(dtype)
            engine(bench, model, data, queries, shape.batch_size)
            with (
                patch.object(fitting, "_covariances", watched("covariance pass", fitting._covariances, way)),
                patch.object(fitting, "_second_moments", watched("eigenvalue pass", fitting._second_moments, way)),
            ):
                factors = fit_ekfac(model, data, batch_size=shape.batch_size)
            watched("scan", scan, way)(model, factors)


def goal(bench: Bench, shape: Shape) -> None:
    """160M weights, 64 queries and 4,096 sequences of 512 tokens: tokens a second of factors and scores together."""
    data, queries = tokens(shape, shape.sequences, 2), tokens(shape, shape.queries, 3)
    few, some = ({"input_ids": each["input_ids"][: shape.batch_size]} for each in (data, queries))
    for way in bench.precisions[1:]:
        with precision(way) as dtype:
            model = model_of(shape, bench.device).to(dtype)
            engine(bench, model, few, {"input_ids": some["input_ids"][:2]}, shape.batch_size)
            trained = training_pass(bench, model, data, shape.batch_size, part=1 if bench.tiny else 8)
            parts, _ = engine(bench, model, data, queries, shape.batch_size)
        total = parts["factors"] + parts["scoring"]
        bench.say(
            "goal",
            precision=way,
            weights=sum(each.numel() for each in model.parameters()),
            tokens=shape.tokens,
            **{"training pass": round(trained, 2), **parts, "of three training passes": round(total / 3 / trained, 2)},
            **{"tokens a second": round(shape.tokens / total)},
        )
        if bench.left < 1.5 * (total + trained):
            return


def rivals(bench: Bench) -> None:
    """kronfluence beside the kit on the smallest shape, where this interpreter has it."""
    import importlib.util
    import tempfile

    if importlib.util.find_spec("kronfluence") is None:
        bench.say("rivals", kronfluence="not installed")
        return
    from adapters import run_kronfluence
    from rivals import prepare, run_influence_kit

    shape = SHAPES["2 x 512"] if not bench.tiny else TINY["2 x 16"]
    asked = argparse.Namespace(**vars(shape), device=bench.device, dtype="float32", padded=False, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        prepare(asked, Path(folder))
        for name, run in (("influence_kit", run_influence_kit), ("kronfluence", run_kronfluence)):
            bench.say("rivals", program=name, **run(asked, Path(folder))["times"])


def steps(bench: Bench) -> dict[str, tuple[float, Callable[[], None]]]:
    """By name: about how many seconds it takes on an H100, and what it does."""
    shapes, last = (TINY, TINY_GOAL) if bench.tiny else (SHAPES, GOAL)
    needed = dict(zip(shapes, (20, 60, 100)))
    found = {"parity": (15, lambda: parity(bench)), "rates": (5, lambda: rates(bench))}
    found["products"] = (5, lambda: products(bench))
    found["eigh"] = (40, lambda: eigendecompositions(bench))
    found |= {n: (needed[n], lambda n=n, s=s: measure(bench, n, s)) for n, s in itertools.islice(shapes.items(), 2)}
    found["goal"] = (60, lambda: goal(bench, last))
    found |= {n: (needed[n], lambda n=n, s=s: measure(bench, n, s)) for n, s in itertools.islice(shapes.items(), 2, 9)}
    found["kernels"] = (25, lambda: kernels(bench, last))
    return found | {"rivals": (20, lambda: rivals(bench))}


def table(lines: list[dict]) -> str:
    """Markdown of what a run of these steps wrote: seconds of each part beside a plain training pass."""
    parts = ("training pass", "covariance pass", "eigendecompositions", "eigenvalue pass", "directions", "scan")
    head = [
        "model",
        "precision",
        "weights",
        "tokens",
        *(f"{part} s" for part in parts),
        "all, of three training passes",
    ]
    head += ["tokens a second", "peak GB", "error of scores"]
    rows = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for line in lines:
        if "training pass" in line:
            cells = [line["step"], line["precision"], f"{line['weights'] / 1e6:.0f}M", f"{line['tokens']:,}"]
            cells += [f"{line[part]:.2f}" for part in parts] + [f"{line['of three training passes']:.2f}"]
            cells += [f"{line['tokens a second']:,}", f"{line['peak_gb']:.0f}"]
            error = line.get("error against float64")
            rows.append(f"| {' | '.join([*cells, '' if error is None else f'{error:.0e}'])} |")
    device = next(line for line in lines if line["step"] == "device")
    parity = [line["scores"] for line in lines if line["step"] == "parity" and "scores" in line]
    said = f"{device['name']}, torch {device['torch']}. Scores equal the CPU's to {max(parity):.0e} of the largest, "
    said += f"for {len(parity)} architectures; the last column compares with float64 on the CPU."
    return f"{said}\n\n" + "\n".join(rows) + "\n"


def main(words: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="shapes that take seconds anywhere")
    parser.add_argument("--minutes", type=float, default=8, help="steps that would take longer are left out (8)")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="some steps by name")
    parser.add_argument("--sequences", type=int, help="of the goal (4096)")
    parser.add_argument("--out", type=Path, help="a file for all lines, as one JSON list")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the table of such a file into README.md")
    asked = parser.parse_args(words)
    if asked.readme:
        from influence_kit.publishing.readme import fill

        lines = json.loads(asked.readme.read_text())
        readme = Path(__file__).resolve().parents[2] / "README.md"
        readme.write_text(fill(readme.read_text(), {"gpu": table(lines)}))
        return lines
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here: give --device cpu --tiny")
    bench = Bench(asked.device, asked.tiny, 60 * asked.minutes, asked.out, time.perf_counter(), [])
    name = torch.cuda.get_device_name() if asked.device == "cuda" else "cpu"
    bench.say("device", name=name, torch=torch.__version__, threads=torch.get_num_threads())
    if asked.sequences:
        global GOAL
        GOAL = replace(GOAL, sequences=asked.sequences)
    for name, (needed, run) in steps(bench).items():
        if asked.only and name not in asked.only:
            continue
        if not bench.tiny and bench.left < needed:
            bench.say(name, left_out=f"needs about {needed:.0f} s, {bench.left:.0f} are left")
            continue
        try:
            run()
        except Exception as error:
            bench.say(name, failed=f"{type(error).__name__}: {error}"[:500])
        swept()
    return bench.lines


if __name__ == "__main__":
    main()
