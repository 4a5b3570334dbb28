"""Products and eigendecompositions are the same whichever library makes them."""

import pytest
import torch

from influence_kit.engine import blas
from influence_kit.engine.gradients import frozen
from influence_kit.engine.shelf import Buffers


@pytest.fixture(params=[True, False])
def onednn(request, monkeypatch):
    """As far as this processor has it: elsewhere torch ignores what it is asked."""
    if request.param and not blas._onednn_is_faster():
        pytest.skip("oneDNN's float32 products are not the faster ones of this processor, or not as exact")
    monkeypatch.setattr(blas, "_onednn_is_faster", lambda: request.param)
    monkeypatch.setattr(blas, "SMALL", 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_torchs_for_batches_transposes_and_rows_that_lie_apart(onednn, dtype):
    x, y = torch.randn(3, 40, 24, dtype=dtype), torch.randn(3, 40, 33, dtype=dtype)
    for left, right in ((x.mT, y), (x[0].T, y[0]), (x[:, :, 3:9].mT, y), (x[0].T, y)):
        expected = (left.double() @ right.double()).to(dtype)
        out = Buffers()("out", tuple(expected.shape), expected)
        assert not out.is_contiguous()  # 33 columns in rows of 48
        assert blas.matmul(left, right, out) is out
        for found in (out, blas.matmul(left, right)):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_products_are_the_same_bit_for_bit_each_time(onednn):
    x, y = torch.randn(300, 200), torch.randn(200, 100)
    first = blas.matmul(x, y)
    assert all(torch.equal(blas.matmul(x, y), first) for _ in range(3))


def test_only_a_large_model_s_passes_are_by_onednn_and_torch_is_left_as_it_was(monkeypatch):
    monkeypatch.setattr(blas, "_onednn_is_faster", lambda: True)
    before, model = blas.ONEDNN.fp32_precision, torch.nn.Linear(30, 20)
    with frozen(model):
        assert blas.ONEDNN.fp32_precision == before
    monkeypatch.setattr(blas, "LARGE", 600)
    with frozen(model):
        assert blas.ONEDNN.fp32_precision == "bf16"
        with blas.by_onednn():
            pass
        assert blas.ONEDNN.fp32_precision == "bf16"
    with pytest.raises(ZeroDivisionError), blas.by_onednn():
        _ = 1 / 0
    assert blas.ONEDNN.fp32_precision == before


def test_short_attention_within_onednn_is_whole_products_with_the_same_gradients(monkeypatch):
    monkeypatch.setattr(blas, "_onednn_is_faster", lambda: True)
    q, k, v = (torch.randn(2, 3, 20, 8, requires_grad=True) for _ in range(3))

    def kind_and_gradients(tokens):
        with blas.attention(tokens):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.grad_fn.name(), torch.autograd.grad(out.square().sum(), (q, k, v))

    fused, expected = kind_and_gradients(20)
    with blas.by_onednn():
        name, found = kind_and_gradients(20)
        long, _ = kind_and_gradients(blas.SHORT + 1)
    assert "Flash" in fused and long == fused != name
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(found, expected, strict=True))
    assert kind_and_gradients(20)[0] == fused


def test_where_rounding_would_be_made_use_of_nothing_is_asked_for(monkeypatch):
    monkeypatch.setattr(blas, "_mkl_is_slow", lambda: True)
    blas._onednn_is_faster.cache_clear()
    rounded = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor,
        "__matmul__",
        lambda x, y: rounded(x, y) if x.dtype == torch.float64 else rounded(x.bfloat16(), y.bfloat16()).float(),
    )
    try:
        assert not blas._onednn_is_faster()
    finally:
        blas._onednn_is_faster.cache_clear()


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
    blas.eigh(torch.eye(4, dtype=torch.float64))
    counts = {found["num_threads"] for found in threadpool_info() if found["internal_api"] == "openblas"}
    assert counts == {torch.get_num_threads()}
