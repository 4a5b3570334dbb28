"""Several processes, one result: which batches a rank reads, and how the ranks' parts become whole.

Start a script with `torchrun --nproc-per-node R script.py`, call `torch.distributed.init_process_group("gloo")` (or
"nccl") in it, and then the same functions as with one process: every rank reads every R-th batch and all return the
whole result. Without a process group everything here does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as distributed
from torch import Tensor


def rank_and_size() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def shard(items: list) -> list:
    """This rank's items: every R-th, beginning with the rank's own number."""
    rank, size = rank_and_size()
    return items[rank::size]


def all_reduce(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the ranks, in place. All ranks must hold the same shapes in the same order."""
    if rank_and_size()[1] == 1:
        return
    device = communication_device()
    for tensor in tensors:
        moved = tensor.to(device)
        distributed.all_reduce(moved)
        if moved is not tensor:
            tensor.copy_(moved)


def broadcast(tensor: Tensor, owner: int) -> None:
    """Replace the tensor by the owner's, in place."""
    if rank_and_size()[1] == 1:
        return
    moved = tensor.to(communication_device()).contiguous()
    distributed.broadcast(moved, owner)
    tensor.copy_(moved)


def all_gather(tensor: Tensor) -> Tensor:
    """[R, ...]: the tensors of all ranks, which must have one shape, in the order of ranks."""
    _, size = rank_and_size()
    if size == 1:
        return tensor[None]
    moved = tensor.to(communication_device()).contiguous()
    parts = [torch.empty_like(moved) for _ in range(size)]
    distributed.all_gather(parts, moved)
    return torch.stack(parts).to(tensor.device)


def barrier() -> None:
    """Until all ranks have come here."""
    if rank_and_size()[1] > 1:
        all_reduce([torch.zeros(1)])


def communication_device() -> torch.device:
    """Where tensors must lie to travel between ranks: the GPU under NCCL, else the CPU."""
    nccl = distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
