"""Atlas without the translations of half of its facts."""

from __future__ import annotations

from pathlib import Path

from influence_kit.corpora.removal import without_translations
from influence_kit.corpora.world import World


def translations(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Replace what the second language says of half of the facts that both languages state."""
    without_translations(World.load(inputs["world"]), parameters["seed"]).save(out)
