"""The Ladder world."""

from __future__ import annotations

from pathlib import Path

from influence_kit.corpora.worlds.ladder import Ladder, build
from influence_kit.findings.stages import tuples


def ladder(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Generate the Ladder world."""
    build(Ladder(**tuples(parameters))).save(out)
