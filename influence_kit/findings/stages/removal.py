"""Worlds from which something is removed in place, one function a removal: `without: translations` in a profile's arm."""

from __future__ import annotations

from pathlib import Path

from influence_kit.corpora.world import World
from influence_kit.corpora.worlds import removal


def translations(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Atlas: replace what the second language says of half of the facts that both languages state."""
    removal.without_translations(World.load(inputs["world"]), parameters["seed"]).save(out)


def copies(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Atlas: replace the copies of half of the canaries."""
    removal.without_copies(World.load(inputs["world"]), parameters["seed"]).save(out)


def procedure(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Procedures: replace texts of half of the procedures, but for those under half of the names."""
    removal.without_procedure(World.load(inputs["world"]), parameters["seed"]).save(out)


def names(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Procedures: replace texts with half of the names, but for those of half of the procedures."""
    removal.without_names(World.load(inputs["world"]), parameters["seed"]).save(out)
