"""Matrix products and eigendecompositions on the faster of the two BLAS libraries that a CPU process has.

torch brings MKL, numpy and scipy bring OpenBLAS. On x86 processors that are not Intel's, OpenBLAS needs about .88 of MKL's
time for float32 products of a thousand rows and .5 for a float64 eigendecomposition (measured on an AMD EPYC 9004, one
thread). Everywhere else, and on a GPU, torch is asked.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def matmul(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """x @ y into `out`, whose rows may lie apart. Tensors that ask for no gradient; leading dimensions alike."""
    if not _by_openblas(x):
        return torch.matmul(x, y, out=out)
    np.matmul(x.numpy(), y.numpy(), out=out.numpy())
    return out


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [m], ascending, and eigenvectors [m, m] as columns of a symmetric matrix given by its lower triangle,
    which may be used up."""
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
