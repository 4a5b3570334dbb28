"""Matrix products and eigendecompositions by the fastest of the libraries that a CPU process has: MKL and oneDNN of torch's own,
OpenBLAS of numpy's and scipy's.

On x86 processors that are not Intel's, MKL uses half of AVX-512's width. oneDNN's float32 products of a million
multiplications and more need about .45 of its time, OpenBLAS's float64 eigendecompositions .5 (measured on an AMD EPYC 9004,
one thread). Everywhere else, and on a GPU, torch is asked as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

ONEDNN = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # whose precision says which library multiplies
SMALL = 1 << 20  # multiplications: below, oneDNN takes longer to begin than it saves
LARGE = 5_000_000  # weights: what takes longer by oneDNN no longer matters beside what does not
SHORT = 256  # tokens: of more, attention's weights, [T, T] a head, are no longer little beside what else a pass keeps


def products_of(model: nn.Module) -> torch.dtype:
    """The dtype in which products of the model's own activations and gradients lose nothing: half precision's are summed in
    float32 by a GPU, float32's on a CPU."""
    own = next(model.parameters())
    return own.dtype if own.is_cuda or own.dtype == torch.float64 else torch.float32


def matmul(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """x @ y.

    Args:
        x: [..., n, k]; asks for no gradient. In half precision on a GPU, where `out` is float32, a matrix.
        y: [..., k, m], likewise; leading dimensions as x or none.
        out: [..., n, m], whose rows may lie apart.

    Returns:
        `out`, or a new tensor.
    """
    if out is not None and x.dtype != out.dtype:
        return torch.mm(x, y, out_dtype=out.dtype, out=out)
    with by_onednn(x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() * y.shape[-1] >= SMALL):
        return torch.matmul(x, y, out=out)


@contextmanager
def by_onednn(wanted: bool = True) -> Iterator[None]:
    """Let torch's own float32 products on a CPU be oneDNN's inside, where that is faster and as exact; elsewhere, and unless
    `wanted`, nothing changes."""
    if not wanted or not _onednn_is_faster() or ONEDNN.fp32_precision not in ("none", "ieee"):
        yield
        return
    before = ONEDNN.fp32_precision
    ONEDNN.fp32_precision = "bf16"  # the one way to ask; `_onednn_is_faster` has seen that float32 it remains
    try:
        yield
    finally:
        ONEDNN.fp32_precision = before


@contextmanager
def attention(tokens: int) -> Iterator[None]:
    """Within `by_onednn`, let torch's attention to so many tokens be whole products and a softmax, if they are few: of its fused
    kernel's many tiny products each takes oneDNN several times what it takes MKL."""
    if ONEDNN.fp32_precision != "bf16" or tokens > SHORT:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def is_large(model: nn.Module) -> bool:
    """Whether the model's own passes are faster by oneDNN too."""
    return sum(parameter.numel() for parameter in model.parameters()) >= LARGE


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
def _mkl_is_slow() -> bool:
    try:
        processor = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return torch.backends.mkl.is_available() and "GenuineIntel" not in processor


@cache
def _openblas_is_faster() -> bool:
    return _mkl_is_slow() and "openblas" in np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]


@cache
def _onednn_is_faster() -> bool:
    """Where MKL is slow and oneDNN, allowed to round to bfloat16, does not: without a unit for that it has no use for it, and
    keeps to its float32 kernels."""
    if not (_mkl_is_slow() and torch.backends.mkldnn.is_available()):
        return False
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = x.double() @ y.double()
    before, ONEDNN.fp32_precision = ONEDNN.fp32_precision, "bf16"
    try:
        found = (x @ y, x.T.contiguous().T @ y, (x[None] @ y[None])[0])
    finally:
        ONEDNN.fp32_precision = before
    return all(float((each - exact).norm() / exact.norm()) < 2e-6 for each in found)


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
