"""Identities 1, 3 and 5 of the EK-FAC approximation, its label sampling, and what is on disk."""

import pytest
import torch
from conftest import ARCHITECTURES, random_sequences, tiny_model
from random_models import breaking
from torch import nn

from influence_kit.engine import fitting as ekfac
from influence_kit.engine import labels as labels_module
from influence_kit.engine.fitting import fit_ekfac
from influence_kit.engine.gradients import forward
from influence_kit.engine.labels import sample_labels, uniforms


def exact_layer_fisher(model, name, data):
    """[D, D] Gauss-Newton block of one layer's weights (bias last column), mean over sequences: sum_t J^T H J."""
    layer = dict(model.named_modules())[name]
    parameters = [layer.weight] + ([layer.bias] if layer.bias is not None else [])
    total = 0
    for tokens, mask in zip(data["input_ids"], data["loss_mask"], strict=True):
        logits = forward(model, tokens[None])[0]
        for t in range(len(tokens) - 1):
            if not mask[t + 1]:
                continue
            rows = []
            for v in range(logits.shape[1]):
                grads = torch.autograd.grad(logits[t, v], parameters, retain_graph=True)
                weight = grads[0] if isinstance(layer, nn.Linear) else grads[0].T
                rows.append((weight if len(grads) == 1 else torch.cat([weight, grads[1][:, None]], 1)).flatten())
            jacobian, p = torch.stack(rows), logits[t].detach().softmax(-1)
            total = total + jacobian.T @ (torch.diag(p) - p[:, None] * p) @ jacobian
    return total / len(data["input_ids"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trace_of_the_curvature_is_the_sum_of_eigenvalues(architecture):
    """Identity 1: catches the empirical for the true Fisher, a dropped bias column and a wrong mean."""
    model = tiny_model(architecture, depth=1, vocabulary=11)
    few = random_sequences(6, length=6, vocabulary=11, padded=architecture == "llama")
    many = {name: tensor.repeat(400, 1) for name, tensor in few.items()}  # each row draws its own labels
    factors = fit_ekfac(model, many, batch_size=200)
    for name, layer in factors.layers.items():
        exact = exact_layer_fisher(model, name, few).trace()
        assert float(layer.eigenvalues.sum() / exact) == pytest.approx(1, abs=0.04), name
    empirical = fit_ekfac(model, few, labels="data")
    differ = [float(empirical.layers[n].eigenvalues.sum() / f.eigenvalues.sum()) - 1 for n, f in factors.layers.items()]
    assert max(map(abs, differ)) > 0.06  # the check above would see the difference


class OneToken(nn.Module):
    """Predicts one token from one constant layer input, so that EK-FAC is exact (identity 3)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.mlp = nn.ModuleDict({"up": nn.Linear(4, 5, dtype=torch.float64)})
        self.register_buffer("x", torch.randn(4, dtype=torch.float64))

    def forward(self, tokens):
        return self.mlp["up"](self.x.expand(*tokens.shape, 4))


def test_ekfac_is_the_exact_block_for_one_token_and_constant_input():
    model = OneToken()
    data = {"input_ids": torch.randint(0, 5, (4000, 2), generator=torch.Generator().manual_seed(0))}
    factors = fit_ekfac(model, data, batch_size=500)
    layer = factors.layers["mlp.up"]
    full = torch.kron(layer.Q_S, layer.Q_A)
    ours = full @ torch.diag(layer.eigenvalues.flatten()) @ full.T
    grads = (
        torch.eye(5, dtype=torch.float64)[factors.labels[:, 1]]
        - forward(model, data["input_ids"])[:, 0].softmax(-1).detach()
    )
    a = torch.cat([model.x, torch.ones(1, dtype=torch.float64)])
    rows = torch.einsum("np,m->npm", grads, a).flatten(1)
    torch.testing.assert_close(ours, rows.T @ rows / len(rows), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_batch_size_and_padding_change_nothing_beyond_rounding(architecture):
    """Identity 5."""
    model, data = tiny_model(architecture), random_sequences(9, padded=True)
    longer = {
        "input_ids": torch.cat([data["input_ids"], torch.full((9, 7), 3)], 1),
        "loss_mask": torch.cat([data["loss_mask"], torch.zeros(9, 7, dtype=torch.bool)], 1),
    }
    one, other = fit_ekfac(model, data, batch_size=9), fit_ekfac(model, longer, batch_size=2)
    assert torch.equal(one.labels[data["loss_mask"]], other.labels[:, :12][data["loss_mask"]])
    for name in one.layers:
        a, b = one.layers[name], other.layers[name]
        torch.testing.assert_close(a.eigenvalues, b.eigenvalues, rtol=1e-6, atol=1e-14)


def test_permuting_the_sequences_with_their_labels_changes_nothing():
    model, data = tiny_model("gpt_neox"), random_sequences(16)
    factors = fit_ekfac(model, data)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    again = fit_ekfac(model, {n: t[order] for n, t in data.items()}, labels=factors.labels[order], batch_size=5)
    for name in factors.layers:
        torch.testing.assert_close(
            factors.layers[name].eigenvalues, again.layers[name].eigenvalues, rtol=1e-6, atol=1e-14
        )
    assert again.details["labels"] == "given"


def test_labels_follow_the_model_s_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    draws = uniforms(0, slice(0, 200), 500)
    labels = sample_labels(logits.expand(200, 500, 4), draws)
    share = torch.bincount(labels.flatten(), minlength=4) / labels.numel()
    torch.testing.assert_close(share.double(), logits.softmax(-1).double(), rtol=0, atol=0.006)


def test_labels_are_drawn_once_from_the_seed_and_depend_on_it():
    model, data = tiny_model("gpt_neox"), random_sequences(8)
    one, same, other = fit_ekfac(model, data), fit_ekfac(model, data, batch_size=3), fit_ekfac(model, data, seed=1)
    assert torch.equal(one.labels, same.labels) and not torch.equal(one.labels, other.labels)
    assert not torch.equal(one.labels, data["input_ids"])


def test_draws_of_a_row_do_not_depend_on_length_or_batch():
    assert torch.equal(uniforms(5, slice(3, 6), 40)[1, :9], uniforms(5, slice(4, 5), 9)[0])


def test_kfac_eigenvalues_have_the_curvature_s_scale():
    model, data = tiny_model("gpt_neox", depth=1), random_sequences(64)
    ekfac, kfac = fit_ekfac(model, data), fit_ekfac(model, data, method="kfac")
    for name in ekfac.layers:
        ratio = float(kfac.layers[name].eigenvalues.sum() / ekfac.layers[name].eigenvalues.sum())
        assert 0.2 < ratio < 5, name  # without the factor T it would be near 1/11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": "none"}, "labels='none'"),
        ({"method": "ekfak"}, "method='ekfak'"),
        ({"labels": torch.zeros(3, 12, dtype=torch.long)}, r"do not match input_ids \[8, 12\]"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        fit_ekfac(tiny_model("gpt_neox"), random_sequences(8), **change)


def test_nothing_to_fit_on_is_said():
    data = random_sequences(4)
    with pytest.raises(ValueError, match="no target"):
        fit_ekfac(tiny_model("gpt_neox"), data | {"loss_mask": torch.zeros(4, 12, dtype=torch.bool)})
    with pytest.raises(ValueError, match="no sequences"):
        fit_ekfac(tiny_model("gpt_neox"), {"input_ids": torch.zeros(0, 12, dtype=torch.long)})


@pytest.mark.parametrize("labels", ["sampled", "data"])
def test_token_gradients_in_memory_in_a_file_or_computed_again_give_the_same_factors(labels, monkeypatch):
    model, data = tiny_model("llama"), random_sequences(12, padded=True)
    one, other = fit_ekfac(model, data, labels=labels), fit_ekfac(model, data, labels=labels, memory=0)
    monkeypatch.setattr(ekfac, "free_disk", lambda: 0)
    third = fit_ekfac(model, data, labels=labels, memory=0, batch_size=12)
    some = fit_ekfac(model, data, labels=labels, memory=40_000)  # room for a part of the batches
    for name in one.layers:
        for factors in (other, third, some):
            assert torch.equal(one.layers[name].eigenvalues, factors.layers[name].eigenvalues)


def test_layers_that_read_the_same_input_share_its_basis():
    model, data = tiny_model("llama"), random_sequences(6)
    layers = {name.rpartition("layers.")[2]: f for name, f in fit_ekfac(model, data, "all").layers.items()}
    assert layers["0.mlp.gate_proj"].inputs[0] is layers["0.mlp.up_proj"].inputs[0]
    assert layers["1.self_attn.q_proj"].inputs[0] is layers["1.self_attn.v_proj"].inputs[0]
    assert layers["0.mlp.gate_proj"].inputs[0] is not layers["1.mlp.gate_proj"].inputs[0]


@pytest.mark.parametrize("blocks", [2, 3])
def test_block_diagonal_factors_are_the_whole_ones_of_the_blocks(blocks):
    """The paper's Appendix A: eigenbases of the diagonal blocks of A and S, eigenvalues corrected in that basis."""
    model, data = tiny_model("gpt_neox"), random_sequences(20)
    whole = fit_ekfac(model, data, method="kfac")
    cut = fit_ekfac(model, data, labels=whole.labels, blocks=blocks)
    for name, layer in cut.layers.items():
        spectrum = whole.layers[name]
        S = spectrum.Q_S @ torch.diag(spectrum.eigenvalues.sum(1)) @ spectrum.Q_S.T  # S up to a factor
        mask = torch.block_diag(*(torch.ones(len(q), len(q)) for q in layer.outputs)).bool()
        turned = layer.Q_S.T @ S.masked_fill(~mask, 0) @ layer.Q_S
        torch.testing.assert_close(turned, torch.diag(turned.diagonal()), rtol=0, atol=1e-9 * float(S.abs().max()))
        assert len(layer.inputs) == blocks and sum(map(len, layer.inputs)) == layer.eigenvalues.shape[1]
        # an orthogonal basis keeps the trace, whichever it is
        trace = fit_ekfac(model, data, labels=whole.labels).layers[name].eigenvalues.sum()
        assert float(layer.eigenvalues.sum()) == pytest.approx(float(trace))
    with pytest.raises(ValueError, match="blocks=0"):
        fit_ekfac(model, data, blocks=0)


def test_a_large_vocabulary_is_searched_by_blocks_to_the_same_labels():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 20_001, generator=generator, dtype=torch.float64)
    logits[:20] *= 30  # nearly all weight on one token
    draws = torch.rand(200, generator=generator, dtype=torch.float64)
    draws[:2] = torch.tensor([0, 0.5])
    found = sample_labels(logits, draws)
    assert torch.equal(found, labels_module._at_once(logits, draws[:, None])[:, 0])
    assert int(sample_labels(logits[30:31], torch.tensor([1 - 2**-53], dtype=torch.float64))) < 20_001
    single = sample_labels(logits.float(), draws)
    assert (single != found).sum() <= 1 and single.max() < 20_001


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [0.3, 0.8])
def test_killed_fit_goes_on_to_the_same_factors(tmp_path, monkeypatch, at):
    from influence_kit.engine import resume

    monkeypatch.setattr(resume, "SAVE_SECONDS", -1)
    model, data = tiny_model("llama"), random_sequences(20, padded=True)
    expected, seen = fit_ekfac(model, data, batch_size=4), []

    def kill(done, to_do):
        if done > at * to_do:
            raise Killed

    with pytest.raises(Killed):
        fit_ekfac(model, data, batch_size=4, resume=tmp_path, progress=kill)
    again = fit_ekfac(model, data, batch_size=4, resume=tmp_path, progress=lambda done, to_do: seen.append(done))
    assert min(seen) > at * 40 and torch.equal(again.labels, expected.labels)
    assert again.details == expected.details
    for name in expected.layers:
        assert torch.equal(again.layers[name].eigenvalues, expected.layers[name].eigenvalues)
        assert torch.equal(again.layers[name].Q_A, expected.layers[name].Q_A)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 5}, {"labels": "data"}])
