"""Chapter 02: its measures by hand, and its stages, tiny and real: what is replaced, what is kept through a kill, and that nothing else moves."""

from dataclasses import asdict

import numpy as np
import pandas
import pytest
import torch
from safetensors.numpy import load_file

from influence_kit import models
from influence_kit.corpora.world import World, batch_of
from influence_kit.corpora.worlds.atlas import Atlas, build
from influence_kit.errors import UserError
from influence_kit.findings import is_ekfac_right as finding
from influence_kit.findings.common import influence, scored_queries, train
from influence_kit.findings.is_ekfac_right import found_at, lds, slopes
from influence_kit.referees import retraining
from influence_kit.referees.retraining import APART, answers

RNG = np.random.default_rng(0)
SMALL = {
    "entities": 8,
    "relations": 2,
    "values": 4,
    "templates": 2,
    "facts_per_document": 1,
    "filler_words": 6,
    "noise_words": 12,
}
SMALL |= {"canaries": 1, "repetitions": (2,), "documents": 120, "most_supporters": 60, "held_out": 20, "queries": 4}
BANK = {"subsets": 4}
REWEIGHTED = {"queries": 3, "counts": [1, 20]}


def quiet(*_):
    pass


def test_the_score_of_a_perfect_prediction_is_one_whatever_its_scale():
    scores, members = RNG.standard_normal((3, 20)), RNG.random((12, 20)) < 0.5
    truth = members @ scores.T
    assert lds(scores, members, np.exp(truth)) == pytest.approx([1, 1, 1])
    assert lds(-5 * scores, members, truth) == pytest.approx([-1, -1, -1])


