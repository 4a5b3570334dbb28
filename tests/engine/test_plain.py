"""The engine on plain torch modules, from fit to index: needs nothing of the kit beside the engine.

`test_alone.py` runs this file against a copy of the engine as well, where nothing else can be imported.
"""

import pytest
import torch
from torch import nn

from influence_kit.engine import Factors, Index, build_index, fit_ekfac, score, token_scores, top_scores, tracked_layers

VOCABULARY, LENGTH = 13, 9


class Block(nn.Module):
    """Mixes earlier tokens into later ones, then an MLP."""

    def __init__(self, width: int):
        super().__init__()
        self.before = nn.Linear(width, width)
        self.mlp = nn.ModuleDict({"up": nn.Linear(width, 2 * width), "down": nn.Linear(2 * width, width, bias=False)})

    def forward(self, x):
        x = x + self.before(x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]).tanh()
        return x + self.mlp["down"](self.mlp["up"](x).tanh())


class Model(nn.Module):
    """Token ids [B, T] to logits [B, T, V]."""

    def __init__(self, width: int = 6):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Embedding(VOCABULARY, width), nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def sequences(rows: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, LENGTH + 1, (rows, 1), generator=generator)
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < lengths).long()}


@pytest.fixture(scope="module")
def setting():
    model = Model().double()
    return model, fit_ekfac(model, sequences(30, 1)), sequences(3, 2), sequences(40, 3)


def gradients(model, data):
    """{layer: [N, P, M']}, one sequence at a time, by back-propagation to the weights."""
    found = {name: [] for name in tracked_layers(model)}
    for ids, real in zip(data["input_ids"], data["attention_mask"].bool()):
        model.zero_grad()
        log_p = model(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        log_p[real[1:]].sum().backward()
        for name, layer in tracked_layers(model).items():
            weight = layer.weight.grad
            found[name].append(weight if layer.bias is None else torch.cat([weight, layer.bias.grad[:, None]], 1))
    return {name: torch.stack(each) for name, each in found.items()}


def test_scores_are_inner_products_under_the_factors(setting):
    model, factors, queries, data = setting
    left, right, expected = gradients(model, queries), gradients(model, data), 0
    for name, layer in factors.layers.items():
        turned = [layer.Q_S.T @ each[name] @ layer.Q_A for each in (left, right)]
        expected = expected + (turned[0] / layer.damped(0.1)).flatten(1) @ turned[1].flatten(1).T
    found = score(*setting, batch_size=7)
    torch.testing.assert_close(found.values, expected, rtol=1e-9, atol=1e-12)
    tokens = found.per_token(1, [4, -1])
    torch.testing.assert_close(tokens.sum(1), found.values[1, [4, -1]], rtol=1e-9, atol=1e-12)
    one = {name: each[1:2] for name, each in queries.items()}
    few = {name: each[[4, 39]] for name, each in data.items()}
    assert torch.equal(token_scores(model, factors, one, few), tokens)


def test_ends_index_and_saved_factors_agree_with_scores(setting, tmp_path):
    model, factors, queries, data = setting
    whole = score(*setting)
    factors.save(tmp_path / "factors.safetensors")
    loaded = Factors.load(tmp_path / "factors.safetensors")
    assert torch.equal(score(model, loaded, queries, data).values, whole.values)
    for form in ("raw", "relatif", "cosine"):
        ends = top_scores(*setting, k=4, form=form)
        best = whole.form(form).argsort(descending=True)
        assert torch.equal(ends.sequences[:, 0], best[:, :4]) and torch.equal(ends.sequences[:, 1], best.flip(1)[:, :4])
    build_index(model, factors, data, tmp_path / "index", bytes_per_sequence=16)
    found = Index.open(tmp_path / "index").query(model, queries, k=4, sequences=data, rescore=40)
    assert torch.equal(found.sequences, top_scores(*setting, k=4).sequences)


def test_a_killed_scan_goes_on(setting, tmp_path):
    seen = []

    def kill(done, to_do):
        seen.append(done)
        if done > to_do / 2 and len(seen) < 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(*setting, batch_size=4, resume=tmp_path, progress=kill)
    assert torch.equal(
        score(*setting, batch_size=4, resume=tmp_path, progress=kill).values, score(*setting, batch_size=4).values
    )
    assert len(seen) < 12
