"""Sequences as strangers give them: read right, or refused in one line."""

import pytest
import torch
from conftest import random_sequences

from influence_kit.engine.sequences import batch_rows, read_batch


def test_counted_positions_have_a_target_after_them():
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    batch = read_batch({"input_ids": torch.zeros(3, 4, dtype=torch.long), "loss_mask": mask}, slice(0, 3))
    assert batch.length == 2  # nothing is computed at or after the last target
    assert torch.equal(batch.counted, torch.tensor([[1, 1], [1, 0], [0, 0]]).bool())


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"\[N, T\]"):
        read_batch({"input_ids": torch.zeros(4, dtype=torch.long)}, slice(0, 2))
    with pytest.raises(ValueError, match="at least 2"):
        read_batch({"input_ids": torch.zeros(4, 1, dtype=torch.long)}, slice(0, 2))
    with pytest.raises(ValueError, match="must have one shape"):
        read_batch({"input_ids": torch.zeros(4, 3).long(), "loss_mask": torch.ones(4, 2)}, slice(0, 2))
    with pytest.raises(ValueError, match="batch_size=0"):
        batch_rows(4, 0)


def test_a_dataset_works_like_a_mapping():
    from datasets import Dataset

    data = random_sequences(5, padded=True)
    dataset = Dataset.from_dict({name: tensor.tolist() for name, tensor in data.items()})
    for rows in batch_rows(5, 2):
        ours, theirs = read_batch(data, rows), read_batch(dataset, rows)
        assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.loss_mask, theirs.loss_mask)
