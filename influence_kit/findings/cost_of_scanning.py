"""What influence costs, and what the shortcuts lose (chapter 10): EK-FAC beside LiSSA, queries at low rank, curvature
in diagonal blocks, and a filter by words before the scan.

Work is counted in *sequence gradients*: one forward and backward pass of one sequence, 3 W L multiplications for a
model of W weights (head included, embeddings not) and L positions. Everything else is counted in multiplications and
divided by that. Seconds belong to a machine; work does not.

The paper scored only the 10,000 sequences with the highest TF-IDF (Sec. 3.2.1; Eq 28 and 29) and found the unfiltered
top 10 among them for most queries (Sec. 5.2.2). Here every sequence of the scan is scored, so that what a filter would
have lost is known, and so is what it is to the query.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from influence_kit.corpora.world import World, batch_of
from influence_kit.errors import UserError
from influence_kit.findings.families import Planned, planted_grid, text_grid
from influence_kit.findings.profiles import Profile
from influence_kit.measures.correlations import correlations
from influence_kit.measures.intervals import Estimate, estimate_of, pick, ratio_of_means
from influence_kit.measures.lexical import overlap
from influence_kit.measures.lifts import top_count, top_members
from influence_kit.measures.relations import relations

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

    from influence_kit.engine.factors import Factors
    from influence_kit.engine.products import GaussNewton
    from influence_kit.findings.trained import Scanned, Trained

MODEL = ["family", "size", "seed"]  # columns that tell one model
ALL = "all"  # sequences of any relation
EIGH = 4.5  # multiplications of a symmetric eigendecomposition with vectors over n^3 (Golub and Van Loan, Sec. 8.3)
TIMED = 8  # steps of LiSSA timed at once
AFFORDABLE = 32  # the largest width that is solved exactly


def reads(profile: Profile) -> list[Planned]:
    """The largest model of three families, the planted ones for a few seeds, and a small model of Ladder beside an exact solution."""
    found = text_grid(profile, widths=largest_width(profile, "text"), extra=("batching",))
    for world in ("atlas", "ladder"):
        found += planted_grid(
            profile, world, widths=largest_width(profile, world), seeds=profile.few, extra=("batching",)
        )
    return found + planted_grid(profile, "ladder", widths=affordable_width(profile), extra=("cost",))


def largest_width(profile: Profile, family: str) -> list[int]:
    """The largest width of a family, in a list; none where the profile has no such family."""
    grid = getattr(profile, family)
    return [max(size.width for size in grid.family.sizes)] if grid else []


def affordable_width(profile: Profile) -> list[int]:
    """The largest width of Ladder at which an exact solution is affordable, the smallest where none is, in a list."""
    widths = sorted(size.width for size in profile.ladder.family.sizes) if profile.ladder else []
    return ([width for width in widths if width <= AFFORDABLE] or widths[:1])[-1:]


def batching(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Score some queries and sequences of a scan by every shortcut inside the estimate; write batching.parquet.

    A row per query, method and setting: agreement (correlation with the scores of the whole), top (share of its ten
    most influential that stay), stored (numbers kept over those of the whole). Methods: "rank" (query batching, setting
    is r), "random" (the same r by a random projection in place of the best one), "blocks" (setting is O; stored counts
    the factors' numbers), and "redrawn" (O = 1 fitted on other sequences and labels: what any fit leaves open). `share`
    is r / width; `positions` how many positions the query's loss can reach, which bounds the rank of its gradient.

    Args:
        parameters: queries, sequences (how many), fit (sequences of each fit by blocks), blocks (the O beside 1), and
            an extra's own.
    """
    import torch

    from influence_kit import models
    from influence_kit.engine.fitting import fit_ekfac
    from influence_kit.engine.products import GaussNewton
    from influence_kit.engine.scans import score

    world, rng = World.load(inputs["world"]), np.random.default_rng([parameters["seed"], 0xBA7C])
    model = models.load(inputs["model"], parameters["fraction"], parameters["device"])
    factors, scanned, scored = _scan(inputs["influence"])
    asked = np.sort(rng.permutation(scored)[: parameters["queries"]])
    queries = batch_of(world.queries, asked)
    sequences = batch_of(world.sequences, np.sort(rng.permutation(scanned)[: parameters["sequences"]]))
    damping, width = parameters["damping"], min(min(each.eigenvalues.shape) for each in factors.layers.values())
    ranks = [2**i for i in range(width.bit_length()) if 2**i < width] + [width]
    orders = [1, *parameters["blocks"]]
    done, steps = 0, len(ranks) + len(orders) + 3

    def scores_of(factors: Factors, **how) -> np.ndarray:
        nonlocal done
        done += 1
        progress(done, steps, "shortcuts")
        return score(model, factors, queries, sequences, damping, self_influence=False, **how).values.numpy()

    positions = (queries["loss_mask"].int() * torch.arange(queries["loss_mask"].shape[1])).max(1).values.numpy()
    rows: list[dict] = []

    def keep(method: str, setting: int, found: np.ndarray, whole: np.ndarray, stored: float) -> None:
        agreement, top = correlations(found, whole), top_shared(found, whole)
        share = setting / width if method in ("rank", "random") else math.nan
        about = {"method": method, "setting": setting, "share": share, "stored": stored}
        for i, (query, reach) in enumerate(zip(asked, positions, strict=True)):
            same = {"agreement": float(agreement[i]), "top": float(top[i])}
            rows.append({"query": int(query), "positions": int(reach), **about, **same})

    whole = scores_of(factors)
    curvature = GaussNewton(model, factors, sequences, damping)
    for rank, found in projected(curvature, queries, ranks, parameters["seed"]).items():
        keep("random", rank, found, whole, stored_at(factors, rank))
    for rank in ranks:
        keep("rank", rank, scores_of(factors, rank=rank), whole, stored_at(factors, rank))
    drawn = rng.permutation(world.sequences.num_rows)[: 2 * parameters["fit"]]
    first, second = (batch_of(world.sequences, np.sort(part)) for part in np.array_split(drawn, 2))
    fits = {o: fit_ekfac(model, first, parameters["layers"], seed=parameters["seed"], blocks=o) for o in orders}
    whole = scores_of(fits[1])
    for blocks, fitted in fits.items():
        if blocks > 1:
            keep("blocks", blocks, scores_of(fitted), whole, numbers(fitted) / numbers(fits[1]))
    again = fit_ekfac(model, second, parameters["layers"], seed=parameters["seed"] + 1)
    keep("redrawn", 1, scores_of(again), whole, 1.0)
    pq.write_table(pa.Table.from_pylist(rows), out / "batching.parquet")


