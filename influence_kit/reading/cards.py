"""Token cards: a query, the sequences that raise and lower it most, and where in them.

Viewers that strip styles (GitHub's notebook preview) leave HTML without shading, so a PNG twin says the same.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from html import escape
from typing import Any

import numpy

from influence_kit.errors import UserError
from influence_kit.reading import card_html, card_png
from influence_kit.reading.card_model import ALIGNMENTS, Card, Row, spans
from influence_kit.reading.style import number


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
    caption: str = "",
    gloss: str = "",
    further: Mapping[str, Sequence[Row]] | None = None,
    lowest: int | None = None,
    distinct: bool = False,
    alignment: str = "updating",
    joiner: str = "",
    what: str = "Training texts",
) -> CardView:
    """Card of a query's k highest rows and its lowest, no row twice.

    Args:
        prompt: Tokens as text.
        completion: Tokens as text, those that the query asks for.
        rows: Sequences to choose from.
        k: How many are shown.
        title: Above all.
        caption: A sentence under all.
        gloss: What a query in another language says, in English.
        further: Other lists, such as RelatIF's, in their order, by heading; k of each are shown.
        lowest: How many of the lowest are shown; k by default.
        distinct: Of rows that say the same only the first is shown.
        alignment: Which token of a position is shaded, one of `ALIGNMENTS`.
        joiner: Put between tokens (" " for worlds of words).
        what: What the sequences are, in a word or two.

    Raises:
        UserError: an unknown alignment, or no row has a score above or below 0.
    """
    if alignment not in ALIGNMENTS:
        raise UserError(f"alignment {alignment!r} is not one of {sorted(ALIGNMENTS)}")
    rows = sorted(rows, key=lambda row: -row.score)
    query = [*prompt, *completion]

    def shown(chosen: Sequence[Row], number: int) -> tuple[Row, ...]:
        found: dict[Any, Row] = {}
        for place, row in enumerate(chosen):
            key = tuple(row.tokens) if distinct else place
            if key not in found:
                match = SequenceMatcher(None, query, list(row.tokens), autojunk=False).find_longest_match()
                found[key] = replace(row, overlap=match.size)
        return tuple(found.values())[:number]

    top = shown([row for row in rows if row.score > 0], k)
    bottom = shown([row for row in reversed(rows) if row.score < 0], k if lowest is None else lowest)
    if not top + bottom:
        raise UserError(f"none of the card's {len(rows)} rows has a score above or below 0: pass rows that have one")
    others = tuple((head, shown(part, k)) for head, part in (further or {}).items())
    left, right = ("".join(t for t, _ in spans(Row(part, 0.0, 0), joiner=joiner)) for part in (prompt, completion))
    card = Card(title, left, joiner + right, top, bottom, others, gloss, caption, alignment, joiner, what)
    return CardView((card,))


def side_by_side(views: Sequence[CardView]) -> CardView:
    """Cards in columns (small model left, large right), each on its own scale; a query they share is shown once.

    Raises:
        UserError: no card.
    """
    cards = tuple(card for view in views for card in view.cards)
    if not cards:
        raise UserError("side_by_side needs at least one card, but got none")
    return CardView(cards)


def median_query(values: Sequence[float]) -> int:
    """The query whose value is the median (the lower one of two), so that a card shows neither the best nor the worst.

    Raises:
        UserError: no value is a number.
    """
    known = numpy.flatnonzero(numpy.isfinite(values))
    if not len(known):
        raise UserError(f"none of {len(values)} queries has a value, so there is no median one to show")
    order = known[numpy.argsort(numpy.asarray(values)[known], kind="stable")]
    return int(order[(len(order) - 1) // 2])


def which_query(values: Sequence[float], query: int, mean: float, threshold: float, what: str) -> str:
    """Caption of a card: which query it shows, and whether it contradicts the chapter's number.

    Args:
        values: What the chapter measures, for each query.
        query: The one that is shown.
        mean: What the chapter reports.
        threshold: On which side of it the number lies is the finding.
        what: What is measured, in words.
    """
    of = f"Shown is the median one of {len(values)} queries" if query == median_query(values) else "Shown is one query"
    told = f"{of}: {what} is {number(values[query])} here, {number(mean)} over all."
    if (values[query] > threshold) != (mean > threshold):
        told += " It contradicts the number: what it shows is not what most of the evidence says."
    return told
