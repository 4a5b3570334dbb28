"""What a token card says, before it is HTML or a picture: a query, its sequences, and what is shown for each token.

All text comes from corpora and is hostile: controls and characters that reorder text are made visible here.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from influence_kit.errors import UserError
from influence_kit.reading.style import number

ALIGNMENTS = {"updating": "token whose gradient updates the weights", "predicted": "token that is predicted there"}
# What stands at a text's ends and fills up a row, and how it is shown.
SPECIAL = {"<bos>": "start", "<s>": "start", "<|endoftext|>": "end", "</s>": "end", "<eos>": "end"}
SPECIAL |= {"<pad>": "padding", "[PAD]": "padding", "<|padding|>": "padding"}
LEVELS, ALPHA, UNDERLINE_FROM = 20, 0.6, 3  # steps of shading, the strongest, and the step that is also underlined
SPARSE = 2 / 3  # the paper drops sequences whose token scores exceed this |a|_2 / |a|_1: one token carries them
SHORT = 24  # tokens of a sequence that one token may carry without a word about it
WINDOW = 64  # tokens shown of a long sequence
LONGEST = 200  # characters shown of a long token

Span = tuple[str, float]  # what is shown for one token (or a few that share a character), and its score


@dataclass(frozen=True)
class Row:
    """One training sequence of a card.

    Attributes:
        tokens: Its T tokens as text; where tokens share a character, the first holds it and the others ''.
        score: Its influence, raw (nats, per unit weight).
        rank: 1 for the highest score of the scan.
        nats_per_copy: Influence of one more copy, nats.
        scored: How many sequences the scan scored.
        language: Of the sequence, in a word.
        source: What the sequence is, or where it comes from, in a few words.
        bm25_rank: 1 for the sequence that shares most words with the query; not shown where it shares none.
        token_scores: One a token [T]; position t holds what the gradient at t adds, where token t + 1 is predicted.
        gloss: What a text in another language says, in English.
        copies: How many sequences of the scan say the same, this one included.
        overlap: Longest run of tokens that it shares with the query.
    """

    tokens: Sequence[str]
    score: float
    rank: int
    nats_per_copy: float | None = None
    scored: int | None = None
    language: str = ""
    source: str = ""
    bm25_rank: int | None = None
    token_scores: Sequence[float] | None = None
    gloss: str = ""
    copies: int = 1
    overlap: int = 0


@dataclass(frozen=True)
class Card:
    """A query and the sequences that raise and lower it most.

    Attributes:
        title: Above all.
        prompt: The query's prompt as it is shown.
        completion: What the query asks for, as it is shown.
        top: The rows of the highest scores, highest first.
        bottom: The rows of the lowest scores, lowest first.
        further: Other lists of rows, each with its heading.
        gloss: What a query in another language says, in English.
        caption: A sentence on which query this is, and on where it differs from what the text says.
        alignment: Which token of a position is shaded, one of `ALIGNMENTS`.
        joiner: What stands between tokens.
        what: What the sequences are, in a word or two.
    """

    title: str
    prompt: str
    completion: str
    top: tuple[Row, ...]
    bottom: tuple[Row, ...]
    further: tuple[tuple[str, tuple[Row, ...]], ...] = ()
    gloss: str = ""
    caption: str = ""
    alignment: str = "updating"
    joiner: str = ""
    what: str = "Training texts"

    @functools.cached_property
    def sections(self) -> list[tuple[str, list[tuple[Row, str, list[Span]]]]]:
        """(heading, [(row, what is known of it in one line, its tokens)])."""
        asked = "the bold part" if self.prompt else "this text"
        heads = f"{self.what} that make {asked} more likely", "Less likely"
        lists = *zip(heads, (self.top, self.bottom)), *self.further
        return [
            (head, [(row, facts(row), spans(row, self.alignment, self.joiner)) for row in rows])
            for head, rows in lists
            if rows
        ]

    @property
    def rows(self) -> list[Row]:
        """Of all lists."""
        return [*self.top, *self.bottom, *(row for _, rows in self.further for row in rows)]

    @property
    def magnitudes(self) -> list[float]:
        """Sizes of all token scores."""
        return [abs(s) for row in self.rows if row.token_scores is not None for s in row.token_scores]

    @property
    def clip(self) -> float:
        """The token score that has the strongest shade: one in a hundred is as large."""
        return (float(numpy.quantile(self.magnitudes, 0.99)) if self.magnitudes else 0.0) or 1.0

    @property
    def legend(self) -> str:
        """What the shades mean."""
        if not self.magnitudes:
            return "no token scores"
        beyond = sum(s > self.clip for s in self.magnitudes)
        return (
            f"shade: what a token adds to the raw score, strongest from ±{number(self.clip)} on ({beyond} of {len(self.magnitudes)} "
            f"tokens are beyond); it lies on the {ALIGNMENTS[self.alignment]}"
        )

    @functools.cached_property
    def alt(self) -> str:
        """The card in words: the query, and of each sequence what is known of it and its strongest stretch."""
        parts = [f"Token card. {self.title} Query: {self.prompt.strip()} → {self.completion.strip()}"]
        for head, rows in self.sections:
            shown = [f"{known}: “{''.join(t for t, _ in crop(text, 16)[1]).strip()}”" for _, known, text in rows]
            parts.append(f"{head}: " + "; ".join(shown) + ".")
        return visible(" ".join([*parts, self.legend.capitalize() + ".", self.caption]).strip())


def shared_query(cards: Sequence[Card]) -> bool:
    """Whether several cards ask the same, so that it need be shown only once."""
    return len(cards) > 1 and len({(card.prompt, card.completion, card.gloss) for card in cards}) == 1


def in_english(gloss: str) -> str:
    """The line under a text in another language; none where there is no gloss."""
    return f"English: {visible(gloss)}" if gloss else ""


def captions(cards: Sequence[Card]) -> list[str]:
    """What stands under cards beside each other, each sentence once."""
    return list(dict.fromkeys(card.caption for card in cards if card.caption))


def visible(text: str) -> str:
    """Controls as symbols, invisible or direction-changing characters by name: no text hides or reorders."""

    def shown(c: str) -> str:
        if c in "\n\t":
            return {"\n": "↵ ", "\t": "⇥ "}[c]
        if ord(c) < 32 or ord(c) == 127:
            return chr(0x2400 + ord(c)) if ord(c) < 32 else "␡"
        # Joiners shape Persian, Indic and emoji text; every other format character only deceives.
        hidden = unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\u200c\u200d"
        return f"⟨U+{ord(c):04X}⟩" if hidden else c

    return "".join(map(shown, text))


def direction(text: str) -> str:
    """'rtl' where most letters are Arabic, Hebrew or another script written leftwards, else 'ltr'."""
    kinds = [unicodedata.bidirectional(c) for c in text]
    return "rtl" if sum(k in ("R", "AL") for k in kinds) > kinds.count("L") else "ltr"


def spans(row: Row, alignment: str = "updating", joiner: str = "") -> list[Span]:
    """What is shown for each token, and its score.

    Scores are aligned; characters spread over tokens are joined; special tokens have plain names, runs of them are
    collapsed, and at the start they are left out unless they have a score; of a long token the start is shown, and how
    long it is; a text cut within a character ends in dots.

    Raises:
        UserError: as many scores as tokens are not given, or one of them is not finite.
    """
    scores = [0.0] * len(row.tokens) if row.token_scores is None else [float(s) for s in row.token_scores]
    if len(scores) != len(row.tokens):
        raise UserError(f"sequence of rank {row.rank}: {len(scores)} token scores for {len(row.tokens)} tokens")
    if not numpy.isfinite(scores).all():
        raise UserError(f"sequence of rank {row.rank}: token scores hold nan or infinity, so no scale fits them")
    if alignment == "predicted":
        scores = [0.0, *scores[:-1]]
    tokens = list(zip(row.tokens, scores, strict=True))
    start = next((i for i, (token, score) in enumerate(tokens) if score or token.strip() not in SPECIAL), 0)
    shown: list[Span] = []
    run = 0
    for token, score in tokens[start:]:
        name = SPECIAL.get(token.strip(), "")
        run = run + 1 if name else 0
        if run > 1:
            shown[-1] = (f" ⟨{name} ×{run}⟩", shown[-1][1] + score)
        elif name:
            shown.append((f" ⟨{name}⟩" if shown else f"⟨{name}⟩", score))
        elif token or not shown:
            if len(token) > LONGEST:
                token = f"{token[:LONGEST]}… ⟨{len(token):,} characters⟩"
            shown.append((visible((joiner if shown else "") + token), score))
        else:  # the rest of a character that its first token shows
            shown[-1] = (shown[-1][0], shown[-1][1] + score)
    if shown and shown[-1][0].endswith("\ufffd"):  # a text cut within a character
        shown[-1] = (f"{shown[-1][0][:-1]}…", shown[-1][1])
    return shown


def crop(text: list[Span], window: int) -> tuple[bool, list[Span]]:
    """Whether `text` is longer than `window` tokens, and the window around its strongest token."""
    if len(text) <= window:
        return False, text
    strongest = max(range(len(text)), key=lambda i: abs(text[i][1]))
    start = max(0, min(strongest - window // 2, len(text) - window))
    end = start + window
    return True, [("… ", 0.0)] * (start > 0) + text[start:end] + [(" …", 0.0)] * (end < len(text))


def level(score: float, clip: float) -> int:
    """Step of shading, 0 (none) to LEVELS, linear up to `clip`."""
    return min(LEVELS, round(LEVELS * abs(score) / clip))


def facts(row: Row) -> str:
    """What is known of a sequence, in one line."""
    known = [f"#{row.rank:,}" + ("" if row.scored is None else f" of {row.scored:,}")]
    if row.nats_per_copy is not None:
        known.append(f"{number(row.nats_per_copy, sign=True)} nats per copy (raw {number(row.score, sign=True)})")
    else:
        known.append(f"raw {number(row.score, sign=True)} nats")
    known += [visible(word) for word in (row.language, row.source) if word]
    known += [f"one of {row.copies:,} copies"] if row.copies > 1 else []
    if not row.overlap:
        known.append("no token shared")
    else:
        known += [f"BM25 rank {row.bm25_rank:,}"] if row.bm25_rank is not None else []
        known.append(f"shares {row.overlap} tokens in a row" if row.overlap > 1 else "shares single tokens")
    if (
        row.token_scores is not None
        and len(row.tokens) >= SHORT
        and (total := float(numpy.abs(row.token_scores).sum()))
    ):
        if float(numpy.linalg.norm(row.token_scores)) / total > SPARSE:
            known.append("sparse: one token carries it")
    return " · ".join(known)
