"""Token cards: a query, the sequences that raise and lower it most, and where in them; as HTML and as a PNG twin.

Viewers that strip styles (GitHub's notebook preview) leave HTML without shading, so the PNG says the same. All text
comes from corpora and is hostile until escaped: it reaches markup only through `html.escape`, and no script is used.
"""

import base64
import codecs
import functools
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from html import escape

import numpy

from influence_kit.errors import UserError
from influence_kit.reading.style import NEGATIVE, POSITIVE, number

ALIGNMENTS = {"updating": "token whose gradient updates the weights", "predicted": "token that is predicted there"}
PADDING = {"<bos>", "<s>", "<pad>", "[PAD]", "<|padding|>", "<|endoftext|>", "</s>", "<eos>"}
LEVELS, ALPHA, UNDERLINE_FROM = 20, 0.6, 3  # steps of shading, the strongest, and the step that is also underlined
SPARSE = 2 / 3  # the paper drops sequences whose token scores exceed this |a|_2 / |a|_1: one token carries them

Span = tuple[str, float]  # what is shown for one token (or a few that share a character), and its score


@dataclass(frozen=True)
class Row:
    """One training sequence of a card.

    pieces: token strings; where tokens share a character, the first holds it and the others '' (or all are bytes).
    token_scores: one per piece; position t holds what the gradient at t adds, where piece t + 1 is predicted.
    """

    pieces: Sequence[str | bytes]
    score: float  # influence (nats, per unit weight)
    rank: int  # 1: the highest score of the scan
    nats_per_copy: float | None = None
    percentile: float | None = None
    language: str = ""
    source: str = ""
    bm25_rank: int | None = None
    token_scores: Sequence[float] | None = None


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
    """Shown text and score per token: scores aligned, split characters joined, runs of padding collapsed."""
    scores = [0.0] * len(row.pieces) if row.token_scores is None else [float(s) for s in row.token_scores]
    if len(scores) != len(row.pieces):
        raise UserError(f"sequence of rank {row.rank}: {len(scores)} token scores for {len(row.pieces)} pieces")
    if not numpy.isfinite(scores).all():
        raise UserError(f"sequence of rank {row.rank}: token scores hold nan or infinity, so no scale fits them")
    if alignment == "predicted":
        scores = [0.0, *scores[:-1]]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    shown: list[Span] = []
    run, carried = 0, 0.0
    for i, (piece, score) in enumerate(zip(row.pieces, scores, strict=True)):
        last = i == len(scores) - 1
        text = decoder.decode(piece, final=last) if isinstance(piece, bytes) else piece
        run = run + 1 if text.strip() in PADDING else 0
        if run > 1:
            shown[-1] = (f"⟨{text.strip()} ×{run}⟩", shown[-1][1] + score)
        elif text or (last and not shown):
            shown.append((visible((joiner if shown else "") + text), score + carried))
            carried = 0.0
        elif shown and isinstance(piece, str):  # the rest of a character that its first token shows
            shown[-1] = (shown[-1][0], shown[-1][1] + score)
        else:  # bytes of an unfinished character: its score belongs to the piece that completes it
            carried += score
    return shown


