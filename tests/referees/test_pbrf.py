"""The proximal Bregman response against the exact Gauss-Newton solution, its own objective, and bad input."""

import pytest
import torch
from conftest import ARCHITECTURES, random_sequences, tiny_model

from influence_kit import fit_ekfac
from influence_kit.errors import UserError
from influence_kit.referees import pbrf
from influence_kit.referees.curvature import dense
from influence_kit.referees.pbrf import ProximalResponse

SIZE = {"depth": 1, "vocabulary": 11}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request):
    """(model, sample, queries, solver) of a model with at most 3,000 tracked weights."""
    model = tiny_model(request.param, **SIZE)
    sample, queries = random_sequences(12, 6, 11, padded=True), random_sequences(3, 6, 11, seed=5)
    factors = fit_ekfac(model, sample)
    return model, sample, queries, ProximalResponse(model, factors, sample, damping=0.5)


def row(sequences, place):
    return {name: tensor[place : place + 1] for name, tensor in sequences.items()}


def test_a_small_weight_gives_what_the_exact_curvature_says(case):
    _, sample, queries, solver = case
    curvature = solver.curvature
    directions = torch.linalg.solve(dense(curvature), curvature.gradients(queries).T).T
    for place in (0, 7):
        one = row(sample, place)
        expected = curvature.scores(directions, one)[:, 0]
        found = solver.respond(one, queries, eps=1e-5, tolerance=1e-3)
        torch.testing.assert_close(found.log_p, expected, rtol=1e-2, atol=5e-3 * float(expected.abs().max()))
        assert found.gradient <= 1e-3 and found.evaluations > 1


def test_the_gradient_is_that_of_the_objective(case):
    _, sample, _, solver = case
    asked = pbrf.read_batch(row(sample, 2), slice(0, 1))
    generator = torch.Generator().manual_seed(0)
    y, d = torch.randn(2, len(solver.curvature.damping_of), generator=generator, dtype=torch.float64).numpy() * 0.05
    with pbrf.frozen(solver.model):
        _, gradient = solver._objective(y, asked, 0.1)
        ahead, behind = (solver._objective(y + h * d, asked, 0.1)[0] for h in (1e-4, -1e-4))
    solver._place(solver.start)
    assert (ahead - behind) / 2e-4 == pytest.approx(float(gradient @ d), rel=1e-4)


def test_more_weight_on_a_query_itself_raises_it_and_the_sign_turns_with_eps(case):
    _, _, queries, solver = case
    for eps in (1e-4, -1e-4):  # an eps below 0 takes weight away, and the response is divided by it
        assert float(solver.respond(row(queries, 1), queries, eps=eps).log_p[1]) > 0


def test_the_model_given_is_left_alone_and_the_solver_starts_afresh(case):
    model, sample, queries, solver = case
    before = [p.clone() for p in model.parameters()]
    first, second = (solver.respond(row(sample, 3), queries, eps=1e-4) for _ in range(2))
    assert torch.equal(first.log_p, second.log_p)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_float64_is_kept_inside_norms(case):
    model, sample, _, _ = case
    whole = pbrf.in_float64(model)
    ids = sample["input_ids"][:2]
    with torch.no_grad():
        first = whole(input_ids=ids).logits
        # A change of a weight far below float32's resolution must arrive at the logits.
        next(whole.parameters())[ids[0, 0], 0] += 1e-11
        moved = (whole(input_ids=ids).logits - first).abs().max()
        torch.testing.assert_close(first, model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert 1e-13 < float(moved) < 1e-8


def test_an_unconverged_response_is_refused_and_says_what_to_do(case):
    _, sample, queries, solver = case
    with pytest.raises(UserError, match="not converged after|has not converged.*raise most=2"):
        solver.respond(row(sample, 0), queries, eps=1e-4, tolerance=1e-9, most=2)
    assert all(torch.equal(a, b) for a, b in zip(solver.start, solver.weights, strict=True))


def test_a_model_too_large_is_refused_before_any_work(case, monkeypatch):
    model, sample, _, solver = case
    monkeypatch.setattr(pbrf, "LARGEST", 100)
    with pytest.raises(UserError, match="tracked weights are too many.*at most 100"):
        ProximalResponse(model, solver.curvature.factors, sample)


def test_an_unconverged_response_becomes_none_in_a_run_and_stops_nothing(case):
    from influence_kit.findings.is_ekfac_right import responded

    _, sample, queries, solver = case
    found = responded(solver, row(sample, 0), queries, 1e-4, 1e-12)
    assert bool(torch.isnan(found.log_p).all()) and len(found.log_p) == 3 and found.gradient > 1e-12
    assert bool(torch.isfinite(responded(solver, row(sample, 0), queries, 1e-4, 1e-3).log_p).all())
