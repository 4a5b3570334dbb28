"""Products and eigendecompositions are the same whichever library makes them."""

import pytest
import torch

from influence_kit.engine import blas
from influence_kit.engine.shelf import Buffers


@pytest.mark.parametrize("openblas", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_torchs_for_batches_transposes_and_rows_that_lie_apart(openblas, dtype, monkeypatch):
    monkeypatch.setattr(blas, "_openblas_is_faster", lambda: openblas)
    x, y = torch.randn(3, 40, 24, dtype=dtype), torch.randn(3, 40, 33, dtype=dtype)
    for left, right in ((x.mT, y), (x[0].T, y[0]), (x[:, :, 3:9].mT, y)):
        expected = left @ right
        out = Buffers()("out", tuple(expected.shape), expected)
        assert not out.is_contiguous()  # 33 columns in rows of 48
        assert blas.matmul(left, right, out) is out
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("openblas", [True, False])
def test_eigenvectors_diagonalise_what_the_lower_triangle_says(openblas, monkeypatch):
    monkeypatch.setattr(blas, "_openblas_is_faster", lambda: openblas)
    matrix = torch.randn(50, 80, dtype=torch.float64)
    matrix = matrix @ matrix.T
    values, vectors = blas.eigh(matrix.tril())
    assert bool((values.diff() >= 0).all())
    torch.testing.assert_close(vectors @ values.diag() @ vectors.T, matrix)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(50, dtype=torch.float64))


def test_openblas_uses_as_many_threads_as_torch(monkeypatch):
    from threadpoolctl import threadpool_info

    monkeypatch.setattr(blas, "_openblas_is_faster", lambda: True)
    monkeypatch.setattr(blas, "_threads", 0)
    x = torch.randn(4, 4)
    blas.matmul(x, x, torch.empty(4, 4))
    counts = {found["num_threads"] for found in threadpool_info() if found["internal_api"] == "openblas"}
    assert counts == {torch.get_num_threads()}