@dataclass(frozen=True)
class Card:
    """Shown by a notebook as HTML with its PNG twin; `html`, `png` and `alt` serve files and reports."""

    title: str
    prompt: str
    completion: str
    top: tuple[Row, ...]
    bottom: tuple[Row, ...]
    alignment: str = "updating"
    joiner: str = ""
    window: int = 64
    scale: float | None = None  # token score of the strongest shade; None: this card's own 99th percentile
    width: int = 900
    overlaps: tuple[int, ...] = ()  # longest run of tokens shared with the query, per row

    @functools.cached_property
    def sections(self) -> list[tuple[str, list[tuple[Row, str, list[Span]]]]]:
        rows = [(row, _facts(row, n), spans(row, self.alignment, self.joiner))
                for row, n in zip(self.top + self.bottom, self.overlaps, strict=True)]  # fmt: skip
        cut = len(self.top)
        heads = "Raise the completion's log probability most", "Lower it most"
        return [(head, part) for head, part in zip(heads, (rows[:cut], rows[cut:]), strict=True) if part]

    @property
    def magnitudes(self) -> list[float]:
        return [abs(s) for row in self.top + self.bottom if row.token_scores is not None for s in row.token_scores]

    @property
    def clip(self) -> float:
        return self.scale or (float(numpy.percentile(self.magnitudes, 99)) if self.magnitudes else 0.0) or 1.0

    @property
    def legend(self) -> str:
        if not self.magnitudes:
            return "no token scores"
        beyond = sum(s > self.clip for s in self.magnitudes)
        return (f"shade: token score, linear, clipped at ±{number(self.clip)} nats ({beyond} of "
                f"{len(self.magnitudes)} tokens beyond); shaded is the {ALIGNMENTS[self.alignment]}")  # fmt: skip

    @functools.cached_property
    def alt(self) -> str:
        parts = [f"Token card. {self.title} Query: {self.prompt.strip()} → {self.completion.strip()}"]
        for head, rows in self.sections:
            shown = [f"{facts}: “{''.join(t for t, _ in crop(text, 16)[1]).strip()}”" for _, facts, text in rows]
            parts.append(f"{head}: " + "; ".join(shown) + ".")
        return visible(" ".join([*parts, self.legend.capitalize() + "."]))

    @functools.cached_property
    def html(self) -> str:
        return f'<div class="ikc">{CSS}{_html(self)}</div>'

    @functools.cached_property
    def png(self) -> bytes:
        from influence_kit.reading import paint  # here: matplotlib is needed for the picture only

        return paint.png([self], self.alt)

    def _repr_mimebundle_(self, include=None, exclude=None):
        return _bundle(self.html, self.png, self.alt)


@dataclass(frozen=True)
class Columns:
    """Cards beside each other, on one scale."""

    cards: tuple[Card, ...]

    @property
    def alt(self) -> str:
        return " ".join(card.alt for card in self.cards)

    @property
    def html(self) -> str:
        cells = "".join(f'<div class="col">{_html(card)}</div>' for card in self.cards)
        return f'<div class="ikc wide">{CSS}{cells}</div>'

    @functools.cached_property
    def png(self) -> bytes:
        from influence_kit.reading import paint

        return paint.png(self.cards, self.alt)

    def _repr_mimebundle_(self, include=None, exclude=None):
        return _bundle(self.html, self.png, self.alt)


def query_card(
    prompt: Sequence[str | bytes],
    completion: Sequence[str | bytes],
    rows: Sequence[Row],
    *,
    title: str = "",
    alignment: str = "updating",
    joiner: str = "",
    k: int = 5,
    window: int = 64,
    scale: float | None = None,
    width: int = 900,
) -> Card:
    """Card of a query's k highest and k lowest rows (by score; no row twice).

    prompt, completion: token strings. joiner: put between tokens (" " for word-level worlds). window: tokens shown of a
    long sequence, around its strongest token; the whole is one click away in HTML. Raises UserError for an unknown
    alignment and where no row has a score above or below 0.
    """
    if alignment not in ALIGNMENTS:
        raise UserError(f"alignment {alignment!r} is not one of {sorted(ALIGNMENTS)}")
    rows = sorted(rows, key=lambda row: -row.score)
    top, bottom = [r for r in rows if r.score > 0][:k], [r for r in reversed(rows) if r.score < 0][:k]
    if not top + bottom:
        raise UserError(f"none of the card's {len(rows)} rows has a score above or below 0: pass rows that have one")
    query = [*prompt, *completion]
    matches = [SequenceMatcher(None, query, list(r.pieces), autojunk=False).find_longest_match() for r in top + bottom]
    left, right = (visible(joiner.join(t for t, _ in spans(Row(p, 0.0, 0)))) for p in (prompt, completion))
    return Card(title, left, joiner + right, tuple(top), tuple(bottom), alignment, joiner, window, scale, width,
                tuple(match.size for match in matches))  # fmt: skip


