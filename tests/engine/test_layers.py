"""Which layers are tracked, which are refused, and what is said of those that are left out."""

import warnings

import pytest
import torch
import transformers as tf
from conftest import ARCHITECTURES, random_sequences, tiny_model
from reference import ekfac_scores
from torch import nn

from influence_kit.engine.fitting import fit_ekfac
from influence_kit.engine.layers import shape_of, tracked_layers
from influence_kit.engine.scans import score


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_mlp_layers_are_found_in_order_and_the_head_is_left_out(architecture):
    model = tiny_model(architecture)
    mlp, everything = tracked_layers(model), tracked_layers(model, "all")
    assert len(mlp) == (6 if architecture == "llama" else 4)
    assert all(".mlp." in name for name in mlp) and set(mlp) < set(everything)
    assert not any("lm_head" in name or "embed_out" in name for name in everything)
    assert all(shape_of(module)[1] in (16, 48, 64) for module in mlp.values())


def test_conv1d_is_a_linear_map_with_a_transposed_weight():
    model = tiny_model("gpt2")
    assert shape_of(tracked_layers(model)["transformer.h.0.mlp.c_fc"]) == (64, 16)


def test_pattern_without_a_match_names_the_model_s_layers():
    with pytest.raises(ValueError, match=r"matches no linear map.*gpt_neox\.layers\.0"):
        tracked_layers(tiny_model("gpt_neox"), "nothing-like-this")


def test_bad_pattern_is_said_to_be_one():
    with pytest.raises(ValueError, match="not a regular expression"):
        tracked_layers(tiny_model("gpt_neox"), "(")


def test_tied_head_is_refused():
    with pytest.raises(ValueError, match="shares its weight"):
        tracked_layers(tiny_model("gpt_neox"), "embed_out|lm_head")


def test_too_wide_layer_is_refused_with_the_memory_it_would_need():
    model = nn.Sequential(nn.Linear(4, 50_000))
    with pytest.raises(ValueError, match="20 GB"):
        tracked_layers(model, "0")


def said(call, *arguments) -> list[str]:
    """What is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*arguments)
    return [str(each.message) for each in caught if "tracks" in str(each.message)]


def mixture(dense: bool):
    """A mixture of 8 experts, fused as transformers fuses them, with one dense layer or none."""
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    plain = {"mlp_only_layers": [0] if dense else [], "intermediate_size": 96}
    return tf.AutoModelForCausalLM.from_config(tf.Qwen3MoeConfig(vocab_size=29, **shape, **experts, **plain))


def test_fused_experts_are_said_not_to_be_tracked():
    expected = (
        "layers='mlp' tracks 4,608 of 10,880 MLP weights; not tracked: 6,144 fused in one parameter "
        "(model.layers.1.mlp.experts.gate_up_proj), 128 in no linear map (model.layers.1.mlp.gate.weight)"
    )
    assert said(tracked_layers, mixture(dense=True)) == [expected]
    assert said(fit_ekfac, mixture(dense=True), random_sequences(4)) == [expected]
    with pytest.raises(ValueError, match=r"tracks 0 of 12,544.*12,288 fused in one parameter"):
        tracked_layers(mixture(dense=False))


def test_a_model_whose_experts_are_fused_is_scored_by_its_dense_layer_alone():
    model, data = mixture(dense=True).eval(), random_sequences(5, padded=True)
    named = r"layers\.0\.mlp"
    labels = torch.randint(0, 29, (5, 12), generator=torch.Generator().manual_seed(0))
    one, other = (score(model, fit_ekfac(model, data, layers, labels), data, data).values for layers in ("mlp", named))
    assert torch.equal(one, other)


class Adapted(nn.Linear):
    """A linear map with an adapter of rank 2 beside it, as LoRA has it."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, 2, bias=False), nn.Linear(2, outputs, bias=False)
        for parameter in (self.weight, self.bias):
            parameter.requires_grad_(False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Small(nn.Module):
    """Predicts a token from the one before."""

    def __init__(self, kind=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(29, 8), nn.Linear(8, 29)
        self.mlp = nn.ModuleDict({"up": kind(8, 16), "down": kind(16, 8)})

    def forward(self, tokens):
        return self.head(self.mlp["down"](self.mlp["up"](self.embed(tokens)).tanh()))


def test_frozen_bases_of_adapters_are_left_out_and_it_is_said():
    model = Small(Adapted)
    [message] = said(tracked_layers, model)
    assert message == (
        "layers='mlp' tracks 96 of 352 MLP weights; not tracked: 256 frozen, where others are trained (mlp.up.weight)"
    )
    assert list(tracked_layers(model)) == ["mlp.up.down", "mlp.up.up", "mlp.down.down", "mlp.down.up"]
    assert "mlp.up" in tracked_layers(model, r"mlp\.(up|down)$")  # asked for by name
    score(model, fit_ekfac(model, random_sequences(4)), random_sequences(2), random_sequences(4))


def test_a_model_that_trains_nothing_is_tracked_whole():
    model = Small().requires_grad_(False)
    assert list(tracked_layers(model)) == ["mlp.up", "mlp.down"] and not said(tracked_layers, model)
    assert not said(tracked_layers, Small()) and not said(tracked_layers, Small(), "all")


class Packed(nn.Linear):
    """Four bits a weight, two in a byte, as bitsandbytes has it."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(torch.zeros(inputs * outputs // 2, 1, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("layers", ["mlp", "all", "up"])
def test_packed_weights_are_refused_before_the_first_pass(layers):
    model = Small(Packed)
    if layers == "all":
        assert said(tracked_layers, model, layers) == [
            "layers='all' tracks 232 of 488 weights; not tracked: 256 packed in uint8 (mlp.up.weight)"
        ]
        return
    with pytest.raises(ValueError, match="packed"):
        fit_ekfac(model, random_sequences(4), layers)


def test_a_tied_head_is_said_not_to_be_tracked():
    model = tiny_model("gpt2")
    assert said(tracked_layers, model, "all") == [
        "layers='all' tracks 6,144 of 6,608 weights; not tracked: 464 tied to the embedding (lm_head.weight)"
    ]
    assert not said(tracked_layers, model)


def test_layers_that_see_tokens_in_one_row_score_like_others():
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 32,
        "word_embed_proj_dim": 16,
    }
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(tf.OPTConfig(vocab_size=29, max_position_embeddings=32, **shape))
    model, data, queries = model.double().eval(), random_sequences(6, padded=True), random_sequences(2, seed=3)
    labels = torch.randint(0, 29, (6, 12), generator=torch.Generator().manual_seed(0))
    pattern = r"\.fc[12]$"
    expected = ekfac_scores(model, data, labels, queries, pattern=pattern)
    found = score(model, fit_ekfac(model, data, pattern, labels), queries, data).values
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
