"""The kit and its rivals on one model and the same tokens: stage times, ratios, peak memory, agreement of scores.

    python tests/benchmarks/rivals.py                                # the kit alone, and whatever rival this Python has
    python tests/benchmarks/rivals.py --kronfluence OTHER/bin/python --bergson ANOTHER/bin/python
    python tests/benchmarks/rivals.py --architecture gpt2 --width 64 --sequences 64 --length 32 --queries 4 --padded

Every program runs in a process of its own, one after the other, with the same number of threads, the same pseudo-labels
and the paper's damping; the rivals get the batch sizes they were fastest with. Times are of work, imports are done before. On a
virtual machine, whose speed wanders by a twentieth, take --rounds 2: each program's faster run counts. Prints Markdown tables.
Not a test: run by hand on an idle machine. Rivals tried: kronfluence 1.0.1, bergson 2.5.1; neither is a dependency of the kit.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from adapters import clock, memory, run_bergson, run_kronfluence

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("influence_kit", "kronfluence", "bergson")
CLASSES = {"gpt_neox": "GPTNeoXForCausalLM", "llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=list(CLASSES), default="gpt_neox")
    for name, value in {
        "width": 512,
        "depth": 2,
        "sequences": 256,
        "length": 128,
        "queries": 64,
        "vocabulary": 512,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--padded", action="store_true", help="sequences of different lengths (not for bergson)")
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1, help="run all programs so often; each one's faster run counts")
    for name in PROGRAMS[1:]:
        parser.add_argument(
            f"--{name}", default=sys.executable, metavar="PYTHON", help=f"an interpreter that has {name}"
        )
    parser.add_argument("--readme", action="store_true", help="also put the table into README.md")
    parser.add_argument("--worker", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def prepare(asked: argparse.Namespace, folder: Path) -> None:
    """A random model far from uniform, token files, and pseudo-labels."""
    sys.path.insert(0, str(ROOT / "tests"))
    from random_models import random_model

    model = random_model(asked.architecture, asked.seed, asked.width, asked.depth, asked.vocabulary, asked.length)
    model.save_pretrained(folder / "model")
    rng = np.random.default_rng(asked.seed)

    def tokens(rows: int) -> np.ndarray:
        return rng.integers(0, asked.vocabulary, (rows, asked.length))

    lengths = rng.integers(max(asked.length // 3, 3), asked.length + 1, (asked.sequences, 1))
    mask = np.arange(asked.length)[None] < (lengths if asked.padded else np.full_like(lengths, asked.length))
    train, query = tokens(asked.sequences), tokens(asked.queries)
    np.savez(folder / "tokens.npz", train=train, labels=tokens(asked.sequences), mask=mask, query=query)


def run_influence_kit(asked: argparse.Namespace, folder: Path) -> dict:
    """Through the public interface; then the scan alone, beside a plain training step over the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from influence_kit import fit_ekfac, score

    started = clock(asked)
    dtype = getattr(torch, asked.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype).to(asked.device).eval()
    files = {name: torch.from_numpy(array) for name, array in np.load(folder / "tokens.npz").items()}
    sequences, queries = {"input_ids": files["train"], "loss_mask": files["mask"]}, {"input_ids": files["query"]}
    times = {"setup": clock(asked) - started}
    at = clock(asked)
    factors = fit_ekfac(model, sequences, labels=files["labels"])
    times["factors"] = clock(asked) - at
    at = clock(asked)
    scores = score(model, factors, queries, sequences, self_influence=False)
    times["scoring"] = clock(asked) - at
    times["total"] = clock(asked) - started
    peak = memory(asked)
    np.save(folder / "influence_kit.npy", scores.values.double().numpy())
    return {"times": times, "peak": peak, "beside": beside_training(asked, model, factors, queries, sequences)}


def beside_training(asked, model, factors, queries, sequences) -> dict[str, float]:
    """Seconds of a plain training pass (all weights' gradients) and of scans alone, in turn; the best of four each."""
    import inspect

    import torch

    from influence_kit.engine import scans as scoring
    from influence_kit.engine.gradients import forward, sequence_losses
    from influence_kit.engine.sequences import batch_rows, read_batch

    total = len(sequences["input_ids"])

    def train() -> None:
        for rows in batch_rows(total, 32):  # it is slower by 64
            batch = read_batch(sequences, rows, asked.device)
            logits = forward(model, batch.tokens)[:, :-1]
            model.zero_grad()
            sequence_losses(logits, batch.tokens[:, 1:], batch.loss_mask[:, 1:]).sum().backward()

    batch_size = inspect.signature(scoring.score).parameters["batch_size"].default
    twice = {"input_ids": torch.cat([queries["input_ids"]] * 2)}
    prepared = {
        name: scoring.Sweep.of(
            model, factors, some, sequences, damping=0.1, batch_size=batch_size, norms=norms, memory=4e9
        )
        for name, some, norms in (
            ("scan", queries, False),
            ("scan, queries doubled", twice, False),
            ("scan with norms", queries, True),
        )
    }
    found: dict[str, list[float]] = {name: [] for name in ("training pass", *prepared)}
    for _ in range(4):
        at = clock(asked)
        train()
        found["training pass"].append(clock(asked) - at)
        for name, scan in prepared.items():
            with scan.state(None) as state:
                at = clock(asked)
                for _ in scan.chunks(state, lambda rows, part: part, None):
                    pass
                found[name].append(clock(asked) - at)
    return {name: min(seconds) for name, seconds in found.items()}


