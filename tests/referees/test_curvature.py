"""Gauss-Newton products and exact solves against the dense matrix, and LiSSA against both."""

import pytest
import torch
from conftest import ARCHITECTURES, random_sequences, tiny_model
from oracles import exact_scores, gauss_newton, sequence_gradients
from reference import ekfac_scores

from influence_kit import fit_ekfac
from influence_kit.engine.factors import Factors, LayerFactors
from influence_kit.engine.products import GaussNewton, sampled_inverse
from influence_kit.errors import UserError
from influence_kit.referees.curvature import PRODUCT, quality, solve, within_layers
from influence_kit.referees.curvature import dense as dense_of
from influence_kit.referees.lissa import lissa, minibatch, top_eigenvalue

SIZE = {"depth": 1, "vocabulary": 11}


def damped_alike(model, dense, damping=0.1):
    """Factors whose mean eigenvalue in each layer is that of the dense matrix, [D, D]."""
    fitted, start, layers = fit_ekfac(model, random_sequences(4, 6, 11), method="diagonal"), 0, {}
    for name, each in fitted.layers.items():
        size = each.eigenvalues.numel()
        mean = dense[start : start + size, start : start + size].diagonal().mean()
        layers[name] = LayerFactors(None, None, torch.full_like(each.eigenvalues, float(mean)))
        start += size
    return Factors(layers)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request):
    """(model with at most 3,000 tracked weights, data, queries, dense G, curvature)"""
    model = tiny_model(request.param, **SIZE)
    data, queries = random_sequences(4, 6, 11, padded=True), random_sequences(2, 6, 11, seed=5)
    dense = gauss_newton(model, data)
    assert len(dense) <= 3000
    return model, data, queries, dense, GaussNewton(model, damped_alike(model, dense), data)


def test_products_are_those_of_the_dense_matrix(case):
    _, data, _, dense, curvature = case
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(2, len(dense), generator=generator, dtype=torch.float64)
    expected = v @ dense + curvature.damping_of * v
    near = 1e-6 * float(expected.abs().max())  # Llama's norm computes in float32 whatever the model is
    torch.testing.assert_close(curvature.product(v), expected, rtol=1e-6, atol=near)
    some = {name: tensor[[3, 1]] for name, tensor in data.items()}
    small = gauss_newton(case[0], some)
    torch.testing.assert_close(curvature.product(v, [3, 1]), v @ small + curvature.damping_of * v, rtol=1e-6, atol=near)


def test_a_product_leaves_the_model_as_it_was_and_no_hook_behind(case):
    model, _, _queries, dense, curvature = case
    before = [p.requires_grad for p in model.parameters()]
    curvature.product(torch.ones(1, len(dense), dtype=torch.float64))
    assert [p.requires_grad for p in model.parameters()] == before
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_and_scores_are_plain_ones(case):
    model, data, queries, _dense, curvature = case
    plain = torch.cat(list(sequence_gradients(model, queries).values()), 1)
    torch.testing.assert_close(curvature.gradients(queries), plain)
    others = torch.cat(list(sequence_gradients(model, data).values()), 1)
    torch.testing.assert_close(curvature.scores(plain, data, 4), plain @ others.T)


def test_the_exact_solution_is_that_of_a_dense_solve(case):
    model, data, queries, dense, curvature = case
    v = curvature.gradients(queries)
    near = sampled_inverse(curvature, draws=20)
    x, growth, iterations = solve(curvature, v, 1e-12, 2000, near)
    expected = exact_scores(model, data, queries, dense)
    torch.testing.assert_close(curvature.scores(x, data), expected, rtol=1e-2, atol=5e-3 * float(expected.abs().max()))
    assert float(growth.max()) <= 1e-12
    _, growth, few = solve(curvature, v, 1e-12, 3, near)
    assert few == 3 < iterations and float(growth.max()) > 1e-12


def test_quality_is_residual_and_alignment_with_the_dense_solution(case):
    _model, _data, queries, dense, curvature = case
    v = curvature.gradients(queries)
    whole = dense + torch.diag(curvature.damping_of)
    exact = torch.linalg.solve(whole, v.T).T
    for x in (v, exact, 3 * exact, exact + 0.1 * v):
        residual, energy = quality(curvature, x, v)
        torch.testing.assert_close(residual, (v - x @ whole).norm(dim=1) / v.norm(dim=1), rtol=1e-3, atol=1e-4)
        cosine = ((x @ whole) * exact).sum(1) / (((x @ whole) * x).sum(1) * ((exact @ whole) * exact).sum(1)).sqrt()
        torch.testing.assert_close((energy / (v * exact).sum(1)).sqrt(), cosine.abs(), rtol=1e-3, atol=1e-4)


