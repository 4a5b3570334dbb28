"""Sequences as strangers give them: read right, or refused in one line before the first pass."""

from collections import UserDict
from functools import partial
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch
import transformers as tf
from conftest import random_sequences, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from influence_kit.engine.fitting import fit_ekfac
from influence_kit.engine.index import build_index
from influence_kit.engine.scans import score, token_scores, top_scores
from influence_kit.engine.sequences import batch_rows, check, corpus_digest, count, gather, read_batch, row_digests


def test_counted_positions_have_a_target_after_them():
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]).bool()
    batch = read_batch({"input_ids": torch.zeros(3, 4, dtype=torch.long), "loss_mask": mask}, slice(0, 3))
    assert batch.length == 2  # nothing is computed at or after the last target
    assert torch.equal(batch.counted, torch.tensor([[1, 1], [1, 0], [0, 0]]).bool())


def test_bad_shapes_are_named():
    for ids, message in (
        (torch.zeros(4), "whole numbers, not float32"),
        (torch.zeros(4, 3).bool(), "whole numbers, not bool"),
        (torch.zeros(4).long(), r"must be \[N, T\]"),
        (torch.zeros(4, 1).long(), "at least 2"),
        (torch.zeros(4, 2, 2).long(), r"must be \[N, T\]"),
        (torch.tensor(3), "not a single Tensor"),
        ({1: [2, 3]}, "cannot be cut into rows"),
        ([[1, 2, 3], [1, 2]], "rows must have one length"),
        ([["a", "b"], ["c", "d"]], "no table of numbers"),
        ([[1, None], [2, 3]], "no table of numbers"),
        (torch.tensor([[1, 2], [3, -1]]), "input_ids of row 1 holds the id -1"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            check({"input_ids": ids})
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="must have one shape"):
        read_batch({"input_ids": torch.zeros(4, 3).long(), "loss_mask": torch.ones(4, 2)}, slice(0, 2))
    with pytest.raises(ValueError, match="loss_mask has 5 rows, input_ids has 4"):
        check({"input_ids": torch.zeros(4, 3).long(), "loss_mask": torch.ones(5, 3)})
    with pytest.raises(ValueError, match="batch_size=0"):
        batch_rows(4, 0)


def mixed_lengths():
    return datasets.Dataset.from_dict({"input_ids": [[1, 2, 3]] * 3 + [[1, 2]]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda: datasets.Dataset.from_dict({"input_ids": [[1, 2]]}).to_iterable_dataset(), "streaming"),
        (lambda: datasets.DatasetDict(train=datasets.Dataset.from_dict({"input_ids": [[1, 2]]})), "splits .train."),
        (lambda: [{"input_ids": [1, 2]}], "not a list"),
        (lambda: torch.zeros(3, 4).long(), "not a Tensor"),
        (lambda: {"ids": [[1, 2]]}, "no column input_ids among ids"),
        (lambda: {}, "no column input_ids among none"),
        (mixed_lengths, "rows must have one length"),
        (lambda: {"input_ids": [[1, 2]], "completion_mask": [[0, 1]]}, "'completion_mask' is not read"),
        (lambda: {"input_ids": [[1, 2, 3]], "position_ids": [[0, 0, 1]]}, "position_ids of row 0 is 0 at token 1"),
    ],
)
def test_containers_that_cannot_be_read_are_refused(given, message):
    model = tiny_model("gpt_neox")
    for call in (fit_ekfac, lambda model, sequences: check(sequences, model)):
        with pytest.raises(ValueError, match=message) as error:
            call(model, given())
        assert "\n" not in str(error.value)


