"""The kit and its rivals on one model and the same tokens: stage times, ratios, peak memory, agreement of scores.

    python tests/benchmarks/rivals.py                                # the kit alone, and whatever rival this Python has
    python tests/benchmarks/rivals.py --kronfluence OTHER/bin/python --bergson ANOTHER/bin/python
    python tests/benchmarks/rivals.py --architecture gpt2 --width 64 --sequences 64 --length 32 --queries 4 --padded

Every program runs in a process of its own, one after the other, with the same number of threads, the same pseudo-labels
and the paper's damping; the rivals get the batch sizes they were fastest with. Prints Markdown tables. Not a test: run by
hand on an idle machine. Rivals tried: kronfluence 1.0.1, bergson 2.5.1; neither is a dependency of the kit.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
PATTERN = r"\.mlp\."
PROGRAMS = ("influence_kit", "kronfluence", "bergson")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=["gpt_neox", "llama", "gpt2"], default="gpt_neox")
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
    import torch
    import transformers as tf

    width, vocabulary = asked.width, asked.vocabulary
    common = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 0}
    deep = common | {"hidden_size": width, "num_hidden_layers": asked.depth, "num_attention_heads": 4}
    room = {"max_position_embeddings": asked.length}
    configuration = {
        "gpt_neox": lambda: tf.GPTNeoXConfig(**deep, **room, intermediate_size=4 * width),
        "llama": lambda: tf.LlamaConfig(**deep, **room, intermediate_size=3 * width, num_key_value_heads=2),
        "gpt2": lambda: tf.GPT2Config(**common, n_embd=width, n_layer=asked.depth, n_head=4, n_positions=asked.length),
    }[asked.architecture]()
    torch.manual_seed(asked.seed)
    model = tf.AutoModelForCausalLM.from_config(configuration)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder / "model")
    rng = np.random.default_rng(asked.seed)

    def tokens(rows: int) -> np.ndarray:
        return rng.integers(0, vocabulary, (rows, asked.length))

    lengths = rng.integers(max(asked.length // 3, 3), asked.length + 1, (asked.sequences, 1))
    mask = np.arange(asked.length)[None] < (lengths if asked.padded else np.full_like(lengths, asked.length))
    train, query = tokens(asked.sequences), tokens(asked.queries)
    np.savez(folder / "tokens.npz", train=train, labels=tokens(asked.sequences), mask=mask, query=query)


def run_influence_kit(asked: argparse.Namespace, folder: Path) -> dict:
    """Through the public interface; then the scan alone, beside a plain training step over the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    from influence_kit import fit_ekfac, score

    started = time.perf_counter()
    dtype = getattr(torch, asked.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype).to(asked.device).eval()
    files = {name: torch.from_numpy(array) for name, array in np.load(folder / "tokens.npz").items()}
    sequences, queries = {"input_ids": files["train"], "loss_mask": files["mask"]}, {"input_ids": files["query"]}
    times = {"setup": clock(asked) - started}
    at = clock(asked)
    factors = fit_ekfac(model, sequences, labels=files["labels"], batch_size=16)
    times["factors"] = clock(asked) - at
    at = clock(asked)
    scores = score(model, factors, queries, sequences, self_influence=False)
    times["scoring"] = clock(asked) - at
    times["total"] = clock(asked) - started
    peak = memory(asked)
    np.save(folder / "influence_kit.npy", scores.values.double().numpy())
    return {"times": times, "peak": peak, "beside": beside_training(asked, model, factors, queries, sequences)}


def beside_training(asked, model, factors, queries, sequences) -> dict[str, float]:
    """Seconds of a plain training pass (all weights' gradients) and of scans alone, in turn; the better of two each."""
    import torch

    from influence_kit import scoring
    from influence_kit.gradients import batch_rows, forward, read_batch, sequence_losses

    total = len(sequences["input_ids"])

    def train() -> None:
        for rows in batch_rows(total, 32):
            batch = read_batch(sequences, rows, asked.device)
            logits = forward(model, batch.tokens)[:, :-1]
            model.zero_grad()
            sequence_losses(logits, batch.tokens[:, 1:], batch.loss_mask[:, 1:]).sum().backward()

    twice = {"input_ids": torch.cat([queries["input_ids"]] * 2)}
    prepared = {
        name: scoring._Scan(model, factors, some, sequences, 0.1, 32, False, norms, None, 4e9)
        for name, some, norms in (
            ("scan", queries, False),
            ("scan, queries doubled", twice, False),
            ("scan with norms", queries, True),
        )
    }
    found: dict[str, list[float]] = {name: [] for name in ("training pass", *prepared)}
    for _ in range(2):
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


