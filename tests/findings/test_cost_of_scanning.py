"""Chapter 10: work, crossovers, ranks and depths worked by hand; what a filter by words keeps, by enumeration; its stages, tiny and real,
against direct calls, which repeat to the byte."""

from dataclasses import asdict
from itertools import pairwise, permutations

import numpy as np
import pandas as pd
import pytest

from influence_kit import fit_ekfac, models, score
from influence_kit.corpora.world import World, batch_of
from influence_kit.corpora.worlds import atlas, ladder
from influence_kit.engine.factors import Factors
from influence_kit.engine.products import GaussNewton
from influence_kit.errors import UserError
from influence_kit.findings import cost_of_scanning as finding
from influence_kit.findings.common import influence, train
from influence_kit.findings.cost_of_scanning import (
    ALL,
    batching,
    cost,
    crossover,
    depth_needed,
    ekfac_work,
    lissa_work,
    numbers,
    prefilter,
    projected,
    smallest_rank,
    speed_up,
    stored_at,
    survival,
    top_shared,
    total_work,
)
from influence_kit.findings.profiles import load_profile
from influence_kit.measures.correlations import correlations
from influence_kit.measures.lexical import overlap
from influence_kit.measures.relations import relations
from influence_kit.referees import lissa

COMMON = {"fraction": 1.0, "seed": 7, "device": "cpu", "damping": 0.1, "layers": "mlp"}
BATCHING = {**COMMON, "queries": 3, "sequences": 60, "fit": 50, "blocks": [2]}
COST = {**COMMON, "queries": 2, "sequences": 40, "scored": 30, "batches": [4, 8], "depth": 16}
COST |= {"draws": 2, "most": 200, "tolerance": 1e-3, "turns": 1}


def test_work_of_ekfac_counted_by_hand():
    # One layer 4 x 2, 10 weights, 5 positions: a pass is 150 multiplications.
    fit, query = ekfac_work([(4, 2)], 10, 5, 7)
    assert fit == pytest.approx(7 * (1 + 5 * (2 * 16 + 2 * 4 + 8) / 150) + 4.5 * (64 + 8) / 150)
    assert query == pytest.approx(1 + (5 * 8 + 2 * (16 * 2 + 4 * 4)) / 150)
    cheaper = ekfac_work([(4, 2)], 10, 5, 7, blocks=2)
    assert cheaper[0] < fit and cheaper[1] < query
    assert lissa_work(3, 8, 4 / 3) == 1 + 32


def test_crossover_is_where_total_work_crosses():
    for fixed, each, rival_fixed, rival_each in ((100, 1, 0, 10), (100, 1, 5, 100), (99, 1, 0, 10), (0, 1, 0, 2)):
        n = crossover(fixed, each, rival_fixed, rival_each)
        assert total_work(fixed, each, n) < total_work(rival_fixed, rival_each, n)
        assert n == 1 or total_work(fixed, each, n - 1) >= total_work(rival_fixed, rival_each, n - 1)
    assert crossover(10, 2, 0, 1) == np.inf and crossover(1, 1, 0, 1) == np.inf and crossover(0, 1, 2, 1) == 1


def test_top_shared_counts_what_stays_on_top():
    whole = np.arange(20.0)[None]
    assert top_shared(whole, whole, 5).tolist() == [1] and top_shared(-whole, whole, 5).tolist() == [0]
    moved = whole.copy()
    moved[0, 19] = -1
    assert top_shared(moved, whole, 5).tolist() == [0.8] and top_shared(moved, whole, 99).tolist() == [1]


def test_smallest_rank_is_the_first_that_is_good_on_average():
    rows = [
        (m, r, r / 8, r / 6, a)
        for m, values in (("a", (0.5, 0.992, 1)), ("b", (0.1, 0.2, 0.3)))
        for r, a in zip((2, 4, 8), values)
    ]
    table = pd.DataFrame(rows, columns=["model", "rank", "share", "stored", "agreement"])
    found = smallest_rank(table, 0.99, ["model"]).set_index("model")
    assert (
        found.loc["a"].tolist() == [4, 0.5, 4 / 6] and found.loc["b", "rank"] == 8 and np.isinf(found.loc["b", "share"])
    )
    two = pd.concat([table[table["model"] == "a"], table[table["model"] == "a"].assign(agreement=0.98)])
    assert smallest_rank(two, 0.99, ["model"])["rank"].tolist() == [8]


