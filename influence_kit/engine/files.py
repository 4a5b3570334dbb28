"""Files that appear whole or not at all, tensors on disk that know their own checksum, and names for content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from .shelf import bytes_of

KEY = "influence_kit"  # of the metadata in safetensors files


@contextmanager
def whole(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write to that takes the place of `path` at the end: a reader sees the old file or the new, never half."""
    part = Path(f"{os.fspath(path)}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*parts: object) -> str:
    """A name of 16 hex digits for models (their weights), tensors, mappings of tensors and whatever JSON holds."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, nn.Module):
            tensors = _weights(part)
        elif isinstance(part, Tensor):
            tensors = iter([("", part)])
        elif isinstance(part, Mapping) and any(isinstance(each, Tensor) for each in part.values()):
            tensors = iter(sorted(part.items()))
        else:
            found.update(json.dumps(part, sort_keys=True).encode())
            continue
        for name, tensor in tensors:
            if isinstance(tensor, Tensor):
                found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(bytes_of(tensor))
            else:  # what a module keeps in its state beside tensors
                found.update(f"{name} {tensor!r}".encode())
    return found.hexdigest()[:16]


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Named weights and persistent buffers, those included that `accelerate` keeps elsewhere, one at a time."""
    for name, tensor in model.state_dict().items():
        if getattr(tensor, "is_meta", False):
            owner, _, own = name.rpartition(".")
            kept = getattr(getattr(model.get_submodule(owner), "_hf_hook", None), "weights_map", None)
            if kept is None:
                raise ValueError(
                    f"weight {name!r} holds no numbers (it is on torch's meta device): load the model first"
                )
            tensor = kept[own]
        yield name, tensor


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], about: dict) -> None:
    """Write one safetensors file with `about` (JSON) and a checksum of both; the same content gives the same bytes."""
    from safetensors.torch import save_file

    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    content = json.dumps({"about": about, "checksum": digest(about, tensors)}, sort_keys=True)
    with whole(path) as part:
        save_file(tensors, part, metadata={KEY: content})


def load_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """Tensors and `about`, as `save_tensors` wrote them.

    Raises:
        ValueError: The file was written by something else, or is not what was written.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            content = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): make it again") from error
    try:
        content = json.loads(content or "")
        about, checksum = content["about"], content["checksum"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} was not written by this program, or before it wrote checksums: make it again"
        ) from error
    if digest(about, tensors) != checksum:
        raise ValueError(f"{path} is damaged (its content does not match its checksum): make it again")
    return tensors, about
