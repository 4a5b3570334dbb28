"""kronfluence and bergson on the files that `rivals.py` prepares, and how any program's time and memory are taken.

Each runs in an interpreter that need have nothing beside numpy, torch, transformers and its own package, so that all of
these are imported where they are used. A function writes the scores [Q, N] to `<program>.npy` in the folder and returns its
times in seconds and peak memory in bytes. Tried: kronfluence 1.0.1, bergson 2.5.1.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

PATTERN = r"\.mlp\."


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
