"""Refined scores on Ladder: how near they come to the converged solution of another sample, to proximal responses, and what they
cost beside a scan and its fit.

    python tests/benchmarks/refined.py --widths 8,16,32 --seeds 0,1

World B of the designs: 120,000 documents, models of two layers, of ten checkpoints the one whose queries lose nearest half a nat.
Factors from 1,000 documents, 4,000 scanned, 30 queries, a sample of 1,000 that neither shares. The reference is solved for to
convergence on another sample, `--reference` documents; how converged it is is printed. At width 8 also `--responses` proximal
responses. Trained models are kept in `--folder`. Times are seconds of the one core that it takes; about one to four minutes a model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from influence_kit import fit_ekfac, models, score
from influence_kit.corpora.world import World, batch_of
from influence_kit.corpora.worlds.ladder import Ladder, build
from influence_kit.engine.products import GaussNewton, sampled_inverse
from influence_kit.engine.refine import Iterate
from influence_kit.findings.is_ekfac_right import chosen, slopes
from influence_kit.measures.correlations import rank_correlations
from influence_kit.recipes import Recipe
from influence_kit.referees.pbrf import ProximalResponse, Unconverged

RATES = {8: 0.016, 16: 0.016, 32: 0.016, 64: 0.008, 128: 0.004}
STEPS = (1, 2, 4, 8, 16, 32)
NEAR = 0.5  # nats: the loss of queries that a checkpoint is chosen by


def main() -> None:
    asked = arguments()
    torch.set_num_threads(1)
    folder = asked.folder or Path(tempfile.mkdtemp())
    for width in asked.widths:
        for seed in asked.seeds:
            run(width, seed, asked, folder)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(each) for each in text.split(",")]  # noqa: E731
    parser.add_argument("--widths", type=numbers, default=[8, 16, 32])
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--documents", type=int, default=120_000)
    parser.add_argument("--sample", type=int, default=1_000)
    parser.add_argument("--reference", type=int, default=2_000)
    parser.add_argument(
        "--converged", type=int, default=32, help="iterations of the reference, each from drawn gradients"
    )
    parser.add_argument("--queries", type=int, default=30)
    parser.add_argument("--responses", type=int, default=14)
    parser.add_argument("--preconditioners", default="drawn,ekfac")
    parser.add_argument("--folder", type=Path)
    return parser.parse_args()


def run(width: int, seed: int, asked: argparse.Namespace, folder: Path) -> None:
    world = build(Ladder(seed=seed, documents=asked.documents))
    model, loss = trained(world, width, seed, folder / f"{asked.documents}-{width}-{seed}")
    rng = np.random.default_rng(seed)
    rows = np.split(
        rng.permutation(asked.documents), np.cumsum([4_000, 1_000, asked.sample, asked.sample, asked.reference])
    )
    scan, fit, sample, fresh, other = (batch_of(world.sequences, np.sort(each)) for each in rows[:5])
    queries = batch_of(world.queries, np.sort(rng.permutation(world.queries.num_rows)[: asked.queries]))
    fit_ekfac(model, {name: tensor[:64] for name, tensor in fit.items()})  # first calls take longer
    began = time.process_time()
    factors = fit_ekfac(model, fit)
    fitted = time.process_time() - began
    plain = score(model, factors, queries, scan)
    unit = time.process_time() - began
    began = time.process_time()
    eight = score(model, factors, queries, scan, refine=8, refine_on=sample).refinement
    refined = fitted + time.process_time() - began
    weights = sum(each.eigenvalues.numel() for each in factors.layers.values())
    print(f"width {width} ({weights:,} tracked weights), seed {seed}, queries lose {loss:.2f} nats")
    print(
        f"  a scan of 4,000 and its fit {unit:.2f} s; with refine=8 ({eight.preconditioner}) {refined / unit:.1f} times that"
    )
    curvature, far = (GaussNewton(model, factors, each) for each in (sample, fresh))
    v, seen = curvature.gradients(queries), curvature.gradients(scan, 256)
    whole = GaussNewton(model, factors, other)
    best = Iterate.begin(v, near := sampled_inverse(whole, 1, most=4096))
    for step in range(asked.converged):
        best = best.step(whole.product, near)
        if step + 1 == asked.converged // 2:
            half = best.x @ seen.T
    del near
    truth = best.x @ seen.T
    print(
        f"  reference on {asked.reference:,} others: residual {mean(best.r.norm(dim=1) / best.size):.3f} after {asked.converged} "
        f"iterations, rank correlation with itself after half as many {mean(agreement(half, truth)):.3f}"
    )
    directions = {"EK-FAC": curvature.precondition(v)}
    print(f"  {'':<20}{'rank corr.':>11}{'own residual':>14}{'fresh residual':>16}{'scans and fits':>16}")
    show("EK-FAC", directions["EK-FAC"], curvature, far, v, seen, truth, 1.0)
    for name in asked.preconditioners.split(","):
        began = time.process_time()
        precondition = sampled_inverse(curvature, 1) if name == "drawn" else curvature.precondition
        found, spent = Iterate.begin(v, precondition), 0.0
        for step in range(1, STEPS[-1] + 1):
            found = found.step(curvature.product, precondition)
            if step in STEPS:
                spent += time.process_time() - began
                directions[f"{step} ({name})"] = found.x
                show(f"{step} ({name})", found.x, curvature, far, v, seen, truth, 1 + spent / unit)
                began = time.process_time()
    began, draws = time.process_time(), max(4096 // asked.sample, 1)
    directions[name := f"Woodbury, {draws} draws"] = sampled_inverse(curvature, draws)(v)
    spent = time.process_time() - began
    show(name, directions[name], curvature, far, v, seen, truth, 1 + spent / unit)
    if width == 8 and asked.responses:
        apart = {name: tensor[: asked.sample] for name, tensor in other.items()}
        responses(model, factors, apart, scan, queries, directions, plain.values, asked, asked.documents)


def show(name, x, curvature, far, v, seen, truth, cost: float) -> None:
    own, fresh = ((v - each.product(x)).norm(dim=1) / v.norm(dim=1) for each in (curvature, far))
    same = mean(agreement(x @ seen.T, truth))
    print(f"  {name:<20}{same:>11.3f}{mean(own):>14.2f}{mean(fresh):>16.2f}{cost:>16.1f}", flush=True)


def responses(model, factors, sample, scan, queries, directions, plain, asked, total: int) -> None:
    """Over some documents, half of them EK-FAC's strongest: slope of the proximal responses on the scores, through zero, and rank
    correlation, both the mean over queries. The response is to one more copy, over a sample that no direction was solved on."""
    solver = ProximalResponse(model, factors, sample)
    curvature = GaussNewton(model, factors, sample)
    found, kept = [], []
    for place in chosen(plain, asked.responses, 0).tolist():
        try:
            one = {name: tensor[place : place + 1] for name, tensor in scan.items()}
            found.append(solver.respond(one, queries, 1 / total).log_p)
            kept.append(place)
        except Unconverged as error:
            print(f"  document {place} left out: {error}")
    true = torch.stack(found, 1)
    print(f"  {f'{len(kept)} proximal responses':<24}{'rank corr.':>10}{'slope':>8}")
    few = {name: tensor[kept] for name, tensor in scan.items()}
    for name, x in directions.items():
        values = curvature.scores(x, few).double()
        print(f"  {name:<24}{mean(agreement(values, true)):>10.2f}{mean(slopes(true, values)):>8.2f}", flush=True)


def agreement(scores: torch.Tensor, truth: torch.Tensor) -> np.ndarray:
    return rank_correlations(scores.numpy(), truth.numpy())


def mean(values) -> float:
    return float(np.mean(np.asarray(values)))


def trained(world: World, width: int, seed: int, folder: Path):
    """(model, mean loss of its queries) at the checkpoint whose queries lose nearest NEAR."""
    tenths = [(i + 1) / 10 for i in range(10)]
    queries = batch_of(world.queries)
    if not (folder / "losses.json").exists():
        recipe = Recipe(learning_rate=RATES[width], seed=seed, checkpoints=tuple(tenths), evaluations=1)
        models.train(configured(width, world), batch_of(world.sequences), batch_of(world.held_out), recipe, folder)
    losses = {at: -float(models.evaluate(models.load(folder, at), queries)[0].mean()) for at in tenths}
    at = min(losses, key=lambda each: abs(losses[each] - NEAR))
    return models.load(folder, at), losses[at]


def configured(width: int, world: World):
    """As `models.configure`, which takes multiples of 16."""
    config = models.configure("gpt_neox", world.vocabulary_size, max(width, 16), 2, world.context).to_dict()
    return transformers.GPTNeoXConfig(**config | {"hidden_size": width, "intermediate_size": 4 * width})


if __name__ == "__main__":
    main()
