"""Gradients in the eigenbasis by every route, and factors on disk."""

import pytest
import torch
from conftest import random_sequences, tiny_model

from influence_kit.engine.factors import Factors, LayerFactors, Rotated, Rotator
from influence_kit.engine.fitting import fit_ekfac
from influence_kit.engine.gradients import TokenGradients
from influence_kit.engine.scans import score


def orthogonal(size: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size).double())[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rotated", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("length", "m", "p"), [(2, 7, 5), (50, 7, 5), (6, 7, 5), (6, 4, 9), (3, 40, 2)])
@pytest.mark.parametrize("cut", [1, 2])
def test_every_order_of_rotation_agrees(length, m, p, bias, rotated, cut, monkeypatch):
    monkeypatch.setattr("influence_kit.engine.factors.CPU_BLOCK", 60)  # several pieces
    torch.manual_seed(0)
    a, g = torch.randn(3, length, m).double(), torch.randn(3, length, p).double()
    inputs, outputs = (tuple(orthogonal(len(part)) for part in torch.empty(n).tensor_split(cut)) for n in (m + bias, p))
    layer = LayerFactors(inputs, outputs, torch.ones(p, m + bias).double())
    ones = torch.cat([a, torch.ones(3, length, 1).double()], 2) if bias else a
    expected = torch.einsum("ntp,ntm->npm", g, ones)
    expected = layer.Q_S.T @ expected if rotated[0] else expected
    expected = expected @ layer.Q_A if rotated[1] else expected
    found = torch.zeros_like(expected)
    for some, rows, piece in Rotator().pieces(layer, TokenGradients(a, g, bias), Rotated(*rotated)):
        assert piece.is_contiguous() and float(piece[..., m + bias :].abs().sum()) == 0
        found[some, rows] = piece[..., : m + bias]
    torch.testing.assert_close(found, expected)
    if all(rotated):
        torch.testing.assert_close(Rotator().gradients(layer, TokenGradients(a, g, bias)), expected)


@pytest.mark.parametrize("method", ["ekfac", "kfac", "diagonal", "identity"])
@pytest.mark.parametrize("blocks", [1, 2])
def test_saved_factors_come_back_to_the_bit_and_the_file_is_stable(tmp_path, method, blocks):
    model, data = tiny_model("llama", dtype=torch.float32), random_sequences(8)
    factors = fit_ekfac(model, data, "all", method=method, blocks=blocks)
    factors.save(tmp_path / "one.safetensors")
    loaded = Factors.load(tmp_path / "one.safetensors")
    loaded.save(tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert list(loaded.layers) == list(factors.layers) and loaded.details == factors.details
    for name in factors.layers:
        assert torch.equal(loaded.layers[name].eigenvalues, factors.layers[name].eigenvalues)
    assert torch.equal(score(model, loaded, data, data).values, score(model, factors, data, data).values)


def test_a_shared_basis_is_written_once(tmp_path):
    from safetensors import safe_open

    fit_ekfac(tiny_model("llama"), random_sequences(4), "all").save(tmp_path / "x.safetensors")
    with safe_open(str(tmp_path / "x.safetensors"), "pt") as file:
        names = set(file.keys())
    assert "model.layers.0.self_attn.q_proj/inputs/0" in names
    assert "model.layers.0.self_attn.k_proj/inputs/0" not in names


def test_foreign_and_damaged_files_are_not_mistaken_for_factors(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="was not written by this program"):
        Factors.load(tmp_path / "x.safetensors")
    fit_ekfac(tiny_model("llama"), random_sequences(4)).save(tmp_path / "y.safetensors")
    whole = (tmp_path / "y.safetensors").read_bytes()
    (tmp_path / "y.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Factors.load(tmp_path / "y.safetensors")


def test_any_flipped_bit_of_saved_factors_is_found(tmp_path):
    model = torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict({"up": torch.nn.Linear(2, 3)})})
    layer = LayerFactors((orthogonal(3).float(),), (orthogonal(3).float(),), torch.rand(3, 3))
    path = tmp_path / "x.safetensors"
    Factors({"mlp.up": layer}, torch.ones(2, 3).long(), {"method": "ekfac", "seed": 0}).beside(model).save(path)
    whole = path.read_bytes()
    Factors.load(path)
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(ValueError):
            Factors.load(path)
    path.write_bytes(whole[:-8] + bytes(8))
    with pytest.raises(ValueError, match="is damaged .its content does not match its checksum.: make it again"):
        Factors.load(path)


def test_factors_of_a_time_without_checksums_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata={"influence_kit": '{"order": []}'})
    with pytest.raises(ValueError, match="before it wrote checksums"):
        Factors.load(tmp_path / "x.safetensors")