def run_kronfluence(asked: argparse.Namespace, folder: Path) -> dict:
    """kronfluence with its documented task interface; all queries in one batch, so that it reads the sequences once."""
    import logging
    import re
    import warnings

    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    warnings.filterwarnings("ignore")
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    started = time.perf_counter()
    dtype = getattr(torch, asked.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype).to(asked.device).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):  # which kronfluence does not know
            linear = nn.Linear(*module.weight.shape, dtype=dtype, device=asked.device)
            linear.weight.data, linear.bias.data = module.weight.data.T.contiguous(), module.bias.data
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    modules = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.search(PATTERN, n)]

    class NextToken(Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(input_ids=batch["tokens"], use_cache=False).logits[:, :-1]
            targets = (batch["labels"] if sample else batch["tokens"])[:, 1:]
            targets = targets.masked_fill(~batch["mask"][:, 1:], -100)
            return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return modules

        def get_attention_mask(self, batch):
            counted = batch["mask"].clone()  # positions with a target after them
            counted[:, :-1] = batch["mask"][:, 1:].flip(1).cumsum(1).flip(1) > 0
            counted[:, -1] = False
            return counted.long()

    class Rows(torch.utils.data.Dataset):
        def __init__(self, tokens, labels, mask):
            self.columns = {"tokens": tokens, "labels": labels, "mask": mask}

        def __len__(self):
            return len(self.columns["tokens"])

        def __getitem__(self, i):
            return {name: torch.from_numpy(column)[i] for name, column in self.columns.items()}

    files = np.load(folder / "tokens.npz")
    train = Rows(files["train"], files["labels"], files["mask"])
    query = Rows(files["query"], files["query"], np.ones(files["query"].shape, bool))
    task = NextToken()
    with tempfile.TemporaryDirectory() as kept:
        analyzer = Analyzer(
            "rival", prepare_model(model, task), task, cpu=asked.device == "cpu", output_dir=kept,
            log_level=logging.ERROR, disable_tqdm=True,
        )  # fmt: skip
        factor, scoring = FactorArguments(strategy="ekfac"), ScoreArguments(damping_factor=None)
        factor.covariance_max_examples = factor.lambda_max_examples = None
        if asked.dtype == "float64":
            for arguments_, names in (
                (factor, ("activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda")),
                (scoring, ("query_gradient_svd", "per_sample_gradient", "precondition", "score")),
            ):
                for name in names:
                    setattr(arguments_, f"{name}_dtype", torch.float64)
        times = {"setup": clock(asked) - started}
        at = clock(asked)
        analyzer.fit_all_factors("f", train, per_device_batch_size=8, factor_args=factor)
        times["factors"] = clock(asked) - at
        at = clock(asked)
        analyzer.compute_pairwise_scores(
            "s", "f", query, train, score_args=scoring, per_device_query_batch_size=64, per_device_train_batch_size=8
        )
        times["scoring"] = clock(asked) - at
        times["total"] = clock(asked) - started
        np.save(folder / "kronfluence.npy", analyzer.load_pairwise_scores("s")["all_modules"].double().numpy())
    return {"times": times, "peak": memory(asked)}


def run_bergson(asked: argparse.Namespace, folder: Path) -> dict:
    """bergson's own workers, one after the other, on ready-made token datasets."""
    import re
    import shutil

    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM

    disable_progress_bars()
    from bergson.build import build_worker
    from bergson.collector.collector import HookCollectorBase
    from bergson.config import config as settings
    from bergson.data import load_scores
    from bergson.hessians.apply_hessian import EkfacConfig, apply_worker
    from bergson.hessians.hessian_approximations import hessian_worker
    from bergson.score.score import score_worker

    started = time.perf_counter()
    files = np.load(folder / "tokens.npz")
    model = str(folder / "model")

    def rows(tokens: np.ndarray, labels: np.ndarray | None = None) -> Dataset:
        columns = {"input_ids": tokens.tolist(), "length": [asked.length] * len(tokens)}
        return Dataset.from_dict(columns if labels is None else columns | {"labels": labels.tolist()})

    names = list(HookCollectorBase.discover_targets(AutoModelForCausalLM.from_pretrained(model).base_model))
    others = [name for name in names if not re.search(PATTERN, f".{name}")]
    with tempfile.TemporaryDirectory() as kept:

        def step(name: str):
            made = settings.IndexConfig(
                run_path=str(Path(kept) / name), model=model, precision={"float32": "fp32", "float64": "fp64"}[asked.dtype],
                token_batch_size=8 * asked.length, include_bias=True, loss_reduction="sum",
                filter_modules=",".join(others) or None,
            )  # fmt: skip
            made.partial_run_path.mkdir(parents=True, exist_ok=True)
            return made

        def done(made) -> str:
            shutil.move(made.partial_run_path, made.run_path)
            return made.run_path

        times = {"setup": time.perf_counter() - started}
        at, made = time.perf_counter(), step("factors")
        precision = {"float32": "fp32", "float64": "fp64"}[asked.dtype]
        curvature = settings.HessianConfig(
            method="kfac", ev_correction=True, hessian_dtype=precision, use_dataset_labels=True
        )
        hessian_worker(0, 0, 1, made, curvature, rows(files["train"], files["labels"]))
        factors = done(made)
        times["factors"] = time.perf_counter() - at
        at, made = time.perf_counter(), step("queries")
        build_worker(0, 0, 1, made, settings.PreprocessConfig(), rows(files["query"]))
        queries, inverse = done(made), str(Path(kept) / "inverse")
        apply_worker(
            0, 0, 1,
            EkfacConfig(hessian_method_path=factors, gradient_path=queries, run_path=inverse, ev_correction=True),
            settings.InversionConfig("damped_inverse", 0.1),
        )  # fmt: skip
        made = step("scores")
        asked_for = settings.ScoreConfig(query_path=inverse)
        score_worker(0, 0, 1, made, asked_for, settings.PreprocessConfig(), rows(files["train"]))
        found = np.asarray(load_scores(made.partial_run_path)[:], np.float64).reshape(asked.sequences, -1).T
        times["scoring"] = time.perf_counter() - at
        times["total"] = time.perf_counter() - started
    np.save(folder / "bergson.npy", found)
    return {"times": times, "peak": memory(asked)}


def clock(asked: argparse.Namespace) -> float:
    """Seconds, once the device has done all it was given."""
    if asked.device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def memory(asked: argparse.Namespace) -> float:
    """Peak bytes: of the process on a CPU, of allocated tensors on a GPU."""
    if asked.device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    asked = arguments()
    if asked.worker:
        import torch

        torch.set_num_threads(asked.threads)
        result = globals()[f"run_{asked.worker}"](asked, asked.folder)
        (asked.folder / f"{asked.worker}.json").write_text(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(asked, folder)
        ran = {program: result for program in PROGRAMS if (result := launch(asked, folder, program))}
        if "influence_kit" not in ran:
            sys.exit(1)
        print(table := report(asked, folder, ran))
        if asked.readme:
            sys.path.insert(0, str(ROOT))
            from influence_kit.pipeline.readme import fill

            readme = ROOT / "README.md"
            readme.write_text(fill(readme.read_text(), {"rivals": table + "\n"}))


def launch(asked: argparse.Namespace, folder: Path, program: str) -> dict | None:
    """Run one program on the prepared files; None, with the reason on stderr, where it could not run."""
    python = getattr(asked, program, sys.executable)
    if program != "influence_kit":
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
        f"{asked.device}, {asked.threads} thread{'s' * (asked.threads > 1)}.",
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


if __name__ == "__main__":
    main()
