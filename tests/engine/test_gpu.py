"""A GPU gives the CPU's scores."""

import pytest
import torch
from conftest import random_sequences, tiny_model

from influence_kit import fit_ekfac, score, top_scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


ROTARY = 1e-6  # transformers computes the angles of rotary positions in float32, whatever the model is in


@pytest.mark.parametrize(
    ("architecture", "dtype", "within"),
    [(name, torch.float32, 1e-5) for name in ("llama", "gpt_neox", "gpt2")]
    + [("llama", torch.float64, ROTARY), ("gpt_neox", torch.float64, ROTARY), ("gpt2", torch.float64, 1e-10)],
)
def test_scores_are_the_cpus(architecture, dtype, within):
    data, queries = random_sequences(40, padded=True), random_sequences(4, seed=1)
    found = {}
    for device in ("cpu", "cuda"):
        model = tiny_model(architecture, dtype=dtype).to(device)
        factors = fit_ekfac(model, data, seed=0)
        found[device] = (
            factors.labels.cpu(),
            score(model, factors, queries, data).values.cpu(),
            top_scores(model, factors, queries, data, k=5).sequences.cpu(),
        )
    (labels, raw, top), (drawn, scores, best) = found["cpu"], found["cuda"]
    assert torch.equal(labels, drawn) and torch.equal(top, best)
    assert (raw - scores).abs().max() <= within * raw.abs().max()
