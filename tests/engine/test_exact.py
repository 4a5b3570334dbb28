"""Identities 1 and 3 against dense curvature: what EK-FAC approximates, and in what order its relatives fall short of it."""

import pytest
import torch
from conftest import random_sequences, tiny_model
from oracles import exact_scores, fisher, gauss_newton

from influence_kit.engine.fitting import fit_ekfac
from influence_kit.engine.gradients import forward, sequence_losses
from influence_kit.engine.scans import score

VOCABULARY = 11


def trained(architecture: str, data):
    """A model of 2,000 to 3,000 tracked weights after a short training on sequences with structure."""
    model = tiny_model(architecture, width=16, depth=1, vocabulary=VOCABULARY)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimiser.zero_grad()
        logits = forward(model, data["input_ids"])[:, :-1]
        sequence_losses(logits, data["input_ids"][:, 1:], data["loss_mask"][:, 1:]).mean().backward()
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return model


def sequences(rows: int, seed: int):
    """Every token follows from the one before by one of two steps."""
    generator = torch.Generator().manual_seed(seed)
    tokens = random_sequences(rows, 8, VOCABULARY, seed)["input_ids"]
    for t in range(1, 8):
        step = torch.where(torch.rand(rows, generator=generator) < 0.8, 3, 7)
        tokens[:, t] = (tokens[:, t - 1] + step) % VOCABULARY
    return {"input_ids": tokens, "loss_mask": torch.ones(rows, 8, dtype=torch.bool)}


@pytest.fixture(scope="module", params=["gpt_neox", "llama"])
def setting(request):
    data = sequences(12, 0)
    model = trained(request.param, data)
    return model, data, sequences(5, 1), gauss_newton(model, data)


def test_fisher_is_the_gauss_newton_matrix(setting):
    """Softmax with cross-entropy is a matching loss: both are one matrix."""
    model, data, _, curvature = setting
    torch.testing.assert_close(fisher(model, data), curvature, rtol=1e-9, atol=1e-12)


def test_trace_of_every_block_is_the_sum_of_eigenvalues(setting):
    model, data, _, curvature = setting
    many = {name: tensor.repeat(300, 1) for name, tensor in data.items()}
    factors, start = fit_ekfac(model, many, batch_size=200), 0
    for name, layer in factors.layers.items():
        own = slice(start, start + layer.eigenvalues.numel())
        assert float(layer.eigenvalues.sum() / curvature[own, own].trace()) == pytest.approx(1, abs=0.04), name
        start = own.stop
    assert start == len(curvature) < 5000


def test_the_ladder_of_approximations(setting):
    """Correlation with the exact damped Gauss-Newton scores: layer blocks > EK-FAC >= K-FAC > gradient dot product."""
    model, data, queries, curvature = setting
    others = sequences(40, 7)
    exact = exact_scores(model, others, queries, curvature)
    many = {name: tensor.repeat(120, 1) for name, tensor in data.items()}  # labels drawn 60 times

    def agreement(found):
        return float(torch.stack([torch.corrcoef(torch.stack(rows))[0, 1] for rows in zip(exact, found)]).mean())

    ladder = {"blocks": agreement(exact_scores(model, others, queries, curvature, blocks=True))}
    for method in ("ekfac", "kfac", "identity"):
        factors = fit_ekfac(model, many, method=method, batch_size=128)
        ladder[method] = agreement(score(model, factors, queries, others).values)
    assert ladder["blocks"] > ladder["ekfac"] > ladder["identity"] + 0.05
    assert ladder["ekfac"] > ladder["kfac"] - 0.03 and ladder["kfac"] > ladder["identity"]