def test_depth_needed_is_where_it_stays():
    table = pd.DataFrame({"depth": [1, 2, 4, 8] * 2, "x": [0.5, 0.9, 0.7, 0.95] * 2})
    assert depth_needed(table, "x", above=0.8) == 8 and depth_needed(table, "x", above=0.6) == 2
    assert depth_needed(table, "x", above=0.99) == np.inf and depth_needed(table, "x", below=1) == 1


def tables():
    """EK-FAC is aligned to .9; LiSSA with minibatches of 4 gets there in 8 steps, with 2 it never does."""
    lissa = [
        ("LiSSA", b, d, a, r, 1 + d * b)
        for b, d, a, r in ((4, 4, 0.8, 0.5), (4, 8, 0.95, 0.2), (2, 4, 0.5, 0.6), (2, 8, 0.6, 0.3))
    ]
    costs = pd.DataFrame(
        [("EK-FAC", 0, 0, 0.9, 0.4, 3), *lissa], columns=["method", "batch", "depth", "alignment", "residual", "work"]
    )
    about = pd.DataFrame({"batch": [4, 2], "tuning": [40.0, 20], "fit": 100.0, "each": 3.0})
    seconds = pd.DataFrame(
        {"part": ["fit", "query", "step", "step"], "batch": [0, 0, 4, 2], "seconds": [10, 0.1, 0.5, 0.4]}
    )
    return costs, about, seconds


def test_speed_up_takes_lissa_at_its_cheapest_that_is_as_good():
    found = speed_up(*tables(), queries=50)
    assert (found["batch"], found["depth"], found["reached"], found["alignment"]) == (4, 8, True, 0.9)
    assert found["speedup"] == pytest.approx(np.log10((40 + 50 * 33) / (100 + 150)))
    assert found["seconds_speedup"] == pytest.approx(np.log10(50 * 8 * 0.5 / (10 + 5)))
    assert found["crossover"] == crossover(100, 3, 40, 33) == 3
    assert speed_up(*tables(), residual=0.25)["depth"] == 8


def test_a_depth_that_never_suffices_is_a_lower_bound_and_says_so():
    found = speed_up(*tables(), residual=0.1)
    assert found["reached"] is False and found["depth"] == 8 and found["batch"] == 2


def enumerated(row, member, k):
    """(survival [N], chance that all members survive) over every order of ties."""
    kept, whole, number = np.zeros(len(row)), 0, 0
    for order in permutations(range(len(row))):
        if all(row[a] >= row[b] for a, b in pairwise(order)):
            passes = np.zeros(len(row), bool)
            passes[list(order[:k])] = True
            kept, whole, number = kept + passes, whole + passes[member].all(), number + 1
    return kept / number, whole / number


def test_ties_are_broken_at_random():
    row, member = np.array([1.0, 3, 1, 0, 1, 3]), np.array([1, 1, 1, 0, 0, 0], bool)
    for k in range(1, 7):
        kept, whole = enumerated(row, member, k)
        np.testing.assert_allclose(survival(row[None], k)[0], kept)
        np.testing.assert_allclose(finding._all_kept(*finding._places(row[None]), member[None], k)[0], whole)
        assert survival(row[None], k).sum() == pytest.approx(k)


@pytest.fixture(scope="module")
def small_atlas():
    parameters = {"entities": 12, "relations": 2, "values": 6, "documents": 600, "most_supporters": 200}
    return atlas.build(
        atlas.Atlas(**parameters, canaries=2, repetitions=(1, 4), noise_share=0.2, held_out=20, queries=4)
    )


@pytest.fixture(scope="module")
def small_ladder():
    return ladder.build(ladder.Ladder(documents=2000, held_out=20, queries=8))


def test_verbatim_copies_pass_the_filter_and_the_other_language_does_not(small_atlas):
    rows, queries = np.arange(small_atlas.sequences.num_rows), np.arange(small_atlas.queries.num_rows)
    kinds, lexical = relations(small_atlas, rows, queries), overlap(small_atlas, rows, queries)
    passes = survival(lexical, 30)
    kept = {name: passes[member].mean() for name, member in kinds.items()}
    assert kept["verbatim"] == 1
    assert kept["same fact, same language"] > 2 * kept["same fact, other language"]


