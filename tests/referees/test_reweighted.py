"""Training again with the most influential sequences left out or doubled: what is replaced, what is kept through a kill, and that nothing else moves."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from influence_kit import models
from influence_kit.corpora.world import World, batch_of
from influence_kit.corpora.worlds.atlas import Atlas, build
from influence_kit.errors import UserError
from influence_kit.findings.stages import retrained
from influence_kit.findings.stages import reweighted as stage
from influence_kit.findings.stages.influence import influence
from influence_kit.findings.stages.train import train

from .test_retraining import SMALL, quiet


def test_what_goes_is_the_strongest_and_what_comes_is_weak():
    values = np.array([5.0, -4.0, 3.0, 0.1, -0.2, 0.0, 2.0, -0.3])
    gone, instead = stage.strongest_and_weak(values, 2, seed=1)
    assert gone.tolist() == [0, 2] and set(instead) <= {3, 4, 5, 7} and len(set(instead)) == 2
    assert all(np.array_equal(a, b) for a, b in zip(stage.strongest_and_weak(values, 2, 1), (gone, instead), strict=True))
    positive = np.array([9.0, 8.0, 7.0, -60.0, -10.0, -50.0])  # the strongest are among the half with the smallest absolute values
    gone, instead = stage.strongest_and_weak(positive, 3, seed=1)
    assert gone.tolist() == [0, 1, 2] and set(instead) == {3, 4, 5}
    with pytest.raises(UserError, match="5 sequences cannot be left out of 8"):
        stage.strongest_and_weak(values, 5, seed=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("reweighted")
    folders = {name: root / name for name in ("world", "model", "influence")}
    build(Atlas(**SMALL)).save(folders["world"])
    recipe = asdict(models.Recipe(batch_size=8, warmup_steps=2, evaluations=2, learning_rate=1e-2))
    trained = {"architecture": "gpt_neox", "width": 16, "depth": 1, "device": "cpu", "recipe": recipe}
    train(trained, folders, folders["model"], quiet)
    about = {"fraction": 1.0, "seed": 7, "fit": 60, "sequences": 120, "damping": 0.1, "layers": "mlp", "device": "cpu"}
    folders["influence"].mkdir()
    influence(about, folders, folders["influence"], quiet)
    return folders, {"model": trained, "queries": 3, "counts": [1, 20], "repeats": 2, **about}


def test_whole_is_the_model_itself_and_kills_lose_nothing(made, tmp_path, monkeypatch):
    folders, parameters = made
    calls = []

    def killed(done, total, what):
        calls.append((done, total))
        if done > 10:
            raise KeyboardInterrupt

    monkeypatch.setattr(retrained, "how_many_together", lambda *_: 5)
    with pytest.raises(KeyboardInterrupt):
        stage.reweighted(parameters, folders, tmp_path, killed)
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "resume").glob("*.safetensors")}
    assert len(kept) == 2 and 10 < calls[-1][0] <= 15 and calls[-1][1] == 26
    stage.reweighted(parameters, folders, tmp_path, quiet)
    assert all((tmp_path / "resume" / name).stat().st_mtime_ns == time for name, time in kept.items())
    found = load_file(tmp_path / "reweighted.safetensors")
    scan = load_file(folders["influence"] / "scores.safetensors")
    world = World.load(folders["world"])
    own, _ = models.evaluate(models.load(folders["model"], 1.0), batch_of(world.queries, scan["queries"]))
    assert np.allclose(found["whole"][0], own.numpy(), atol=1e-4) and not np.allclose(found["whole"][1], own.numpy(), atol=0.1)
    assert found["log_p"].shape == (2, 3, 2, 2, len(own)) and found["counts"].tolist() == [1, 20]


def test_an_answer_is_that_of_a_model_trained_with_the_strongest_left_out_or_doubled(made, tmp_path):
    folders, parameters = made
    stage.reweighted({**parameters, "queries": 1, "counts": [20], "repeats": 1}, folders, tmp_path, quiet)
    found, scan = load_file(tmp_path / "reweighted.safetensors"), load_file(folders["influence"] / "scores.safetensors")
    world = World.load(folders["world"])
    values = scan["values"][found["asked"][0]].astype(float)
    strong, weak = stage.strongest_and_weak(values, 20, seed=7)
    assert values[strong].min() >= np.delete(values, strong).max()
    expected = (scan["values"][:, strong].astype(float).sum(1) - scan["values"][:, weak].astype(float).sum(1)) / 120
    assert found["predicted"][1, 0, 0] == pytest.approx(expected) and found["predicted"][0, 0, 0] == pytest.approx(-expected)
    assert expected[found["asked"][0]] > 0
    trained = parameters["model"]
    config = models.configure("gpt_neox", world.vocabulary_size, 16, 1, world.context)
    recipe = models.Recipe(**{**trained["recipe"], "checkpoints": (1.0,), "evaluations": 1, "betas": tuple(trained["recipe"]["betas"])})
    for way, (lost, instead) in enumerate([(strong, weak), (weak, strong)]):
        order = np.arange(120)
        order[scan["rows"][lost]] = scan["rows"][instead]
        times = np.bincount(order, minlength=120)[scan["rows"][strong]]
        assert (times == (2 if way else 0)).all()
        changed = {name: tensor[torch.from_numpy(order)] for name, tensor in batch_of(world.sequences).items()}
        models.train(config, changed, batch_of(world.held_out), recipe, tmp_path / f"again {way}")
        log_p, _ = models.evaluate(models.load(tmp_path / f"again {way}", 1.0), batch_of(world.queries, scan["queries"]))
        assert np.allclose(found["log_p"][way, 0, 0, 0], log_p.numpy(), atol=1e-4)