# A table of ids, which tokens of it are there (from the left), and which of these are targets.
TABLES = st.integers(1, 5).flatmap(
    lambda rows: st.integers(2, 7).flatmap(
        lambda length: st.tuples(
            st.lists(st.lists(st.integers(0, 28), min_size=length, max_size=length), min_size=rows, max_size=rows),
            st.lists(st.integers(0, length), min_size=rows, max_size=rows),
            st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=rows, max_size=rows),
        )
    )
)
CONTAINERS = {
    "tensors": lambda columns: {name: torch.tensor(each) for name, each in columns.items()},
    "arrays": lambda columns: {name: np.array(each) for name, each in columns.items()},
    "lists": lambda columns: columns,
    "lists of tensors": lambda columns: {n: [torch.tensor(row) for row in each] for n, each in columns.items()},
    "lists of arrays": lambda columns: {n: [np.array(row) for row in each] for n, each in columns.items()},
    "encoding": lambda columns: tf.BatchEncoding(columns),
    "encoding of tensors": lambda columns: tf.BatchEncoding(columns, tensor_type="pt"),
    "own mapping": lambda columns: UserDict(columns),
    "dataset": lambda columns: datasets.Dataset.from_dict(columns),
    "dataset of tensors": lambda columns: datasets.Dataset.from_dict(columns).with_format("torch"),
    "dataset of arrays": lambda columns: datasets.Dataset.from_dict(columns).with_format("numpy"),
    "transformed dataset": lambda columns: datasets.Dataset.from_dict(columns).with_transform(lambda rows: rows),
}
WHOLE_NUMBERS = (np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)


def rows_of(sequences):
    """All rows, read in twos."""
    found = [read_batch(sequences, rows) for rows in batch_rows(count(sequences), 2)]
    return torch.cat([b.tokens for b in found]), torch.cat([b.loss_mask for b in found])


@pytest.mark.parametrize("container", CONTAINERS)
@given(table=TABLES, said=st.sets(st.sampled_from(["loss_mask", "labels", "attention_mask"])))
@settings(max_examples=15, deadline=None)
def test_any_container_with_any_columns_says_the_same(container, table, said):
    ids, lengths, wanted = table
    real = [[t < n for t in range(len(row))] for row, n in zip(ids, lengths)]
    targets = [[r and w for r, w in zip(*rows)] for rows in zip(real, wanted)]
    columns = {
        "loss_mask": targets,
        "labels": [[i if t else -100 for i, t in zip(*rows)] for rows in zip(ids, targets)],
        "attention_mask": [[int(each) for each in row] for row in real],
    }
    given_columns = {"input_ids": ids} | {name: columns[name] for name in said}
    expected = targets if {"loss_mask", "labels"} & said else real if said else [[True] * len(row) for row in ids]
    sequences = CONTAINERS[container](given_columns)
    check(sequences)
    tokens, mask = rows_of(sequences)
    assert tokens.dtype == torch.int64 and tokens.tolist() == ids
    assert mask.dtype == torch.bool and mask[:, 1:].tolist() == [row[1:] for row in expected] and not mask[:, 0].any()
    again = gather(sequences, range(len(ids)))
    assert torch.equal(again["input_ids"], tokens) and torch.equal(again["loss_mask"], mask)
    # What a sequence is does not depend on what it lies in, how its targets are given, or how far it is padded.
    longer = {"input_ids": [[*row, 3] for row in ids], "loss_mask": [[*row, 0] for row in mask.tolist()]}
    assert corpus_digest(sequences) == corpus_digest(longer)


@given(
    table=TABLES, dtype=st.sampled_from(WHOLE_NUMBERS), kind=st.sampled_from([*WHOLE_NUMBERS, bool, float, np.float32])
)
@settings(max_examples=40, deadline=None)
def test_any_type_of_number_is_read(table, dtype, kind):
    ids, _, wanted = table
    for make in (np.array, lambda *content: torch.from_numpy(np.array(*content))):
        tokens, mask = rows_of({"input_ids": make(ids, dtype), "loss_mask": make(wanted, kind)})
        assert tokens.tolist() == ids and mask[:, 1:].tolist() == [row[1:] for row in wanted]


