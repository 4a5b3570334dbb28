"""Files that appear whole or not at all, their hashes, and the room that a disk has left."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to that takes the place of `path` at the end: a reader sees the old file or the new, never half.

    What a killed writer leaves is written over by the next one, so one process at a time may write a path.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all; text as UTF-8."""
    with whole(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def working_folder() -> Path:
    """Where the user stands: what paths that they give start from. A run computes elsewhere and says by INFLUENCE_KIT_CWD."""
    return Path(os.environ.get("INFLUENCE_KIT_CWD") or Path.cwd())


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is, or will be once it is made."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return shutil.disk_usage(existing).free
