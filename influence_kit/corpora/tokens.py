"""Text to fixed-length token sequences and back: a byte-level BPE of one's own, or any Hugging Face tokenizer.

All functions give `input_ids` int32 [N, T] and `loss_mask` bool [N, T]; `loss_mask` is True where the token is a
target, that is, predicted from the tokens before it. Sequences are padded on the right with id 0, never a target. Under
causal attention no target sees what stands to its right, so no attention mask is needed.
"""

import codecs
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from influence_kit.errors import UserError

BOS, EOS = "<bos>", "<eos>"
PADDING_ID = 0
SMALLEST_VOCABULARY = 256 + len((BOS, EOS))


def train_bpe(texts: Iterable[str], vocabulary_size: int) -> str:
    """Byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) as tokenizers JSON: `<bos>` 0, `<eos>` 1, then bytes.

    Every string can be encoded and comes back unchanged. The result depends on the texts alone, not on their order,
    on threads or on a seed. May give fewer than `vocabulary_size` tokens when the texts hold no more pairs to merge.
    Raises UserError when `vocabulary_size` cannot hold the 256 bytes and two specials, or the texts are empty.
    """
    if vocabulary_size < SMALLEST_VOCABULARY:
        raise UserError(f"vocabulary_size is {vocabulary_size}; it must be at least {SMALLEST_VOCABULARY} (256 bytes, "
                        f"{BOS}, {EOS})")
    texts = [text for text in texts if text]
    if not texts:
        raise UserError("no text to train a tokenizer on: every text is empty; give at least one")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary_size, special_tokens=[BOS, EOS], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def vocabulary_size(tokenizer_json: str) -> int:
    """Number of tokens: the embedding rows that a model for this tokenizer needs."""
    return _load(tokenizer_json).get_vocab_size()


