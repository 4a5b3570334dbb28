"""The Atlas world."""

from __future__ import annotations

from pathlib import Path

from influence_kit.corpora.worlds.atlas import Atlas, build
from influence_kit.findings.stages import tuples


def atlas(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Generate the Atlas world."""
    build(Atlas(**tuples(parameters))).save(out)
