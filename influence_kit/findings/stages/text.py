"""Real text: fetched or read once, then cut into a world of parallel paragraphs."""

from __future__ import annotations

from pathlib import Path

from influence_kit.corpora.texts.parallel import ParallelText, build
from influence_kit.corpora.texts.realtext import cache_text, load_text, read_text
from influence_kit.findings.stages import tuples


def text(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Fetch or read real text once: text.parquet and manifest.json."""
    downloads = out / "resume"
    downloads.mkdir(parents=True, exist_ok=True)
    table, manifest = read_text(parameters["source"], parameters["languages"], parameters["folder"] or downloads)
    cache_text(table, manifest, out)


def parallel(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Make the world of parallel paragraphs from the text."""
    build(ParallelText(**tuples(parameters)), load_text(inputs["text"])[0]).save(out)