def test_recall_of_scores_that_follow_the_filter_or_oppose_it(small_ladder):
    rows, queries = np.arange(small_ladder.sequences.num_rows), np.arange(8)
    lexical = overlap(small_ladder, rows, queries) + 1e-6 * np.random.default_rng(0).random((8, len(rows)))
    along = prefilter(small_ladder, lexical, rows, queries, (0.01, 1), lexical)
    every = along[along["relation"] == ALL]
    assert (every["top"] == 10).all() and (every["kept"] == 10).all() and (every["whole"] == 1).all()
    parts = along[along["relation"] != ALL].groupby(["query", "share"])[["top", "kept"]].sum()
    assert (parts == 10).to_numpy().all() and along.loc[along["relation"] != ALL, "whole"].isna().all()
    against = prefilter(small_ladder, -lexical, rows, queries, (0.5, 1), lexical)
    sums = against[against["relation"] == ALL].groupby("share")[["kept", "whole"]].mean()
    assert sums.loc[0.5].tolist() == [0, 0] and sums.loc[1].tolist() == [10, 1]


def test_a_random_filter_keeps_its_share(small_ladder):
    rows, queries = np.arange(small_ladder.sequences.num_rows), np.arange(8)
    rng = np.random.default_rng(1)
    values = rng.normal(size=(8, len(rows)))
    found = prefilter(small_ladder, values, rows, queries, (0.2,), rng.random(values.shape), k=200)
    every = found[found["relation"] == ALL]
    assert every["kept"].sum() / every["top"].sum() == pytest.approx(0.2, abs=0.03)


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("cost")
    folders = {name: root / name for name in ("world", "model", "influence", "batching", "cost", "again")}
    for folder in folders.values():
        folder.mkdir()
    ladder.build(ladder.Ladder(documents=1500, held_out=20, queries=8)).save(folders["world"])
    recipe = asdict(models.Recipe(batch_size=16, warmup_steps=5, evaluations=2, learning_rate=1e-2))
    train(
        {"architecture": "gpt_neox", "width": 16, "depth": 1, "device": "cpu", "recipe": recipe},
        folders,
        folders["model"],
        quiet,
    )
    influence({**COMMON, "fit": 80, "sequences": 100}, folders, folders["influence"], quiet)
    batching(BATCHING, folders, folders["batching"], quiet)
    cost(COST, folders, folders["cost"], quiet)
    return folders


@pytest.fixture(scope="module")
def parts(made):
    world, model = World.load(made["world"]), models.load(made["model"])
    return world, model, Factors.load(made["influence"] / "factors.safetensors")


def test_batching_has_a_row_for_each_query_and_shortcut(made):
    found = pd.read_parquet(made["batching"] / "batching.parquet")
    counts = found.groupby(["method", "setting"]).size()
    assert counts.tolist() == [3] * len(counts)
    sizes = {method: sorted(set(rows["setting"])) for method, rows in found.groupby("method")}
    assert sizes == {"rank": [1, 2, 4, 8, 16], "random": [1, 2, 4, 8, 16], "blocks": [2], "redrawn": [1]}
    by = found.groupby(["method", "setting"])["agreement"].mean()
    assert by["rank", 16] > 0.999 and by["rank", 4] > by["random", 4] and by["rank", 1] < by["rank", 8]
    assert (found["positions"] == 6).all()


def test_random_projections_at_full_rank_change_nothing(parts):
    world, model, factors = parts
    queries, sequences = batch_of(world.queries, [0, 3]), batch_of(world.sequences, range(40))
    direct = score(model, factors, queries, sequences).values.numpy()
    found = projected(GaussNewton(model, factors, sequences), queries, [4, 17], seed=1)
    np.testing.assert_allclose(found[17], direct, rtol=1e-3, atol=1e-4 * np.abs(direct).max())
    assert correlations(found[4], direct).max() < 0.999


