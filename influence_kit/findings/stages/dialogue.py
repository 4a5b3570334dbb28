"""Spoken lines: fetched or read once, then cut into a world of dialogue."""

from __future__ import annotations

from pathlib import Path

from influence_kit.corpora.texts.dialogue import Dialogue, build
from influence_kit.corpora.texts.realtext import cache_text, describe, load_text
from influence_kit.corpora.texts.wesnoth import campaign_lines
from influence_kit.findings.stages import tuples


def lines(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Fetch or read the campaigns' lines once: text.parquet and manifest.json."""
    downloads = out / "resume"
    downloads.mkdir(parents=True, exist_ok=True)
    download = parameters["source"] == "wesnoth"
    folder = downloads if download else Path(parameters["folder"])
    table = campaign_lines(parameters["campaigns"], folder, download)
    cache_text(table, describe(table), out)


def dialogue(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Make the world of dialogue from the lines."""
    build(Dialogue(**tuples(parameters)), load_text(inputs["text"])[0]).save(out)
