"""Which token texts begin with: of three, the one that the model knows; or what is asked."""

import math
from types import SimpleNamespace

import pytest
import torch

from influence_kit.errors import UserError
from influence_kit.findings.openings import choose_opening


class Backwards(torch.nn.Module):
    """Knows texts that begin with one token alone: it is sure of the next id after it, and of nothing otherwise."""

    def __init__(self, opening, vocabulary=12):
        super().__init__()
        self.opening, self.scale = opening, torch.nn.Parameter(torch.tensor(3.0))
        self.vocabulary = vocabulary

    def forward(self, input_ids, use_cache=False):
        sure = (input_ids[:, :1] == self.opening) if self.opening is not None else (input_ids[:, :1] > 2)
        logits = torch.nn.functional.one_hot((input_ids + 1) % self.vocabulary, self.vocabulary) * self.scale
        return SimpleNamespace(logits=logits * sure[..., None])


class Words:
    """A tokenizer of numbers whose bos is 1."""

    bos_token_id = 1

    def __len__(self):
        return 12

    def __call__(self, texts, max_length, **_):
        return {"input_ids": [[int(word) for word in text.split()][:max_length] for text in texts]}

    def convert_ids_to_tokens(self, token):
        return f"<{token}>"


@pytest.mark.parametrize("opening", [0, 1, None])
def test_texts_begin_with_what_the_model_knows(opening):
    chosen = choose_opening(Backwards(opening), Words(), ["3 4 5 6", "7 8", "9"])
    others = {each: loss for each, loss in chosen.nats.items() if each != min(chosen.nats, key=chosen.nats.get)}
    assert chosen.token == opening and len(chosen.nats) == 3
    assert all(loss == pytest.approx(math.log(12)) for loss in others.values()) and min(chosen.nats.values()) < 1
    called = "no opening" if opening is None else f"<{opening}> (id {opening})"
    assert chosen.said.startswith(f"Texts begin with {called}: ") and "2.48 with" in chosen.said


def test_an_opening_can_be_asked_for_and_must_be_one():
    for asked, token in [("bos", 1), ("none", None), (7, 7)]:
        chosen = choose_opening(None, Words(), [], asked)
        assert chosen.token == token and chosen.nats == {} and "as was asked" in chosen.said
    for asked in ("best?", 12, -1):
        with pytest.raises(UserError, match="choose best, bos, none, or a token id from 0 to 11"):
            choose_opening(None, Words(), [], asked)
    with pytest.raises(UserError, match="no text has two tokens"):
        choose_opening(Backwards(0), Words(), ["3"])
