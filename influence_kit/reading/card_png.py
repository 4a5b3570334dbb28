"""Token cards as PNG: the same words, shades and underlines as the HTML, laid out line by line."""

from __future__ import annotations

import functools
import io
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from influence_kit.reading import fonts
from influence_kit.reading.card_model import (
    ALPHA,
    LEVELS,
    UNDERLINE_FROM,
    WINDOW,
    Card,
    captions,
    crop,
    direction,
    in_english,
    level,
    shared_query,
    visible,
)
from influence_kit.reading.style import FAINT, INK, NEGATIVE, POSITIVE, style

if TYPE_CHECKING:
    from matplotlib.font_manager import FontProperties

ZOOM = 1.5  # device pixels per CSS pixel: sharp text, and a file of some tens of kilobytes
DPI = 100  # CSS pixels per inch
ALONE, BESIDE = 900, 1120  # CSS pixels: the width of one card, and of several beside each other
MARGIN, INDENT, GAP = 14, 13, 20
WIDE = "\u2e80-\uffef"  # scripts that break lines between any two characters
ATOM = re.compile(rf"\s*[{WIDE}]|\s*[^\s{WIDE}]+|\s+")

Item = tuple[str, float, bool]  # text, token score, bold
Word = list[Item]  # what no line may break: tokens of one word, and the space before it
# ("text", x, y, string, size, colour, bold, fonts), ("box", x, y, width, height, colour, alpha) or ("line", x, y, width,
# colour, dotted), in CSS pixels from the top left corner of the picture
Mark = tuple
Measure = Callable[[str, bool], float]  # the width of a text, bold or not
Placed = tuple[float, str, Word]  # the space before a word, the word without it, its items


@functools.cache
def _font(size: float, bold: bool, families: tuple[str, ...]) -> FontProperties:
    from matplotlib.font_manager import FontProperties

    return FontProperties(family=list(families), size=size * 72 / DPI, weight="bold" if bold else "normal")


@functools.cache
def _renderer():
    from matplotlib.backends.backend_agg import RendererAgg

    return RendererAgg(8, 8, DPI * ZOOM)


@functools.lru_cache(65536)
def _width(text: str, size: float, bold: bool, families: tuple[str, ...]) -> float:
    def measured(string: str) -> float:
        return _renderer().get_text_width_height_descent(string, _font(size, bold, families), ismath=False)[0] / ZOOM

    return measured(f"|{text}|") - measured("||")  # spaces at the ends have no ink, and only ink is measured


def _text(word: Word) -> str:
    return "".join(text for text, _, _ in word)


def _words(items: Sequence[Item]) -> Iterator[Word]:
    """Atoms joined where no line may break: tokens of one word stay together, so that shaped scripts join."""
    word: Word = []
    for text, score, bold in items:
        for atom in ATOM.findall(text):
            before = word[-1][0][-1] if word else ""
            wide = any(unicodedata.east_asian_width(c) in "WF" for c in (before or " ", atom.strip()[:1] or " "))
            # Space belongs to the word that it stands before, be it a token's end or a token of its own.
            if word and (word[-1][2] != bold or (_text(word).strip() and (atom[0].isspace() or wide))):
                yield word
                word = []
            word.append((atom, score, bold))
    if word:
        yield word


def _fitting(word: Word, width: float, measure: Measure) -> Iterator[Word]:
    """A word, in parts where it is wider than a line."""

    def fits(text: str) -> bool:
        return measure(text.strip(), word[0][2]) <= width

    if fits(_text(word)):
        yield word
        return
    part: Word = []
    for text, score, bold in word:
        rest = text
        while rest:
            least, most = 0, len(rest)  # the longest start of what is left that still fits, by halving
            while least < most:
                half = (least + most + 1) // 2
                least, most = (half, most) if fits(_text(part) + rest[:half]) else (least, half - 1)
            if least == 0 and part:
                yield part
                part = []
                continue
            part, rest = [*part, (rest[: max(least, 1)], score, bold)], rest[max(least, 1) :]
    yield part


def _ordered(line: list[Placed], base: str) -> list[Placed]:
    """Words from the paragraph's starting side: runs against its direction are reversed (a coarse UAX 9)."""
    out: list[Placed] = []
    run: list[Placed] = []

    def turned() -> list[Placed]:
        gaps = [gap for gap, _, _ in run[:1] + run[:0:-1]]  # the space between two words stays between them
        return [(gap, body, word) for gap, (_, body, word) in zip(gaps, run[::-1])]

    for word in line:
        strong = [unicodedata.bidirectional(c) for c in word[1]]
        if not any(k in ("L", "R", "AL") for k in strong) or direction(word[1]) == base:
            out += [*turned(), word]
            run = []
        else:
            run.append(word)
    return out + turned()


