"""The Deep world."""

from __future__ import annotations

from pathlib import Path

from influence_kit.corpora.worlds.deep import Deep, build
from influence_kit.findings.stages import tuples


def deep(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Generate the Deep world."""
    build(Deep(**tuples(parameters))).save(out)
