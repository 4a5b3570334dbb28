"""Retraining: what a model says when it is trained anew on half of its corpus, many times over.

The linear datamodelling score (Park et al. 2023, TRAK) asks of any method: do the summed scores of the sequences in a
random half rank the halves as the retrained models' answers do?

Models of a few thousand weights spend their training waiting for Python, so that many of them are trained in the time
of a few: `answers` stacks their weights and takes each step for all of them at once; `answers_of_all` trains as many
such groups as it takes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call, vmap

from influence_kit import models
from influence_kit.corpora.world import World, batch_of
from influence_kit.errors import UserError
from influence_kit.files import whole
from influence_kit.recipes import Recipe, how_many_together, schedule, tuples

APART = 1000  # between the seeds of repeated trainings: worlds count theirs in ones


def random_halves(total: int, subsets: int, seed: int) -> np.ndarray:
    """bool [subsets, total]: random halves of a corpus; with an even number of subsets every second one is the rest of
    the one before it, so that each sequence is in exactly half of them."""
    if total < 2 or subsets < 1:
        raise UserError(f"{subsets} halves of {total} sequences cannot be drawn: give at least 1 of at least 2")
    rng = np.random.default_rng([seed, 0x4A1F])
    found = np.zeros((subsets, total), bool)
    for row in range(0, subsets, 2):
        found[row, rng.permutation(total)[: total // 2]] = True
        if row + 1 < subsets:
            found[row + 1] = ~found[row]
    return found


def answers(
    config: Any,
    sequences: Mapping[str, Tensor],
    rows: Tensor,
    recipe: Recipe,
    seeds: Sequence[int],
    queries: Mapping[str, Tensor],
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Train K models, each on its own rows of a corpus in their own order and from its own seed; log-probabilities [K,
    Q] in nats of all queries' target tokens at the end.

    config: of transformers, which all models share; sequences, queries: `input_ids` int64 [N, T], `loss_mask` bool [N,
    T]; rows int64 [K, M], in which a row may occur more than once. Each is the model that `models.train` makes of
    sequences[rows[k]] with the recipe and its seed, up to rounding; checkpoints and held-out losses are left out.
    Raises UserError where one diverged.
    """
    number, total = rows.shape
    recipes = [replace(recipe, seed=seed) for seed in seeds]
    order = torch.stack([rows[k][models.slots(total, recipes[k])] for k in range(number)])
    batches = order.split(recipe.batch_size, 1)
    config = copy.deepcopy(config)
    config._attn_implementation = (
        "eager"  # the fused kernels know no stacked models and would be called for each of them
    )
    model = models.initialise(config, recipes[0].seed).to(device).train()
    weights = _stacked(config, recipes, device)
    optimiser = _optimiser(weights, recipe)
    for step, batch in enumerate(batches):
        tokens, keep = (sequences[name][batch].to(device) for name in ("input_ids", "loss_mask"))
        vmap(lambda own, tokens, keep: _mean_loss(model, own, tokens, keep))(weights, tokens, keep).sum().backward()
        _clip(weights, recipe.clip)
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * schedule(step, len(batches), recipe.warmup_steps)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if progress and (step + 1) % max(1, len(batches) // 20) == 0:
            progress(step + 1, len(batches))
    found = torch.stack([_answers_of_one(model, weights, k, queries, device) for k in range(number)])
    if not found.isfinite().all():
        seed = recipes[int((~found.isfinite()).any(1).nonzero()[0])].seed
        raise UserError(f"training again diverged (seed {seed}): lower learning_rate={recipe.learning_rate}")
    return found


def _stacked(config: Any, recipes: Sequence[Recipe], device: str) -> dict[str, Tensor]:
    """Weights [K, …] of models as their seeds draw them, by name; tied ones once."""
    drawn = {
        seed: dict(models.initialise(config, seed).named_parameters()) for seed in {recipe.seed for recipe in recipes}
    }
    names = drawn[recipes[0].seed]
    return {
        name: torch.stack([drawn[recipe.seed][name].detach() for recipe in recipes]).to(device).requires_grad_()
        for name in names
    }


def _optimiser(weights: dict[str, Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW, which acts on each entry by itself; matrices decay, vectors do not, as in `models.train`."""
    matrices = {
        "params": [weight for weight in weights.values() if weight.ndim >= 3],
        "weight_decay": recipe.weight_decay,
    }
    vectors = {"params": [weight for weight in weights.values() if weight.ndim < 3], "weight_decay": 0.0}
    return torch.optim.AdamW([matrices, vectors], lr=recipe.learning_rate, betas=recipe.betas, fused=True)


def _mean_loss(model: nn.Module, weights: dict[str, Tensor], tokens: Tensor, keep: Tensor) -> Tensor:
    """Mean next-token loss of one model's batch, with other weights in the places of its own."""
    loss, targets = models.cross_entropy(lambda **batch: functional_call(model, weights, kwargs=batch), tokens, keep)  # type: ignore[arg-type]
    return loss / targets


def _clip(weights: dict[str, Tensor], most: float) -> None:
    """Shrink each model's gradient [K, …] to a norm of at most `most`."""
    gradients = [weight.grad for weight in weights.values() if weight.grad is not None]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
    shrunk = (most / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(shrunk.view(-1, *[1] * (gradient.ndim - 1)))


def _answers_of_one(
    model: nn.Module, weights: dict[str, Tensor], k: int, queries: Mapping[str, Tensor], device: str
) -> Tensor:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name][k])
    model.eval()
    log_p, _ = models.evaluate(model, {name: tensor.to(device) for name, tensor in queries.items()})
    return log_p.cpu()


def answers_of_all(
    trained: Mapping,
    world: World,
    corpora: Sequence[np.ndarray],
    repeats: int,
    queries: Mapping[str, Tensor],
    kept: Path,
    progress: Callable[[int, int, str], None],
) -> Tensor:
    """What models say that are trained on each of many changed corpora, several times over.

    Args:
        trained: Parameters of the stage that trained the model (architecture, width, depth, device, recipe).
        corpora: Positions of the world's sequences, in the order of training, of each of C corpora.
        repeats: R, the number of training seeds, the model's own first.
        queries: `input_ids` and `loss_mask` [Q, T].
        kept: A folder where answers are kept as soon as they are there, so that a killed stage trains no model twice.

    Returns:
        log_p [C, R, Q], nats.
    """
    recipe = Recipe(**tuples(trained["recipe"]))
    config = models.configure(
        trained["architecture"], world.vocabulary_size, trained["width"], trained["depth"], world.context
    )
    sequences = batch_of(world.sequences)
    trainings = [(corpus, recipe.seed + APART * repeat) for corpus in corpora for repeat in range(repeats)]
    # Stacking itself costs a fifth of a step, whatever is stacked: two models share it.
    together = max(2, how_many_together(recipe, sequences["input_ids"].shape[1], world.vocabulary_size))
    kept.mkdir(parents=True, exist_ok=True)
    found = torch.full((len(trainings), len(queries["input_ids"])), torch.nan)
    for number, group in enumerate(groups := _groups(trainings, together)):
        path, done = kept / f"{number:04}.safetensors", sum(map(len, groups[:number]))

        def told(step: int, steps: int, done: int = done, group: list[int] = group) -> None:
            progress(done + len(group) * step // steps, len(trainings), "retrained models")

        if not path.exists():
            rows = torch.from_numpy(np.stack([trainings[k][0] for k in group]))
            log_p = answers(
                config, sequences, rows, recipe, [trainings[k][1] for k in group], queries, trained["device"], told
            )
            with whole(path) as part:
                save_file({"log_p": log_p.contiguous()}, part)
        found[group] = load_file(path)["log_p"]
        told(1, 1)
    return found.unflatten(0, (len(corpora), repeats))


def _groups(trainings: list, together: int) -> list[list[int]]:
    """Positions of trainings in even groups of at most so many, each of corpora of one length."""
    lengths = np.array([len(corpus) for corpus, _ in trainings])
    alike = [np.flatnonzero(lengths == one) for one in np.unique(lengths)]
    return [part.tolist() for group in alike for part in np.array_split(group, -(-len(group) // together))]
