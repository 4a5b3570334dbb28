"""Token cards: a query, the sequences that raise and lower it most, and where in them.

Viewers that strip styles (GitHub's notebook preview) leave HTML without shading, so a PNG twin says the same.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from html import escape

import numpy

from influence_kit.errors import UserError
from influence_kit.reading import card_html, card_png
from influence_kit.reading.card_model import ALIGNMENTS, Card, Row, spans


@dataclass(frozen=True)
class CardView:
    """Cards beside each other, shown by a notebook as HTML with their PNG twin."""

    cards: tuple[Card, ...]

    @property
    def alt(self) -> str:
        return " ".join(card.alt for card in self.cards)

    @functools.cached_property
    def html(self) -> str:
        return card_html.html(self.cards)

    @functools.cached_property
    def png(self) -> bytes:
        return card_png.png(self.cards, self.alt)

    def _repr_mimebundle_(self, include=None, exclude=None):
        image = base64.b64encode(self.png).decode()
        # Hidden by a style: a viewer that strips styles, and with them the shading, shows the picture in its place.
        twin = f'<img style="display:none" alt="{escape(self.alt)}" src="data:image/png;base64,{image}">'
        bundle = {"text/html": twin + self.html, "image/png": image, "text/plain": self.alt}
        return bundle, {"image/png": {"alt": self.alt, "width": 900}}


def query_card(
    prompt: Sequence[str],
    completion: Sequence[str],
    rows: Sequence[Row],
    *,
    k: int = 5,
    title: str = "",
    alignment: str = "updating",
    joiner: str = "",
) -> CardView:
    """Card of a query's k highest and k lowest rows, no row twice.

    Args:
        prompt: Tokens as text.
        completion: Tokens as text, those that the query asks for.
        rows: Sequences to choose from.
        k: How many of either end are shown.
        title: Above all.
        alignment: Which token of a position is shaded, one of `ALIGNMENTS`.
        joiner: Put between tokens (" " for worlds of words).

    Raises:
        UserError: an unknown alignment, or no row has a score above or below 0.
    """
    if alignment not in ALIGNMENTS:
        raise UserError(f"alignment {alignment!r} is not one of {sorted(ALIGNMENTS)}")
    rows = sorted(rows, key=lambda row: -row.score)
    top, bottom = [r for r in rows if r.score > 0][:k], [r for r in reversed(rows) if r.score < 0][:k]
    if not top + bottom:
        raise UserError(f"none of the card's {len(rows)} rows has a score above or below 0: pass rows that have one")
    query = [*prompt, *completion]
    matches = [SequenceMatcher(None, query, list(r.tokens), autojunk=False).find_longest_match() for r in top + bottom]
    left, right = ("".join(t for t, _ in spans(Row(part, 0.0, 0), joiner=joiner)) for part in (prompt, completion))
    overlaps = tuple(match.size for match in matches)
    return CardView((Card(title, left, joiner + right, tuple(top), tuple(bottom), overlaps, alignment, joiner),))


def side_by_side(views: Sequence[CardView]) -> CardView:
    """Cards in columns (small model left, large right) on one scale: the 99th percentile of all their token scores.

    Raises:
        UserError: no card.
    """
    cards = [card for view in views for card in view.cards]
    if not cards:
        raise UserError("side_by_side needs at least one card, but got none")
    magnitudes = [value for card in cards for value in card.magnitudes]
    scale = float(numpy.percentile(magnitudes, 99)) if magnitudes else None
    return CardView(tuple(replace(card, scale=scale) for card in cards))
