"""Random halves, and models trained together."""

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, random_sequences

from influence_kit import models
from influence_kit.errors import UserError
from influence_kit.recipes import how_many_together
from influence_kit.referees.retraining import answers, random_halves


def test_halves_come_in_pairs_that_share_nothing():
    found = random_halves(11, 6, seed=3)
    assert found.shape == (6, 11) and found[0].sum() == 5
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert (first ^ second).all()
    assert not np.array_equal(found[0], found[2])
    assert np.array_equal(found, random_halves(11, 6, seed=3)) and not np.array_equal(
        found, random_halves(11, 6, seed=4)
    )
    with pytest.raises(UserError, match="0 halves of 11"):
        random_halves(11, 0, seed=3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_trained_together_are_those_trained_one_by_one(architecture, tmp_path):
    recipe = models.Recipe(
        batch_size=8, passes=2, warmup_steps=3, learning_rate=3e-3, clip=0.5, weight_decay=0.3, checkpoints=(1.0,)
    )
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