def test_the_sampled_inverse_is_woodbury_s(case):
    """(F + lambda) times the inverse is the identity on F's own construction, and many draws near the dense inverse."""
    _model, _data, queries, dense, curvature = case
    v = curvature.gradients(queries)
    exact = torch.linalg.solve(dense + torch.diag(curvature.damping_of), v.T).T

    def off(draws):
        return float((sampled_inverse(curvature, draws)(v) - exact).norm() / exact.norm())

    assert off(100) < off(3) and off(100) < 0.3


def test_preconditioning_is_ekfac_s_own_solve(case):
    model, data, queries, *_ = case
    factors = fit_ekfac(model, data)
    curvature = GaussNewton(model, factors, data)
    ours = curvature.scores(curvature.precondition(curvature.gradients(queries)), data)
    torch.testing.assert_close(ours, ekfac_scores(model, data, factors.labels, queries), rtol=1e-6, atol=1e-6)
    blocks = GaussNewton(model, fit_ekfac(model, data, blocks=2), data)
    assert not torch.allclose(
        blocks.precondition(blocks.gradients(queries)), curvature.precondition(curvature.gradients(queries))
    )


def test_lissa_converges_to_the_dense_solution_and_shallow_lissa_does_not(case):
    model, data, queries, dense, _ = case
    damping = 50.0  # so that it takes hundreds of steps and not many thousands
    curvature = GaussNewton(model, damped_alike(model, dense), data, damping)
    v, everything = curvature.gradients(queries), len(data["input_ids"])
    top = top_eigenvalue(curvature, everything, batches=1, steps=60)
    largest = float(torch.linalg.eigvalsh(dense + torch.diag(curvature.damping_of))[-1])
    assert 0.9 * largest < top <= largest * (1 + 1e-6)
    depth = int(6 * top / float(curvature.damping_of.min()))
    found = lissa(curvature, v, [3, depth], 1 / top, everything)
    expected = exact_scores(model, data, queries, dense, damping)
    torch.testing.assert_close(
        curvature.scores(found[1], data), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max())
    )
    left = [quality(curvature, x, v)[0] for x in found]
    assert float(left[1].max()) < 0.02 < float(left[0].min())


def test_lissa_is_its_recursion_written_out():
    """r_j = v + (I - alpha (G~ + lambda)) r_{j-1}, a new minibatch every step."""
    model, data = tiny_model("gpt_neox", **SIZE), random_sequences(4, 5, 11)
    curvature = GaussNewton(model, damped_alike(model, gauss_newton(model, data)), data)
    v = curvature.gradients(random_sequences(2, 6, 11, seed=5))
    scale, generator, r = 0.5 / top_eigenvalue(curvature, 2), torch.Generator().manual_seed(9), v
    for _ in range(2):
        rows = minibatch(curvature, 2, generator)
        g = gauss_newton(model, {name: tensor[rows] for name, tensor in data.items()}) + torch.diag(
            curvature.damping_of
        )
        r = v + r - scale * r @ g
    torch.testing.assert_close(lissa(curvature, v, [1, 2], scale, 2, seed=9)[1], scale * r)


def test_lissa_says_so_when_it_diverges_and_when_it_is_asked_nonsense():
    model, data = tiny_model("gpt_neox", **SIZE), random_sequences(6, 7, 11)
    curvature = GaussNewton(model, fit_ekfac(model, data), data)
    v = curvature.gradients(random_sequences(2, 6, 11, seed=5))
    scale = 1 / top_eigenvalue(curvature, 6)
    with pytest.raises(UserError, match=r"diverges at step \d+ with scale="):
        lissa(curvature, v, [400], 8 * scale, 6)
    for depths in ([], [0, 1], [4, 2]):
        with pytest.raises(UserError, match="depths="):
            lissa(curvature, v, depths, scale, 6)
    with pytest.raises(UserError, match="scale=0"):
        lissa(curvature, v, [1], 0, 6)
    with pytest.raises(UserError, match="a minibatch of 7 cannot be drawn from 6"):
        lissa(curvature, v, [1], scale, 7)


def test_a_product_counts_a_pass_and_a_third():
    assert PRODUCT == pytest.approx(1 / 3 + 1 / 3 + 2 / 3)


def test_the_matrix_itself_comes_out_of_its_products(case):
    _, _, _, dense, curvature = case
    expected = dense + curvature.damping_of.diag()
    found = dense_of(curvature, rows=50)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_a_block_a_layer_is_left_within_layers(case):
    _, _, _, _dense, curvature = case
    sizes = [p * m for p, m in curvature.shapes.values()]
    number = sum(sizes)
    found = within_layers(curvature, torch.ones(number, number))
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    assert torch.equal(found, (owner[:, None] == owner[None]).float())


def test_a_matrix_too_large_to_hold_is_refused(case, monkeypatch):
    from influence_kit.referees import curvature as module

    monkeypatch.setattr(module, "LARGEST", 10)
    with pytest.raises(UserError, match="tracked weights have a Gauss-Newton matrix of .* at most 10"):
        dense_of(case[-1])
