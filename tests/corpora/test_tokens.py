"""Encoding and reading back, on invented sentences in five scripts."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from influence_kit.corpora import tokens
from influence_kit.errors import UserError
from influence_kit.reading.words import tokenizer_texts

SENTENCES = [
    "The copper kettle sings when the morning is cold; the lamp answers the kettle.",
    "Der kupferne Kessel singt über der Lampe, und die Lampe antwortet dem Kessel.",
    "아침이 추우면 구리 주전자가 노래하고, 등불이 주전자에게 대답한다.",
    "İki ışık, küçük çaydanlığa şarkı söyler; çaydanlık ışığa cevap verir.",
    "清晨很冷的时候，铜壶会唱歌，灯会回答铜壶。",
    "def sing(kettle):\n\treturn kettle  # 🫖👩‍👩‍👧 ½ £ \u2028 \x00 é e\u0301",
    " <bos> and <eos> are words here ",
]


@pytest.fixture(scope="module")
def bpe() -> str:
    return tokens.train_bpe(SENTENCES * 3, 400)


@pytest.fixture(scope="module")
def bytes_only() -> str:
    return tokens.train_bpe(["x"], tokens.SMALLEST_VOCABULARY)


def shown(ids: np.ndarray, mask: np.ndarray, tokenizer: str) -> list[str]:
    return tokenizer_texts(ids[: mask.sum() + 1], tokenizer)


def test_encode_layout_and_mask(bpe):
    ids, mask = tokens.encode([*SENTENCES, ""], bpe, 300)
    assert ids.dtype == np.int32 and mask.dtype == bool and ids.shape == mask.shape == (len(SENTENCES) + 1, 300)
    for row, targets in zip(ids, mask):
        used = targets.sum() + 1
        assert row[0] == 0 and row[used - 1] == 1 and not targets[0] and targets[1:used].all()
        assert (row[1 : used - 1] > 1).all(), "neither special may come out of a text"
        assert (row[used:] == tokens.PADDING_ID).all() and not targets[used:].any()
    assert mask[-1].sum() == 1 and ids.max() < Tokenizer.from_str(bpe).get_vocab_size() == 400


def test_the_text_comes_back_from_its_pieces(bpe, bytes_only):
    for tokenizer in (bpe, bytes_only):
        ids, mask = tokens.encode(SENTENCES, tokenizer, 400)
        for sentence, row, targets in zip(SENTENCES, ids, mask):
            parts = shown(row, targets, tokenizer)
            assert len(parts) == targets.sum() + 1
            assert parts[0] == "<bos>" and parts[-1] == "<eos>" and "".join(parts[1:-1]) == sentence


def test_a_character_goes_to_the_first_of_its_tokens(bytes_only):
    ids, mask = tokens.encode(["a등é🫖b"], bytes_only, 20)
    assert shown(ids[0], mask[0], bytes_only) == ["<bos>", "a", "등", "", "", "é", "", "🫖", "", "", "", "b", "<eos>"]


def test_a_cut_character_shows_as_such(bytes_only):
    ids, _ = tokens.encode(["a등b"], bytes_only, 20)
    a, x, y, z, b = ids[0, 1:6]
    assert tokenizer_texts([a, x, y], bytes_only) == ["a", "\ufffd", ""]
    assert tokenizer_texts([x, y, b, a], bytes_only) == ["\ufffd", "", "b", "a"]
    assert tokenizer_texts([x, y, 1, b], bytes_only) == ["\ufffd", "", "<eos>", "b"]
    assert tokenizer_texts([x, x, y, z, a], bytes_only) == ["\ufffd", "등", "", "", "a"]
    assert tokenizer_texts([z, a], bytes_only) == ["\ufffd", "a"]
    assert tokenizer_texts([], bytes_only) == []


def test_a_merged_token_that_ends_inside_a_character():
    # Three characters with the same first two bytes: those merge into one token, the third stays apart.
    tokenizer = tokens.train_bpe(["가각갂"] * 20, tokens.SMALLEST_VOCABULARY + 1)
    ids, mask = tokens.encode(["갃!가"], tokenizer, 10)
    assert shown(ids[0], mask[0], tokenizer) == ["<bos>", "갃", "", "!", "가", "", "<eos>"]


def test_truncation_keeps_the_beginning(bpe):
    whole, _ = tokens.encode(SENTENCES[:1], bpe, 300)
    cut, mask = tokens.encode(SENTENCES[:1], bpe, 9)
    assert (cut[0] == whole[0, :9]).all() and mask[0].tolist() == [False] + [True] * 8 and 1 not in cut
    with pytest.raises(UserError, match="sequence length is 1"):
        tokens.encode(SENTENCES, bpe, 1)
    assert tokens.encode([], bpe, 9)[0].shape == (0, 9)


def test_training_depends_on_the_texts_alone():
    code = (
        "import hashlib, sys\nfrom influence_kit.corpora.tokens import train_bpe\n"
        "texts = sys.stdin.buffer.read().decode().split('\\x1e')\n"
        "print(hashlib.sha256(train_bpe(texts, 600).encode()).hexdigest())"
    )
    # Every word twice as often as the next gives many ties among pairs, which is where an order could show.
    texts = [" ".join(f"{a}{b}{a}" for b in "aeiouäöü가나다") for a in "bcdfghklmnp라마바"] + SENTENCES
    seen = set()
    for seed, threads, order in (("0", "false", 1), ("1", "true", -1), ("2", "true", 1)):
        environment = os.environ | {"PYTHONHASHSEED": seed, "TOKENIZERS_PARALLELISM": threads}
        seen.add(
            subprocess.run(
                [sys.executable, "-c", code],
                input="\x1e".join(texts[::order]).encode(),
                env=environment,
                capture_output=True,
                check=True,
            ).stdout
        )
    seen.add(hashlib.sha256(tokens.train_bpe(texts, 600).encode()).hexdigest().encode() + b"\n")
    assert len(seen) == 1


def test_training_refusals():
    with pytest.raises(UserError, match="vocabulary_size is 257; it must be at least 258"):
        tokens.train_bpe(["x"], 257)
    with pytest.raises(UserError, match="every text is empty"):
        tokens.train_bpe(["", ""], 300)


def foreign(tokenizer_json: str, **specials):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer_json), **specials)


def test_any_hugging_face_tokenizer(bpe):
    texts = SENTENCES[:5]
    ids, mask = tokens.encode(texts, bpe, 40)
    same_ids, same_mask = tokens.encode_with(foreign(bpe, bos_token="<bos>", eos_token="<eos>"), texts, 40)
    assert (same_ids == ids).all() and (same_mask == mask).all() and same_ids.dtype == np.int32

    bare = foreign(bpe)
    assert bare.pad_token_id is None and bare.bos_token_id is None and bare.eos_token_id is None
    bare_ids, bare_mask = tokens.encode_with(bare, texts, 300)
    ids, mask = tokens.encode(texts, bpe, 300)
    for bare_row, bare_targets, row, targets in zip(bare_ids, bare_mask, ids, mask):
        used = targets.sum() - 1  # without <bos> and <eos>
        assert (bare_row[:used] == row[1 : used + 1]).all() and (bare_row[used:] == 0).all()
        assert not bare_targets[0] and bare_targets[1:used].all() and not bare_targets[used:].any()
    assert tokens.encode_with(bare, [], 8)[0].shape == (0, 8)

    only_eos, mask = tokens.encode_with(foreign(bpe, eos_token="<eos>"), texts, 300)
    for row, targets, bare_targets in zip(only_eos, mask, bare_mask):
        assert targets.sum() == bare_targets.sum() + 1 and row[targets][-1] == 1


def test_a_tokenizer_larger_than_the_model_is_refused(bpe):
    tokenizer = foreign(bpe)
    ids, _ = tokens.encode_with(tokenizer, SENTENCES, 64, vocabulary_size=400)
    largest = int(ids.max())
    tokens.encode_with(tokenizer, SENTENCES, 64, vocabulary_size=largest + 1)
    with pytest.raises(UserError, match=f"gives token id {largest}, but the model's vocabulary has {largest} tokens"):
        tokens.encode_with(tokenizer, SENTENCES, 64, vocabulary_size=largest)
    with pytest.raises(UserError, match="token id 400 is outside the tokenizer's vocabulary of 400"):
        tokenizer_texts([5, 400], bpe)


def test_pieces_of_a_sentencepiece_like_tokenizer():
    vocabulary = {"<unk>": 0, "<s>": 1, "\u2581la": 2, "mp": 3, "\u2581": 4} | {
        f"<0x{b:02X}>": 5 + b for b in range(256)
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>"])
    ids = [1, 2, 3, 4, *(5 + byte for byte in "등".encode())]
    assert tokenizer_texts(ids, tokenizer.to_str()) == ["<s>", " la", "mp", " ", "등", "", ""]


def test_added_words_that_are_not_special_show_their_text(bpe):
    layout = json.loads(bpe)
    layout["added_tokens"].append(layout["added_tokens"][0] | {"id": 400, "content": " 등불  ", "special": False})
    tokenizer = json.dumps(layout)
    ids, mask = tokens.encode(["a 등불  b"], tokenizer, 8)
    assert 400 in ids and shown(ids[0], mask[0], tokenizer) == ["<bos>", "a", " 등불  ", "b", "<eos>"]


def test_padding_changes_no_target_of_a_causal_model(bpe):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=16, n_layer=2, n_head=2, n_positions=160)).eval().double()

    def target_log_p(length: int) -> np.ndarray:
        ids, mask = tokens.encode(SENTENCES[:1], bpe, length)
        with torch.no_grad():
            log_p = model(torch.from_numpy(ids).long()).logits.log_softmax(-1)[0]
        return np.array([log_p[t - 1, ids[0, t]] for t in np.flatnonzero(mask[0])])

    exact = int(tokens.encode(SENTENCES[:1], bpe, 160)[1].sum()) + 1
    np.testing.assert_allclose(target_log_p(160), target_log_p(exact), atol=1e-12)
    assert exact < 150
