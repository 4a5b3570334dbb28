"""Identities 2, 5, 6 and 7: scores against explicit inverses, decompositions, finite differences."""

import math

import pytest
import torch
from conftest import ARCHITECTURES, random_sequences, tiny_model
from random_models import breaking

from influence_kit.engine.directions import Directions
from influence_kit.engine.factors import EIGENBASIS, LayerFactors, Rotator
from influence_kit.engine.fitting import fit_ekfac
from influence_kit.engine.gradients import Recorder, forward, frozen, sequence_losses
from influence_kit.engine.layers import tracked_layers
from influence_kit.engine.passes import sequence_gradients as gradients_of
from influence_kit.engine.scans import score, token_scores, top_scores
from influence_kit.engine.sequences import read_batch


def queries_of(rows: int = 3, length: int = 12):
    data = random_sequences(rows, length, seed=11)
    data["loss_mask"][:, :-3] = False
    return data


def sequence_gradients(model, data):
    """{layer: [N, P, M']} by plain outer products."""
    chosen = tracked_layers(model)
    rotator = Rotator()
    with frozen(model), Recorder(chosen) as recorder:
        found, _ = gradients_of(model, recorder, read_batch(data, slice(0, len(data["input_ids"]))))
        for name, each in found.items():
            a, g = rotator.tokens(LayerFactors(None, None, torch.empty(0)), each)
            found[name] = g.transpose(1, 2) @ a
    return found


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_equal_explicit_inverse_products(architecture, padded):
    """Identity 2 against a dense (Q_S kron Q_A) diag(1 / (Lambda + lambda)) (Q_S kron Q_A)^T."""
    model, data, queries = tiny_model(architecture), random_sequences(7, padded=padded), queries_of()
    factors = fit_ekfac(model, random_sequences(20, seed=5))
    scores = score(model, factors, queries, data, damping=0.1, batch_size=3)
    q, r, expected, norms = sequence_gradients(model, queries), sequence_gradients(model, data), 0, 0
    for name, layer in factors.layers.items():
        basis = torch.kron(layer.Q_S, layer.Q_A)
        inverse = basis @ torch.diag(1 / (layer.eigenvalues + 0.1 * layer.eigenvalues.mean()).flatten()) @ basis.T
        expected = expected + q[name].flatten(1) @ inverse @ r[name].flatten(1).T
        norms = norms + torch.einsum("nd,de,ne->n", r[name].flatten(1), inverse, r[name].flatten(1))
    torch.testing.assert_close(scores.values, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    torch.testing.assert_close(scores.self_influence, norms, rtol=1e-9, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_and_tokens_sum_to_the_sequence_score(architecture):
    """Identity 2 in float32."""
    model, data, queries = tiny_model(architecture, dtype=torch.float32), random_sequences(7, padded=True), queries_of()
    factors = fit_ekfac(model, random_sequences(20, seed=5))
    scores = score(model, factors, queries, data, by_layer=True)
    scale = float(scores.values.abs().max())
    torch.testing.assert_close(scores.by_layer.sum(2), scores.values, rtol=0, atol=1e-5 * scale)
    assert scores.by_layer.shape == (3, 7, len(scores.layers))
    for row in range(3):
        tokens = token_scores(model, factors, {n: t[row : row + 1] for n, t in queries.items()}, data, batch_size=2)
        torch.testing.assert_close(tokens.sum(1), scores.values[row], rtol=0, atol=1e-5 * scale)


def test_whitened_norms_and_cosine_of_a_sequence_with_itself():
    model, data = tiny_model("gpt_neox"), random_sequences(6)
    scores = score(model, fit_ekfac(model, random_sequences(20, seed=5)), data, data)
    torch.testing.assert_close(scores.values.diagonal(), scores.self_influence, rtol=1e-10, atol=0)
    torch.testing.assert_close(scores.cosine.diagonal(), torch.ones(6).double(), rtol=1e-10, atol=0)
    torch.testing.assert_close(scores.relatif.diagonal(), scores.query_norm, rtol=1e-10, atol=0)


def test_rebatching_permuting_and_padding_change_no_score():
    """Identity 5."""
    model, data, queries = tiny_model("llama"), random_sequences(9, padded=True), queries_of()
    factors = fit_ekfac(model, random_sequences(20, seed=5))
    one = score(model, factors, queries, data, batch_size=9)
    order = torch.tensor([3, 1, 8, 0, 2, 7, 4, 6, 5])
    longer = {
        "input_ids": torch.cat([data["input_ids"], torch.full((9, 5), 2)], 1)[order],
        "loss_mask": torch.cat([data["loss_mask"], torch.zeros(9, 5, dtype=torch.bool)], 1)[order],
    }
    other = score(model, factors, queries, longer, batch_size=2)
    torch.testing.assert_close(one.values[:, order], other.values, rtol=1e-9, atol=1e-9 * float(one.values.abs().max()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_finite_difference_of_a_small_step_is_the_identity_score(architecture):
    """Identity 6: a step of size eps along grad log p(z) moves log p(query) by eps times the score, exactly to rounding."""
    model, data, queries = tiny_model(architecture), random_sequences(4), queries_of()
    factors = fit_ekfac(model, data, method="identity")
    scores = score(model, factors, queries, data, damping=0.0)
    gradients, chosen = sequence_gradients(model, data), tracked_layers(model)
    # Llama's norms work in float32 whatever the model's dtype: its rounding over the step bounds the agreement
    step, tolerance = (1e-4, 3e-3) if architecture == "llama" else (1e-6, 1e-6)

    def moved(n: int, length: float):
        """log p of each query after a step along grad log p(z_n) = -grad L(z_n), which is then taken back."""
        for sign in (1, -1):
            for name, layer in chosen.items():
                change = -sign * length * gradients[name][n]
                if layer.bias is not None:
                    layer.bias.data += change[:, -1]
                    change = change[:, :-1]
                layer.weight.data += change if isinstance(layer, torch.nn.Linear) else change.T
            if sign == 1:
                with torch.no_grad():
                    logits = forward(model, queries["input_ids"])[:, :-1]
                    found = -sequence_losses(logits, queries["input_ids"][:, 1:], queries["loss_mask"][:, 1:])
        return found

    difference = torch.stack([(moved(n, step) - moved(n, -step)) / (2 * step) for n in range(4)], 1)
    torch.testing.assert_close(difference, scores.values, rtol=0, atol=tolerance * float(scores.values.abs().max()))


def test_influences_cancel_where_the_training_gradient_vanishes():
    """Identity 7: at a minimum of the training loss, sum_m I = 0."""
    torch.manual_seed(0)

    class Bigram(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding.from_pretrained(torch.randn(6, 4).double())
            self.mlp = torch.nn.ModuleDict({"head": torch.nn.Linear(4, 6, dtype=torch.float64)})

        def forward(self, tokens):
            return self.mlp["head"](self.embed(tokens))

    model, data = Bigram(), random_sequences(40, length=8, vocabulary=6)
    before = _imbalance(model, data)
    optimiser = torch.optim.LBFGS(
        model.mlp.parameters(), max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        logits = model(data["input_ids"])[:, :-1]
        loss = sequence_losses(logits, data["input_ids"][:, 1:], data["loss_mask"][:, 1:]).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    assert before > 0.01 and _imbalance(model, data) < 1e-5


def _imbalance(model, data):
    values = score(model, fit_ekfac(model, data), queries_of(2, 8) | {"input_ids": data["input_ids"][:2]}, data).values
    return float((values.sum(1).abs() / values.abs().sum(1)).max())


def test_ranking_table_and_units():
    model, data = tiny_model("gpt_neox"), random_sequences(6)
    scores = score(model, fit_ekfac(model, data), queries_of(), data, corpus_size=600)
    top, bottom = scores.top(2, query=1), scores.bottom(2, query=1)
    assert top[0].score == float(scores.values[1].max()) and bottom[0].score == float(scores.values[1].min())
    assert top[0].nats_per_copy == top[0].score / 600
    torch.testing.assert_close(scores.nats_per_copy, scores.values / 600)
    with pytest.raises(ValueError, match="3 queries"):
        scores.top(1, query=3)


@pytest.mark.parametrize("damping", [-0.1, float("nan")])
def test_bad_damping_is_refused(damping):
    model, data = tiny_model("gpt_neox"), random_sequences(6)
    with pytest.raises(ValueError, match="damping"):
        score(model, fit_ekfac(model, data), data, data, damping=damping)


def test_factors_of_another_model_are_refused():
    data = random_sequences(6)
    factors = fit_ekfac(tiny_model("gpt_neox"), data)
    with pytest.raises(ValueError, match="another model"):
        score(tiny_model("gpt2"), factors, data, data)
    with pytest.raises(ValueError, match="the model's are"):
        score(tiny_model("gpt_neox", width=32), factors, data, data)


def test_query_without_a_target_is_refused_before_the_scan():
    model, data = tiny_model("gpt_neox"), random_sequences(6)
    with pytest.raises(ValueError, match="query 0 has no target"):
        score(model, fit_ekfac(model, data), data | {"loss_mask": torch.zeros(6, 12).bool()}, data)
    with pytest.raises(ValueError, match="takes one query"):
        token_scores(model, fit_ekfac(model, data), data, data)


def setting(architecture="llama", dtype=torch.float64, rows=23, padded=True, **fit):
    """A model, its factors, queries and sequences."""
    model = tiny_model(architecture, dtype=dtype)
    return (
        model,
        fit_ekfac(model, random_sequences(20, seed=5), **fit),
        queries_of(),
        random_sequences(rows, padded=padded),
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rows", [2, 200])
def test_scan_without_norms_gives_the_same_scores(architecture, rows):
    """Directions turned out of the eigenbasis (many sequences) or left in it (few), bias aside or not."""
    setup = setting(architecture, rows=rows)
    whole, bare = score(*setup), score(*setup, self_influence=False, by_layer=True)
    torch.testing.assert_close(bare.values, whole.values, rtol=1e-9, atol=1e-10 * float(whole.values.abs().max()))
    torch.testing.assert_close(bare.by_layer.sum(2), bare.values, rtol=1e-9, atol=1e-12)
    assert bare.self_influence is None
    with pytest.raises(ValueError, match="self_influence=False"):
        _ = bare.relatif


@pytest.mark.parametrize("norms", [False, True])
def test_directions_in_a_file_score_like_those_in_memory(norms):
    setup = setting("gpt_neox")
    one, other = score(*setup, self_influence=norms), score(*setup, self_influence=norms, memory=0)
    assert torch.equal(one.values, other.values)


def test_directions_of_one_query_come_from_memory_or_file_alike():
    model, factors, queries, _ = setting("gpt_neox")
    rotated = dict.fromkeys(factors.layers, EIGENBASIS)
    kept, filed = (Directions(model, factors, queries, 0.1, rotated, batch_size=2, memory=m) for m in (2e9, 0))
    for name, layer in factors.layers.items():
        for query in range(3):
            one = kept.of_query(name, query)
            assert one.shape == layer.eigenvalues.shape and torch.equal(one, filed.of_query(name, query))


@pytest.mark.parametrize("norms", [False, True])
def test_query_batching_at_full_rank_is_exact_and_states_its_error_below_it(norms):
    setup = setting("gpt_neox")
    exact = score(*setup, self_influence=norms)
    full = score(*setup, self_influence=norms, rank=64)
    scale = float(exact.values.abs().max())
    torch.testing.assert_close(full.values, exact.values, rtol=1e-9, atol=1e-10 * scale)
    assert float(full.query_error.max()) < 1e-6 and exact.query_error is None
    low, lower = score(*setup, rank=4), score(*setup, rank=1)
    assert 0 < float(low.query_error.min()) < float(low.query_error.max()) < float(lower.query_error.min()) < 1
    within = score(*setup, rank=0.01)
    assert float(within.query_error.max()) <= 0.01
    # the error of the direction bounds that of the score: |dI| <= |dV| |D|
    assert float((within.values - exact.values).abs().max()) < 0.05 * scale
    for bad in (0, -1, 1.5, 0.0):
        with pytest.raises(ValueError, match="rank="):
            score(*setup, rank=bad)


@pytest.mark.parametrize("form", ["raw", "relatif", "cosine"])
def test_top_scores_keep_both_ends_of_the_whole_ranking(form):
    setup = setting(rows=60)
    whole = score(*setup, batch_size=7)
    values = whole.values if form == "raw" else getattr(whole, form)
    ends = top_scores(*setup, k=9, form=form, batch_size=7, corpus_size=600)
    for query in range(3):
        order = values[query].argsort(descending=True)
        assert [row.sequence for row in ends.top(9, query)] == order[:9].tolist()
        assert [row.sequence for row in ends.bottom(4, query)] == order.flip(0)[:4].tolist()
        assert ends.top(1, query)[0].score == pytest.approx(float(values[query].max()))
    copies = ends.top(1)[0].nats_per_copy
    assert copies == ends.top(1)[0].score / 600 if form == "raw" else math.isnan(copies)  # RelatIF is not in nats
    with pytest.raises(ValueError, match="query=3 is out of range"):
        ends.top(1, 3)
    with pytest.raises(ValueError, match="more than the 9"):
        ends.top(10)
    with pytest.raises(ValueError, match="form='best'"):
        top_scores(*setup, form="best")


def test_top_scores_of_fewer_sequences_than_asked_for():
    setup = setting(rows=3)
    ends = top_scores(*setup, k=5)
    assert len(ends.top(3)) == 3 and ends.sequences[0, 0].tolist()[3:] == [-1, -1]


def test_equal_scores_rank_by_position():
    model, factors, queries, sequences = setting(rows=1)
    same = {name: tensor.repeat(8, 1) for name, tensor in sequences.items()}
    ends = top_scores(model, factors, queries, same, k=4, batch_size=1)
    assert [row.sequence for row in ends.top(4)] == [0, 1, 2, 3] == [row.sequence for row in ends.bottom(4)]


def test_tokens_of_a_few_sequences_without_another_scan():
    setup = setting()
    scores = score(*setup)
    tokens = scores.per_token(1, [4, 2])
    assert tokens.shape == (2, 12)
    torch.testing.assert_close(tokens.sum(1), scores.values[1, [4, 2]], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(tokens, token_scores(*setup[:2], _row(setup[2], 1), _row(setup[3], [4, 2])))
    assert torch.equal(scores.per_token(-2, [4, 2]), tokens)  # of three queries, the second
    for query, sequences, message in ((3, [1], "query=3 is out of range"), (0, [], "no sequences given")):
        with pytest.raises(ValueError, match=message):
            scores.per_token(query, sequences)
    from dataclasses import replace

    with pytest.raises(ValueError, match="do not know their model"):
        replace(scores, tokens_of=None).per_token(0, [1])


def _row(data, rows):
    return {name: tensor[rows].reshape(-1, tensor.shape[1]) for name, tensor in data.items()}


class Killed(Exception):
    pass


@pytest.mark.parametrize("what", [score, top_scores])
def test_killed_scan_goes_on_where_it_stopped(tmp_path, what):
    setup = setting(rows=40)
    expected = what(*setup, batch_size=4)

    def kill(done, to_do):
        if done > to_do / 2:
            raise Killed

    with pytest.raises(Killed):
        what(*setup, batch_size=4, resume=tmp_path, progress=kill)
    kept, seen = sorted(path.name for path in tmp_path.iterdir()), []
    assert len(kept) == 5
    (tmp_path / kept[0]).write_bytes(b"damaged")
    again = what(*setup, batch_size=4, resume=tmp_path, progress=lambda done, to_do: seen.append(done))
    assert torch.equal(again.values, expected.values)
    assert len(seen) == 6  # the damaged part, and the five that were not made
    assert not list(tmp_path.iterdir())


def test_state_of_another_scan_is_not_used(tmp_path):
    setup, seen = setting(rows=8), []

    def kill(done, to_do):
        if done == to_do:
            raise Killed

    with pytest.raises(Killed):
        score(*setup, batch_size=4, resume=tmp_path, progress=kill)
    scores = score(*setup, damping=0.2, batch_size=4, resume=tmp_path, progress=lambda done, to_do: seen.append(done))
    assert seen == [4, 8] and torch.equal(scores.values, score(*setup, damping=0.2, batch_size=4).values)


@pytest.mark.parametrize("what", [score, top_scores])
def test_a_killed_scan_of_other_rows_is_made_again_where_they_differ(tmp_path, what):
    """300 rows, of which 64 were looked at: row 1 kept the score of what it had been."""
    model, factors, queries, sequences = setting(rows=300)

    def kill(done, to_do):
        if done > to_do / 2:
            raise Killed

    with pytest.raises(Killed):
        what(model, factors, queries, sequences, batch_size=4, resume=tmp_path, progress=kill)
    other, seen = {name: tensor.clone() for name, tensor in sequences.items()}, []
    other["input_ids"][1] = (other["input_ids"][1] + 1) % 29
    other["loss_mask"][77, 4] = False
    setup = (model, factors, queries, other)
    again = what(*setup, batch_size=4, resume=tmp_path, progress=lambda done, to_do: seen.append(done))
    assert torch.equal(again.values, what(*setup, batch_size=4).values)
    assert len(seen) == 75 - 37 + 2  # what was not made, and the two parts that rest on other rows
    assert not torch.equal(again.values, what(model, factors, queries, sequences, batch_size=4).values)


@pytest.mark.parametrize("change", ["weights", "query", "basis", "more rows"])
def test_a_killed_scan_of_another_model_or_query_is_not_gone_on_with(tmp_path, change):
    model, factors, queries, sequences = setting(rows=40)

    def kill(done, to_do):
        if done > to_do / 2:
            raise Killed

    with pytest.raises(Killed):
        score(model, factors, queries, sequences, batch_size=4, resume=tmp_path, progress=kill)
    if change == "weights":
        with torch.no_grad():
            model.model.norm.weight[3] += 0.1
    if change == "query":
        queries["input_ids"][2, 1] = (queries["input_ids"][2, 1] + 1) % 29
    if change == "basis":
        layer = next(iter(factors.layers.values()))
        layer.outputs[0][:, 0] *= -1
        layer.outputs[0][:, 1] += 1e-3 * layer.outputs[0][:, 0]
    if change == "more rows":
        sequences = {name: torch.cat([tensor, tensor[:9]]) for name, tensor in sequences.items()}
    found = score(model, factors, queries, sequences, batch_size=4, resume=tmp_path)
    assert torch.equal(found.values, score(model, factors, queries, sequences, batch_size=4).values)


def broken(rows=40, length=12):
    """A model that breaks, factors of it, queries, sequences of which three break, and the others' numbers."""
    model = breaking(tiny_model("llama"))
    sequences = random_sequences(rows, length, vocabulary=28)
    factors = fit_ekfac(model, random_sequences(20, length, vocabulary=28, seed=5))
    sequences["input_ids"][[1, 5, 7], 2] = 28
    queries = random_sequences(2, length, vocabulary=28, seed=11)
    return model, factors, queries, sequences, [n for n in range(rows) if n not in (1, 5, 7)]


@pytest.mark.parametrize("form", ["raw", "relatif", "cosine"])
def test_scores_that_are_not_finite_are_counted_and_named_and_rank_last(form):
    *setup, good = broken()
    message = r"3 of 40 sequences have scores that are not finite \(sequences 1, 5, 7\): they rank last"
    with pytest.warns(UserWarning, match=message):
        scores = score(*setup, batch_size=1)
    with pytest.warns(UserWarning, match=message):
        both = top_scores(*setup, k=40, form=form, batch_size=1)
    assert scores.values[:, good].isfinite().all()
    for query in range(2):
        row = scores.form(form)[query]
        ranked = sorted(good, key=lambda n: -float(row[n]))
        assert [each.sequence for each in both.top(40, query)] == [*ranked, 1, 5, 7]
        assert [each.sequence for each in both.bottom(40, query)] == [*ranked[::-1], 1, 5, 7]
        if form == "raw":
            assert [each.sequence for each in scores.top(40, query)] == [*ranked, 1, 5, 7]
            assert [each.sequence for each in scores.bottom(40, query)] == [*ranked[::-1], 1, 5, 7]
    with pytest.warns(UserWarning, match="3 of 3 sequences"):
        few = top_scores(*setup[:3], _row(setup[3], [1, 5, 7]), k=5, form=form)
    assert few.sequences[0, 0].tolist() == [0, 1, 2, -1, -1]


def test_a_query_whose_gradient_is_not_finite_is_refused_before_the_scan():
    model, factors, queries, sequences, _ = broken()
    queries["input_ids"][1, 3] = 28
    with pytest.raises(ValueError, match="1 of 2 queries have gradients that are not finite, first query 1"):
        score(model, factors, queries, sequences)
    with pytest.raises(ValueError, match="not finite"):
        token_scores(model, factors, _row(queries, 1), sequences)


def test_half_precision_model_scores_like_the_full_one():
    data, queries = random_sequences(12), queries_of()
    full, half = tiny_model("llama", dtype=torch.float32), tiny_model("llama", dtype=torch.bfloat16)
    labels = fit_ekfac(full, data).labels
    ours, exact = (score(m, fit_ekfac(m, data, labels=labels), queries, data).values for m in (half, full))
    assert ours.dtype == torch.float32
    assert float(torch.corrcoef(torch.stack([ours.flatten(), exact.flatten()]))[0, 1]) > 0.9