@given(
    table=TABLES,
    at=st.tuples(st.integers(0, 4), st.integers(0, 6)),
    value=st.sampled_from([-100, 2, -1, 0.5, float("nan")]),
)
@settings(max_examples=40, deadline=None)
def test_a_mask_that_is_not_zero_or_one_is_refused_by_its_place(table, at, value):
    ids, _, wanted = table
    row, token = at[0] % len(ids), at[1] % len(ids[0])
    for name, hint in (("loss_mask", "-100 belongs in a column `labels`"), ("attention_mask", "")):
        mask = torch.tensor(wanted).double()
        mask[:] = mask if name == "loss_mask" else 1
        mask[row, token] = value
        mask = mask.long() if isinstance(value, int) else mask
        with pytest.raises(ValueError, match=f"{name} of row {row} is .* at token {token}, not 0 or 1.*{hint}"):
            check({"input_ids": ids, name: mask})


@given(table=TABLES)
@settings(max_examples=40, deadline=None)
def test_attention_masks_with_padding_on_the_left_or_holes_are_refused(table):
    ids, _, real = table
    row = next((i for i, r in enumerate(real) if any(b and not a for a, b in pairwise(r))), None)
    sequences = {"input_ids": ids, "attention_mask": real}
    if row is None:
        check(sequences)
        return
    why = "it has a hole" if real[row][0] else "padding must be on the right"
    with pytest.raises(ValueError, match=f"attention_mask of row {row} is 1 after a 0: {why}"):
        check(sequences)


def test_a_completion_at_the_end_is_no_padding_on_the_left():
    data = random_sequences(3)
    data["loss_mask"][:, :-4] = False
    check(data | {"attention_mask": torch.ones(3, 12).long()}, asking=True)


