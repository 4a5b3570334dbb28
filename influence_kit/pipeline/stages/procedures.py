"""The Procedures world."""

from __future__ import annotations

from pathlib import Path

from influence_kit.corpora.procedures import Procedures, build
from influence_kit.pipeline.stages import tuples


def procedures(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Generate the Procedures world."""
    build(Procedures(**tuples(parameters))).save(out)