def side_by_side(cards: Sequence[Card], width: int = 1120) -> Columns:
    """Columns (small model left, large right) that share one scale: the 99th percentile of all their token scores."""
    if not cards:
        raise UserError("side_by_side needs at least one card, but got none")
    magnitudes = [value for card in cards for value in card.magnitudes]
    scale = float(numpy.percentile(magnitudes, 99)) if magnitudes else None
    return Columns(tuple(replace(card, scale=scale, width=width // len(cards)) for card in cards))


def _facts(row: Row, overlap: int) -> str:
    facts = [f"#{row.rank}"]
    if row.nats_per_copy is not None:
        facts.append(f"{number(row.nats_per_copy, sign=True)} nats per copy (raw {number(row.score, sign=True)})")
    else:
        facts.append(f"raw {number(row.score, sign=True)} nats")
    if row.percentile is not None:
        facts.append(f"percentile {number(row.percentile, 6)}")
    facts += [visible(word) for word in (row.language, row.source) if word]
    if row.bm25_rank is not None:
        facts.append(f"BM25 rank {row.bm25_rank}")
    facts.append(f"longest shared run {overlap} token{'' if overlap == 1 else 's'}")
    if row.token_scores is not None and (total := float(numpy.abs(row.token_scores).sum())):
        if float(numpy.linalg.norm(row.token_scores)) / total > SPARSE:
            facts.append("sparse: one token carries it")
    return " · ".join(facts)


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


def _css() -> str:
    rules = [
        ".ikc{background:#fff;color:#1a1a1a;max-width:900px;padding:10px 14px;font:13px/1.6 system-ui,sans-serif}",
        ".ikc.wide{max-width:none;display:flex;gap:24px}.ikc .col{flex:1;min-width:0}",
        ".ikc h4{margin:0 0 4px;font-size:15px}.ikc h5{margin:12px 0 2px;font-size:13px}.ikc p{margin:2px 0}",
        ".ikc .m,.ikc summary{color:#666;font-size:11.5px}.ikc .t{white-space:pre-wrap;overflow-wrap:anywhere}",
        f".ikc .up,.ikc .down{{padding:0 10px;border-left:3px solid {POSITIVE};margin:5px 0}}",
        f".ikc .down{{border-color:{NEGATIVE}}}",
    ]
    for sign, rgb, line in (("p", "213,94,0", "solid"), ("n", "0,114,178", "dotted")):
        for step in range(1, LEVELS + 1):
            under = f";text-decoration:underline {line} rgb({rgb})" if step >= UNDERLINE_FROM else ""
            rules.append(f".ikc .{sign}{step}{{background:rgba({rgb},{ALPHA * step / LEVELS:.2f}){under}}}")
    return f"<style>{''.join(rules)}</style>"


CSS = _css()


def _shaded(text: list[Span], clip: float) -> str:
    # Spans stay plain and inside one paragraph with a direction: isolating each token would break Arabic joining.
    out = []
    for piece, score in text:
        step = level(score, clip)
        mark = f'<span class="{"n" if score < 0 else "p"}{step}" title="{number(score, sign=True)}">'
        out.append(f"{mark}{escape(piece)}</span>" if step else escape(piece))
    return f'<p class="t" dir="{direction("".join(p for p, _ in text))}">{"".join(out)}</p>'


def _html(card: Card) -> str:
    query = f"{escape(card.prompt)}<b>{escape(card.completion)}</b>"
    swatch = (
        f'<span class="n{LEVELS}">lowers</span> <span class="p{LEVELS}">raises</span> · ' if card.magnitudes else ""
    )
    out = [f"<h4>{escape(visible(card.title))}</h4>" if card.title else "",
           f'<p class="t" dir="{direction(card.prompt + card.completion)}">{query}</p>',
           f'<p class="m">{swatch}{escape(card.legend)}</p>']  # fmt: skip
    for head, rows in card.sections:
        out.append(f"<h5>{escape(head)}</h5>")
        for row, facts, text in rows:
            cropped, part = crop(text, card.window)
            out.append(f'<div class="{"up" if row.score > 0 else "down"}"><p class="m">{escape(facts)}</p>')
            out.append(_shaded(part, card.clip))
            if cropped:
                whole = _shaded(text, card.clip)
                out.append(f"<details><summary>whole sequence, {len(row.pieces)} tokens</summary>{whole}</details>")
            out.append("</div>")
    return "".join(out)


def _bundle(html: str, png: bytes, alt: str) -> tuple[dict, dict]:
    image = base64.b64encode(png).decode()
    # Hidden by a style: a viewer that strips styles, and with them the shading, shows the picture in its place.
    twin = f'<img style="display:none" alt="{escape(alt)}" src="data:image/png;base64,{image}">'
    return {"text/html": twin + html, "image/png": image, "text/plain": alt}, {"image/png": {"alt": alt, "width": 900}}
