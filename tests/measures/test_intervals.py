"""Intervals: printing, coverage by simulation, pairing, determinism."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from influence_kit.errors import UserError
from influence_kit.measures.intervals import (
    Estimate,
    bootstrap,
    difference,
    difference_in_differences,
    difference_of,
    estimate_of,
    gaps,
    largest_minus_smallest,
    over_seeds,
    pick,
    ratio_of_means,
    recomputed,
    slope_of,
)


def nested(rng, seeds: int, units: int, between: float) -> tuple[np.ndarray, np.ndarray]:
    """Values with mean 0 and unit sd within a seed, sd `between` between seeds."""
    label = np.repeat(np.arange(seeds), units)
    return rng.normal(0, between, seeds)[label] + rng.normal(size=seeds * units), label


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.38, 0.3, 0.45), "0.38 [0.30, 0.45]"),
        ((17.3, 12.1, 22.4), "17 [12, 22]"),
        ((0.11, 0.0018, 0.21), "0.11 [0.0018, 0.21]"),
        ((1e-5, -0.1, 0.2), "1e-05 [-0.10, 0.20]"),
        ((1.234e-5, 1.1e-5, 1.4e-5), "1.23e-05 [1.10e-05, 1.40e-05]"),
        ((0.0, 0.0, 0.0), "0 [0, 0]"),
        ((1.0, 1.0, 1.0), "1 [1, 1]"),
        ((123456.0, 123000.0, 124000.0), "1.235e+05 [1.230e+05, 1.240e+05]"),
        ((float("nan"), float("nan"), float("nan")), "nan [nan, nan]"),
        ((1.85, float("nan"), float("nan")), "1.85 [–]"),
    ],
)
def test_printing(numbers, text):
    assert str(Estimate(*numbers, n=3)) == text
    assert f"{Estimate(*numbers, n=3)}" == text


def test_printing_by_a_given_format_never_turns_small_into_zero():
    assert f"{Estimate(0.381, 1e-5, 0.5, n=3):.2f}" == "0.38 [1e-05, 0.50]"


def test_value_is_the_mean_over_seeds_of_the_statistic():
    estimate = bootstrap([1, 2, 3, 10], ["a", "a", "a", "b"], draws=50)
    assert estimate.value == 6 and estimate.n == 4 and estimate.seeds == ("a", "b")
    pairs = np.array([[1.0, 2], [3, 2], [1, 1], [1, 3]])
    assert bootstrap(pairs, [0, 0, 1, 1], ratio_of_means, draws=50).value == pytest.approx((1 + 0.5) / 2)


@pytest.mark.parametrize(("between", "lowest"), [(0.0, 0.94), (0.2, 0.93), (2.0, 0.93)])
def test_default_interval_covers_with_three_seeds(between, lowest):
    rng = np.random.default_rng(0)
    estimates = [bootstrap(*nested(rng, 3, 40, between)) for _ in range(400)]
    assert np.mean([e.low <= 0 <= e.high for e in estimates]) >= lowest


def test_t_interval_is_students():
    rng = np.random.default_rng(0)
    values, seeds = nested(rng, 5, 20, 1.0)
    means = values.reshape(5, 20).mean(1)
    low, high = stats.t.interval(0.9, 4, means.mean(), stats.sem(means))
    assert bootstrap(values, seeds, level=0.9).interval == pytest.approx((low, high))


def test_bootstrap_of_one_seed_is_the_standard_one():
    values = np.random.default_rng(0).exponential(size=200)
    estimate = bootstrap(values, np.zeros(200), draws=4000)
    reference = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000).confidence_interval
    assert "one seed" in estimate.note and estimate.seeds == (0,)
    assert estimate.interval == pytest.approx((reference.low, reference.high), abs=0.02)
    assert np.isnan(over_seeds({0: values.mean()}).low)


def test_ratio_of_means_covers_and_pairs():
    rng = np.random.default_rng(1)
    same = rng.gamma(2, 1, (3, 60, 1))
    pairs = np.concatenate([0.4 * same + rng.normal(0, 0.05, same.shape), same], axis=2).reshape(-1, 2)
    estimate = bootstrap(pairs, np.repeat([0, 1, 2], 60), ratio_of_means)
    assert estimate.low < 0.4 < estimate.high and estimate.high - estimate.low < 0.1
    loose = bootstrap(
        np.column_stack([pairs[:, 0], rng.permutation(pairs[:, 1])]), np.repeat([0, 1, 2], 60), ratio_of_means
    )
    assert loose.high - loose.low > 3 * (estimate.high - estimate.low)


def test_units_with_nan_are_left_out():
    values = np.array([1.0, np.nan, 3.0, 5.0, np.nan])
    estimate = bootstrap(values, [0, 0, 0, 1, 2], draws=100)
    assert estimate.n == 3 and estimate.seeds == (0, 1) and estimate.value == 3.5
    assert bootstrap([np.nan], [0]).note == "no unit has a value" and np.isnan(bootstrap([np.nan], [0]).value)


def test_a_seed_without_a_value_is_named():
    estimate = bootstrap([[1.0, 2], [1, 0], [0, 0]], ["a", "b", "c"], ratio_of_means)
    assert np.isnan(estimate.value) and estimate.note.startswith("no value in seed")


def test_equal_generator_seeds_give_equal_intervals():
    values, seeds = nested(np.random.default_rng(0), 3, 30, 0.3)
    one = np.zeros(90)
    assert bootstrap(values, one, seed=4) == bootstrap(values, one, seed=4) != bootstrap(values, one, seed=5)
    order = np.random.default_rng(1).permutation(90)
    assert bootstrap(values[order], seeds[order]).value == pytest.approx(bootstrap(values, seeds).value)


def test_bounds_cut_and_no_width_is_said():
    assert bootstrap([0.97, 0.99, 1.0], [0, 1, 2], bounds=(0, 1)).high == 1
    assert bootstrap([2.0] * 6, [0, 0, 1, 1, 2, 2]).note.startswith("no variation")


def test_a_share_without_variation_has_the_exact_binomial_interval():
    seeds = np.repeat([11, 12, 13], 8)
    every = bootstrap(np.ones(24), seeds, bounds=(0, 1))
    low, high = stats.binomtest(24, 24).proportion_ci(0.95)
    assert every.interval == pytest.approx((low, high)) and low == pytest.approx(0.858, abs=1e-3)
    apart = difference(np.ones(24), seeds, np.zeros(24), seeds)
    assert apart.value == 1 and 0.7 < apart.low < low < apart.high
    assert every.how == "exact binomial, 24 of 24" and apart.how == "exact binomial, 24 of 24 less 0 of 24"


def test_ratios_are_averaged_as_logarithms():
    ratio = over_seeds({1: 2.0, 2: 8.0, 3: 4.0}, method="log")
    plain = over_seeds({1: 1.0, 2: 3.0, 3: 2.0})
    assert np.log2([ratio.value, *ratio.interval]) == pytest.approx([plain.value, *plain.interval])
    assert over_seeds({1: 2.0, 2: 0.0}, method="log").note == "no positive value in seed 2"


def test_a_slope_uses_all_sizes_within_each_seed():
    table = pd.DataFrame({"seed": np.repeat([1, 2], 3), "size": [10, 100, 1000] * 2, "x": [1, 2, 3, 5, 7.5, 9]})
    found = slope_of(table, "x")
    assert found.per_seed == pytest.approx({1: 1.0, 2: 2.0}) and found.value == pytest.approx(1.5)
    with pytest.raises(UserError, match="Seed 1 has 1 of 'size'"):
        slope_of(pick(table, size=10), "x")


def test_a_seed_listed_twice_counts_once():
    once, twice = bootstrap([1.0, 2, 4], [1, 2, 3]), bootstrap([1.0, 2, 4, 4], [1, 2, 3, 3])
    assert once.interval == twice.interval and twice.seeds == (1, 2, 3)


@pytest.mark.parametrize(
    "made",
    [
        over_seeds({1: 0.2, 2: 0.5, 3: 0.4}),
        over_seeds({1: 0.9, 2: 1.0, 3: 0.99}, bounds=(0, 1)),
        over_seeds({1: 0.9, 2: 1.0, 3: 0.99}, bounds=(-np.inf, 1)),
        over_seeds({1: 0.2, 2: 5.0, 3: 4.0}, method="log"),
        bootstrap(np.ones(24), np.repeat([1, 2, 3], 8)),
        difference(np.ones(6), np.repeat([1, 2, 3], 2), np.zeros(3), [1, 2, 3]),
    ],
)
def test_what_a_table_keeps_gives_the_estimate_again(made):
    row = made.row(size=8)
    per_seed = {name: value for name, value in row.items() if name.startswith("seed_")}
    assert recomputed(per_seed, row["interval"]) == pytest.approx((row["estimate"], row["low"], row["high"]))


def test_statistics_without_an_axis_are_called_by_sample():
    def spearman(pairs):
        return stats.spearmanr(pairs[:, 0], pairs[:, 1]).statistic

    rng = np.random.default_rng(0)
    x = rng.normal(size=120)
    estimate = bootstrap(np.column_stack([x, x + rng.normal(size=120)]), np.repeat([0, 1, 2], 40), spearman, draws=40)
    assert 0.5 < estimate.value < 0.85
    with pytest.raises(UserError, match="one number a sample"):
        bootstrap([1.0, 2], [0, 0], np.sort)


def test_difference_cancels_what_a_seed_does_to_both():
    rng = np.random.default_rng(0)
    seeds = np.repeat([0, 1, 2], 80)
    effect = np.array([-3.0, 0, 3])[seeds]
    large, small = effect + 1 + rng.normal(0, 0.3, 240), effect + rng.normal(0, 0.3, 240)
    estimate = difference(large, seeds, small, seeds)
    assert estimate.value == pytest.approx(1, abs=0.1) and 0.5 < estimate.low < 1 < estimate.high < 1.5
    assert estimate.n == 480 and bootstrap(large, seeds).low < 0
    backwards = difference(large, seeds, small[::-1], seeds[::-1])
    assert backwards.value == pytest.approx(estimate.value)


def test_matched_units_are_drawn_together():
    rng = np.random.default_rng(0)
    seeds, query = np.repeat([0, 1, 2], 60), rng.normal(0, 3, 180)
    a, b = query + 0.5 + rng.normal(0, 0.1, 180), query + rng.normal(0, 0.1, 180)
    matched, loose = difference(a, seeds, b, seeds, matched_units=True), difference(a, seeds, b, seeds)
    assert matched.n == 180 and loose.n == 360 and matched.value == pytest.approx(loose.value)
    assert matched.interval == pytest.approx(bootstrap(a - b, seeds).interval, abs=1e-9)


def test_differences_of_ratio_statistics():
    rng = np.random.default_rng(0)
    seeds = np.repeat([0, 1, 2], 100)
    same = rng.gamma(5, 1, 300)
    small, large = np.column_stack([0.1 * same, same]), np.column_stack([0.4 * same, same])
    assert difference(large, seeds, small, seeds, ratio_of_means).value == pytest.approx(0.3)
    assert difference(large, seeds, small, seeds, ratio_of_means, matched_units=True).interval == pytest.approx(
        (0.3, 0.3)
    )


def test_refusals_name_the_value():
    with pytest.raises(UserError, match=r"\[0, 1\] and \[1, 2\]"):
        difference([1.0, 2], [0, 1], [1.0, 2], [1, 2])
    with pytest.raises(UserError, match="one order"):
        difference([1.0, 2, 3], [0, 0, 1], [1.0, 2], [0, 1], matched_units=True)
    with pytest.raises(UserError, match="bca"):
        bootstrap([1.0], [0], method="bca")
    with pytest.raises(UserError, match=r"\(2,\)"):
        bootstrap([1.0, 2, 3], [0, 1])
    with pytest.raises(UserError, match="1.5"):
        bootstrap([1.0, 2], [0, 1], level=1.5)


def test_columns_of_a_table_are_read_with_its_seeds():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {"seed": np.repeat([1, 2, 3], 20), "size": np.tile([8, 4], 30), "x": rng.normal(size=60), "y": rng.random(60)}
    )
    big, small = table[table["size"] == 8], table[table["size"] == 4]
    assert estimate_of(table, ["x", "y"], ratio_of_means) == bootstrap(table[["x", "y"]], table["seed"], ratio_of_means)
    assert difference_of(big, small, "x", "y") == difference(big["x"], big["seed"], small["y"], small["seed"])
    assert largest_minus_smallest(table, "x") == difference(big["x"], big["seed"], small["x"], small["seed"])
    table["treated"], table["change"] = table["x"] > 0, table["y"]
    gone, kept = table[table["treated"]], table[~table["treated"]]
    assert difference_in_differences(table) == difference(gone["y"], gone["seed"], kept["y"], kept["seed"])
    first = pick(table, seed=1)
    by_hand = pick(first, treated=True)["y"].mean() - pick(first, treated=False)["y"].mean()
    assert gaps(table, ["seed"])[1] == pytest.approx(by_hand)
    row = estimate_of(table, "x").row(size=8)
    assert list(row) == ["size", "estimate", "low", "high", "interval", "seed_1", "seed_2", "seed_3"]
