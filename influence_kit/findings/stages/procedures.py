"""The Procedures world."""

from __future__ import annotations

from pathlib import Path

from influence_kit.corpora.worlds.procedures import Procedures, build
from influence_kit.findings.stages import tuples


def procedures(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Generate the Procedures world."""
    build(Procedures(**tuples(parameters))).save(out)
