"""The stages `batching` and `cost`, tiny and real: what they write equals direct calls, and repeats to the byte."""

from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from influence_kit import fit_ekfac, models, score
from influence_kit.corpora.world import World, batch_of
from influence_kit.corpora.worlds.ladder import Ladder, build
from influence_kit.engine.factors import Factors
from influence_kit.errors import UserError
from influence_kit.findings.stages.batching import batching, numbers, projected, stored_at
from influence_kit.findings.stages.cost import cost
from influence_kit.findings.stages.influence import influence
from influence_kit.findings.stages.train import train
from influence_kit.measures.correlations import correlations
from influence_kit.referees.curvature import GaussNewton

COMMON = {"fraction": 1.0, "seed": 7, "device": "cpu", "damping": 0.1, "layers": "mlp"}
BATCHING = {**COMMON, "queries": 3, "sequences": 60, "fit": 50, "blocks": [2]}
COST = {**COMMON, "queries": 2, "sequences": 40, "scored": 30, "batches": [4, 8], "depth": 16}
COST |= {"draws": 2, "most": 200, "tolerance": 1e-3, "turns": 1}


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("cost")
    folders = {name: root / name for name in ("world", "model", "influence", "batching", "cost", "again")}
    for folder in folders.values():
        folder.mkdir()
    build(Ladder(documents=1500, held_out=20, queries=8)).save(folders["world"])
    recipe = asdict(models.Recipe(batch_size=16, warmup_steps=5, evaluations=2, learning_rate=1e-2))
    train({"architecture": "gpt_neox", "width": 16, "depth": 1, "device": "cpu", "recipe": recipe}, folders, folders["model"], quiet)
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
    assert lissa.loc[(4, 16), "work"] == 1 + 16 * 4 * 4 / 3 and lissa.loc[(8, 16), "alignment"] > lissa.loc[(8, 1), "alignment"]
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



def test_lissa_goes_on_at_half_the_scale_where_a_minibatch_is_steeper_than_power_iteration_saw(made, tmp_path, monkeypatch):
    from influence_kit.findings.stages import cost as stage

    whole = stage.top_eigenvalue
    monkeypatch.setattr(stage, "top_eigenvalue", lambda *args, **options: whole(*args, **options) / 6)
    cost({**COST, "batches": [8]}, made, tmp_path, quiet)
    scale = pd.read_parquet(tmp_path / "about.parquet")["scale"].item()
    safe = pd.read_parquet(made["cost"] / "about.parquet").set_index("batch")["scale"][8]
    assert scale / safe in (pytest.approx(3), pytest.approx(1.5), pytest.approx(0.75))
    rows = pd.read_parquet(tmp_path / "cost.parquet")
    assert (rows[rows["method"] == "LiSSA"]["residual"] < 1.5).all()
    monkeypatch.setattr(stage, "top_eigenvalue", lambda *args, **options: whole(*args, **options) / 1e4)
    with pytest.raises(UserError, match="LiSSA diverges"):
        cost({**COST, "batches": [8]}, made, tmp_path, quiet)
