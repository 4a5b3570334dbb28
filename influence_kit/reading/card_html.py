"""Token cards as HTML. Text reaches markup only through `html.escape`, and no script is used."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from influence_kit.reading.card_model import (
    ALPHA,
    LEVELS,
    UNDERLINE_FROM,
    WINDOW,
    Card,
    Span,
    captions,
    crop,
    direction,
    in_english,
    level,
    shared_query,
    visible,
)
from influence_kit.reading.style import NEGATIVE, POSITIVE, number


def _css() -> str:
    rules = [
        ".ikc{background:#fff;color:#1a1a1a;max-width:900px;padding:10px 14px;"
        "font:13px/1.6 system-ui,sans-serif;overflow-wrap:anywhere}",
        ".ikc.wide{max-width:1140px}.ikc .cols{display:flex;gap:24px}.ikc .col{flex:1;min-width:0}",
        ".ikc h4{margin:0 0 4px;font-size:15px}.ikc h5{margin:12px 0 2px;font-size:13px}.ikc p{margin:2px 0}",
        ".ikc .m,.ikc summary{color:#666;font-size:11.5px}.ikc .t{white-space:pre-wrap}.ikc .g{font-style:italic}",
        f".ikc .up,.ikc .down{{padding:0 10px;border-left:3px solid {POSITIVE};margin:5px 0}}",
        f".ikc .down{{border-color:{NEGATIVE}}}",
    ]
    for sign, rgb, line in (("p", "213,94,0", "solid"), ("n", "0,114,178", "dotted")):
        for step in range(1, LEVELS + 1):
            under = f";text-decoration:underline {line} rgb({rgb})" if step >= UNDERLINE_FROM else ""
            rules.append(f".ikc .{sign}{step}{{background:rgba({rgb},{ALPHA * step / LEVELS:.2f}){under}}}")
    return f"<style>{''.join(rules)}</style>"


CSS = _css()


def html(cards: Sequence[Card]) -> str:
    """One card, or several beside each other; MathJax is told to leave their text alone."""
    shared = shared_query(cards)
    columns = "".join(f'<div class="col">{_card(card, not shared)}</div>' for card in cards)
    wide = " wide" if len(cards) > 1 else ""
    head = _query(cards[0]) if shared else ""
    told = "".join(f"<p>{escape(visible(text))}</p>" for text in captions(cards))
    columns = f'<div class="cols">{columns}</div>'
    return f'<div class="ikc{wide} tex2jax_ignore mathjax_ignore">{CSS}{head}{columns}{told}</div>'


def _query(card: Card) -> str:
    asked = f"{escape(card.prompt)}<b>{escape(card.completion)}</b>"
    return f'<p class="t" dir="{direction(card.prompt + card.completion)}">{asked}</p>{_gloss(card.gloss)}'


def _gloss(text: str) -> str:
    return f'<p class="m g">{escape(in_english(text))}</p>' if text else ""


def _card(card: Card, asked: bool) -> str:
    swatch = f'<span class="n{LEVELS}">lowers</span> <span class="p{LEVELS}">raises</span> · '
    out = [f"<h4>{escape(visible(card.title))}</h4>" if card.title else "", _query(card) if asked else ""]
    for head, rows in card.sections:
        out.append(f"<h5>{escape(head)}</h5>")
        for row, known, text in rows:
            cropped, part = crop(text, WINDOW)
            out.append(f'<div class="{"up" if row.score > 0 else "down"}"><p class="m">{escape(known)}</p>')
            out.append(_shaded(part, card.clip) + _gloss(row.gloss))
            if cropped:
                whole = _shaded(text, card.clip)
                out.append(f"<details><summary>whole sequence, {len(row.tokens)} tokens</summary>{whole}</details>")
            out.append("</div>")
    out.append(f'<p class="m">{swatch if card.magnitudes else ""}{escape(card.legend)}</p>')
    return "".join(out)


def _shaded(text: list[Span], clip: float) -> str:
    # Spans stay plain and inside one paragraph with a direction: isolating each token would break Arabic joining.
    out = []
    for token, score in text:
        step = level(score, clip)
        mark = f'<span class="{"n" if score < 0 else "p"}{step}" title="{number(score, sign=True)}">'
        out.append(f"{mark}{escape(token)}</span>" if step else escape(token))
    return f'<p class="t" dir="{direction("".join(token for token, _ in text))}">{"".join(out)}</p>'
