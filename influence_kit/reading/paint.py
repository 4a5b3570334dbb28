"""The PNG twin of token cards: the same words, shades and underlines as the HTML, laid out line by line."""

import functools
import io
import re
import unicodedata
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from influence_kit.reading import fonts
from influence_kit.reading.cards import ALPHA, LEVELS, UNDERLINE_FROM, Card, crop, direction, level, visible
from influence_kit.reading.style import FAINT, INK, NEGATIVE, POSITIVE, style

if TYPE_CHECKING:
    from matplotlib.font_manager import FontProperties

ZOOM = 1.5  # device pixels per CSS pixel: sharp text, and a file of some tens of kilobytes
DPI = 100  # CSS pixels per inch
MARGIN, INDENT, GAP = 14, 13, 20
WIDE = "\u2e80-\uffef"  # scripts that break lines between any two characters
ATOM = re.compile(rf"\s*[{WIDE}]|\s*[^\s{WIDE}]{{1,24}}|\s+")

Item = tuple[str, float, bool]  # text, token score, bold
# ("text", x, y, string, size, colour, bold), ("box", x, y, width, height, colour, alpha) or ("line", x, y, width,
# colour, dotted), in CSS pixels from the top left corner of the picture
Mark = tuple


@functools.cache
def _font(size: float, bold: bool, families: tuple[str, ...]) -> "FontProperties":
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


