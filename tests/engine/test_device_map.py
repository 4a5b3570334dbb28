"""A model whose weights `accelerate` keeps elsewhere is fitted and scored like any other."""

import pytest
import torch
from conftest import ARCHITECTURES, random_sequences, tiny_model

from influence_kit import fit_ekfac, score
from influence_kit.engine.files import digest


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_offloaded_weights_give_the_same_scores(architecture, where, tmp_path):
    from accelerate import cpu_offload, disk_offload

    data, queries = random_sequences(9, padded=True), random_sequences(2, seed=3)
    model, away = tiny_model(architecture, dtype=torch.float32), tiny_model(architecture, dtype=torch.float32)
    here = torch.device("cpu")
    away = disk_offload(away, str(tmp_path), here) if where == "disk" else cpu_offload(away, here)
    assert all(parameter.is_meta for parameter in away.parameters())
    expected, found = (score(m, fit_ekfac(m, data), queries, data) for m in (model, away))
    scale = float(expected.values.abs().max())
    torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(found.per_token(1, [2]), expected.per_token(1, [2]), rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_weights_that_lie_elsewhere_are_recognised_too(where, tmp_path):
    from accelerate import cpu_offload, disk_offload

    names = []
    for change in (0, 0, 1):
        model = tiny_model("llama", dtype=torch.float32)
        with torch.no_grad():
            model.model.norm.weight[3] += change
        names.append(digest(model))
        here, folder = torch.device("cpu"), str(tmp_path / str(len(names)))
        away = disk_offload(model, folder, here) if where == "disk" else cpu_offload(model, here)
        names.append(digest(away))
    assert len(set(names[:4])) == 1 and names[4] == names[5] != names[0]
    with pytest.raises(ValueError, match="holds no numbers"):
        digest(tiny_model("llama").to("meta"))