def test_a_score_that_knows_nothing_is_near_zero_and_one_that_does_not_vary_has_none():
    scores, members, outputs = (
        RNG.standard_normal((200, 50)),
        RNG.random((40, 50)) < 0.5,
        RNG.standard_normal((40, 200)),
    )
    assert abs(lds(scores, members, outputs).mean()) < 0.05
    assert np.isnan(lds(np.zeros((1, 50)), members, outputs[:, :1])[0])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 5), (4, 6), (4, 2)), "Scores have shape"),
        (((2, 5), (4, 5), (2, 4)), "outputs"),
        (((2, 5), (2, 5), (2, 2)), "too few"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(UserError, match=message):
        lds(*(np.ones(shape) for shape in shapes))


def test_the_slope_says_what_a_score_must_be_multiplied_with():
    scores = RNG.standard_normal((2, 30))
    assert slopes(0.2 * scores, scores) == pytest.approx([0.2, 0.2])
    assert np.isnan(slopes(scores, 0 * scores)).all()


def test_precision_and_recall_among_the_highest():
    scores = np.array([[5.0, 4, 3, 2, 1]] * 2)
    planted = np.array([[True, False, True, True, False], [False] * 5])
    precision, recall = found_at(scores, planted, 2)
    assert precision[0] == 0.5 and recall[0] == 0.5 and np.isnan(recall[1])
    assert found_at(scores, planted, 4)[1][0] == 1  # all three of three


def test_responses_are_asked_for_the_most_influential_of_each_query_in_turn_and_for_others():
    scores = torch.tensor([[0.0, -9.0, 1.0, 8.0, 0.5, 0.1], [7.0, 0.0, 0.2, 6.0, 0.0, 0.0]])
    found = finding.chosen(scores, 6, seed=0)
    assert len(set(found.tolist())) == 6
    assert {1, 0, 3} <= set(finding.chosen(scores, 6, seed=1).tolist())
    assert set(finding.chosen(scores, 4, seed=0).tolist()) >= {
        1,
        0,
    }  # the largest of the first query, then of the second
    assert np.array_equal(finding.chosen(scores, 4, seed=2), finding.chosen(scores, 4, seed=2))


def test_what_goes_is_the_strongest_and_what_comes_is_weak():
    values = np.array([5.0, -4.0, 3.0, 0.1, -0.2, 0.0, 2.0, -0.3])
    gone, instead = finding.strongest_and_weak(values, 2, seed=1)
    assert gone.tolist() == [0, 2] and set(instead) <= {3, 4, 5, 7} and len(set(instead)) == 2
    assert all(
        np.array_equal(a, b) for a, b in zip(finding.strongest_and_weak(values, 2, 1), (gone, instead), strict=True)
    )
    positive = np.array(
        [9.0, 8.0, 7.0, -60.0, -10.0, -50.0]
    )  # the strongest are among the half with the smallest absolute values
    gone, instead = finding.strongest_and_weak(positive, 3, seed=1)
    assert gone.tolist() == [0, 1, 2] and set(instead) == {3, 4, 5}
    with pytest.raises(UserError, match="5 sequences cannot be left out of 8"):
        finding.strongest_and_weak(values, 5, seed=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folders of a tiny world, of a model trained on it and of a scan; what stages are told of them)"""
    root = tmp_path_factory.mktemp("retrained")
    folders = {name: root / name for name in ("world", "model", "influence")}
    build(Atlas(**SMALL)).save(folders["world"])
    recipe = asdict(models.Recipe(batch_size=8, warmup_steps=2, evaluations=2, learning_rate=1e-2))
    trained = {"architecture": "gpt_neox", "width": 16, "depth": 1, "device": "cpu", "recipe": recipe}
    train(trained, folders, folders["model"], quiet)
    about = {"fraction": 1.0, "seed": 7, "fit": 60, "sequences": 120, "damping": 0.1, "layers": "mlp", "device": "cpu"}
    folders["influence"].mkdir()
    influence(about, folders, folders["influence"], quiet)
    return folders, {"model": trained, "repeats": 2, **about}


def test_whole_is_the_model_itself_and_kills_lose_nothing(made, tmp_path, monkeypatch):
    folders, parameters = made
    calls = []

    def killed(done, total, what):
        calls.append((done, total))
        if done > 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(retraining, "how_many_together", lambda *_: 5)
    with pytest.raises(KeyboardInterrupt):
        finding.reweighted(parameters | REWEIGHTED, folders, tmp_path, killed)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "resume").glob("*.safetensors")}
    assert len(kept) == 2 and 10 < calls[-1][0] <= 15 and calls[-1][1] == 26
    finding.reweighted(parameters | REWEIGHTED, folders, tmp_path, quiet)
    assert all((tmp_path / "resume" / name).stat().st_mtime_ns == time for name, time in kept.items())
    found = load_file(tmp_path / "reweighted.safetensors")
    scan = load_file(folders["influence"] / "scores.safetensors")
    world = World.load(folders["world"])
    own, _ = models.evaluate(models.load(folders["model"], 1.0), batch_of(world.queries, scan["queries"]))
    assert np.allclose(found["whole"][0], own.numpy(), atol=1e-4) and not np.allclose(
        found["whole"][1], own.numpy(), atol=0.1
    )
    assert found["log_p"].shape == (2, 3, 2, 2, len(own)) and found["counts"].tolist() == [1, 20]


def test_an_answer_is_that_of_a_model_trained_with_the_strongest_left_out_or_doubled(made, tmp_path):
    folders, parameters = made
    finding.reweighted({**parameters, "queries": 1, "counts": [20], "repeats": 1}, folders, tmp_path, quiet)
    found, scan = load_file(tmp_path / "reweighted.safetensors"), load_file(folders["influence"] / "scores.safetensors")
    world = World.load(folders["world"])
    values = scan["values"][found["asked"][0]].astype(float)
    strong, weak = finding.strongest_and_weak(values, 20, seed=7)
    assert values[strong].min() >= np.delete(values, strong).max()
    expected = (scan["values"][:, strong].astype(float).sum(1) - scan["values"][:, weak].astype(float).sum(1)) / 120
    assert found["predicted"][1, 0, 0] == pytest.approx(expected) and found["predicted"][0, 0, 0] == pytest.approx(
        -expected
    )
    assert expected[found["asked"][0]] > 0
    trained = parameters["model"]
    config = models.configure("gpt_neox", world.vocabulary_size, 16, 1, world.context)
    recipe = models.Recipe(
        **{**trained["recipe"], "checkpoints": (1.0,), "evaluations": 1, "betas": tuple(trained["recipe"]["betas"])}
    )
    for way, (lost, instead) in enumerate([(strong, weak), (weak, strong)]):
        order = np.arange(120)
        order[scan["rows"][lost]] = scan["rows"][instead]
        times = np.bincount(order, minlength=120)[scan["rows"][strong]]
        assert (times == (2 if way else 0)).all()
        changed = {name: tensor[torch.from_numpy(order)] for name, tensor in batch_of(world.sequences).items()}
        models.train(config, changed, batch_of(world.held_out), recipe, tmp_path / f"again {way}")
        log_p, _ = models.evaluate(
            models.load(tmp_path / f"again {way}", 1.0), batch_of(world.queries, scan["queries"])
        )
        assert np.allclose(found["log_p"][way, 0, 0, 0], log_p.numpy(), atol=1e-4)


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    finding.bank(made[1] | BANK, made[0], out, quiet)
    return load_file(out / "bank.safetensors")


def test_an_answer_is_that_of_a_model_trained_on_its_half(made, whole, tmp_path):
    folders, parameters = made
    world, trained = World.load(folders["world"]), parameters["model"]
    asked = scored_queries(world)
    assert whole["log_p"].shape == (4, 2, len(asked)) and np.array_equal(whole["queries"], asked)
    recipe = models.Recipe(**{**trained["recipe"], "checkpoints": (1.0,), "seed": APART})
    config = models.configure("gpt_neox", world.vocabulary_size, 16, 1, world.context)
    half = batch_of(world.sequences, np.flatnonzero(whole["members"][2]))
    models.train(config, half, batch_of(world.held_out), recipe, tmp_path)
    log_p, _ = models.evaluate(models.load(tmp_path), batch_of(world.queries, asked))
    assert np.allclose(whole["log_p"][2, 1], log_p.numpy(), atol=1e-4) and np.ptp(log_p.numpy()) > 0.1


def test_a_killed_bank_trains_no_model_twice_and_ends_the_same(made, whole, tmp_path, monkeypatch):
    folders, parameters = made
    sizes = []

    def counted(config, sequences, rows, *more):
        if sum(sizes) == 6 and 0 not in sizes:
            sizes.append(0)
            raise KeyboardInterrupt
        sizes.append(len(rows))
        return answers(config, sequences, rows, *more)

    monkeypatch.setattr(retraining, "how_many_together", lambda *_: 3)
    monkeypatch.setattr(retraining, "answers", counted)
    with pytest.raises(KeyboardInterrupt):
        finding.bank(parameters | BANK, folders, tmp_path, quiet)
    finding.bank(parameters | BANK, folders, tmp_path, quiet)
    assert sizes == [3, 3, 0, 2]
    again = load_file(tmp_path / "bank.safetensors")
    assert all(np.allclose(again[name], whole[name], atol=1e-4) for name in whole)


REFINED = {"sample": 30, "solved": 30, "iterations": [1, 40], "draws": 2, "reference": 30, "converged": 40}


@pytest.mark.filterwarnings("ignore:refine_on has", "ignore:.* queries have a residual above 1")
def test_a_refinement_ends_at_the_dense_solution_of_its_own_sample(made, tmp_path, monkeypatch):
    from influence_kit.engine.products import GaussNewton
    from influence_kit.referees.curvature import dense

    folders, parameters = made
    asked, steps = parameters | REFINED, []

    def killed(done, total, what):
        steps.append(what)
        if len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finding.refined(asked, folders, tmp_path, killed)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "resume").glob("*.safetensors")}
    finding.refined(asked, folders, tmp_path, quiet)
    assert len(kept) == 4 and all((tmp_path / "resume" / n).stat().st_mtime_ns == at for n, at in kept.items())
    scores = load_file(tmp_path / "scores.safetensors")
    world = World.load(folders["world"])
    setting = finding.setting_of(world, asked, folders["model"], tmp_path / "resume" / "factors.safetensors")
    solved, fresh, others = finding._apart(world, asked)
    assert len({*solved, *fresh, *others}) == 90
    curvature = GaussNewton(setting.model, setting.fit(), batch_of(world.sequences, solved))
    exact = torch.linalg.solve(dense(curvature), curvature.gradients(setting.queries).double().T).T
    expected = curvature.scores(exact.float(), setting.sequences).numpy()
    assert np.allclose(scores["002"], expected, atol=1e-2 * np.abs(expected).max())
    assert np.array_equal(scores["000"], setting.score(setting.fit()).values.numpy())  # EK-FAC as the rivals have it
    table = pandas.read_parquet(tmp_path / "solved.parquet")
    residual, far = (table.groupby("method", sort=False)[name].mean() for name in ("residual", "fresh_residual"))
    assert list(residual.index) == ["EK-FAC", "1 iterations", "40 iterations", "Woodbury"]
    assert residual["40 iterations"] < 1e-2 < residual["1 iterations"] and far["40 iterations"] > 1e-2
    agreement = table.groupby("method")["agreement"].mean()
    assert agreement["40 iterations"] > agreement["EK-FAC"]
    seconds = pandas.read_parquet(tmp_path / "seconds.parquet")
    assert seconds["method"].tolist() == list(residual.index) and (seconds["seconds"] > 0).all()


def test_a_world_too_small_for_a_refinement_is_refused(made, tmp_path):
    with pytest.raises(UserError, match="sample . 2 solved . reference = 150 sequences, the world has 120"):
        finding.refined(made[1] | REFINED | {"reference": 60}, made[0], tmp_path, quiet)


def refined_table(gains: float, fresh: float, same: float, cost: float) -> pandas.DataFrame:
    """Three seeds of EK-FAC and of four iterations that are better by so much, as `refinement` writes them."""
    rows = []
    for seed in (1, 2, 3):
        for method, more in (("EK-FAC", 0.0), ("4 iterations", gains), ("8 iterations", gains)):
            worth = {"r": 0.4 + more + seed / 100, "lds": 0.2 + more + seed / 200}
            solve = {"fresh_residual": fresh, "agreement": same, "cost": cost if method != "8 iterations" else 2 * cost}
            rows += [{"method": method, "seed": seed, **part} for part in (worth, solve)]
    return pandas.DataFrame(rows)


def test_refined_scores_are_the_default_where_all_that_was_asked_for_holds_at_once():
    met = finding.wanting(refined_table(0.1, 0.5, 0.95, 4))
    assert set(met) == {"4 iterations", "8 iterations"} and all(met["4 iterations"].values())
    assert "could be the default: after 4 iterations" in finding.default_or_not(refined_table(0.1, 0.5, 0.95, 4))
    told = finding.default_or_not(refined_table(0.1, 1.2, 0.95, 40))
    wanted = told.split("still wanting")[1]
    assert "4 iterations" in told and finding.CARRIES in wanted and finding.CHEAP in wanted
    assert finding.NEARER not in wanted and finding.SAME not in wanted
    worse = finding.wanting(refined_table(-0.1, 0.5, 0.5, 4))["4 iterations"]
    assert [name for name in finding.WANTED if worse[name]] == [finding.CARRIES, finding.CHEAP]


def test_methods_are_compared_on_the_seeds_that_both_have():
    rows = [("dear", seed, 3.0 + seed) for seed in (1, 2)] + [("cheap", seed, 1.0 * seed) for seed in (1, 2, 3)]
    table = pandas.DataFrame(rows, columns=["method", "seed", "r"])
    found = finding.more(table, "r", "dear", "cheap")
    assert dict(found.per_seed) == {1: 3.0, 2: 3.0} and found.value == 3.0
    assert dict(finding.more(table, "r", "cheap", "dear").per_seed) == {1: -3.0, 2: -3.0}
