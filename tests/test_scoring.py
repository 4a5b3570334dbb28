"""Identities 2, 5, 6 and 7: scores against explicit inverses, decompositions, finite differences."""

import pytest
import torch
from conftest import ARCHITECTURES, random_sequences, tiny_model

from influence_kit.ekfac import fit_ekfac
from influence_kit.gradients import Recorder, as_batches, forward, frozen, sequence_losses, tracked_layers
from influence_kit.scoring import score, token_scores


def queries_of(rows: int = 3, length: int = 12):
    data = random_sequences(rows, length, seed=11)
    data["loss_mask"][:, :-3] = False
    return data


def sequence_gradients(model, data):
    """{layer: [N, P, M']} by plain outer products."""
    chosen = tracked_layers(model)
    (_, batch), *_ = as_batches(data, len(data["input_ids"]))
    with frozen(model), Recorder(chosen) as recorder:
        losses = sequence_losses(forward(model, batch.tokens), batch.tokens, batch.loss_mask)
        return {n: g.outputs.transpose(1, 2) @ g.inputs for n, g in recorder.gradients(losses.sum()).items()}


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
                    logits = forward(model, queries["input_ids"])
                    found = -sequence_losses(logits, queries["input_ids"], queries["loss_mask"])
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
        loss = sequence_losses(model(data["input_ids"]), data["input_ids"], data["loss_mask"]).mean()
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


def test_half_precision_model_scores_like_the_full_one():
    data, queries = random_sequences(12), queries_of()
    full, half = tiny_model("llama", dtype=torch.float32), tiny_model("llama", dtype=torch.bfloat16)
    labels = fit_ekfac(full, data).labels
    ours, exact = (score(m, fit_ekfac(m, data, labels=labels), queries, data).values for m in (half, full))
    assert ours.dtype == torch.float32
    assert float(torch.corrcoef(torch.stack([ours.flatten(), exact.flatten()]))[0, 1]) > 0.9