def _words(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Atoms joined where no line may break: tokens of one word stay together, so that shaped scripts join."""
    word: list[Item] = []
    for text, score, bold in items:
        for atom in ATOM.findall(text):
            before = word[-1][0][-1] if word else ""
            wide = any(unicodedata.east_asian_width(c) in "WF" for c in (before or " ", atom.strip()[:1] or " "))
            if word and (atom[0].isspace() or before.isspace() or wide or word[-1][2] != bold or len(word) > 30):
                yield word
                word = []
            word.append((atom, score, bold))
    if word:
        yield word


def _ordered(line: list[tuple[float, str, list[Item]]], base: str) -> list[tuple[float, str, list[Item]]]:
    """Words from the paragraph's starting side: runs against its direction are reversed (a coarse UAX 9)."""
    out: list = []
    run: list = []
    for word in line:
        strong = [unicodedata.bidirectional(c) for c in word[1]]
        if not any(k in ("L", "R", "AL") for k in strong) or direction(word[1]) == base:
            out += [*reversed(run), word]
            run = []
        else:
            run.append(word)
    return out + run[::-1]


def _flow(
    marks: list[Mark], items: Sequence[Item], x: float, y: float, width: float, *, families: tuple[str, ...],
    size: float = 12.5, leading: float = 20, colour: str = INK, clip: float = 1.0,
) -> float:  # fmt: skip
    """Set a paragraph at (x, y), its top left corner; returns the y below it."""
    base = direction("".join(text for text, _, _ in items))
    lines: list[list[tuple[float, str, list[Item]]]] = [[]]
    used = 0.0
    for word in _words(items):
        body = "".join(text for text, _, _ in word)
        space = len(body) - len(body.lstrip())
        gap = _width(" " * space, size, word[0][2], families) if lines[-1] and space else 0.0
        extent = _width(body.strip(), size, word[0][2], families)
        if lines[-1] and used + gap + extent > width:
            lines.append([])
            used = gap = 0.0
        used += gap + extent
        if body.strip():
            lines[-1].append((gap, body.strip(), word))
    for line in lines:
        edge = 0.0  # distance from the paragraph's starting side
        for gap, body, word in _ordered(line, base):
            bold = word[0][2]
            extent = _width(body, size, bold, families)
            left = x + edge + gap if base == "ltr" else x + width - edge - gap - extent
            start = 0.0
            prefix = ""
            for text, score, _ in word:
                prefix = (prefix + text).lstrip()
                end = extent if len(prefix) >= len(body) else _width(prefix, size, bold, families)
                at = left + start if direction(body) == "ltr" else left + extent - end
                lead = gap if not start and base == direction(body) == "ltr" else 0.0
                if step := level(score, clip):
                    sign = NEGATIVE if score < 0 else POSITIVE
                    at, extra = at - lead, end - start + lead
                    marks.append(("box", at, y + 2, extra, leading - 3, sign, ALPHA * step / LEVELS))
                    if step >= UNDERLINE_FROM:
                        marks.append(("line", at, y + leading - 2, extra, sign, score < 0))
                start = end
            marks.append(("text", left, y + 0.72 * leading, body, size, colour, bold))
            edge += gap + extent
        y += leading
    return y


def _card(card: Card, x: float) -> tuple[list[Mark], float, tuple[str, ...]]:
    """Marks of one card whose left edge is at x, and its height."""
    everything = card.title + card.prompt + card.completion
    everything += "".join(facts + "".join(t for t, _ in text) for _, rows in card.sections for _, facts, text in rows)
    families = tuple(fonts.families(everything))
    marks: list[Mark] = []
    inner = card.width - 2 * MARGIN
    left, y = x + MARGIN, 10.0
    flow = functools.partial(_flow, marks, families=families)
    small: dict[str, Any] = {"size": 10.5, "leading": 16, "colour": FAINT}
    if card.title:
        y = flow([(visible(card.title), 0.0, True)], left, y, inner, size=15, leading=24)
    y = flow([(card.prompt, 0.0, False), (card.completion, 0.0, True)], left, y, inner) + 2
    y = flow([(card.legend, 0.0, False)], left, y, inner, **small)
    if card.magnitudes:
        ramp, cell = left + 46, 4
        zero = ramp + LEVELS * cell
        for i in range(1, LEVELS + 1):
            marks.append(("box", zero - i * cell, y + 3, cell, 12, NEGATIVE, ALPHA * i / LEVELS))
            marks.append(("box", zero + (i - 1) * cell, y + 3, cell, 12, POSITIVE, ALPHA * i / LEVELS))
        marks.append(("line", ramp, y + 16, zero - ramp, NEGATIVE, True))
        marks.append(("line", zero, y + 16, zero - ramp, POSITIVE, False))
        flow([("lowers", 0.0, False)], left, y, 60, **small)
        y = flow([("raises", 0.0, False)], 2 * zero - ramp + 6, y, 60, **small)
    for head, rows in card.sections:
        y = flow([(head, 0.0, True)], left, y + 10, inner, size=13, leading=21)
        for row, facts, text in rows:
            top = y + 3
            y = flow([(facts, 0.0, False)], left + INDENT, top, inner - INDENT, **small)
            y = flow(
                [(t, s, False) for t, s in crop(text, card.window)[1]], left + INDENT, y, inner - INDENT, clip=card.clip
            )
            marks.append(("box", left, top, 3, y - top, POSITIVE if row.score > 0 else NEGATIVE, 1.0))
            y += 4
    return marks, y + 8, families


def png(cards: Sequence[Card], alt: str) -> bytes:
    """PNG of the cards beside each other, ZOOM device pixels per CSS pixel, `alt` as Description; stable bytes."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.transforms import Affine2D
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    with style():
        starts = [sum(card.width + GAP for card in cards[:i]) for i in range(len(cards))]
        laid = [_card(card, x) for card, x in zip(cards, starts, strict=True)]
        width, height = starts[-1] + cards[-1].width, max(bottom for _, bottom, _ in laid)
        fig = Figure(figsize=(width / DPI, height / DPI), dpi=DPI * ZOOM, layout="none")  # type: ignore[arg-type]
        pixels = Affine2D().scale(ZOOM, -ZOOM).translate(0, round(height * ZOOM))
        for marks, _, families in laid:
            for kind, x, y, *rest in sorted(marks, key=lambda mark: mark[0] == "text"):
                if kind == "text":
                    text, size, colour, bold = rest
                    fig.text(x, y, text, transform=pixels, font=_font(size, bold, families), color=colour,
                             va="baseline", parse_math=False)  # fmt: skip
                elif kind == "box":
                    w, h, colour, alpha = rest
                    fig.add_artist(Rectangle((x, y), w, h, transform=pixels, color=colour, alpha=alpha, linewidth=0))
                else:
                    w, colour, dotted = rest
                    fig.add_artist(Line2D([x, x + w], [y, y], transform=pixels, color=colour, linewidth=1.1,
                                          linestyle=":" if dotted else "-"))  # fmt: skip
        raw = io.BytesIO()
        fig.savefig(raw, format="png", dpi=DPI * ZOOM)
    # A palette makes a third of the bytes; this method keeps each shade of the ramps within 4 %.
    image = Image.open(raw).convert("RGB")
    image = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    info = PngInfo()
    info.add_itxt("Description", alt)
    out = io.BytesIO()
    image.save(out, "PNG", pnginfo=info, optimize=True, dpi=(DPI * ZOOM, DPI * ZOOM))
    return out.getvalue()