def test_stored_numbers_are_those_that_lie_there(parts):
    world, model, factors = parts
    # 64 x 17 up and 16 x 65 down.
    assert stored_at(factors, 3) == pytest.approx((3 * (64 + 17) + 3 * (16 + 65)) / (64 * 17 + 16 * 65))
    assert stored_at(factors, 99) == pytest.approx((17 * 81 + 16 * 81) / (64 * 17 + 16 * 65))
    assert numbers(factors) == 64**2 + 17**2 + 64 * 17 + 16**2 + 65**2 + 16 * 65
    blocks = fit_ekfac(model, batch_of(world.sequences, range(20)), blocks=2)
    assert numbers(blocks) == 2 * 32**2 + 9**2 + 8**2 + 64 * 17 + 2 * 8**2 + 33**2 + 32**2 + 16 * 65


def test_cost_measures_every_method_against_the_exact_solution(made, parts):
    _world, _model, _ = parts
    found, about = (pd.read_parquet(made["cost"] / f"{name}.parquet") for name in ("cost", "about"))
    assert not found.isna().any(axis=None) and (about["growth"] <= 1e-3).all() and len(about) == 2
    by = found.groupby(["method", "batch", "depth"])[["agreement", "alignment", "residual", "work"]].mean()
    assert found["alignment"].between(0, 1.01).all()
    lissa = by.loc["LiSSA"]
    assert (
        lissa.loc[(4, 16), "work"] == 1 + 16 * 4 * 4 / 3
        and lissa.loc[(8, 16), "alignment"] > lissa.loc[(8, 1), "alignment"]
    )
    assert by.loc[("EK-FAC", 0, 0), "alignment"] > by.loc[("gradient dot", 0, 0), "alignment"]
    assert about["fit"].iloc[0] > 80  # a pass over each of the scan's own 80 sequences, and more


def test_both_repeat_to_the_byte_but_for_seconds(made):
    for stage, parameters, names in ((batching, BATCHING, ["batching"]), (cost, COST, ["cost", "about"])):
        stage(parameters, made, made["again"], quiet)
        for name in names:
            file = f"{name}.parquet"
            assert (made["again"] / file).read_bytes() == (made[stage.__name__] / file).read_bytes()
    seconds = pd.read_parquet(made["cost"] / "seconds.parquet")
    assert set(zip(seconds["part"], seconds["batch"])) == {("fit", 0), ("query", 0), ("step", 4), ("step", 8)}
    assert (seconds["seconds"] > 0).all()


def test_lissa_goes_on_at_half_the_scale_where_a_minibatch_is_steeper_than_power_iteration_saw(
    made, tmp_path, monkeypatch
):
    whole = lissa.top_eigenvalue
    monkeypatch.setattr(lissa, "top_eigenvalue", lambda *args, **options: whole(*args, **options) / 6)
    cost({**COST, "batches": [8]}, made, tmp_path, quiet)
    scale = pd.read_parquet(tmp_path / "about.parquet")["scale"].item()
    safe = pd.read_parquet(made["cost"] / "about.parquet").set_index("batch")["scale"][8]
    assert scale / safe in (pytest.approx(3), pytest.approx(1.5), pytest.approx(0.75))
    rows = pd.read_parquet(tmp_path / "cost.parquet")
    assert (rows[rows["method"] == "LiSSA"]["residual"] < 1.5).all()
    monkeypatch.setattr(lissa, "top_eigenvalue", lambda *args, **options: whole(*args, **options) / 1e4)
    with pytest.raises(UserError, match="LiSSA diverges"):
        cost({**COST, "batches": [8]}, made, tmp_path, quiet)


def test_the_exact_solution_is_asked_of_the_largest_model_that_affords_it():
    profile = load_profile("smoke")
    sizes = {width: profile.ladder.family.sizes[0].model_copy(update={"width": width}) for width in (16, 32, 64, 128)}

    def asked(*widths: int) -> list[int]:
        family = profile.ladder.family.model_copy(update={"sizes": tuple(sizes[width] for width in widths)})
        ladder = profile.ladder.model_copy(update={"family": family})
        return finding.affordable_width(profile.model_copy(update={"ladder": ladder}))

    assert asked(16, 32, 64) == [32] and asked(128, 64) == [64]
    assert finding.affordable_width(profile.model_copy(update={"ladder": None})) == []
    assert finding.largest_width(profile.model_copy(update={"text": None}), "text") == []
