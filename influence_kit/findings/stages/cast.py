"""The Cast world."""

from __future__ import annotations

from pathlib import Path

from influence_kit.corpora.worlds.cast import Cast, build
from influence_kit.findings.stages import tuples


def cast(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Generate the Cast world."""
    build(Cast(**tuples(parameters))).save(out)
