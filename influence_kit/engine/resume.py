"""What a killed pass over a corpus goes on from: tensors in a folder, named for what they belong to."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from .files import load_tensors, save_tensors
from .processes import rank_and_size

SAVE_SECONDS = 60  # between two savings of sums that grow
QUICK = 2  # seconds that a saving may take; after one that took longer, as many times longer passes until the next


class State:
    """Files `<name>.safetensors` in a folder, each with the key it belongs to; without a folder nothing is kept."""

    def __init__(self, folder: str | os.PathLike | None, key: str) -> None:
        """
        Args:
            folder: One that all processes see, or None.
            key: A digest of all that the numbers rest on.
        """
        self.folder, self.key = None if folder is None else Path(folder), key
        self._written: set[Path] = set()
        self._last, self._took = time.monotonic(), 0.0
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, name: str, rows: str = "") -> dict[str, Tensor] | None:
        """What was saved under this name and key; None if nothing whole was.

        Args:
            name: The file's.
            rows: A digest of the sequences that this file alone rests on, where the key leaves them out.
        """
        if self.folder is None or not (path := self._path(name)).exists():
            return None
        try:
            found, about = load_tensors(path)
        except ValueError:
            return None
        if about != {"key": self.key, "rows": rows}:
            return None
        self._written.add(path)
        return found

    def due(self) -> bool:
        """Whether it is time to save sums that grow."""
        wait = SAVE_SECONDS * max(1.0, self._took / QUICK)
        return self.folder is not None and time.monotonic() - self._last > wait

    def save(self, name: str, tensors: Mapping[str, Tensor], rows: str = "") -> None:
        """Write or replace a file; a kill leaves the one before."""
        if self.folder is None:
            return
        began = time.monotonic()
        save_tensors(path := self._path(name), tensors, {"key": self.key, "rows": rows})
        self._written.add(path)
        self._last = time.monotonic()
        self._took = self._last - began

    def forget(self) -> None:
        """Delete the files that were written or read here."""
        for path in self._written:
            path.unlink(missing_ok=True)
        self._written.clear()

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.safetensors"


def by_rank(name: str) -> str:
    """The name of this rank's own part."""
    rank, size = rank_and_size()
    return f"{name}-{rank}-of-{size}"
