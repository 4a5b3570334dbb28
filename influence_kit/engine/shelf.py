"""Memory that is asked for once: buffers used again for every batch, and tensors kept between passes."""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import tempfile
from collections.abc import Iterable
from typing import BinaryIO

import torch
from torch import Tensor

ALIGNED = 16  # float32 numbers in a cache line


class Buffers:
    """Scratch tensors by name. On a CPU, asking the system for fresh pages costs as much as a small product does."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of this shape in aligned rows, with the dtype and device of `like`; valid until asked for
        again."""
        wide = (*shape[:-1], aligned_width(shape[-1]))
        needed, kept = math.prod(wide), self._kept.get(name)
        if kept is None or kept.numel() < needed or kept.dtype != like.dtype or kept.device != like.device:
            kept = self._kept[name] = torch.empty(needed, dtype=like.dtype, device=like.device)
        return kept[:needed].view(wide)[..., : shape[-1]]


def aligned_width(width: int) -> int:
    """The next multiple of 16. A product whose rows do not begin on cache lines (a bias makes M' odd) takes 1.4 times as long."""
    return -(-width // ALIGNED) * ALIGNED


def aligned(matrix: Tensor) -> Tensor:
    """The same matrix in rows that begin on cache lines; itself if they do."""
    if matrix.stride(1) == 1 and matrix.stride(0) % ALIGNED == 0:
        return matrix
    place = matrix.new_zeros(len(matrix), aligned_width(matrix.shape[1]))[:, : matrix.shape[1]]
    return place.copy_(matrix)


class Shelf:
    """Tensors kept by name: in memory while `memory` bytes last, then in one temporary file of up to `disk` bytes.

    The file has no name and vanishes with the process.
    """

    def __init__(self, memory: float, disk: float = 0) -> None:
        self.memory, self.disk = float(memory), float(disk)
        self._kept: dict[str, Tensor] = {}
        # Offset in the file, dtype and shape as a meta tensor, device.
        self._filed: dict[str, tuple[int, Tensor, torch.device]] = {}
        self._file: BinaryIO | None = None
        self._end = 0

    def fits(self, tensors: Iterable[Tensor]) -> bool:
        """Whether there is room for all of these, in the order given."""
        memory, disk = self.memory, self.disk
        for tensor in tensors:
            if tensor.nbytes <= memory:
                memory -= tensor.nbytes
            elif tensor.nbytes <= disk:
                disk -= tensor.nbytes
            else:
                return False
        return True

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep the tensor. Raises MemoryError if neither budget has room for it."""
        if tensor.nbytes <= self.memory:
            self.memory -= tensor.nbytes
            self._kept[name] = tensor
            return
        if tensor.nbytes > self.disk:
            raise MemoryError(
                f"no room for {name}: {tensor.nbytes / 1e9:.1f} GB, {self.disk / 1e9:.1f} GB of disk left"
            )
        self.disk -= tensor.nbytes
        if self._file is None:
            self._file = tempfile.TemporaryFile()
        self._file.seek(self._end)
        self._file.write(bytes_of(tensor))
        self._filed[name] = (self._end, tensor.detach().to("meta"), tensor.device)
        self._end += tensor.nbytes

    def __contains__(self, name: str) -> bool:
        return name in self._kept or name in self._filed

    def get(self, name: str, buffers: Buffers) -> Tensor:
        """The tensor; one from the file is read into the buffer of its name's last part."""
        if name in self._kept:
            return self._kept[name]
        offset, about, device = self._filed[name]
        tag, like = f"shelf {name.rpartition('/')[2]}", torch.empty(0, dtype=about.dtype)
        tensor = buffers(tag, (aligned_width(about.numel()),), like)[: about.numel()].view(about.shape)
        assert self._file is not None
        self._file.seek(offset)
        self._file.readinto(bytes_of(tensor))  # type: ignore[attr-defined]
        return tensor.to(device)


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's numbers in row order: its own memory where it lies so on the CPU, else a copy's."""
    return memoryview(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def release_freed() -> None:
    """Let the system have what was freed. glibc keeps tensors of less than 32 MB for itself, gigabytes after a fit."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def free_disk() -> int:
    """Bytes that this process's temporary files may take: half of what is free, shared with torchrun's other processes here."""
    return shutil.disk_usage(tempfile.gettempdir()).free // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