def _lines(items: Sequence[Item], width: float, measure: Measure) -> Iterator[list[Placed]]:
    """Lines of a paragraph."""
    line: list[Placed] = []
    used = 0.0
    for whole in _words(items):
        bold = whole[0][2]
        for word in _fitting(whole, width, measure):
            text = _text(word)
            body = text.strip()
            gap = measure(text[: -len(text.lstrip()) or None], bold)
            extent = measure(body, bold)
            if line and used + gap + extent > width:
                yield line
                line, used = [], 0.0
            if not line:
                gap = 0.0
            used += gap + extent
            line.append((gap, body, word))
    yield line


def _flow(
    marks: list[Mark], items: Sequence[Item], x: float, y: float, width: float, *, families: tuple[str, ...],
    size: float = 12.5, leading: float = 20, colour: str = INK, clip: float = 1.0,
) -> float:  # fmt: skip
    """Set a paragraph.

    Args:
        marks: What is drawn is added to these.
        items: The paragraph's text, in the order in which it is read.
        x: Its left edge.
        y: Its top.
        width: Its width.
        families: Fonts that cover it.
        size: Of the letters, in CSS pixels as all else.
        leading: From line to line.
        colour: Of the letters.
        clip: The token score that has the strongest shade.

    Returns:
        The y below it.
    """

    def measure(text: str, bold: bool) -> float:
        return _width(text, size, bold, families)

    base = direction("".join(text for text, _, _ in items))
    for line in _lines(items, width, measure):
        edge = 0.0  # distance from the paragraph's starting side
        for gap, body, word in _ordered(line, base):
            bold = word[0][2]
            extent = measure(body, bold)
            left = x + edge + gap if base == "ltr" else x + width - edge - gap - extent
            ahead = direction(body) == base == "ltr"  # the space before a word is shaded where it is plain whose it is
            space = measure(_text(word)[: -len(_text(word).lstrip()) or None], bold)
            shown, start = "", -gap if ahead else 0.0
            for text, score, _ in word:
                shown += text
                end = min(measure(shown, bold) - space, extent)
                end = max(end, start) if ahead else max(end, 0.0)
                if (step := level(score, clip)) and end > start:
                    at = left + start if direction(body) == "ltr" else left + extent - end
                    sign = NEGATIVE if score < 0 else POSITIVE
                    marks.append(("box", at, y + 2, end - start, leading - 3, sign, ALPHA * step / LEVELS))
                    if step >= UNDERLINE_FROM:
                        marks.append(("line", at, y + leading - 2, end - start, sign, score < 0))
                start = end
            if body:
                marks.append(("text", left, y + 0.72 * leading, body, size, colour, bold, families))
            edge += gap + extent
        y += leading
    return y


def _paragraphs(marks: list[Mark], cards: Sequence[Card], x: float, width: float) -> Callable[..., float]:
    """`_flow` with margins, and with fonts that cover all of the cards' text."""
    texts = [part for c in cards for part in (c.title, c.prompt, c.completion, c.gloss, c.caption)]
    texts += [known + row.gloss for c in cards for _, rows in c.sections for row, known, _ in rows]
    texts += [token for c in cards for _, rows in c.sections for _, _, text in rows for token, _ in text]
    families = tuple(fonts.families("".join(texts)))

    def flow(items: Sequence[Item], y: float, *, indent: float = 0, **options: Any) -> float:
        left, inner = x + MARGIN + indent, width - 2 * MARGIN - indent
        return _flow(marks, items, left, y, inner, families=families, **options)

    return flow


SMALL: dict[str, Any] = {"size": 10.5, "leading": 16, "colour": FAINT}


def _query(flow: Callable[..., float], card: Card, y: float) -> float:
    y = flow([(card.prompt, 0.0, False), (card.completion, 0.0, True)], y) + 2
    return flow([(in_english(card.gloss), 0.0, False)], y - 2, **SMALL) + 2 if card.gloss else y


