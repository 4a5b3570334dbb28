"""Tokens as a person reads them. Nothing that trains or scores imports this: how text is shown voids no number."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from influence_kit.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from influence_kit.corpora.world import World


def token_texts(world: World, input_ids: Sequence[int]) -> list[str]:
    """The text of each token of a row [T]: a word where the world has words, else as `tokenizer_texts` gives it."""
    if world.vocabulary:
        return [world.vocabulary[token] for token in input_ids]
    return tokenizer_texts(input_ids, world.tokenizer)


def tokenizer_texts(input_ids: Sequence[int], tokenizer_json: str) -> list[str]:
    """One string a token such that ''.join of them is the text; special tokens show as their names.

    A character that is spread over several tokens goes to the first of them, the others give ''. What is left of a
    character when a sequence was cut inside it shows as U+FFFD. Padding shows as the token of id 0: cut it off first.

    Args:
        input_ids: Token ids [T].
        tokenizer_json: Of `corpora.tokens.train_bpe`, or of a Hugging Face tokenizer (byte-level, or "▁" for spaces
            with byte fallback).

    Raises:
        UserError: an id outside the vocabulary.
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
            intact = len(text) if waiting or place == start or len(text) < 2 else len(text) - 1
            shown[start] += text[:intact]
            shown[place] += text[intact:]
            start = None if not waiting else (place if text else start)
        if special:
            if start is not None:
                shown[start] += decoder.decode(b"", final=True)
            start, shown[place] = None, special
    if start is not None:
        shown[start] += decoder.decode(b"", final=True)
    return shown


@lru_cache(maxsize=8)
def _load(tokenizer_json: str) -> tuple[Tokenizer, dict[int, tuple[str, bool]], bool]:
    """(tokenizer, {id: (content, special)} of added tokens, whether the vocabulary is byte-level)."""
    from tokenizers import Tokenizer

    layout = json.loads(tokenizer_json)
    added = {token["id"]: (token["content"], token["special"]) for token in layout["added_tokens"]}
    byte_level = '"ByteLevel"' in json.dumps([layout["decoder"], layout["pre_tokenizer"]])
    return Tokenizer.from_str(tokenizer_json), added, byte_level


@lru_cache(maxsize=200_000)
def _token_bytes(tokenizer_json: str, token: int) -> tuple[bytes, str]:
    """(the token's bytes, its name if it is special else '')."""
    tokenizer, added, byte_level = _load(tokenizer_json)
    if token in added:
        content, special = added[token]
        return content.encode(), content if special else ""
    stored = tokenizer.id_to_token(token)
    if stored is None:
        raise UserError(
            f"token id {token} is outside the tokenizer's vocabulary of {tokenizer.get_vocab_size()}; use the "
            "tokenizer that made the ids"
        )
    if byte_level:
        return bytes(_byte_of()[character] for character in stored), ""
    fallback = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", stored)
    return (bytes([int(fallback[1], 16)]) if fallback else stored.replace("\u2581", " ").encode()), ""


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte: printable Latin-1 is itself, the rest is numbered from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(rest)}
