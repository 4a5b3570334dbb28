"""What a killed pass over a corpus goes on from: tensors in a folder, named for what they belong to."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from .processes import rank_and_size
from .sequences import count, gather
from .shelf import bytes_of

SAVE_SECONDS = 60  # between two savings of sums that grow
WITNESSES = 64  # sequences whose tokens enter the key, evenly spaced


def digest(*parts: object) -> str:
    """A name of 16 hex digits for models (their weights), tensors and whatever JSON holds."""
    found = hashlib.sha256()
    for part in parts:
        for name, tensor in part.state_dict().items() if isinstance(part, nn.Module) else [("", part)]:
            if not isinstance(tensor, Tensor):
                found.update(json.dumps(tensor, sort_keys=True).encode())
                continue
            found.update(f"{name} {tuple(tensor.shape)}".encode())
            if not tensor.is_meta:
                found.update(bytes_of(tensor))
    return found.hexdigest()[:16]


def witnesses(sequences: Mapping[str, Tensor]) -> Iterable[object]:
    """What tells one corpus from another in a digest: the number of sequences and 64 evenly spaced ones. Reading all of a
    large corpus takes longer than a name is worth."""
    total = count(sequences)
    chosen = gather(sequences, sorted({i * total // WITNESSES for i in range(WITNESSES)})) if total else {}
    return [total, *chosen.values()]


class State:
    """Files `<name>.safetensors` in a folder, each with the key it belongs to; without a folder nothing is kept."""

    def __init__(self, folder: str | os.PathLike | None, key: str) -> None:
        self.folder, self.key = None if folder is None else Path(folder), key
        self._written: set[Path] = set()
        self._last = time.monotonic()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, name: str) -> dict[str, Tensor] | None:
        """What was saved under this name and key; None if nothing whole was."""
        from safetensors import SafetensorError, safe_open

        if self.folder is None or not (path := self._path(name)).exists():
            return None
        try:
            with safe_open(str(path), "pt") as file:
                if (file.metadata() or {}).get("key") != self.key:
                    return None
                found = {each: file.get_tensor(each) for each in file.keys()}
        except SafetensorError:
            return None
        self._written.add(path)
        return found

    def due(self) -> bool:
        """Whether it is time to save sums that grow."""
        return self.folder is not None and time.monotonic() - self._last > SAVE_SECONDS

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write or replace a file; a kill leaves the one before."""
        from safetensors.torch import save_file

        if self.folder is None:
            return
        path = self._path(name)
        part = path.with_suffix(f".{rank_and_size()[0]}.part")
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, part, metadata={"key": self.key})
        os.replace(part, path)
        self._written.add(path)
        self._last = time.monotonic()

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
