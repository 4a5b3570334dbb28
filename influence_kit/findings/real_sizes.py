"""Families of language models that others trained, side by side: what of chapter 12's findings changes with a model's size."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from influence_kit import hub
from influence_kit.findings.a_real_language_model import (
    LANGUAGES,
    SHOWN,
    Reading,
    kept,
    middle,
    over_facts,
    planted,
    sentences,
    translations,
)
from influence_kit.measures.intervals import Estimate, pick

if TYPE_CHECKING:
    import pandas

    from influence_kit.findings.chapter import Chapter
    from influence_kit.reading.saved import SavedFigure

TURNED, ABROAD, ALL = SHOWN["flipped"], "all other languages", "all prompts"
KEPT, FOUND, THEME = "share of a fact that is left", "AUC of a paragraph's English", "AUC of passages on the theme"

# What is drawn: quantity, of what -> the figure's name and question.
DRAWN = {
    (KEPT, TURNED): ("12_size_word_order", "Does a larger model keep more of a fact that is turned round?"),
    (FOUND, ABROAD): ("12_size_languages", "Does influence cross languages in larger models?"),
    (THEME, ALL): ("12_size_themes", "Does the theme count for more in larger models?"),
}


def by_size(runs: Sequence[Reading]) -> pandas.DataFrame:
    """A row a model and number of the chapter: model, family, parameters (all weights), quantity, of (a group of sentences, a language, or
    all prompts), and the estimate with its interval over facts, paragraphs or prompts."""
    import pandas

    rows = []
    for run in runs:
        made = run.planned.made
        folder = run.folder("weights") if "weights" in made else Path(made["factors"].parameters["source"])
        about = {"model": run.name, "family": family(run.name), "parameters": hub.describe(folder)["weights"]}
        rows += [estimate.row(**about, quantity=quantity, of=of) for quantity, of, estimate in _numbers(run)]
    return pandas.DataFrame(rows).drop(columns="seed_0").sort_values(["family", "parameters"], kind="stable")


def family(name: str) -> str:
    """What the models of a family share of their names: SmolLM2-135M and SmolLM2-1.7B are SmolLM2."""
    return re.split(r"[-_ ](?=\d)", name)[0]


def drawn(chapter: Chapter, table: pandas.DataFrame) -> Iterator[SavedFigure]:
    """Figures of a table of `by_size`, against the number of weights."""
    from influence_kit.reading import figures

    for (quantity, of), (name, title) in DRAWN.items():
        if len(part := pick(table, quantity=quantity, of=of)):
            axes = {"xlabel": "weights", "ylabel": f"{quantity} ({of})"}
            told = figures.describe(part, "estimate", what=f"{quantity}, {of}", by="family", x="parameters")
            yield chapter.figure(figures.estimate_points(part, hue="family", title=title, **axes), name, part, told)


def on_sizes(table: pandas.DataFrame) -> str:
    """What changes from the smallest to the largest model of each family, in words."""
    lines = []
    for (quantity, of), _ in DRAWN.items():
        for name, part in pick(table, quantity=quantity, of=of).groupby("family", sort=False):
            ends = [part.iloc[place] for place in sorted({0, len(part) - 1})]
            told = " to ".join(f"{end['estimate']:.2f} [{end['low']:.2f}, {end['high']:.2f}]" for end in ends)
            sizes = " to ".join(f"{end['parameters'] / 1e6:,.0f}" for end in ends)
            lines.append(f"- {name}, {sizes} million weights: {quantity} ({of}) {told}.")
    return "\n".join(lines)


def _numbers(run: Reading) -> Iterator[tuple[str, str, Estimate]]:
    real = kept(pick(sentences(run), nonsense=False))
    for group in ("reworded", "flipped", "answer_only"):
        yield KEPT, SHOWN[group], middle(real[group])
    if "languages" in run.planned.made:
        found = translations(run)
        yield FOUND, ABROAD, over_facts(found["auc"], bounds=(0, 1))
        for language, part in found.groupby("language", sort=False):
            yield FOUND, LANGUAGES.get(language, language), over_facts(part["auc"], bounds=(0, 1))
    themes = pick(planted(run), by="influence", group="on_theme")
    if len(themes):
        yield THEME, ALL, over_facts(themes["auc"], bounds=(0, 1))
