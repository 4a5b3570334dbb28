"""Random halves, and the bank of models retrained on them: nothing that was trained is lost by a kill."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, random_sequences
from safetensors.numpy import load_file

from influence_kit import models
from influence_kit.corpora.world import World, batch_of
from influence_kit.corpora.worlds.atlas import Atlas, build
from influence_kit.errors import UserError
from influence_kit.findings.stages import bank as stage
from influence_kit.findings.stages import retrained
from influence_kit.findings.stages.influence import scored_queries
from influence_kit.findings.stages.retrained import APART
from influence_kit.findings.stages.train import train
from influence_kit.recipes import how_many_together
from influence_kit.referees.retraining import answers, random_halves

SMALL = {"entities": 8, "relations": 2, "values": 4, "templates": 2, "facts_per_document": 1, "filler_words": 6, "noise_words": 12}
SMALL |= {"canaries": 1, "repetitions": (2,), "documents": 120, "most_supporters": 60, "held_out": 20, "queries": 4}


def quiet(*_):
    pass


def test_halves_come_in_pairs_that_share_nothing():
    found = random_halves(11, 6, seed=3)
    assert found.shape == (6, 11) and found[0].sum() == 5
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert (first ^ second).all()
    assert not np.array_equal(found[0], found[2])
    assert np.array_equal(found, random_halves(11, 6, seed=3)) and not np.array_equal(found, random_halves(11, 6, seed=4))
    with pytest.raises(UserError, match="0 halves of 11"):
        random_halves(11, 0, seed=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folders of a tiny world and a model trained on it, the bank's parameters)"""
    root = tmp_path_factory.mktemp("bank")
    folders = {name: root / name for name in ("world", "model")}
    build(Atlas(**SMALL)).save(folders["world"])
    recipe = asdict(models.Recipe(batch_size=8, warmup_steps=2, evaluations=2, learning_rate=1e-2))
    trained = {"architecture": "gpt_neox", "width": 16, "depth": 1, "device": "cpu", "recipe": recipe}
    train(trained, folders, folders["model"], quiet)
    return folders, {"model": trained, "subsets": 4, "repeats": 2, "seed": 7, "fraction": 1.0, "device": "cpu"}


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    stage.bank(made[1], made[0], out, quiet)
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_trained_together_are_those_trained_one_by_one(architecture, tmp_path):
    recipe = models.Recipe(batch_size=8, passes=2, warmup_steps=3, learning_rate=3e-3, clip=0.5, weight_decay=0.3, checkpoints=(1.0,))
    config = models.configure(architecture, 29, 16, 2, 24)
    data, queries = random_sequences(40), random_sequences(6)
    rows, seeds = torch.stack([torch.arange(36), torch.arange(39, 3, -1), torch.zeros(36, dtype=torch.long)]), [4, 4, 9]
    told = []
    found = answers(config, data, rows, recipe, seeds, queries, progress=lambda step, steps: told.append((step, steps)))
    assert told[-1] == (10, 10)
    for k, seed in enumerate(seeds):
        changed = {name: tensor[rows[k]] for name, tensor in data.items()}
        models.train(config, changed, queries, models.Recipe(**{**vars(recipe), "seed": seed}), tmp_path / str(k))
        log_p, _ = models.evaluate(models.load(tmp_path / str(k)), queries)
        assert torch.allclose(found[k], log_p, atol=2e-4)
        assert not torch.allclose(found[k], found[(k + 1) % 3], atol=0.1)


def test_training_together_says_when_a_model_diverged():
    recipe = models.Recipe(batch_size=8, learning_rate=1e30)
    with pytest.raises(UserError, match="diverged.*lower learning_rate=1e.30"):
        config, data = models.configure("gpt_neox", 29, 16, 1, 24), random_sequences(16)
        answers(config, data, torch.arange(16)[None], recipe, [0], data)


def test_small_models_are_trained_in_crowds_and_larger_ones_alone():
    recipe = models.Recipe(batch_size=16)
    assert how_many_together(recipe, 7, 120) == 64 and how_many_together(recipe, 48, 1024) == 1
    assert how_many_together(recipe, 16, 1024) == 4


def test_a_killed_bank_trains_no_model_twice_and_ends_the_same(made, whole, tmp_path, monkeypatch):
    folders, parameters = made
    sizes = []

    def counted(config, sequences, rows, *more):
        if sum(sizes) == 6 and 0 not in sizes:
            sizes.append(0)
            raise KeyboardInterrupt
        sizes.append(len(rows))
        return answers(config, sequences, rows, *more)

    monkeypatch.setattr(retrained, "how_many_together", lambda *_: 3)
    monkeypatch.setattr(retrained, "answers", counted)
    with pytest.raises(KeyboardInterrupt):
        stage.bank(parameters, folders, tmp_path, quiet)
    stage.bank(parameters, folders, tmp_path, quiet)
    assert sizes == [3, 3, 0, 2]
    again = load_file(tmp_path / "bank.safetensors")
    assert all(np.allclose(again[name], whole[name], atol=1e-4) for name in whole)


def test_responses_are_asked_for_the_most_influential_of_each_query_in_turn_and_for_others():
    from influence_kit.findings.stages.response import chosen

    scores = torch.tensor([[0.0, -9.0, 1.0, 8.0, 0.5, 0.1], [7.0, 0.0, 0.2, 6.0, 0.0, 0.0]])
    found = chosen(scores, 6, seed=0)
    assert len(set(found.tolist())) == 6
    assert {1, 0, 3} <= set(chosen(scores, 6, seed=1).tolist())
    assert set(chosen(scores, 4, seed=0).tolist()) >= {1, 0}  # the largest of the first query, then of the second
    assert np.array_equal(chosen(scores, 4, seed=2), chosen(scores, 4, seed=2))
