"""Chapter 03: exponents, their intervals, KS and likelihood-ratio tests, coverage against nulls."""

import numpy as np
import pytest
from scipy import stats

from influence_kit.errors import UserError
from influence_kit.findings import heavy_tails as tails


def pareto(density_exponent: float, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).pareto(density_exponent - 1, n) + 1


@pytest.mark.parametrize("exponent", [1.99, 2.5, 4.34])
def test_pareto_exponents_are_recovered(exponent):
    error = (exponent - 1) / np.sqrt(500)
    samples = [
        np.concatenate([pareto(exponent, 5000, seed), -pareto(exponent, 5000, seed + 100)]) for seed in range(40)
    ]
    fits = [tails.fit_tail(values, top=500) for values in samples]
    assert np.mean([tail.density_exponent for tail in fits]) == pytest.approx(exponent, abs=3 * error / np.sqrt(40))
    assert sum(tail.low < exponent < tail.high for tail in fits) >= 34
    for tail, values in zip(fits, samples, strict=True):
        assert tail.count == 500 and tail.xmin == np.sort(values)[-500]
        assert tail.high - tail.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_interval_covers_at_its_level():
    hits = [(tail := tails.fit_tail(pareto(2.5, 400, seed), top=60)).low < 2.5 < tail.high for seed in range(1000)]
    assert 0.95 == pytest.approx(np.mean(hits), abs=0.025)


def test_exponent_and_ks_agree_with_scipy():
    values = pareto(2.2, 1000)
    tail = tails.fit_tail(values, top=200)
    top = np.sort(values)[-200:]
    assert tail.density_exponent - 1 == pytest.approx(200 / np.log(top / top[0]).sum(), rel=1e-12)
    expected = stats.ks_1samp(top, stats.pareto(b=tail.density_exponent - 1, scale=tail.xmin).cdf).statistic
    assert tail.ks == pytest.approx(expected, abs=1e-12)


def test_unit_of_the_values_plays_no_part():
    values = pareto(2.2, 2000)
    one, tiny = tails.fit_tail(values), tails.fit_tail(values * 1e-9)
    assert tiny.density_exponent == pytest.approx(one.density_exponent, rel=1e-9)
    assert tiny.ks == pytest.approx(one.ks, abs=1e-9) and tiny.xmin == pytest.approx(one.xmin * 1e-9)


def test_ks_accepts_a_power_law_and_rejects_others():
    rng = np.random.default_rng(0)
    powers = [pareto(2.3, 5000, seed) for seed in range(10)]
    p = [tails.ks_p_value(tails.fit_tail(power), draws=300) for power in powers]
    assert np.median(p) > 0.1 and sum(x < 0.1 for x in p) <= 4
    for other in (rng.exponential(size=5000), rng.normal(size=10000)):
        assert tails.ks_p_value(tails.fit_tail(other), draws=500) < 0.01


def test_ks_p_values_of_power_laws_are_uniform():
    samples = [pareto(2.5, 300, seed) for seed in range(200)]
    p = [tails.ks_p_value(tails.fit_tail(values, top=100), draws=200, seed=7) for values in samples]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def ratios(values, top=500):
    return tails.likelihood_ratios(tails.fit_tail(values, top), values)


@pytest.mark.filterwarnings("error")
def test_likelihood_ratios_have_the_right_sign(capsys):
    rng = np.random.default_rng(0)
    power = ratios(pareto(2.5, 3000))
    ratio, p = power["exponential"]
    assert ratio > 2 and p < 0.05
    assert abs(power["lognormal"][0]) < 2 and power["lognormal"][1] > 0.05
    light = ratios(rng.exponential(size=16000))
    assert light["exponential"][0] < -2 and light["exponential"][1] < 0.05
    lognormal = ratios(np.exp(rng.normal(size=3000)), top=2000)
    assert lognormal["lognormal"][0] < -2 and lognormal["lognormal"][1] < 0.05
    assert capsys.readouterr() == ("", "")


def test_likelihood_ratios_are_right_for_exponents_above_three():
    """powerlaw 2.0.0 stops at 3 by default: this sample's ratio was then -12.3 instead of 3.1."""
    values = pareto(5.5, 4000, seed=2)
    ratio, _ = ratios(values, top=1000)["exponential"]
    excess = np.sort(values)[-1000:] / np.sort(values)[-1000]
    exponent = 1 + 1000 / np.log(excess).sum()
    power = np.log(exponent - 1) - exponent * np.log(excess)
    rate = 1 / (excess.mean() - 1)
    difference = power - (np.log(rate) - rate * (excess - 1))
    assert ratio == pytest.approx(difference.sum() / (difference.std() * np.sqrt(1000)), abs=0.01)
    assert ratio > 0


def test_coverage_by_hand():
    values = np.array([[6.0, 2.0, 1.0, 1.0, -5, -5, -5, -5, -5, -5], [-1.0] * 10])
    assert tails.coverage(values, [0.1, 0.11])[0].tolist() == pytest.approx([0.6, 0.8])  # the count is rounded up
    assert np.isnan(tails.coverage(values, [0.1])[1]).all()
    assert tails.coverage(values[0], [0.1, 0.2, 0.4, 1]).tolist() == pytest.approx([0.6, 0.8, 1, 1])


def test_the_top_hundredth_of_700_takes_7():
    assert tails.coverage(np.ones(700), [0.01])[0] == pytest.approx(0.01)


@pytest.mark.parametrize(("kind", "share"), [("gaussian", 0.0668), ("laplace", 0.0982)])
def test_nulls_have_their_known_top_share(kind, share):
    null = tails.null_coverage(kind, [0.01, 0.1, 1], n=16000, draws=60)
    assert null.mean[0] == pytest.approx(share, abs=0.0005)
    assert null.low[0] < share < null.high[0] and null.high[0] - null.low[0] < 0.01
    assert null.mean[2] == 1 and (np.diff(null.mean) > 0).all()


def test_refusals_name_the_value():
    with pytest.raises(UserError, match="3 of 5 are positive"):
        tails.fit_tail([1.0, 2, 3, -1, -2])
    with pytest.raises(UserError, match="nan"):
        tails.fit_tail([1.0, np.nan] * 10)
    with pytest.raises(UserError, match="top is 9"):
        tails.fit_tail(pareto(2, 100), top=9)
    with pytest.raises(UserError, match="cauchy"):
        tails.null_coverage("cauchy", [0.1], n=10)
    with pytest.raises(UserError, match="0"):
        tails.coverage(np.ones(5), [0])


def test_the_card_says_what_the_table_says_of_its_query(atlas_models):
    rows = tails.measured(atlas_models, [atlas_models[0].seed], top=10, tested=0, draws=2)
    said = tails.median_card(atlas_models, rows, "Atlas").html
    largest = tails.of(rows, "Atlas").set_index("query")
    query = largest["strongest"].sort_values(kind="stable").index[(len(largest) - 1) // 2]
    for run in atlas_models:
        shown = tails.of(rows, "Atlas", parameters=run.parameters).set_index("query").loc[query]
        assert f"{run.parameters:,} weights: the strongest 1 % hold {shown['top 1 %']:.0%}" in said
        assert f"{shown['strongest']:.1%} of the positive influence" in said
