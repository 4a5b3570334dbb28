"""Is EK-FAC right here, and what does the simplest thing get? Scores of EK-FAC and of its rivals beside two referees:
proximal Bregman responses, and models trained again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from influence_kit.corpora.world import World, batch_of
from influence_kit.errors import UserError
from influence_kit.files import whole
from influence_kit.findings.common import scan_rows, scored_queries
from influence_kit.findings.extras import Extra
from influence_kit.findings.families import Planned, planted_grid, section, text_grid
from influence_kit.findings.profiles import Profile
from influence_kit.measures.agreement import own_effects
from influence_kit.measures.correlations import correlations, rank_correlations
from influence_kit.measures.intervals import Estimate, difference_of, estimate_of, pick
from influence_kit.measures.lifts import precision_at
from influence_kit.measures.relations import relations
from influence_kit.recipes import Recipe, schedule, steps_of, tuples

if TYPE_CHECKING:
    import pandas
    import torch

    from influence_kit.findings.trained import Trained
    from influence_kit.referees.pbrf import ProximalResponse, Response
    from influence_kit.referees.rivals import Setting

SALT = 0x217A
WAYS = ("left out", "doubled")
RUNGS = ("exact", "block-diagonal", "EK-FAC", "K-FAC", "diagonal", "gradient dot")
SUPPORT = ("same fact, same language", "same fact, other language")  # what was planted for a query to find
# When refined scores would be the default: what must hold at the same number of iterations, fixed before any was run.
NEARER, FORESEES, CARRIES, SAME, CHEAP = WANTED = (
    "they come nearer to the proximal response than EK-FAC",
    "they foresee retraining better than EK-FAC, beyond the noise of the seeds",
    "less than all of the equation is left on sequences that were not solved on",
    "they rank as the converged solution of other sequences does (correlation .9)",
    "they take at most ten times the time of a fit and a scan",
)


def reads(profile: Profile) -> list[Planned]:
    """The families that are small enough to train many times; for a few seeds refined scores, and the middle model of Atlas."""
    section(profile, "little_atlas", "02")
    found = planted_grid(profile, "little_atlas", extra=("rivals", "response", "bank", "reweighted"))
    found += planted_grid(profile, "little_atlas", seeds=profile.few, extra=("inverses", "refined"))
    found += planted_grid(profile, "atlas", widths=middle_width(profile), seeds=profile.few, extra=("rivals",))
    return found + text_grid(profile, extra=("rivals", "bank"), section="little_text")


def middle_width(profile: Profile) -> list[int]:
    """The middle one of Atlas's widths, in a list."""
    widths = sorted({size.width for size in profile.atlas.family.sizes})
    return widths[len(widths) // 2 : len(widths) // 2 + 1]


def rivals(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Write scores.safetensors: one tensor [Q, N] a method, numbered as in methods.json (a list of names), rows [N] and
    queries [Q] (positions in the world's tables); and seconds.parquet (method, seconds: of everything the method does,
    on the machine at hand; the only numbers here that do not repeat).

    Args:
        parameters: sample (sequences that curvature is taken from), sequences (scored; a world's own `scan` column goes
            first), dampings, fits, fractions (of training: EK-FAC's variants), tracin (fractions of training), model (of
            the stage that trained it), and an extra's own.
    """
    from influence_kit.measures.lexical import bm25, idf_overlap
    from influence_kit.referees.rivals import damping_sweep, methods_for, variants

    world = World.load(inputs["world"])
    setting = setting_of(world, parameters, inputs["model"], out / "resume" / "factors.safetensors")
    methods = methods_for(setting.model, {"BM25": bm25, "TF-IDF": idf_overlap})
    methods |= damping_sweep(tuple(parameters.get("dampings", ())))
    methods |= variants(tuple(parameters.get("fits", ())), tuple(parameters.get("fractions", ())))
    _compared(world, setting, methods, parameters, out, progress)


def inverses(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Write what `rivals` does for the methods that take the Gauss-Newton matrix of the sample itself.

    Args:
        parameters: sample, sequences (as of `rivals`), lissa (depth, minibatch), model (of the stage that trained it), and an
            extra's own.
    """
    from influence_kit.referees.rivals import INVERSES, METHODS

    world = World.load(inputs["world"])
    setting = setting_of(world, parameters, inputs["model"], out / "resume" / "factors.safetensors")
    _compared(world, setting, {name: METHODS[name] for name in INVERSES}, parameters, out, progress)


def _compared(
    world: World, setting: Setting, methods: Mapping[str, Callable], parameters: dict, out: Path, progress
) -> None:
    """Write the scores of every method, and the seconds that it takes."""
    import torch
    from safetensors.torch import save_file

    tensors, seconds = {}, []
    for number, (name, method) in enumerate(methods.items()):

        def timed(method=method) -> dict[str, torch.Tensor]:
            began = time.perf_counter()
            values = method(setting)
            taken = torch.tensor(time.perf_counter() - began)
            return {"values": values.cpu().float().contiguous(), "seconds": taken}

        found = _once(out / "resume" / f"{number:03}.safetensors", timed)
        tensors[f"{number:03}"] = found["values"]
        seconds.append(float(found["seconds"]))
        progress(number + 1, len(methods), name)
    tensors |= {"rows": torch.from_numpy(scored(world, parameters)), "queries": torch.from_numpy(scored_queries(world))}
    save_file(tensors, out / "scores.safetensors")
    (out / "methods.json").write_text(json.dumps(list(methods)))
    pq.write_table(pa.table({"method": list(methods), "seconds": seconds}), out / "seconds.parquet")


def _once(path: Path, make: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What `make` gives, kept at `path`, so that a killed stage makes nothing twice."""
    from safetensors.torch import load_file, save_file

    if not path.exists():
        with whole(path) as part:
            save_file(dict(make()), part)
    return load_file(path)


def scored(world: World, parameters: dict) -> np.ndarray:
    """Positions of the sequences to score."""
    return scan_rows(world, parameters["sequences"], np.random.default_rng([parameters["seed"], SALT]))


def setting_of(world: World, parameters: dict, trained: Path, kept: Path) -> Setting:
    """What methods get, the same for all stages told the same parameters; EK-FAC's factors are kept at `kept`."""
    from influence_kit import models
    from influence_kit.engine.factors import Factors
    from influence_kit.referees.rivals import Setting

    rng = np.random.default_rng([parameters["seed"], SALT, 1])
    sample = batch_of(world.sequences, np.sort(rng.permutation(world.sequences.num_rows)[: parameters["sample"]]))
    recipe = Recipe(**tuples(parameters["model"]["recipe"]))
    steps = steps_of(world.sequences.num_rows, recipe)
    rates = [
        (at, recipe.learning_rate * schedule(min(round(at * steps), steps - 1), steps, recipe.warmup_steps))
        for at in parameters.get("tracin", [1.0])
    ]
    setting = Setting(
        lambda at: models.load(trained, at, parameters["device"]),
        batch_of(world.queries, scored_queries(world)),
        batch_of(world.sequences, scored(world, parameters)),
        sample,
        **{name: parameters[name] for name in ("damping", "layers", "seed")},
        corpus_size=world.sequences.num_rows,
        checkpoints=tuple(rates),
        **{name: parameters["lissa"][name] for name in ("depth", "minibatch") if "lissa" in parameters},
    )
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        setting.fit().save(kept)
    return replace(setting, factors=Factors.load(kept))


def refined(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Solve for the queries' directions with the curvature of all layers together, further and further, on sequences that
    neither EK-FAC's factors nor the proximal responses rest on. Write scores.safetensors, methods.json and
    seconds.parquet as `rivals` does, seconds with a fit of the factors and a scan in them; and solved.parquet: a row a
    query and method, with iterations, preconditioner, residual, fresh_residual (on sequences as many as were solved on)
    and agreement (rank correlation with the scores of the reference).

    Methods are "EK-FAC"; "4 iterations" and so on; and "Woodbury", the inverse of gradients with labels drawn from the model.

    Args:
        parameters: sample (of the factors and responses), sequences (scored), solved (how many sequences are solved on, and
            again how many are fresh), iterations (each a method), draws (Woodbury's, a sequence), reference (how many
            others a converged solution rests on, 0 for none), converged (its iterations), model (of the stage that
            trained it), and an extra's own.
    """
    import torch
    from safetensors.torch import save_file

    from influence_kit.engine.products import GaussNewton, sampled_inverse
    from influence_kit.engine.refine import refine
    from influence_kit.engine.scans import score
    from influence_kit.referees.curvature import quality

    world = World.load(inputs["world"])
    setting = setting_of(world, parameters, inputs["model"], out / "resume" / "factors.safetensors")
    sample, fresh, others = (batch_of(world.sequences, rows) for rows in _apart(world, parameters))
    model, asked, seen, damping = setting.model, setting.queries, setting.sequences, setting.damping
    began = time.perf_counter()
    factors = replace(setting, factors=None).fit()
    fitting = time.perf_counter() - began
    curvature, far = (GaussNewton(model, factors, each, damping) for each in (sample, fresh))
    vectors = curvature.gradients(asked)

    def solved(method: str, steps: int, on: dict = sample, beside: dict | None = fresh) -> dict[str, torch.Tensor]:
        began, x = time.perf_counter(), None
        if steps:
            solve = refine(model, factors, asked, on, steps, others=beside, damping=damping)
            values = score(model, factors, asked, seen, damping, self_influence=False, refine=solve).values
        elif method == "Woodbury":
            x = sampled_inverse(curvature, parameters["draws"])(vectors)
            values = curvature.scores(x, seen, 256)
        else:
            values = setting.score(factors).values
        found = {"values": values, "seconds": torch.tensor(fitting + time.perf_counter() - began)}
        if steps:
            drawn, left = solve.about.preconditioner == "drawn", [solve.about.residual, solve.about.fresh_residual]
        else:
            x = curvature.precondition(vectors) if x is None else x
            drawn, left = method == "Woodbury", [quality(each, x, vectors)[0] for each in (curvature, far)]
        found |= {"residual": left[0], "fresh_residual": left[1], "drawn": torch.tensor(drawn)}
        return {name: tensor.cpu().contiguous() for name, tensor in found.items()}

    methods = {"EK-FAC": 0, **{f"{steps} iterations": steps for steps in parameters["iterations"]}, "Woodbury": 0}
    truth = None
    if parameters["reference"]:
        kept = out / "resume" / "reference.safetensors"
        found = _once(kept, lambda: solved("reference", parameters["converged"], others, None))
        truth = found["values"].double().numpy()
        progress(0, len(methods), "a converged solution")
    tensors, seconds, rows, queries = {}, [], [], scored_queries(world)
    for place, (method, steps) in enumerate(methods.items()):
        kept = out / "resume" / f"{place:03}.safetensors"
        found = _once(kept, lambda method=method, steps=steps: solved(method, steps))  # type: ignore[misc]
        tensors[f"{place:03}"] = found["values"].float()
        seconds.append(float(found["seconds"]))
        about = {"method": method, "iterations": steps, "preconditioner": "drawn" if found["drawn"] else "ekfac"}
        same = np.full(len(queries), np.nan)
        if truth is not None:
            same = rank_correlations(found["values"].double().numpy(), truth)
        for number, query in enumerate(queries.tolist()):
            left = {name: float(found[name][number]) for name in ("residual", "fresh_residual")}
            rows.append({"query": query, **about, **left, "agreement": float(same[number])})
        progress(place + 1, len(methods), method)
    tensors |= {"rows": torch.from_numpy(scored(world, parameters)), "queries": torch.from_numpy(queries)}
    save_file(tensors, out / "scores.safetensors")
    (out / "methods.json").write_text(json.dumps(list(methods)))
    pq.write_table(pa.table({"method": list(methods), "seconds": seconds}), out / "seconds.parquet")
    pq.write_table(pa.Table.from_pylist(rows), out / "solved.parquet")


def _apart(world: World, parameters: dict) -> list[np.ndarray]:
    """Positions of sequences that directions are solved on, of fresh ones, and of the reference's: none is in two, nor in the
    sample of `setting_of`."""
    total, sizes = world.sequences.num_rows, [parameters["solved"], parameters["solved"], parameters["reference"]]
    if parameters["sample"] + sum(sizes) > total:
        raise UserError(
            f"refined: sample + 2 solved + reference = {parameters['sample'] + sum(sizes)} sequences, the world has {total}: "
            "lower them in the profile"
        )
    rng = np.random.default_rng([parameters["seed"], SALT, 1])
    rows = np.split(rng.permutation(total)[parameters["sample"] :], np.cumsum(sizes))
    return [np.sort(part) for part in rows[:3]]


def response(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Solve for the response to one more copy, in the whole corpus, of each of some sequences: half of them those that
    EK-FAC calls the most influential on some query, half at random. Write response.safetensors: log_p [M, Q] (nats at
    eps = 1), places int64 [M] (columns of the rivals' scores), queries int64 [Q]; solved.parquet: place, gradient (left
    of it), evaluations.

    A response that does not converge is none: nan, and what was left of its gradient says so. Each is kept as soon as
    it is there.

    Args:
        parameters: those of `rivals`, of which it needs the same sample; responses (M), tolerance, and an extra's own.
    """
    import torch
    from safetensors.torch import save_file

    from influence_kit.referees.pbrf import ProximalResponse

    world = World.load(inputs["world"])
    setting = setting_of(world, parameters, inputs["model"], out / "resume" / "factors.safetensors")
    places = chosen(setting.score(setting.fit()).values, parameters["responses"], parameters["seed"])
    solver = ProximalResponse(setting.model, setting.fit(), setting.sample, setting.damping)
    found = []
    for number, place in enumerate(places):

        def solved(place=place) -> dict[str, torch.Tensor]:
            sequence = {name: tensor[place : place + 1] for name, tensor in setting.sequences.items()}
            one = responded(solver, sequence, setting.queries, 1 / world.sequences.num_rows, parameters["tolerance"])
            about = torch.tensor([one.gradient, float(one.evaluations)], dtype=torch.float64)
            return {"log_p": one.log_p.contiguous(), "about": about}

        found.append(_once(out / "resume" / f"{number:04}.safetensors", solved))
        progress(number + 1, len(places), "responses")
    tensors = {"log_p": torch.stack([each["log_p"] for each in found]), "places": torch.from_numpy(places)}
    save_file({**tensors, "queries": torch.from_numpy(scored_queries(world))}, out / "response.safetensors")
    left, evaluations = (np.array([float(each["about"][i]) for each in found]) for i in (0, 1))
    columns = {"place": places, "row": scored(world, parameters)[places], "gradient": left, "evaluations": evaluations}
    pq.write_table(pa.table(columns), out / "solved.parquet")


def responded(
    solver: ProximalResponse, sequence: dict, queries: Mapping[str, torch.Tensor], eps: float, tolerance: float
) -> Response:
    """The response to one sequence; of nan where it does not converge."""
    import torch

    from influence_kit.referees.pbrf import Response, Unconverged

    try:
        return solver.respond(sequence, queries, eps, tolerance)
    except Unconverged as refused:
        nothing = torch.full((len(queries["input_ids"]),), torch.nan, dtype=torch.float64)
        return Response(nothing, refused.gradient, refused.evaluations)


def chosen(scores: torch.Tensor, number: int, seed: int) -> np.ndarray:
    """Columns int64 [number] of scores [Q, N]: for a half of them, queries in turn and the largest |score| that is not
    taken yet, the rest at random."""
    order, taken = scores.abs().argsort(dim=1, descending=True, stable=True).numpy(), []
    for turn in range(number // 2):
        row = order[turn % len(order)]
        taken.append(next(int(place) for place in row if place not in taken))
    rest = np.setdiff1d(np.arange(scores.shape[1]), taken)
    more = np.random.default_rng([seed, 0x9B2F]).permutation(rest)[: number - len(taken)]
    return np.sort(np.concatenate([np.array(taken, dtype=np.int64), more]))


def bank(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Train the model again on random halves, in the same order; write bank.safetensors: members bool [S, N] (which
    sequences each half holds), log_p [S, R, Q] (nats, of the scored queries, for each of R training seeds, the model's
    own first), queries int64 [Q] (their positions in the world's table), whole [Q] (the model's own log_p).

    Args:
        parameters: model (those of the stage that trained it), subsets, repeats, seed, and an extra's own.
    """
    import torch
    from safetensors.torch import save_file

    from influence_kit import models
    from influence_kit.referees.retraining import answers_of_all, random_halves

    world = World.load(inputs["world"])
    asked = scored_queries(world)
    queries = batch_of(world.queries, asked)
    members = random_halves(world.sequences.num_rows, parameters["subsets"], parameters["seed"])
    halves = [np.flatnonzero(half) for half in members]
    log_p = answers_of_all(parameters["model"], world, halves, parameters["repeats"], queries, out / "resume", progress)
    own, _ = models.evaluate(models.load(inputs["model"], parameters["fraction"]), queries)
    tensors = {"members": torch.from_numpy(members), "log_p": log_p, "whole": own}
    save_file({**tensors, "queries": torch.from_numpy(asked)}, out / "bank.safetensors")


def reweighted(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """For some scored queries and each of some counts, change the weight of that many of the most influential sequences
    and train again, in the same order: left *out*, weak sequences stand in their places; *doubled*, they stand in the
    places of those weak ones too.

    Writes reweighted.safetensors: log_p [2, K, C, R, Q] (nats, of the scored queries, by WAYS, for each of R training
    seeds, the model's own first), whole [R, Q] (the same after training on the corpus as it is), predicted [2, K, C, Q]
    (nats, what influence foretells of such a change), asked int64 [K] (which of the Q queries it was done for), counts
    int64 [C].

    Weak sequences are drawn from the half of the scan with the least influence on the query.

    Args:
        parameters: model (those of the stage that trained it), queries, counts, repeats, seed, and an extra's own.
    """
    import torch
    from safetensors.torch import load_file, save_file

    from influence_kit.referees.retraining import answers_of_all

    world = World.load(inputs["world"])
    scan = load_file(inputs["influence"] / "scores.safetensors")
    values, rows = scan["values"].double().numpy(), scan["rows"].numpy()
    queries = batch_of(world.queries, scan["queries"].numpy())
    asked, counts = (
        np.linspace(0, len(values) - 1, min(parameters["queries"], len(values))).astype(int),
        parameters["counts"],
    )
    corpus = np.arange(world.sequences.num_rows)
    corpora, predicted = [corpus], []
    for way in WAYS:
        for query in asked:
            for count in counts:
                strong, weak = strongest_and_weak(values[query], count, parameters["seed"])
                lost, instead = (strong, weak) if way == "left out" else (weak, strong)
                changed = corpus.copy()
                changed[rows[lost]] = rows[instead]
                corpora.append(changed)
                predicted.append(torch.from_numpy((values[:, instead].sum(1) - values[:, lost].sum(1)) / len(corpus)))
    log_p = answers_of_all(
        parameters["model"], world, corpora, parameters["repeats"], queries, out / "resume", progress
    )
    shape = (len(WAYS), len(asked), len(counts))
    tensors = {"log_p": log_p[1:].unflatten(0, shape).contiguous(), "whole": log_p[0].clone()}
    tensors |= {"predicted": torch.stack(predicted).unflatten(0, shape), "counts": torch.tensor(counts)}
    save_file({**tensors, "asked": torch.from_numpy(asked)}, out / "reweighted.safetensors")


def strongest_and_weak(values: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the `count` highest of a query's scores [N], and of as many weak ones: drawn from the N / 2 of the
    others with the smallest absolute values. Raises UserError where half of N is fewer."""
    if not 1 <= count <= len(values) // 2:
        raise UserError(
            f"{count} sequences cannot be left out of {len(values)}: give a count between 1 and half of them"
        )
    strong = np.argsort(-values, kind="stable")[:count]
    order = np.argsort(np.abs(values), kind="stable")
    weak = np.sort(order[~np.isin(order, strong)][: len(values) // 2])
    return strong, np.random.default_rng([seed, 0x1E07, count]).choice(weak, count, replace=False)


STAGES = {
    "rivals": Extra(rivals, scan=False, recipe=True),
    "inverses": Extra(inverses, scan=False, recipe=True),
    "response": Extra(response, scan=False, recipe=True),
    "refined": Extra(refined, scan=False, recipe=True),
    "bank": Extra(bank, scan=False, recipe=True),
    "reweighted": Extra(reweighted, recipe=True),
}


def lds(scores, members, outputs) -> np.ndarray:
    """Linear datamodelling score (Park et al. 2023): Spearman's correlation, over subsets of the corpus, of the summed
    scores of a subset's sequences with what a model retrained on the subset says.

    Args:
        scores: Any method's [Q, N]; nats or not, only the order of sums counts.
        members: Which sequences each subset holds, bool [S, N].
        outputs: Log-probabilities after retraining, nats [S, Q].

    Returns:
        A correlation a query, [Q].

    Raises:
        UserError: shapes that do not fit, or fewer than three subsets.
    """
    scores, members, outputs = np.asarray(scores, float), np.asarray(members, float), np.asarray(outputs, float)
    if scores.ndim != 2 or members.shape[1:] != scores.shape[1:] or outputs.shape != (len(members), len(scores)):
        raise UserError(
            f"Scores have shape {scores.shape}, members {members.shape} and outputs {outputs.shape}; give [Q, N], "
            "[S, N] and [S, Q]."
        )
    if len(members) < 3:
        raise UserError(f"{len(members)} subsets are too few for a rank correlation; retrain on more.")
    return rank_correlations(scores @ members.T, outputs.T)


def slopes(truth, scores) -> np.ndarray:
    """Slope of the truth on the scores through zero, row by row, [Q]: what a score in nats has to be multiplied with to
    be right.

    1 for an estimate on the right scale; below 1 where it exaggerates. nan where all scores of a row are 0.
    """
    truth, scores = (np.asarray(rows, float) for rows in (truth, scores))
    size = (scores**2).sum(1)
    return np.divide((truth * scores).sum(1), size, out=np.full(len(size), np.nan), where=size > 0)


def found_at(scores, planted, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(precision, recall) [Q] of the planted sequences, bool [Q, N], among each query's k highest scores; nan for
    queries that have none.

    Recall is over min(k, number planted), so that a perfect ranking has 1.
    """
    planted = np.asarray(planted, bool)
    precision = precision_at(scores, planted, k)
    most = np.minimum(planted.sum(1), k)
    return precision, np.divide(precision * k, most, out=np.full(len(most), np.nan), where=most > 0)


def level(table: pandas.DataFrame, column: str, method: str, bounds=(-1, 1), **where) -> Estimate:
    """One method's mean over queries, with its interval over seeds; `where` narrows the table."""
    return estimate_of(pick(table, method=method, **where), column, bounds=bounds)


def more(table: pandas.DataFrame, column: str, better: str, worse: str, **where) -> Estimate:
    """One method less another on the same queries, with its interval over the seeds that both have; `where` narrows the table."""
    first, second = (pick(table, method=method, **where) for method in (better, worse))
    both = set(first["seed"]) & set(second["seed"])
    first, second = (rows[rows["seed"].isin(both)] for rows in (first, second))
    return difference_of(first, second, column, matched_units=True)


def best_representation(table: pandas.DataFrame, column: str) -> str:
    """The depth at which representation similarity does best."""
    rows = table[table["method"].str.startswith("representations")]
    return rows.groupby("method")[column].mean().idxmax()


def scores_of(run: Trained, kind: str = "rivals") -> dict[str, np.ndarray]:
    """Scores [Q, N] by method, as the stage of a kind wrote them: "rivals", "inverses" or "refined"."""
    from safetensors.numpy import load_file

    tensors = load_file(run.extra(kind) / "scores.safetensors")
    names = json.loads((run.extra(kind) / "methods.json").read_text())
    return {name: tensors[f"{number:03}"] for number, name in enumerate(names)}


def corpus_of(run: Trained) -> str:
    """A reader's word for what a model was trained on."""
    return "real text" if run.corpus == "little_text" else "Atlas"


def responses_of(run: Trained) -> tuple[np.ndarray, np.ndarray]:
    """True responses [Q, M] and the columns of the scores that they belong to; without those that did not converge."""
    from safetensors.numpy import load_file

    truth = load_file(run.extra("response") / "response.safetensors")
    there = ~np.isnan(truth["log_p"]).any(1)
    return truth["log_p"][there].T, truth["places"][there]


def gradients_left(run: Trained) -> pandas.DataFrame:
    """What is left of the gradient of each proximal response, in what was asked for."""
    import pandas

    tolerance = run.planned.extra["response", 1.0].parameters["tolerance"]
    solved = pandas.read_parquet(run.extra("response") / "solved.parquet")
    return solved.assign(left=solved["gradient"] / tolerance, seed=run.seed)


def judged(run: Trained, kind: str = "rivals") -> Iterator[pandas.DataFrame]:
    """How every method's scores agree with the proximal responses, over the sequences that were solved for: r, rho,
    slope."""
    import pandas

    responses, places = responses_of(run)
    for method, scores in scores_of(run, kind).items():
        found = scores[:, places]
        rows = {
            "r": correlations(found, responses),
            "rho": rank_correlations(found, responses),
            "slope": slopes(responses, found),
        }
        yield pandas.DataFrame(rows | {"method": method, "seed": run.seed})


def _bank_of(run: Trained) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run.extra("bank") / "bank.safetensors")


def retrained(run: Trained, kind: str = "rivals") -> Iterator[pandas.DataFrame]:
    """The linear datamodelling score of every method. Answers are averaged over the trainings of a half."""
    import pandas

    halves = _bank_of(run)
    answers, about = halves["log_p"].mean(1), {"seed": run.seed, "corpus": corpus_of(run)}
    for method, scores in scores_of(run, kind).items():
        yield pandas.DataFrame({"lds": lds(scores, halves["members"], answers), "method": method, **about})


def repeats(run: Trained) -> pandas.DataFrame:
    """Correlation over halves of two trainings' answers: what a perfect prediction could be judged by."""
    import pandas

    log_p = _bank_of(run)["log_p"]
    found = rank_correlations(log_p[:, 0].T, log_p[:, 1].T)
    return pandas.DataFrame({"r": found, "seed": run.seed, "corpus": corpus_of(run)})


def mistaken(run: Trained) -> pandas.DataFrame:
    """LDS of EK-FAC's scores for another query, half of the list away."""
    import pandas

    halves = _bank_of(run)
    scores = np.roll(scores_of(run)["EK-FAC"], len(halves["queries"]) // 2, axis=0)
    found = lds(scores, halves["members"], halves["log_p"].mean(1))
    return pandas.DataFrame({"lds": found, "method": "another query", "seed": run.seed})


def foreseen(run: Trained) -> Iterator[pandas.DataFrame]:
    """How well EK-FAC foresees what became of each query when strong sequences were left out or doubled, by way and
    count."""
    import pandas

    found = _reweighted_of(run)
    for way, log_p, predicted in zip(WAYS, found["log_p"], found["predicted"], strict=True):
        change = log_p.mean(2) - found["whole"].mean(0)
        for place, count in enumerate(found["counts"]):
            values = rank_correlations(predicted[:, place].T, change[:, place].T)
            yield pandas.DataFrame({"foreseen": values, "way": way, "count": int(count), "seed": run.seed})


def foreseen_refined(run: Trained) -> Iterator[pandas.DataFrame]:
    """What `foreseen` says of EK-FAC, of every step of its refinement: the sequences are those that were left out or doubled, which
    EK-FAC chose."""
    import pandas
    from safetensors.numpy import load_file

    found, scan = _reweighted_of(run), run.scan(kind=None)
    seed = run.planned.extra["reweighted", 1.0].parameters["seed"]
    rows = load_file(run.extra("refined") / "scores.safetensors")["rows"]
    column = {int(row): place for place, row in enumerate(rows)}
    for method, scores in scores_of(run, "refined").items():
        for way, log_p in zip(WAYS, found["log_p"], strict=True):
            change = log_p.mean(2) - found["whole"].mean(0)
            for place, count in enumerate(found["counts"]):
                foretold = []
                for query in found["asked"]:
                    strong, weak = strongest_and_weak(scan.raw[query].astype(float), int(count), seed)
                    lost, instead = (strong, weak) if way == "left out" else (weak, strong)
                    gone, come = ([column[int(row)] for row in scan.rows[each]] for each in (lost, instead))
                    foretold.append(scores[:, come].sum(1) - scores[:, gone].sum(1))
                values = rank_correlations(np.stack(foretold).T, change[:, place].T)
                about = {"method": method, "way": way, "count": int(count), "seed": run.seed}
                yield pandas.DataFrame({"foreseen": values, **about})


def solves(run: Trained) -> pandas.DataFrame:
    """How far every step of the refinement solves for a query, a row each: iterations, residual, fresh_residual, agreement with a
    converged solution on other sequences, and cost: seconds over those of EK-FAC's fit and scan."""
    import pandas

    folder = run.extra("refined")
    seconds = pandas.read_parquet(folder / "seconds.parquet").set_index("method")["seconds"]
    found = pandas.read_parquet(folder / "solved.parquet")
    cost = found["method"].map(seconds / seconds["EK-FAC"])
    return found.assign(cost=cost, seed=run.seed)


def own_changes(run: Trained) -> Iterator[pandas.DataFrame]:
    """What its own strongest sequences did to each asked query, nats, by way and count."""
    import pandas

    found = _reweighted_of(run)
    for way, log_p in zip(WAYS, found["log_p"], strict=True):
        own = own_effects(log_p, found["asked"]).mean(2)
        for place, count in enumerate(found["counts"]):
            yield pandas.DataFrame({"own": own[:, place], "way": way, "count": int(count), "seed": run.seed})


def _reweighted_of(run: Trained) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run.extra("reweighted") / "reweighted.safetensors")


def searched(run: Trained, k: int) -> Iterator[pandas.DataFrame]:
    """Precision and recall at k by method and by what was planted, queries that have none of it left out."""
    import pandas
    from safetensors.numpy import load_file

    scan = load_file(run.extra("rivals") / "scores.safetensors")
    planted = relations(run.world, scan["rows"], scan["queries"])
    for method, scores in scores_of(run).items():
        for relation in SUPPORT:
            precision, recall = found_at(scores, planted[relation], k)
            about = {"method": method, "relation": relation, "seed": run.seed}
            yield pandas.DataFrame({"precision": precision, "recall": recall, **about}).dropna()


def bills(runs: list[Trained]) -> pandas.Series:
    """Seconds of every method over those of plain gradient products, the median over models; what costs nothing beside
    another method, or says nothing, is left out."""
    import pandas

    free = ("RelatIF", "cosine", "EK-FAC, ", "random", "representations")

    def seconds(run: Trained) -> pandas.Series:
        kinds = [kind for kind in ("inverses", "rivals") if (kind, 1.0) in run.planned.extra]
        return pandas.concat(
            [pandas.read_parquet(run.extra(kind) / "seconds.parquet").set_index("method")["seconds"] for kind in kinds]
        )

    bills = [seconds(run) for run in runs]
    found = pandas.concat([each / each["gradient dot"] for each in bills], axis=1, sort=False).median(axis=1)
    return found[[not any(word in method for word in free) for method in found.index]]


def damping_of(method: str, own: float) -> float:
    """The damping that a method's name says; `own`, the setting's, for plain EK-FAC."""
    return own if method == "EK-FAC" else float(method.removeprefix("EK-FAC, damping "))


def refinement(runs: Sequence[Trained]) -> pandas.DataFrame:
    """What refined scores are worth, a row a method, seed and query: r (with the proximal response), slope, lds, foreseen (a tenth
    of the corpus left out), residual, fresh_residual, agreement (with the converged solution of other sequences) and cost."""
    import pandas

    found = []
    for run in runs:
        foreseen = pandas.concat(foreseen_refined(run))
        foreseen = pick(foreseen, way=WAYS[0], count=foreseen["count"].max())
        found += [*judged(run, "refined"), *retrained(run, "refined"), foreseen, solves(run)]
    return pandas.concat(found, ignore_index=True)


def wanting(refined: pandas.DataFrame) -> dict[str, dict[str, bool]]:
    """Which of WANTED each refined method of `refinement` meets; what is compared with EK-FAC is met by a whole interval."""
    found = {}
    for method in dict.fromkeys(refined["method"]):
        rows = pick(refined, method=method)
        met = {
            NEARER: gain(refined, "r", method).low > 0,
            FORESEES: gain(refined, "lds", method).low > 0,
            CARRIES: rows["fresh_residual"].median() < 1,
            SAME: rows["agreement"].median() >= 0.9,
            CHEAP: rows["cost"].median() <= 10,
        }
        if method != "EK-FAC":
            found[method] = {name: bool(met[name]) for name in WANTED}
    return found


def gain(refined: pandas.DataFrame, column: str, method: str) -> Estimate:
    """What a refined method is better by than EK-FAC, on the same queries."""
    return more(refined.dropna(subset=column), column, method, "EK-FAC")


def default_or_not(refined: pandas.DataFrame) -> str:
    """What it would take for refined scores to be the default, in a sentence."""
    met = wanting(refined)
    best = max(met, key=lambda method: sum(met[method].values()))  # of equals the first: the fewest iterations
    missing = [name for name in WANTED if not met[best][name]]
    cost = pick(refined, method=best)["cost"].median()
    if not missing:
        return f"Refined scores could be the default: after {best} all that was asked for holds, at {cost:.0f} times the time of a fit and a scan."
    kept = [name for name in WANTED if met[best][name]]
    return (
        f"Refined scores would be the default if five things held at once. Scores after {best} ({cost:.0f} times the time of a fit and a scan) "
        f"come as near to it as any. It holds that {'; '.join(kept) or 'nothing of it'}. What is still wanting: that {'; that '.join(missing)}."
    )


def middle_query(run: Trained) -> tuple[int, dict[int, str]]:
    """Of the queries that have a solved text among their five highest scores (of all, where none has), the one with the median
    correlation of EK-FAC's scores with the proximal responses; and the response to each solved text in words, by column."""
    responses, places = responses_of(run)
    scores = scores_of(run)["EK-FAC"]
    agreement = correlations(scores[:, places], responses)
    texts = list(map(tuple, batch_of(run.world.sequences, run.scan(kind=None).rows)["input_ids"].tolist()))
    solved = {texts[place]: at for at, place in enumerate(places)}
    alike = {column: solved[text] for column, text in enumerate(texts) if text in solved}
    seen = np.flatnonzero(np.isin(np.argsort(-scores, axis=1)[:, :5], list(alike)).any(1))
    seen = seen if len(seen) else np.arange(len(scores))
    query = int(seen[np.argsort(agreement[seen], kind="stable")[len(seen) // 2]])
    total = run.world.sequences.num_rows
    words = {column: f"true {responses[query, at] / total:+.2g} nats" for column, at in alike.items()}
    return query, words