def test_state_of_another_fit_is_not_used(tmp_path, monkeypatch, change):
    from influence_kit.engine import resume

    monkeypatch.setattr(resume, "SAVE_SECONDS", -1)
    model, data = tiny_model("llama"), random_sequences(20)

    def kill(done, to_do):
        if done > to_do / 2:
            raise Killed

    with pytest.raises(Killed):
        fit_ekfac(model, data, batch_size=4, resume=tmp_path, progress=kill)
    asked = {"batch_size": 4} | change
    again, expected = fit_ekfac(model, data, resume=tmp_path, **asked), fit_ekfac(model, data, **asked)
    for name in expected.layers:
        assert torch.equal(again.layers[name].eigenvalues, expected.layers[name].eigenvalues)


@pytest.mark.parametrize("method", ["ekfac", "kfac", "diagonal"])
def test_a_sequence_whose_gradient_is_not_finite_is_no_ground_for_factors(method):
    data = random_sequences(8)
    data["input_ids"][3, 2] = 28
    with pytest.raises(ValueError, match=r"layer '.*mlp.*' has inputs or gradients that are not finite"):
        fit_ekfac(breaking(tiny_model("gpt2")), data, method=method)


def test_a_slow_saving_is_not_made_again_soon(tmp_path, monkeypatch):
    from influence_kit.engine import resume

    clock = iter([0.0, 0.0, 10.0, 100.0, 301.0, 311.0])  # made; saving begins and ends, asked twice
    monkeypatch.setattr(resume.time, "monotonic", lambda: next(clock))
    state = resume.State(tmp_path, "key")
    state.save("sums", {"x": torch.zeros(3)})
    assert [state.due() for _ in range(3)] == [False, False, True]  # ten seconds of saving: five minutes