def main() -> None:
    asked = arguments()
    if asked.worker:
        import torch
        import transformers

        torch.set_num_threads(asked.threads)
        getattr(
            transformers, CLASSES[asked.architecture]
        )  # transformers imports a model's code when it is first asked for
        run = {"influence_kit": run_influence_kit, "kronfluence": run_kronfluence, "bergson": run_bergson}[asked.worker]
        result = run(asked, asked.folder)
        (asked.folder / f"{asked.worker}.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(asked, folder)
        rounds = [{p: r for p in PROGRAMS if (r := launch(asked, folder, p))} for _ in range(asked.rounds)]
        ran = {p: min((run[p] for run in rounds if p in run), key=lambda r: r["times"]["total"]) for p in rounds[0]}
        if "influence_kit" not in ran:
            sys.exit(1)
        print(table := report(asked, folder, ran))
        if asked.readme:
            sys.path.insert(0, str(ROOT))
            from influence_kit.publishing.readme import fill

            readme = ROOT / "README.md"
            readme.write_text(fill(readme.read_text(), {"rivals": table + "\n"}))


def launch(asked: argparse.Namespace, folder: Path, program: str) -> dict | None:
    """Run one program on the prepared files; None, with the reason on stderr, where it could not run."""
    python = getattr(asked, program, sys.executable)
    if program != "influence_kit":
        if shutil.which(python) is None:
            print(f"{program}: left out (there is no interpreter {python!r})", file=sys.stderr)
            return None
        found = subprocess.run([python, "-c", f"import {program}"], capture_output=True, text=True)
        if found.returncode or (program == "bergson" and (asked.padded or asked.device != "cpu")):
            print(
                f"{program}: left out ({found.stderr.strip().splitlines()[-1:] or 'not for these options'})",
                file=sys.stderr,
            )
            return None
    threads = {f"{name}_NUM_THREADS": str(asked.threads) for name in ("OMP", "MKL", "OPENBLAS")}
    environment = os.environ | threads | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    options = [
        f"--{n}={getattr(asked, n)}" for n in ("architecture", "width", "depth", "sequences", "length", "queries")
    ]
    options += [f"--{n}={getattr(asked, n)}" for n in ("vocabulary", "dtype", "device", "threads", "seed")]
    command = [python, __file__, *options, "--worker", program, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        print(f"{program} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    return json.loads((folder / f"{program}.json").read_text())


def report(asked: argparse.Namespace, folder: Path, ran: dict[str, dict]) -> str:
    """Markdown: what was run, the table of programs, the scan beside a training pass."""
    shape = f"{asked.depth} layers, width {asked.width}, {asked.sequences} sequences of {asked.length} tokens"
    lines = [
        f"{asked.architecture}, {shape}{' (padded)' if asked.padded else ''}, {asked.queries} queries, MLP layers, {asked.dtype}, "
        f"{asked.device}, {asked.threads} thread{'s' * (asked.threads > 1)}, {processor()}"
        f"{f'; the fastest of {asked.rounds} runs of each' if asked.rounds > 1 else ''}.",
        "",
        "| program | factors s | scoring s | total s | ratio | peak GB | largest difference of scores |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    ours = np.load(folder / "influence_kit.npy")
    for program, result in ran.items():
        times = result["times"]
        ratio = times["total"] / ran["influence_kit"]["times"]["total"]
        apart = abs(np.load(folder / f"{program}.npy") - ours).max() / abs(ours).max()
        lines.append(
            f"| {program} | {times['factors']:.1f} | {times['scoring']:.1f} | {times['total']:.1f} | {ratio:.2f} | "
            f"{result['peak'] / 1e9:.2f} | {'' if program == 'influence_kit' else f'{apart:.0e} of the largest'} |"
        )
    beside = ran["influence_kit"]["beside"]
    step, scan = beside["training pass"], beside["scan"]
    total = ran["influence_kit"]["times"]["total"]
    lines += [
        "",
        f"A training pass over the same sequences takes {step:.1f} s. The scan takes {scan / step:.2f} of it, "
        f"{beside['scan with norms'] / step:.2f} with self-influence; twice the queries cost "
        f"{beside['scan, queries doubled'] / scan - 1:.0%} more; everything together is {total / (3 * step):.2f} of three training passes.",
    ]
    return "\n".join(lines)


def processor() -> str:
    """The processor's name, as Linux tells it: products of matrices are two to three times as fast on some as on others."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
