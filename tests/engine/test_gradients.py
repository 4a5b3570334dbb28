"""Token gradients against autograd's own weight gradients."""

import pytest
import torch
from conftest import ARCHITECTURES, random_sequences, tiny_model
from torch import nn

from influence_kit.engine.gradients import Recorder, forward, frozen, sequence_losses
from influence_kit.engine.layers import tracked_layers
from influence_kit.engine.passes import sequence_gradients
from influence_kit.engine.sequences import read_batch


def weight_gradient(model, layer, tokens, mask):
    """[P, M (+1)] by ordinary back-propagation through the weights."""
    for parameter in layer.parameters():
        parameter.grad = None
    sequence_losses(forward(model, tokens)[:, :-1], tokens[:, 1:], mask[:, 1:]).sum().backward()
    weight = layer.weight.grad if isinstance(layer, nn.Linear) else layer.weight.grad.T
    return weight if layer.bias is None else torch.cat([weight, layer.bias.grad[:, None]], 1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("layers", ["mlp", "all"])
def test_outer_products_sum_to_the_weight_gradient(architecture, layers, padded):
    model, data = tiny_model(architecture), random_sequences(3, padded=padded)
    chosen = tracked_layers(model, layers)
    batch = read_batch(data, slice(0, 3))
    with frozen(model), Recorder(chosen) as recorder:
        found, _ = sequence_gradients(model, recorder, batch)
    for name, layer in chosen.items():
        a, g, bias = found[name]
        assert bias == (layer.bias is not None)
        ours = g.transpose(1, 2) @ (torch.cat([a, torch.ones_like(a[..., :1])], 2) if bias else a)
        for n in range(3):
            theirs = weight_gradient(model, layer, batch.tokens[n : n + 1], batch.loss_mask[n : n + 1])
            torch.testing.assert_close(ours[n], theirs, rtol=1e-10, atol=1e-12)


def test_no_gradient_reaches_positions_that_are_not_counted():
    model, data = tiny_model("gpt_neox"), random_sequences(4, padded=True)
    batch = read_batch(data, slice(0, 4))
    chosen = tracked_layers(model)
    with frozen(model), Recorder(chosen) as recorder:
        found, _ = sequence_gradients(model, recorder, batch)
        for gradients in found.values():
            assert gradients.outputs.shape[1] == batch.length < 12
            assert gradients.outputs[~batch.counted].abs().max() == 0
            assert gradients.outputs[batch.counted].abs().sum(-1).min() > 0


def test_the_model_is_left_as_it_was():
    model = tiny_model("llama").train()
    for module in list(model.modules())[1::3]:
        module.training = False
    own = [module.training for module in model.modules()]
    next(model.parameters()).requires_grad_(False)
    asking = [p.requires_grad for p in model.parameters()]
    with frozen(model), Recorder(tracked_layers(model)):
        assert not any(p.requires_grad for p in model.parameters())
        assert not any(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == asking
    assert [module.training for module in model.modules()] == own
    assert not any(module._forward_hooks for module in model.modules())


def test_layer_that_runs_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mlp = nn.Embedding(5, 4), nn.ModuleDict({"up": nn.Linear(4, 4)})

        def forward(self, tokens):
            return self.mlp["up"](self.mlp["up"](self.embed(tokens)))

    model = Twice()
    with frozen(model), Recorder(tracked_layers(model)), pytest.raises(ValueError, match="ran twice"):
        model(torch.zeros(1, 3, dtype=torch.long))


class Flattening(nn.Module):
    """A model whose MLP sees [B T, H], as OPT's does, or tokens first."""

    def __init__(self, order: str = "flat"):
        super().__init__()
        torch.manual_seed(0)
        self.order, self.embed = order, nn.Embedding(29, 4)
        self.mlp = nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4, bias=False)})
        self.head = nn.Linear(4, 29)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = {"flat": x.flatten(0, 1), "tokens first": x.transpose(0, 1), "few": x[:, :2], "given": x}[self.order]
        x = self.mlp["down"](self.mlp["up"](x).relu())
        x = {"flat": lambda: x.view(*tokens.shape, 4), "tokens first": lambda: x.transpose(0, 1)}.get(
            self.order, lambda: x
        )()
        return self.head(torch.cat([x, self.embed(tokens)[:, 2:]], 1) if self.order == "few" else x)


def test_layers_that_see_all_tokens_in_one_row_count_like_others():
    data, model = random_sequences(3, padded=True), Flattening()
    chosen, batch = tracked_layers(model), read_batch(data, slice(0, 3))
    found = {}
    for model.order in ("flat", "given"):
        with frozen(model), Recorder(chosen) as recorder:
            found[model.order], _ = sequence_gradients(model, recorder, batch)
    for name in chosen:
        for one, other in zip(found["flat"][name], found["given"][name]):
            assert one is other or torch.equal(one, other)


@pytest.mark.parametrize("order", ["tokens first", "few"])
def test_layers_that_see_something_else_are_refused_by_name(order):
    model = Flattening(order)
    with (
        frozen(model),
        Recorder(tracked_layers(model)) as recorder,
        pytest.raises(ValueError, match=r"'mlp.up' gave \["),
    ):
        sequence_gradients(model, recorder, read_batch(random_sequences(3), slice(0, 3)))


def test_no_grad_of_the_caller_is_no_obstacle_and_inference_mode_is_refused():
    model, data = Flattening(), read_batch(random_sequences(3), slice(0, 3))
    with torch.no_grad(), frozen(model), Recorder(tracked_layers(model)) as recorder:
        sequence_gradients(model, recorder, data)
    with torch.inference_mode(), pytest.raises(ValueError, match="outside of it"), frozen(model):
        pass
    with torch.inference_mode():
        model = Flattening()
    with pytest.raises(ValueError, match="load it outside"), frozen(model):
        pass


def test_layers_that_read_the_same_tensor_hold_it_once():
    model, data = tiny_model("llama"), random_sequences(2)
    chosen = tracked_layers(model, "all")
    with frozen(model), Recorder(chosen) as recorder:
        found, _ = sequence_gradients(model, recorder, read_batch(data, slice(0, 2)))
    inputs = {name.rpartition(".")[2]: each.inputs for name, each in found.items() if ".0." in name}
    assert inputs["q_proj"] is inputs["k_proj"] is inputs["v_proj"]
    assert inputs["gate_proj"] is inputs["up_proj"]
    assert inputs["gate_proj"] is not inputs["q_proj"]