def _scan(folder: Path) -> tuple[Factors, np.ndarray, np.ndarray]:
    """A scan's factors, and the positions of its sequences and queries."""
    from safetensors import safe_open

    from influence_kit.engine.factors import Factors

    with safe_open(str(folder / "scores.safetensors"), "np") as file:
        return Factors.load(folder / "factors.safetensors"), file.get_tensor("rows"), file.get_tensor("queries")


def stored_at(factors: Factors, rank: int) -> float:
    """Numbers that a query direction takes at this rank, r (P + M') a layer, over P M'."""
    shapes = [each.eigenvalues.shape for each in factors.layers.values()]
    return sum(min(rank, p, m) * (p + m) for p, m in shapes) / sum(p * m for p, m in shapes)


def numbers(factors: Factors) -> int:
    """Numbers that the factors hold: eigenvectors and eigenvalues of all layers."""
    bases = {
        id(q): q.numel() for each in factors.layers.values() for q in (*(each.inputs or ()), *(each.outputs or ()))
    }
    return sum(bases.values()) + sum(each.eigenvalues.numel() for each in factors.layers.values())


def projected(
    curvature: GaussNewton, queries: dict[str, Tensor], ranks: Iterable[int], seed: int
) -> dict[int, np.ndarray]:
    """Scores [Q, N] of the curvature's sequences, every direction projected to a random subspace of each rank (nested
    ones).

    The projection acts on the narrower side of each layer, so that the layer's full rank leaves the direction as it is.
    """
    import torch

    generator, ranks = torch.Generator().manual_seed(seed), list(ranks)
    directions = curvature.split(curvature.precondition(curvature.gradients(queries)))
    spans = {}
    for name, (p, m) in curvature.shapes.items():
        noise = torch.randn(min(p, m), min(p, m), generator=generator, dtype=torch.float64)
        spans[name] = torch.linalg.qr(noise)[0].to(directions[name])

    def narrowed(name: str, each: Tensor) -> Tensor:
        p, m = curvature.shapes[name]
        return (each @ spans[name]) if m <= p else (each.mT @ spans[name])

    asked = {name: narrowed(name, each) for name, each in directions.items()}
    parts: dict[int, list[Tensor]] = {rank: [] for rank in ranks}
    total, step = len(curvature.sequences["input_ids"]), 32
    for start in range(0, total, step):
        some = {name: tensor[start : start + step] for name, tensor in curvature.sequences.items()}
        found = {name: narrowed(name, each) for name, each in curvature.split(curvature.gradients(some)).items()}
        for rank in ranks:
            pairs = ((asked[n][..., :rank].flatten(1), found[n][..., :rank].flatten(1)) for n in asked)
            parts[rank].append(sum(a @ b.T for a, b in pairs))  # type: ignore[arg-type]
    return {rank: torch.cat(each, 1).cpu().numpy() for rank, each in parts.items()}


