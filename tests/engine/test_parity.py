"""Identity 4: the same scores as an independent EK-FAC with the same labels, whatever the architecture, shape and padding.

`reference.py` follows the conventions of kronfluence 1.0.1, against which `tests/benchmarks/rivals.py` is run by hand.
"""

import pytest
import torch
from conftest import random_sequences, tiny_model
from random_models import random_model
from reference import ekfac_scores

from influence_kit.engine.fitting import fit_ekfac
from influence_kit.engine.scans import score


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama", "gpt2", "qwen2", "olmo2", "bloom"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_scores_agree_with_an_independent_implementation(architecture, padded, dtype, tolerance):
    shape = {"gpt_neox": (12, 9), "llama": (24, 14), "gpt2": (16, 23)}.get(architecture, (8, 11))
    model = random_model(architecture, 5, shape[0]).to(dtype)
    data = random_sequences(10, shape[1], seed=1, padded=padded)
    labels = torch.randint(0, 29, data["input_ids"].shape, generator=torch.Generator().manual_seed(2))
    queries = random_sequences(3, shape[1], seed=3, padded=padded)
    pattern = r"\.(mlp)\."
    expected = ekfac_scores(model, data, labels, queries, pattern=pattern)
    factors = fit_ekfac(model, data, labels=labels, batch_size=4)
    for options in ({}, {"self_influence": False}):
        found = score(model, factors, queries, data, batch_size=3, **options).values
        assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_attention_layers_agree_too(architecture):
    model = random_model(architecture, 6, 16).double()
    data, queries = random_sequences(8, 10, seed=1, padded=True), random_sequences(2, 10, seed=3)
    labels = torch.randint(0, 29, (8, 10), generator=torch.Generator().manual_seed(2))
    pattern = r"(self_attn|attention)\."
    expected = ekfac_scores(model, data, labels, queries, pattern=pattern)
    found = score(model, fit_ekfac(model, data, pattern, labels=labels), queries, data).values
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-9


@pytest.mark.parametrize("change", ["labels", "last position", "transposed"])
def test_the_comparison_sees_the_usual_mistakes(change):
    """What moves scores by percents: other labels, padding counted in A, transposed eigenvectors."""
    model = tiny_model("gpt_neox")
    data, queries = random_sequences(10, padded=True), random_sequences(3, seed=3)
    labels = torch.randint(0, 29, (10, 12), generator=torch.Generator().manual_seed(2))
    expected = ekfac_scores(model, data, labels, queries)
    factors = fit_ekfac(model, data, labels=data["input_ids"] if change == "labels" else labels)
    if change == "last position":
        factors = fit_ekfac(model, data | {"loss_mask": torch.ones(10, 12, dtype=torch.bool)}, labels=labels)
    if change == "transposed":
        for layer in factors.layers.values():
            layer.outputs[0].copy_(layer.outputs[0].T.clone())
    found = score(model, factors, queries, data).values
    assert float((found - expected).abs().max() / expected.abs().max()) > 1e-3
