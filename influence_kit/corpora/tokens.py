"""Text to token sequences of one length: a byte-level BPE of one's own, or any Hugging Face tokenizer.

Both give `input_ids` int32 [N, T] and `loss_mask` bool [N, T]; `loss_mask` is True where the token is a target, that
is, predicted from the tokens before it. Sequences are padded on the right with id 0, never a target. Under causal
attention no target sees what stands to its right, so no attention mask is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from influence_kit.errors import UserError

BOS, EOS = "<bos>", "<eos>"
PADDING_ID = 0
SMALLEST_VOCABULARY = 256 + len((BOS, EOS))


def train_bpe(texts: Iterable[str], vocabulary_size: int) -> str:
    """Byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2): `<bos>` 0, `<eos>` 1, then bytes, then what was merged.

    Every string can be encoded and comes back unchanged. The result depends on the texts alone, not on their order, on
    threads or on a seed.

    Args:
        texts: What to train on; empty ones count for nothing.
        vocabulary_size: Entries wanted; fewer come out where the texts hold no more pairs to merge.

    Returns:
        Tokenizers JSON.

    Raises:
        UserError: `vocabulary_size` cannot hold the 256 bytes and two specials, or the texts are empty.
    """
    if vocabulary_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"vocabulary_size is {vocabulary_size}; it must be at least {SMALLEST_VOCABULARY} (256 bytes, {BOS}, {EOS})"
        )
    texts = [text for text in texts if text]
    if not texts:
        raise UserError("no text to train a tokenizer on: every text is empty; give at least one")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[BOS, EOS],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def encode(texts: Sequence[str], tokenizer_json: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """`<bos>` text `<eos>`, cut to `length` tokens, padded on the right; all but `<bos>` and padding are targets.

    Args:
        texts: N of them; "<bos>" written in a text is encoded as letters, not as the special.
        tokenizer_json: What `train_bpe` gave.
        length: T.

    Returns:
        input_ids [N, T] and loss_mask [N, T].

    Raises:
        UserError: `length` < 2, so that no target would be left.
    """
    _check_length(length)
    tokenizer = _load(tokenizer_json)
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
    return _rows(ids, tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS), length)


def encode_with(
    tokenizer: Any,
    texts: Sequence[str],
    length: int,
    vocabulary_size: int | None = None,
    opening: int | Literal["bos"] | None = "bos",
) -> tuple[np.ndarray, np.ndarray]:
    """`encode` with a Hugging Face tokenizer (fast or slow), which needs neither a padding token nor a bos token.

    Padding has id 0 whatever 0 stands for, is never a target and is never attended to by one (causal attention, padding
    on the right). Without an opening the text's own first token stands first and is no target; without an eos token
    the text just ends.

    Args:
        tokenizer: Of transformers.
        texts: N of them.
        length: T.
        vocabulary_size: The model's, where ids beyond it are to be refused.
        opening: Token that stands before each text, None for none; "bos": the tokenizer's, where it has one.

    Returns:
        input_ids [N, T] and loss_mask [N, T].

    Raises:
        UserError: `length` < 2, or an id that is not below `vocabulary_size`.
    """
    _check_length(length)
    # verbose=False: a text longer than the model's window is cut here, which needs no warning.
    cut = {"add_special_tokens": False, "verbose": False, "truncation": True, "max_length": length}
    ids = tokenizer(list(texts), **cut)["input_ids"] if len(texts) else []
    first = tokenizer.bos_token_id if opening == "bos" else opening
    input_ids, loss_mask = _rows(ids, first, tokenizer.eos_token_id, length)
    if vocabulary_size is not None:
        check_vocabulary(input_ids, vocabulary_size)
    return input_ids, loss_mask


def check_vocabulary(input_ids: np.ndarray, vocabulary_size: int) -> None:
    """Refuse token ids that have no row in a model's embedding.

    Raises:
        UserError: an id that is not below the model's `vocabulary_size`.
    """
    largest = int(np.max(input_ids, initial=0))
    if largest >= vocabulary_size:
        raise UserError(
            f"the tokenizer gives token id {largest}, but the model's vocabulary has {vocabulary_size} tokens; use the "
            "tokenizer that belongs to the model"
        )


@lru_cache(maxsize=8)
def _load(tokenizer_json: str) -> Tokenizer:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _check_length(length: int) -> None:
    if length < 2:
        raise UserError(f"sequence length is {length}; it must be at least 2, as a first token is never a target")


def _rows(documents: list[list[int]], bos: int | None, eos: int | None, length: int) -> tuple[np.ndarray, np.ndarray]:
    opening, closing = ([] if token is None else [token] for token in (bos, eos))
    input_ids = np.full((len(documents), length), PADDING_ID, dtype=np.int32)
    loss_mask = np.zeros((len(documents), length), dtype=bool)
    for row, ids in enumerate(documents):
        kept = (opening + ids + closing)[:length]
        input_ids[row, : len(kept)] = kept
        loss_mask[row, 1 : len(kept)] = True  # nothing stands before the first token to predict it from
    return input_ids, loss_mask
