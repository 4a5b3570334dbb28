"""Matrix products and eigendecompositions on the faster of the two BLAS libraries that a CPU process has.

torch brings MKL, numpy and scipy bring OpenBLAS. On x86 processors that are not Intel's, OpenBLAS needs about .88 of MKL's
time for float32 products of a thousand rows and .5 for a float64 eigendecomposition (measured on an AMD EPYC 9004, one
thread). With several threads products are torch's there too: each library's threads spin for a while after their work and keep
the other's waiting, so that small products in turn with torch's sums took seven times as long (SmolLM2 135M, two threads).
Everywhere else, and on a GPU, torch is asked.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def products_of(model: nn.Module) -> torch.dtype:
    """The dtype in which products of the model's own activations and gradients lose nothing: half precision's are summed in
    float32 by a GPU, float32's on a CPU."""
    own = next(model.parameters())
    return own.dtype if own.is_cuda or own.dtype == torch.float64 else torch.float32


def matmul(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """x @ y.

    Args:
        x: [..., n, k]; asks for no gradient. In half precision on a GPU, where `out` is float32, a matrix.
        y: [..., k, m], likewise; leading dimensions as x.
        out: [..., n, m], whose rows may lie apart.

    Returns:
        `out`.
    """
    if x.dtype != out.dtype:
        return torch.mm(x, y, out_dtype=out.dtype, out=out)
    if torch.get_num_threads() > 1 or not _by_openblas(x):
        return torch.matmul(x, y, out=out)
    np.matmul(x.numpy(), y.numpy(), out=out.numpy())
    return out


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Of a symmetric matrix given by its lower triangle, which may be used up.

    On a GPU float64 is no slower than float32, and neither batches nor several streams are faster: .06 s for 3,072 on an H200
    (`tests/benchmarks/gpu.py`, step eigh).

    Args:
        matrix: [m, m].

    Returns:
        Eigenvalues [m], ascending, and eigenvectors [m, m] as columns.
    """
    if not _by_openblas(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    from scipy.linalg import eigh

    values, vectors = eigh(matrix.numpy(), driver="evd", overwrite_a=True, check_finite=False)
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _by_openblas(x: Tensor) -> bool:
    if x.device.type != "cpu" or not _openblas_is_faster():
        return False
    _follow(torch.get_num_threads())
    return True


@cache
def _openblas_is_faster() -> bool:
    name = np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return torch.backends.mkl.is_available() and "openblas" in name and "GenuineIntel" not in processor


_threads = 0


def _follow(threads: int) -> None:
    """Let OpenBLAS use as many threads as torch does."""
    global _threads
    if threads == _threads:
        return
    import scipy.linalg  # noqa: F401 its library must be loaded to be told
    from threadpoolctl import threadpool_limits

    threadpool_limits(threads, user_api="blas")
    _threads = threads