def _card(card: Card, x: float, y: float, width: float, asked: bool) -> tuple[list[Mark], float]:
    """Marks of one card whose left edge is at x and whose top is at y, and the y below it."""
    marks: list[Mark] = []
    flow = _paragraphs(marks, [card], x, width)
    if card.title:
        y = flow([(visible(card.title), 0.0, True)], y, size=15, leading=24)
    if asked:
        y = _query(flow, card, y)
    for head, rows in card.sections:
        y = flow([(head, 0.0, True)], y + 6, size=13, leading=21)
        for row, known, text in rows:
            top = y + 3
            y = flow([(known, 0.0, False)], top, indent=INDENT, **SMALL)
            shown = [(token, score, False) for token, score in crop(text, WINDOW)[1]]
            y = flow(shown, y, indent=INDENT, clip=card.clip)
            if row.gloss:
                y = flow([(in_english(row.gloss), 0.0, False)], y, indent=INDENT, **SMALL)
            marks.append(("box", x + MARGIN, top, 3, y - top, POSITIVE if row.score > 0 else NEGATIVE, 1.0))
            y += 4
    y = flow([(card.legend, 0.0, False)], y + 6, **SMALL)
    if card.magnitudes:
        ramp, cell = x + MARGIN + 46, 4
        zero = ramp + LEVELS * cell
        for i in range(1, LEVELS + 1):
            marks.append(("box", zero - i * cell, y + 3, cell, 12, NEGATIVE, ALPHA * i / LEVELS))
            marks.append(("box", zero + (i - 1) * cell, y + 3, cell, 12, POSITIVE, ALPHA * i / LEVELS))
        marks.append(("line", ramp, y + 16, zero - ramp, NEGATIVE, True))
        marks.append(("line", zero, y + 16, zero - ramp, POSITIVE, False))
        flow([("lowers", 0.0, False)], y, **SMALL)
        y = flow([("raises", 0.0, False)], y, indent=2 * zero - ramp + 6 - x - MARGIN, **SMALL)
    return marks, y + 8


def _laid(cards: Sequence[Card]) -> tuple[list[Mark], float, float]:
    """Marks of cards beside each other, and the picture's width and height."""
    each = ALONE if len(cards) == 1 else BESIDE // len(cards)
    width, y, shared = len(cards) * (each + GAP) - GAP, 10.0, shared_query(cards)
    marks: list[Mark] = []
    flow = _paragraphs(marks, cards, 0, width)
    if shared:
        y = _query(flow, cards[0], y) + 6
    columns = [_card(card, i * (each + GAP), y, each, not shared) for i, card in enumerate(cards)]
    y = max(bottom for _, bottom in columns)
    for text in captions(cards):
        y = flow([(visible(text), 0.0, False)], y) + 8
    return marks + [mark for part, _ in columns for mark in part], width, y


def png(cards: Sequence[Card], alt: str) -> bytes:
    """PNG of the cards beside each other, ZOOM device pixels per CSS pixel, `alt` as Description; stable bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import Affine2D
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    with style():
        marks, width, height = _laid(cards)
        fig = Figure(figsize=(width / DPI, height / DPI), dpi=DPI * ZOOM, layout="none")  # type: ignore[arg-type]
        pixels = Affine2D().scale(ZOOM, -ZOOM).translate(0, round(height * ZOOM))
        for kind, x, y, *rest in sorted(marks, key=lambda mark: mark[0] == "text"):
            if kind == "text":
                text, size, colour, bold, families = rest
                fig.text(
                    x, y, text, transform=pixels, font=_font(size, bold, families), color=colour, va="baseline",
                    parse_math=False,
                )  # fmt: skip
            elif kind == "box":
                w, h, colour, alpha = rest
                fig.add_artist(Rectangle((x, y), w, h, transform=pixels, color=colour, alpha=alpha, linewidth=0))
            else:
                w, colour, dotted = rest
                line = Line2D([x, x + w], [y, y], color=colour, linewidth=1.1, linestyle=":" if dotted else "-")
                line.set_transform(pixels)
                fig.add_artist(line)
        canvas = FigureCanvasAgg(fig)
        canvas.draw()
    # A palette makes a third of the bytes; this method keeps each shade of the ramps within 4 %.
    image = Image.fromarray(numpy.asarray(canvas.buffer_rgba())).convert("RGB")
    image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    info = PngInfo()
    info.add_itxt("Description", alt)
    out = io.BytesIO()
    image.save(out, "PNG", pnginfo=info, optimize=True, dpi=(DPI * ZOOM, DPI * ZOOM))
    return out.getvalue()
