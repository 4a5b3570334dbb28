"""Passes in pieces give what one whole pass gives: by sequences, by targets where the head is plain, and where it is not."""

import pytest
import torch
from conftest import ARCHITECTURES, random_sequences, tiny_model

from influence_kit.engine import passes
from influence_kit.engine.fitting import fit_ekfac
from influence_kit.engine.gradients import Recorder, frozen
from influence_kit.engine.index import build_index
from influence_kit.engine.labels import drawn_at, uniforms
from influence_kit.engine.layers import tracked_layers
from influence_kit.engine.passes import Room, rows_within, sequence_gradients
from influence_kit.engine.scans import score, token_scores
from influence_kit.engine.sequences import read_batch

WHOLE, ROWS, TARGETS, BOTH = (
    Room(1 << 40, *each) for each in ((1 << 40, 1 << 40), (1, 1 << 40), (1 << 40, 90), (1, 90))
)


@pytest.fixture
def within(monkeypatch):
    """Sets the room, and counts how many sequences and logits a model's forward passes see."""

    def set_room(room: Room) -> None:
        monkeypatch.setattr(passes, "room", lambda device: room)

    return set_room


def seen(model) -> list[tuple[int, int]]:
    """(sequences, logits) of each of the model's passes from now on."""
    found: list[tuple[int, int]] = []
    model.register_forward_hook(
        lambda module, arguments, output: found.append((len(output.logits), output.logits.numel()))
    )
    return found


def gradients(model, labels=None, rows: int = 5):
    batch = read_batch(random_sequences(rows, padded=True), slice(0, rows))
    with frozen(model), Recorder(tracked_layers(model, "all")) as recorder:
        return sequence_gradients(model, recorder, batch, labels)


def same(found, expected, wanted=slice(None)) -> None:
    assert torch.equal(found[1][:, 1:][wanted], expected[1][:, 1:][wanted])
    for name, (a, g, bias) in expected[0].items():
        torch.testing.assert_close(found[0][name].inputs, a, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(found[0][name].outputs, g, rtol=1e-10, atol=1e-12)
        assert found[0][name].bias == bias


@pytest.mark.parametrize("labels", ["tokens", "given", "drawn"])
@pytest.mark.parametrize("room", [ROWS, TARGETS, BOTH])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pieces_put_together_are_the_whole(architecture, room, labels, within):
    model, mask = tiny_model(architecture), random_sequences(5, padded=True)["loss_mask"][:, 1:]
    told = {
        "tokens": None,
        "given": random_sequences(5, seed=9)["input_ids"],
        "drawn": drawn_at(uniforms(3, slice(0, 5), 12)[:, 1:]),
    }[labels]
    within(WHOLE)
    expected = gradients(model, told)
    within(room)
    passed = seen(model)
    found = gradients(model, told)
    same(found, expected, mask)
    assert max(rows for rows, _ in passed) == (1 if room.activations == 1 else 5)
    if room.logits == 90:  # beside the first, which asks whether the head is plain
        assert max(numbers for _, numbers in passed[1:]) == 0
    shared = {id(each.inputs) for each in found[0].values()}
    assert len(shared) == len({id(each.inputs) for each in expected[0].values()})


def test_a_model_that_caps_its_logits_is_run_whole_by_fewer_sequences(within):
    import transformers

    torch.manual_seed(0)
    model = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=29,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            final_logit_softcapping=0.5,
        )
    ).double()
    model.eval()
    within(WHOLE)
    expected = gradients(model)
    within(Room(1 << 40, 1 << 40, 2 * 11 * 29))
    passed = seen(model)
    same(gradients(model), expected)
    assert max(rows for rows, _ in passed) == 2 and max(numbers for _, numbers in passed) <= 2 * 11 * 29


def test_only_batches_whose_token_gradients_fit_are_read(within):
    model = tiny_model("gpt_neox")
    layers = list(tracked_layers(model))
    each = 11 * sum(16 + 64 for _ in layers) * 8
    piece = 11 * 1.5 * 2 * (16 + 48 + 16 + 16 + 2 * (16 + 64)) * 8  # of all linear maps but the head
    assert rows_within(model, layers, 12, 32) == 32 and rows_within(model, layers, 10**9, 32) == 1
    within(Room(7 * each, 100 * each, 1))
    assert rows_within(model, layers, 12, 32) == 7
    within(Room(7 * each, int(3.5 * piece), 1))
    assert rows_within(model, layers, 12, 32) == 6  # two pieces, and no third for one sequence


@pytest.mark.parametrize("room", [Room(1, 1, 90), Room(4 * 11 * 320 * 8, 1 << 40, 1 << 40)])
def test_scores_do_not_depend_on_the_room(room, within):
    model, data, queries = tiny_model("gpt_neox"), random_sequences(9, padded=True), random_sequences(2, seed=4)
    whole = score(model, fit_ekfac(model, data), queries, data)
    within(room)
    passed = seen(model)
    pieces = score(model, fit_ekfac(model, data), queries, data)
    assert max(rows for rows, _ in passed) <= 4
    torch.testing.assert_close(pieces.values, whole.values, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(pieces.self_influence, whole.self_influence, rtol=1e-8, atol=1e-10)


def test_padding_that_no_sequence_needs_makes_no_batch_smaller(within, tmp_path):
    model, data, queries = tiny_model("gpt_neox"), random_sequences(9, padded=True), random_sequences(2, seed=4)
    wide = {
        "input_ids": torch.nn.functional.pad(data["input_ids"], (0, 40)),
        "loss_mask": torch.nn.functional.pad(data["loss_mask"], (0, 40)),
    }
    within(Room(4 * 11 * 320 * 8, 1 << 40, 1 << 40))
    factors, calls = fit_ekfac(model, data), []
    for given in (data, wide):
        passed = seen(model)
        scores = score(model, fit_ekfac(model, given), queries, given).values
        build_index(model, factors, given, tmp_path / str(len(calls)), bytes_per_sequence=64)
        token_scores(model, factors, {name: column[:1] for name, column in queries.items()}, given)
        calls.append(([rows for rows, _ in passed], scores))
    assert calls[0][0] == calls[1][0] and 4 in calls[0][0]
    torch.testing.assert_close(calls[0][1], calls[1][1], rtol=1e-8, atol=1e-10)


def test_a_long_sequence_makes_no_other_batch_of_a_scan_smaller(within):
    model, queries = tiny_model("gpt_neox"), random_sequences(2, seed=4)
    data = {n: torch.nn.functional.pad(column, (0, 12)) for n, column in random_sequences(8).items()}
    data |= {n: torch.cat([column, random_sequences(1, length=24)[n]]) for n, column in data.items()}
    factors = fit_ekfac(model, data)
    whole = score(model, factors, queries, data).values
    within(Room(4 * 11 * 320 * 8, 1 << 40, 1 << 40))
    passed = seen(model)
    pieces = score(model, factors, queries, data, batch_size=4).values
    assert [rows for rows, _ in passed][-3:] == [4, 4, 1]
    torch.testing.assert_close(pieces, whole, rtol=1e-8, atol=1e-10)