def cost(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Solve for some queries by EK-FAC, by LiSSA at many depths and to convergence; write cost, about and
    seconds.parquet.

    All methods invert the same matrix: the Gauss-Newton matrix of one sample of training sequences, damped as EK-FAC
    damps it; EK-FAC's factors are fitted on that sample.

    cost.parquet, a row per query, method ("EK-FAC", "LiSSA", "gradient dot"), batch (LiSSA's minibatch) and depth:
    agreement (correlation of the scores with those of the exact solution), alignment (cosine between the two in the
    norm of G + lambda), residual |v - (G + lambda) x| / |v|, work (sequence gradients a query). about.parquet, one row
    a minibatch size: scale (LiSSA's alpha), tuning (its work, once), fit and each (EK-FAC's work as the scan fitted it,
    and a query's), iterations of the exact solution and growth of its energy over the last of them, weights. These two
    repeat to the byte. What a scale at which LiSSA diverges cost is not counted. seconds.parquet: part ("fit" of EK-FAC
    on the sample, scaled up to the scan's own fit; "query" of it; a LiSSA "step" a query), batch, seconds: medians over
    turns on the machine at hand, each turn timing every part once.

    Args:
        parameters: queries, sequences (the sample), scored, batches, depth (most steps), draws, most, tolerance (label
            sets of the exact solution's preconditioner, its most iterations, the growth at which it stops), turns, and
            an extra's own.
    """
    from influence_kit import models
    from influence_kit.engine.fitting import fit_ekfac
    from influence_kit.engine.layers import is_linear_map, shape_of
    from influence_kit.engine.products import GaussNewton, sampled_inverse
    from influence_kit.referees.curvature import PRODUCT, quality, solve
    from influence_kit.referees.lissa import BATCHES, STEPS, lissa, tuned

    world, rng = World.load(inputs["world"]), np.random.default_rng([parameters["seed"], 0xC057])
    model = models.load(inputs["model"], parameters["fraction"], parameters["device"])
    factors, scanned, asked = _scan(inputs["influence"])
    fitted_on = factors.details["sequences"]
    asked = np.sort(rng.permutation(asked)[: parameters["queries"]])
    queries = batch_of(world.queries, asked)
    scored = batch_of(world.sequences, rng.permutation(scanned)[: parameters["scored"]])
    sample = batch_of(world.sequences, np.sort(rng.permutation(world.sequences.num_rows)[: parameters["sequences"]]))

    def fit() -> Factors:
        return fit_ekfac(model, sample, parameters["layers"], seed=parameters["seed"])

    curvature = GaussNewton(model, fit(), sample, parameters["damping"])
    v = curvature.gradients(queries)
    depths = [2**i for i in range(parameters["depth"].bit_length()) if 2**i <= parameters["depth"]]
    near = sampled_inverse(curvature, parameters["draws"], parameters["seed"])
    exact, growth, iterations = solve(curvature, v, parameters["tolerance"], parameters["most"], near)
    del near
    progress(0.4, 1, "exact solution")
    energies = (v * exact).sum(1).tolist()
    reference = curvature.scores(exact, scored).cpu().numpy()
    length = int(sample["input_ids"].shape[1]) - 1
    weights = sum(math.prod(shape_of(module)) for module in model.modules() if is_linear_map(module))
    fit_work, each = ekfac_work(list(curvature.shapes.values()), weights, length, fitted_on)
    rows, about = [], []

    def keep(method: str, batch: int, depth: int, x: Tensor, work: float) -> None:
        same = correlations(curvature.scores(x, scored).cpu().numpy(), reference)
        residual, energy = (each.tolist() for each in quality(curvature, x, v))
        for i, query in enumerate(asked):
            alignment = (max(energy[i], 0) / energies[i]) ** 0.5
            found = {"agreement": float(same[i]), "alignment": alignment, "residual": residual[i], "work": work}
            rows.append({"query": int(query), "method": method, "batch": batch, "depth": depth, **found})

    keep("EK-FAC", 0, 0, curvature.precondition(v), each)
    keep("gradient dot", 0, 0, v, 1.0)
    scales = {}
    for n, batch in enumerate(parameters["batches"]):
        scales[batch], found = tuned(curvature, v, depths, batch, parameters["seed"])
        for depth, x in zip(depths, found, strict=True):
            keep("LiSSA", batch, depth, x, lissa_work(depth, batch, PRODUCT))
        of_lissa = {"batch": batch, "scale": scales[batch], "tuning": BATCHES * STEPS * batch * PRODUCT}
        of_ekfac = {"fit": fit_work, "each": each, "weights": weights}
        about.append({**of_lissa, **of_ekfac, "iterations": iterations, "growth": float(growth.max())})
        progress(0.4 + 0.5 * (n + 1) / len(parameters["batches"]), 1, "LiSSA")
    pq.write_table(pa.Table.from_pylist(rows), out / "cost.parquet")
    pq.write_table(pa.Table.from_pylist(about), out / "about.parquet")
    timed: dict[tuple[str, int], Callable] = {
        ("fit", 0): fit,
        ("query", 0): lambda: curvature.precondition(curvature.gradients(queries)),
    }
    timed |= {("step", b): lambda b=b: lissa(curvature, v, [TIMED], scales[b], b, parameters["seed"]) for b in scales}
    taken: dict[tuple[str, int], list[float]] = {key: [] for key in timed}
    for _ in range(parameters["turns"]):
        for key, act in timed.items():
            began = time.perf_counter()
            act()
            taken[key].append(time.perf_counter() - began)
    parts = {"fit": fitted_on / parameters["sequences"], "query": 1 / len(asked), "step": 1 / (TIMED * len(asked))}
    seconds = [{"part": part, "batch": b, "seconds": median(times) * parts[part]} for (part, b), times in taken.items()]
    pq.write_table(pa.Table.from_pylist(seconds), out / "seconds.parquet")


STAGES = {"batching": batching, "cost": cost}


def ekfac_work(
    shapes: Sequence[Sequence[int]], weights: int, length: int, sequences: int, blocks: int = 1
) -> tuple[float, float]:
    """(fit, each query) of EK-FAC, in sequence gradients; shapes: (P, M') of every tracked layer; blocks: O, of the
    paper's Appendix A.

    A fit is a pass over `sequences`, their covariances, rotations and squared gradients, L (2 P^2 + 2 M'^2 + P M')
    multiplications a sequence and layer, and two eigendecompositions a layer. A query is a pass, the rotation of its
    gradient into the eigenbasis and of the quotient out of it.
    """
    one = 3 * weights * length
    each = sum(length * (2 * p * p / blocks + 2 * m * m / blocks + p * m) for p, m in shapes)
    bases = sum(EIGH * (p**3 + m**3) / blocks**2 for p, m in shapes)
    asked = sum(length * p * m + 2 * (p * p * m + p * m * m) / blocks for p, m in shapes)
    return sequences * (1 + each / one) + bases / one, 1 + asked / one


def lissa_work(depth: float, batch_size: int, product: float) -> float:
    """A query's work by LiSSA, in sequence gradients: its own gradient, then `depth` products with minibatches of
    `batch_size` sequences, each product of a sequence `product` gradients."""
    return 1 + depth * batch_size * product


def total_work(fixed, each, queries):
    """fixed + each * queries, elementwise."""
    return np.asarray(fixed) + np.asarray(each) * np.asarray(queries)


def crossover(fixed: float, each: float, rival_fixed: float, rival_each: float) -> float:
    """The smallest number of queries, at least 1, from which on a method is cheaper than its rival; infinite if there
    is none."""
    if each >= rival_each:
        return 1.0 if fixed + each < rival_fixed + rival_each and each == rival_each else math.inf
    exact = (fixed - rival_fixed) / (rival_each - each)
    return float(max(1, math.floor(exact) + 1))


def top_shared(scores, reference, k: int = 10) -> np.ndarray:
    """Share of the reference's k highest that are among the k highest of the scores, [Q] of [Q, N]."""
    fraction = min(k, np.shape(reference)[1]) / np.shape(reference)[1]
    a, b = top_members(scores, fraction), top_members(reference, fraction)
    return (a & b).sum(1) / b.sum(1)


def written(kind: str, name: str, families: Mapping[str, Sequence[Trained]]) -> pandas.DataFrame:
    """A table that the stage of this kind wrote, of all models that have it, with MODEL's columns. Raises UserError
    where none has."""
    import pandas

    made = [(family, run) for family, runs in families.items() for run in runs if (kind, 1.0) in run.planned.extra]
    parts = [
        pandas.read_parquet(run.extra(kind) / f"{name}.parquet").assign(
            family=family, size=run.parameters, seed=run.seed
        )
        for family, run in made
    ]
    if not parts:
        raise UserError(f"no model of this profile has an extra {kind!r}: name it in the profile's `extra`")
    return pandas.concat(parts, ignore_index=True)


def at_rank(low: pandas.DataFrame, method: str, family: str, most: float) -> pandas.DataFrame:
    """A family's rows at the largest rank tried that is at most `most`."""
    rows = pick(low, method=method, family=family)
    return pick(rows, rank=rows.loc[rows["rank"] <= most, "rank"].max())


def smallest_rank(table: pandas.DataFrame, enough: float, by: Sequence[str] = MODEL) -> pandas.DataFrame:
    """The least rank at which the mean correlation over queries is at least `enough`, per model (columns `by`).

    table: a row per query and rank, with rank, share (of the width), stored (share of the whole direction's numbers)
    and agreement. Returns columns `by`, rank, share, stored; a model that never gets there keeps its largest rank and
    inf as share and stored.
    """
    import pandas

    found = []
    for key, rows in table.groupby(list(by)):
        means = rows.groupby("rank")[["agreement", "share", "stored"]].mean()
        good = means[means["agreement"] >= enough]
        about = dict(zip(by, key, strict=True))
        if len(good):
            found.append({**about, "rank": int(good.index[0]), **good.iloc[0][["share", "stored"]]})
        else:
            found.append({**about, "rank": int(means.index[-1]), "share": np.inf, "stored": np.inf})
    return pandas.DataFrame(found)


def depth_needed(table: pandas.DataFrame, column: str, above: float | None = None, below: float | None = None) -> float:
    """The first depth from which on the mean of `column` over queries stays at or above `above` (or at or below
    `below`).

    table: a row per query and depth. inf where it never does.
    """
    means = table.groupby("depth")[column].mean().sort_index()
    good = means >= above if above is not None else means <= below
    bad = np.flatnonzero(~good.to_numpy())
    start = bad[-1] + 1 if len(bad) else 0
    return float(means.index[start]) if start < len(means) else math.inf


def speed_up(
    costs: pandas.DataFrame,
    about: pandas.DataFrame,
    seconds: pandas.DataFrame,
    queries: int = 50,
    residual: float | None = None,
) -> dict[str, float]:
    """What one model's queries cost by LiSSA and by EK-FAC, from the three tables of the stage `cost`.

    LiSSA runs with the minibatch size and to the depth that make it cheapest while its solution is as near to the exact
    one as EK-FAC's (by alignment), or, given `residual`, until |v - (G + lambda) x| / |v| is at most that. Returns
    batch, depth, reached (False: no depth tried suffices, and the largest stands in, so that costs are lower bounds),
    fit and each (EK-FAC's work), lissa_fit (its tuning) and lissa_each; crossover (queries from which on EK-FAC is
    cheaper), speedup and seconds_speedup (log10 of LiSSA's cost over EK-FAC's at that many queries, in work and in
    seconds); alignment, that of EK-FAC, and over, by how much the deepest LiSSA tried is above it.
    """
    of = {method: rows for method, rows in costs.groupby("method")}
    goal = float(of["EK-FAC"]["alignment"].mean())
    deepest = pick(of["LiSSA"], depth=of["LiSSA"]["depth"].max()).groupby("batch")["alignment"].mean().max()
    rule = {"column": "alignment", "above": goal} if residual is None else {"column": "residual", "below": residual}
    tried = []
    for batch, rows in of["LiSSA"].groupby("batch"):
        depth = depth_needed(rows, **rule)  # type: ignore[arg-type]
        reached, depth = math.isfinite(depth), min(depth, float(rows["depth"].max()))
        each = float(rows.loc[rows["depth"] == depth, "work"].mean())
        tuning = float(about.loc[about["batch"] == batch, "tuning"].iloc[0])
        tried.append(
            {"batch": float(batch), "depth": depth, "reached": reached, "lissa_fit": tuning, "lissa_each": each}
        )
    # One that suffices before any that does not; the cheapest of these.
    best = min(tried, key=lambda one: (not one["reached"], total_work(one["lissa_fit"], one["lissa_each"], queries)))
    fit, each = (float(about[name].iloc[0]) for name in ("fit", "each"))
    ratio = total_work(best["lissa_fit"], best["lissa_each"], queries) / total_work(fit, each, queries)
    taken = seconds.set_index(["part", "batch"])["seconds"]
    slow = queries * best["depth"] * taken["step", int(best["batch"])]
    quick = total_work(taken["fit", 0], taken["query", 0], queries)
    crossed = crossover(fit, each, best["lissa_fit"], best["lissa_each"])
    found = {"fit": fit, "each": each, "crossover": crossed, "speedup": math.log10(ratio)}
    found |= {"alignment": goal, "over": float(deepest) - goal}
    return {**best, **found, "seconds_speedup": math.log10(slow / quick)}


def speed_ups(tables: Sequence[pandas.DataFrame], queries: int, residual: float | None = None) -> pandas.DataFrame:
    """`speed_up` of every model in the three tables of the stage `cost`, a row each."""
    import pandas

    first, *others = (table.groupby(MODEL, sort=False) for table in tables)
    return pandas.DataFrame(
        {**dict(zip(MODEL, key)), **speed_up(rows, *(other.get_group(key) for other in others), queries, residual)}  # type: ignore[call-arg]
        for key, rows in first
    )


def bills(speeds: Mapping[str, pandas.DataFrame], seconds: pandas.DataFrame) -> Iterator[dict[str, str]]:
    """What EK-FAC and LiSSA cost, by each rule that LiSSA may stop by, in words: lines of a table."""
    clock = seconds.groupby("part")["seconds"].mean()
    for rule, rows in speeds.items():
        least, mean = "" if rows["reached"].all() else "≥ ", rows.mean(numeric_only=True)
        yield {
            "LiSSA": rule,
            "EK-FAC's work": f"{mean['fit']:,.0f} + {mean['each']:.1f} a query",
            "LiSSA's work": f"{mean['lissa_fit']:,.0f} + {least}{mean['lissa_each']:,.0f} a query",
            "cheaper in every model from … queries": f"{rows['crossover'].max():,.0f}",
            "EK-FAC, this machine": f"{clock['fit']:.2f} s + {1000 * clock['query']:.2f} ms a query",
            "LiSSA, this machine": f"{least}{mean['depth'] * clock['step']:.2f} s a query",
            "times cheaper, in work (geometric mean)": f"{least}{10 ** mean['speedup']:,.0f}",
            "times cheaper, in seconds (geometric mean)": f"{least}{10 ** mean['seconds_speedup']:,.0f}",
        }


def survival(lexical, k: int) -> np.ndarray:
    """Probability [Q, N] that each sequence is among the k with the highest lexical score [Q, N], ties broken at
    random.

    Word overlap ties often (a word-level world has few distinct scores), and an order of ties would be an answer made
    up.
    """
    return _share_kept(*_places(lexical), k)


def _places(lexical) -> tuple[np.ndarray, np.ndarray]:
    """How many sequences lie above each one, and above or level with it: int [Q, N] twice."""
    from scipy.stats import rankdata

    scores = -np.asarray(lexical, dtype=float)
    above, level = (rankdata(scores, way, axis=1).astype(int) for way in ("min", "max"))
    return above - 1, level


def _share_kept(above: np.ndarray, level: np.ndarray, k: int) -> np.ndarray:
    return np.clip((k - above) / (level - above), 0, 1)


def _all_kept(above: np.ndarray, level: np.ndarray, members: np.ndarray, k: int) -> np.ndarray:
    """Probability [Q] that all of a query's `members` (bool [Q, N]) are among the k.

    Where s of m tied sequences find room, j members among them all do with probability s (s - 1) ... / m (m - 1) ... (j
    factors).
    """
    kept, found = _share_kept(above, level, k), []
    tied = members & (kept > 0) & (kept < 1)
    for row in range(len(kept)):
        chance = float((kept[row][members[row]] > 0).all())
        for i in range(int(tied[row].sum())):
            first = tied[row].argmax()  # all of these tie with each other, at the filter's edge
            chance *= (k - above[row, first] - i) / (level[row, first] - above[row, first] - i)
        found.append(chance)
    return np.array(found)


def prefilter(
    world: World,
    values: np.ndarray,
    rows: np.ndarray,
    queries: np.ndarray,
    shares: Sequence[float],
    lexical: np.ndarray | None = None,
    k: int = 10,
) -> pandas.DataFrame:
    """One row per query, share of the scan kept, and relation of the top k to the query (and one for "all" of them).

    Recall of a relation is the sum of kept over the sum of top.

    Args:
        values: Influence scores [Q, N] of the sequences at `rows` for the queries at `queries`.
        shares: Of the scan, kept by the filter.
        lexical: What the filter goes by [Q, N]; `overlap` by default.
        k: Sequences of the full scan's top.

    Returns:
        Columns query, share, relation, top (sequences of that relation in the top k), kept (how many of them the filter
        keeps, as expected where lexical scores tie), whole (probability that the whole top k is kept; of relation "all"
        only).
    """
    import pandas

    lexical = overlap(world, rows, queries) if lexical is None else np.asarray(lexical)
    size, found = values.shape[1], []
    top = top_members(values, min(k, size) / size)
    kinds, places = {ALL: np.ones_like(top), **relations(world, rows, queries)}, _places(lexical)
    for share in shares:
        number = top_count(size, share)
        passes = _share_kept(*places, number)
        for name, member in kinds.items():
            both = top & member
            counts = {"top": both.sum(1), "kept": (both * passes).sum(1)}
            whole = _all_kept(*places, top, number) if name == ALL else np.nan
            about = {"query": queries, "share": share, "relation": name}
            found.append(pandas.DataFrame({**about, **counts, "whole": whole}))
    return pandas.concat(found, ignore_index=True)


def filtered(
    run: Trained, score: str, shares: Sequence[float], k: int, by: Callable[[Scanned], np.ndarray] | None = None
) -> pandas.DataFrame:
    """`prefilter` of a model's scan in one form of the score, by TF-IDF or by what `by` says of the scan."""
    scan = run.scan(kind=None)
    lexical = None if by is None else by(scan)
    found = prefilter(run.world, getattr(scan, score), scan.rows, scan.queries, shares, lexical, k)
    return found.assign(size=run.parameters, seed=run.seed)


def coin(scan: Scanned) -> np.ndarray:
    """Random numbers for a filter to go by."""
    return np.random.default_rng([len(scan.rows), len(scan.queries)]).random(scan.raw.shape)


def recall(rows: pandas.DataFrame) -> Estimate:
    """Kept of the top sequences, over all of them. Where each query keeps all or each none, the interval is exact over queries."""
    rows = rows[rows["top"] > 0]
    share = rows["kept"] / rows["top"]
    if share.nunique() == 1:
        return estimate_of(rows.assign(share=share), "share", bounds=(0, 1))
    return estimate_of(rows, ["kept", "top"], ratio_of_means, bounds=(0, 1))


def by_relation(recalls: pandas.DataFrame) -> pandas.DataFrame:
    """Recall by family and by what the sequences are to the query, over the seeds that have such in some top."""
    import pandas

    groups = recalls[recalls["top"] > 0].groupby(["family", "relation"], sort=False)
    return pandas.DataFrame(
        recall(rows).row(label=f"{family} · {relation}", family=family)
        for (family, relation), rows in groups
        if relation != ALL
    )


def middle_lost(run: Trained, share: float, k: int) -> tuple[int, float, dict[int, str]]:
    """The query whose top k a filter by words hurts as much as the median one's, how many of them it keeps, and what becomes of every
    sequence in a word."""
    scan = run.scan()
    kept = pick(prefilter(run.world, scan.raw, scan.rows, scan.queries, (share,), k=k), relation=ALL)["kept"].to_numpy()
    query = int(np.abs(kept - np.median(kept)).argmin())
    lexical = overlap(run.world, scan.rows, scan.queries[[query]])
    stays = survival(lexical, math.ceil(share * len(scan.rows)))[0]
    words = {place: {0: "lost", 1: "kept"}.get(chance, "tied") for place, chance in enumerate(stays)}
    return query, float(kept[query]), words