def encode(texts: Sequence[str], tokenizer_json: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """(input_ids [N, T], loss_mask [N, T]): `<bos>` text `<eos>`, cut to T = `length` tokens, padded on the right.

    All tokens but `<bos>` and padding are targets. "<bos>" written in a text is encoded as letters, not as the special.
    Raises UserError when `length` < 2 (no target would be left).
    """
    _check_length(length)
    opening, closing, documents = _documents(texts, tokenizer_json)
    return _rows([opening + ids + closing for ids in documents], length)


def encode_with(tokenizer, texts: Sequence[str], length: int,
                vocabulary_size: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`encode` with a Hugging Face tokenizer (fast or slow).

    It needs neither a padding token nor a bos token: padding has id 0 whatever 0 stands for, is never a target and is
    never attended to by one (causal attention, padding on the right). Without a bos token the text's own first token
    stands first and is no target; without an eos token the text just ends.
    Raises UserError when `length` < 2, or an id is not below `vocabulary_size` (the model's, when given).
    """
    _check_length(length)
    opening, closing, documents = _documents(texts, tokenizer, length)
    input_ids, loss_mask = _rows([opening + ids + closing for ids in documents], length)
    if vocabulary_size is not None:
        check_vocabulary(input_ids, vocabulary_size)
    return input_ids, loss_mask


def pack(texts: Sequence[str], tokenizer, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents one after the other, `<eos>` after each, cut into sequences of `length` tokens.

    `tokenizer` is tokenizers JSON or a Hugging Face tokenizer. Each sequence opens with `<bos>` (where the tokenizer
    has one), so that every token of every document is a target exactly once, and only the last sequence is padded.
    Without a bos token the first token of each sequence is no target. Raises UserError as `encode`.
    """
    _check_length(length)
    opening, closing, documents = _documents(texts, tokenizer)
    stream = [token for ids in documents for token in ids + closing]
    step = length - len(opening)
    return _rows([opening + stream[i:i + step] for i in range(0, len(stream), step)], length)


def check_vocabulary(input_ids: np.ndarray, model_vocabulary_size: int) -> None:
    """Raises UserError when a token id has no row in a model's embedding of `model_vocabulary_size` rows."""
    largest = int(np.max(input_ids, initial=0))
    if largest >= model_vocabulary_size:
        raise UserError(f"the tokenizer gives token id {largest}, but the model's vocabulary has "
                        f"{model_vocabulary_size} tokens; use the tokenizer that belongs to the model")


def pieces(input_ids: Sequence[int], tokenizer_json: str) -> list[str]:
    """One string per token such that ''.join(pieces) is the text; special tokens show as their names.

    A character that is spread over several tokens goes to the first of them, the others give ''. What is left of a
    character when a sequence was cut inside it shows as U+FFFD. Padding shows as the token of id 0: cut it off first.
    Also reads the JSON of Hugging Face tokenizers (byte-level, or "▁" for spaces with byte fallback).
    Raises UserError for an id outside the vocabulary.
    """
    shown = [""] * len(input_ids)
    decoder, start = codecs.getincrementaldecoder("utf-8")("replace"), None
    for place, token in enumerate(map(int, input_ids)):
        content, special = _token_bytes(tokenizer_json, token)
        if special:
            content = b""
        for byte in content:
            start = place if start is None else start
            text = decoder.decode(bytes([byte]))
            waiting = decoder.getstate()[0]
            # A broken character surfaces together with, or just before, the byte that broke it.
            whole = len(text) if waiting or place == start or len(text) < 2 else len(text) - 1
            shown[start] += text[:whole]
            shown[place] += text[whole:]
            start = None if not waiting else (place if text else start)
        if special:
            if start is not None:
                shown[start] += decoder.decode(b"", final=True)
            start, shown[place] = None, special
    if start is not None:
        shown[start] += decoder.decode(b"", final=True)
    return shown


@lru_cache(maxsize=8)
def _load(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    return tokenizer


@lru_cache(maxsize=8)
def _layout(tokenizer_json: str) -> tuple[dict[int, tuple[str, bool]], bool]:
    """({id: (content, special)} of added tokens, whether the vocabulary is byte-level)."""
    layout = json.loads(tokenizer_json)
    added = {token["id"]: (token["content"], token["special"]) for token in layout["added_tokens"]}
    return added, '"ByteLevel"' in json.dumps([layout["decoder"], layout["pre_tokenizer"]])


@lru_cache(maxsize=200_000)
def _token_bytes(tokenizer_json: str, token: int) -> tuple[bytes, str]:
    """(the token's bytes, its name if it is special else '')."""
    added, byte_level = _layout(tokenizer_json)
    if token in added:
        content, special = added[token]
        return content.encode(), content if special else ""
    stored = _load(tokenizer_json).id_to_token(token)
    if stored is None:
        raise UserError(f"token id {token} is outside the tokenizer's vocabulary of {vocabulary_size(tokenizer_json)}; "
                        "use the tokenizer that made the ids")
    if byte_level:
        return bytes(_byte_of()[character] for character in stored), ""
    fallback = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", stored)
    return (bytes([int(fallback[1], 16)]) if fallback else stored.replace("\u2581", " ").encode()), ""


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte: printable Latin-1 is itself, the rest is numbered from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(rest)}


def _documents(texts: Sequence[str], tokenizer, length: int | None = None) -> tuple[list, list, list[list[int]]]:
    """(opening, closing, ids per text): opening and closing hold the bos and the eos id, or nothing without one."""
    if isinstance(tokenizer, str):
        own = _load(tokenizer)
        bos, eos = own.token_to_id(BOS), own.token_to_id(EOS)
        ids = [encoding.ids for encoding in own.encode_batch_fast(list(texts), add_special_tokens=False)]
    else:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        cut = {} if length is None else {"truncation": True, "max_length": length}
        # verbose=False: a text longer than the model's window is cut or packed here, which needs no warning.
        ids = tokenizer(list(texts), add_special_tokens=False, verbose=False, **cut)["input_ids"] if len(texts) else []
    return [bos] * (bos is not None), [eos] * (eos is not None), ids


def _check_length(length: int) -> None:
    if length < 2:
        raise UserError(f"sequence length is {length}; it must be at least 2, as a first token is never a target")


def _rows(documents: list[list[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    input_ids = np.full((len(documents), length), PADDING_ID, dtype=np.int32)
    loss_mask = np.zeros((len(documents), length), dtype=bool)
    for row, ids in enumerate(documents):
        kept = ids[:length]
        input_ids[row, :len(kept)] = kept
        loss_mask[row, 1:len(kept)] = True  # nothing stands before the first token to predict it from
    return input_ids, loss_mask
