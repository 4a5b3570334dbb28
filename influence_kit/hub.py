"""Models of a hub as they were at one commit, which their name alone does not say: NAME@COMMIT, fetched once into a folder."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

from influence_kit.errors import UserError, first_line
from influence_kit.weights import check_terms

PINNED = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)@(?P<commit>[0-9a-f]{40})")
# Configuration, tokenizer, weights and what its makers say of it, and these alone: nothing that is unpickled or run.
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]
LICENCE = re.compile(r"^license:\s*(\S+)\s*$", re.MULTILINE)


def is_pinned(source: str) -> bool:
    """Whether a model is named as NAME@COMMIT."""
    return PINNED.fullmatch(source) is not None


def short_name(source: str) -> str:
    """A model's name as a person reads it: no path, seven digits of a commit."""
    return Path(source[:-33] if is_pinned(source) else source).name


def hub_source(source: str, terms: str = "") -> str:
    """The source as a stage takes it: NAME@COMMIT.

    Args:
        source: A hub's model.
        terms: Name of the terms that are accepted, where the licence is no open one.

    Raises:
        UserError: No commit, terms not accepted.
    """
    if not is_pinned(source):
        raise UserError(
            f"model={source!r} names no commit, and what a hub has under a name may change: write "
            f"{source.partition('@')[0]}@COMMIT with its 40 hexadecimal digits (the hub shows them under Files, History), or give a folder"
        )
    check_terms(source, source, terms)
    return source


def fetch(source: str, folder: Path) -> None:
    """Write a hub's model and tokenizer to a folder; what was fetched before an interrupt is not fetched again.

    Args:
        source: NAME@COMMIT.
        folder: Where to write.

    Raises:
        UserError: No connection, no such name or commit, no weights in safetensors.
    """
    import huggingface_hub

    found = PINNED.fullmatch(source)
    if found is None:
        raise ValueError(f"{source!r} is not NAME@COMMIT")
    asked = {"revision": found["commit"], "allow_patterns": WANTED, "ignore_patterns": "*/*"}
    try:
        huggingface_hub.snapshot_download(found["name"], local_dir=folder, **asked)  # type: ignore[arg-type]
    except Exception as error:  # no common base: of the network, of the hub's answer, of its settings
        raise UserError(
            f"model={source!r} could not be fetched: {first_line(error)} (run on a machine with internet, or give the path of a folder)"
        ) from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # what the client notes about a download
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"model={source!r} has no weights in safetensors at this commit: choose a later one")


def describe(folder: Path) -> dict[str, Any]:
    """What a folder's files say of a model: number of its weights and their types, and the license where its README names one."""
    from safetensors import safe_open

    parts = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            parts += [file.get_slice(name) for name in file.keys()]
    about: dict[str, Any] = {"weights": sum(math.prod(part.get_shape()) for part in parts)}
    about["types"] = sorted({part.get_dtype() for part in parts})
    card = folder / "README.md"
    told = LICENCE.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    return about | ({"license": told[1]} if told else {})