def test_columns_that_contradict_each_other_are_refused():
    data = random_sequences(3)
    ids, all_ = data["input_ids"], torch.ones(3, 12).long()
    short = torch.cat([all_[:, :8], 0 * all_[:, 8:]], 1)
    for columns, message in (
        ({"labels": ids.roll(-1, 1)}, "labels of row 0 is .* a label is the token itself"),
        ({"labels": ids, "attention_mask": short}, "labels of row 0 has a target at token 8, where attention_mask"),
        ({"loss_mask": all_, "attention_mask": short}, "loss_mask of row 0 has a target at token 8"),
        ({"loss_mask": short, "labels": ids}, "labels of row 0 and loss_mask disagree at token 8"),
        ({"labels": ids.float()}, "labels must be whole numbers"),
        ({"labels": ids[:, 1:]}, "must have one shape"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            check({"input_ids": ids, **columns})
        assert "\n" not in str(error.value)


def test_an_encoding_and_labels_score_like_the_mask_that_they_mean():
    """2,820 targets instead of 319: what came of not reading them."""
    model, data, queries = (
        tiny_model("llama"),
        random_sequences(9, padded=True),
        random_sequences(2, seed=3, padded=True),
    )
    queries["loss_mask"][:, :3] = False
    labels = torch.randint(0, 29, (9, 12), generator=torch.Generator().manual_seed(0))
    expected = score(model, fit_ekfac(model, data, labels=labels), queries, data).values
    padded = {"input_ids": data["input_ids"], "attention_mask": data["loss_mask"].long()}
    asked = {"input_ids": queries["input_ids"], "labels": queries["input_ids"].masked_fill(~queries["loss_mask"], -100)}
    for sequences in (padded, tf.BatchEncoding(padded), datasets.Dataset.from_dict(padded)):
        found = score(model, fit_ekfac(model, sequences, labels=labels), asked, sequences).values
        assert torch.equal(found, expected)


@pytest.mark.parametrize("padding", [29, 1000])
def test_ids_beyond_the_vocabulary_are_refused_before_the_first_pass(padding, tmp_path):
    model, data = tiny_model("gpt2"), random_sequences(6, padded=True)
    factors = fit_ekfac(model, data)
    bad = {"input_ids": data["input_ids"].masked_fill(~data["loss_mask"], padding), "loss_mask": data["loss_mask"]}
    row = int((bad["input_ids"] == padding).any(1).nonzero()[0])
    message = f"input_ids of row {row} holds the id {padding} at token .*: the model knows the ids from 0 to 28 alone"
    one = {name: tensor[row : row + 1] for name, tensor in bad.items()}
    calls = (
        lambda: fit_ekfac(model, bad),
        lambda: score(model, factors, data, bad),
        lambda: top_scores(model, factors, data, bad),
        lambda: token_scores(model, factors, {n: t[:1] for n, t in data.items()}, bad),
        lambda: build_index(model, factors, bad, tmp_path),
    )
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="queries: .* holds the id"):
        score(model, factors, one, data)


def test_given_labels_are_read_like_ids_or_refused():
    model, data = tiny_model("gpt2"), random_sequences(6, padded=True)
    labels = random_sequences(6, seed=9)["input_ids"]
    expected = fit_ekfac(model, data, labels=labels).layers
    for given_ in (labels.int(), labels.numpy(), labels.tolist(), labels.masked_fill(~data["loss_mask"], -100)):
        found = fit_ekfac(model, data, labels=given_).layers
        assert all(torch.equal(found[n].eigenvalues, expected[n].eigenvalues) for n in expected)
    for wrong, message in (
        (labels + 29, "labels of row 0 holds the id .* at token 1: the model knows the ids from 0 to 28 alone"),
        (torch.full_like(labels, -100), "labels of row 0 holds the id -100 at token 1"),
        (labels.float(), "whole numbers, not float32"),
        (labels[:5], "do not match"),
        (labels[:, :5], "do not match"),
        (None, "no table of numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_ekfac(model, data, labels=wrong)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("damping", float("inf")), ("damping", -1.0)])
def test_numbers_out_of_range_are_refused_before_the_first_pass(name, value, tmp_path):
    model, data = tiny_model("gpt2"), random_sequences(6)
    factors = fit_ekfac(model, data)
    calls = [partial(score, model, factors, data, data), partial(top_scores, model, factors, data, data)]
    calls += [partial(build_index, model, factors, data, tmp_path)]
    for call in [*calls, partial(fit_ekfac, model, data)] if name == "batch_size" else calls:
        with pytest.raises(ValueError, match=f"{name}={value}"):
            call(**{name: value})


def test_sequences_longer_than_the_context_are_refused_before_the_first_pass():
    model = tiny_model("llama", context=16)
    assert model.config.max_position_embeddings == 16
    fit_ekfac(model, random_sequences(2, length=17))  # 16 positions predict 16 tokens
    padded = random_sequences(2, length=30)
    padded["loss_mask"][:, 17:] = False
    fit_ekfac(model, padded)
    for architecture in ("llama", "gpt2", "gpt_neox"):
        with pytest.raises(ValueError, match="targets after 17 tokens: the model's context is 16"):
            fit_ekfac(tiny_model(architecture, context=16), random_sequences(2, length=18))


@pytest.mark.parametrize("rows", [[99, 1], [1, -41], [40], [1.5], [True], ["a"], np.array([True, False])])
def test_a_sequence_that_is_not_there_is_refused(rows):
    model, data = tiny_model("gpt_neox"), random_sequences(40)
    scores = score(model, fit_ekfac(model, data), random_sequences(1, seed=3), data)
    with pytest.raises(ValueError, match="is not there: there are 40"):
        scores.per_token(0, rows)


def test_sequences_are_counted_from_the_end_where_negative():
    data = random_sequences(6)
    for rows in ([-1, 4, -1], np.array([5, 4, 5], np.uint8), torch.tensor([5, -2, 5])):
        assert torch.equal(gather(data, rows)["input_ids"], data["input_ids"][[5, 4, 5]])


def test_rows_are_recognised_by_what_their_loss_rests_on():
    data = random_sequences(4, padded=True)
    of = row_digests(read_batch(data, slice(0, 4)))
    assert len(set(of.tolist())) == 4
    other = {name: tensor.clone() for name, tensor in data.items()}
    other["input_ids"][~other["loss_mask"]] = 7  # padding
    assert (row_digests(read_batch(other, slice(0, 4))) == of).all()
    other["input_ids"][2, 3] += 1
    other["loss_mask"][3, 3] = False
    assert (row_digests(read_batch(other, slice(0, 4))) == of).tolist() == [True, True, False, False]
