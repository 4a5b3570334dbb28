"""Work, crossovers, agreement and the ranks and depths that suffice, on cases worked by hand."""

import numpy as np
import pandas as pd
import pytest

from influence_kit.measures.cost import (
    crossover,
    depth_needed,
    ekfac_work,
    lissa_work,
    smallest_rank,
    speed_up,
    top_shared,
    total_work,
)


def test_work_of_ekfac_counted_by_hand():
    # One layer 4 x 2, 10 weights, 5 positions: a pass is 150 multiplications.
    fit, query = ekfac_work([(4, 2)], 10, 5, 7)
    assert fit == pytest.approx(7 * (1 + 5 * (2 * 16 + 2 * 4 + 8) / 150) + 4.5 * (64 + 8) / 150)
    assert query == pytest.approx(1 + (5 * 8 + 2 * (16 * 2 + 4 * 4)) / 150)
    cheaper = ekfac_work([(4, 2)], 10, 5, 7, blocks=2)
    assert cheaper[0] < fit and cheaper[1] < query
    assert lissa_work(3, 8, 4 / 3) == 1 + 32


def test_crossover_is_where_total_work_crosses():
    for fixed, each, rival_fixed, rival_each in ((100, 1, 0, 10), (100, 1, 5, 100), (99, 1, 0, 10), (0, 1, 0, 2)):
        n = crossover(fixed, each, rival_fixed, rival_each)
        assert total_work(fixed, each, n) < total_work(rival_fixed, rival_each, n)
        assert n == 1 or total_work(fixed, each, n - 1) >= total_work(rival_fixed, rival_each, n - 1)
    assert crossover(10, 2, 0, 1) == np.inf and crossover(1, 1, 0, 1) == np.inf and crossover(0, 1, 2, 1) == 1


def test_top_shared_counts_what_stays_on_top():
    whole = np.arange(20.0)[None]
    assert top_shared(whole, whole, 5).tolist() == [1] and top_shared(-whole, whole, 5).tolist() == [0]
    moved = whole.copy()
    moved[0, 19] = -1
    assert top_shared(moved, whole, 5).tolist() == [0.8] and top_shared(moved, whole, 99).tolist() == [1]


def test_smallest_rank_is_the_first_that_is_good_on_average():
    rows = [(m, r, r / 8, r / 6, a) for m, values in (("a", (0.5, 0.992, 1)), ("b", (0.1, 0.2, 0.3))) for r, a in zip((2, 4, 8), values)]
    table = pd.DataFrame(rows, columns=["model", "rank", "share", "stored", "agreement"])
    found = smallest_rank(table, 0.99, ["model"]).set_index("model")
    assert found.loc["a"].tolist() == [4, 0.5, 4 / 6] and found.loc["b", "rank"] == 8 and np.isinf(found.loc["b", "share"])
    two = pd.concat([table[table["model"] == "a"], table[table["model"] == "a"].assign(agreement=0.98)])
    assert smallest_rank(two, 0.99)["rank"].tolist() == [8]


def test_depth_needed_is_where_it_stays():
    table = pd.DataFrame({"depth": [1, 2, 4, 8] * 2, "x": [0.5, 0.9, 0.7, 0.95] * 2})
    assert depth_needed(table, "x", above=0.8) == 8 and depth_needed(table, "x", above=0.6) == 2
    assert depth_needed(table, "x", above=0.99) == np.inf and depth_needed(table, "x", below=1) == 1


def tables():
    """EK-FAC is aligned to .9; LiSSA with minibatches of 4 gets there in 8 steps, with 2 it never does."""
    lissa = [("LiSSA", b, d, a, r, 1 + d * b) for b, d, a, r in ((4, 4, 0.8, 0.5), (4, 8, 0.95, 0.2), (2, 4, 0.5, 0.6), (2, 8, 0.6, 0.3))]
    costs = pd.DataFrame([("EK-FAC", 0, 0, 0.9, 0.4, 3), *lissa], columns=["method", "batch", "depth", "alignment", "residual", "work"])
    about = pd.DataFrame({"batch": [4, 2], "tuning": [40.0, 20], "fit": 100.0, "each": 3.0})
    seconds = pd.DataFrame({"part": ["fit", "query", "step", "step"], "batch": [0, 0, 4, 2], "seconds": [10, 0.1, 0.5, 0.4]})
    return costs, about, seconds


def test_speed_up_takes_lissa_at_its_cheapest_that_is_as_good():
    found = speed_up(*tables(), queries=50)
    assert (found["batch"], found["depth"], found["reached"], found["alignment"]) == (4, 8, True, 0.9)
    assert found["speedup"] == pytest.approx(np.log10((40 + 50 * 33) / (100 + 150)))
    assert found["seconds_speedup"] == pytest.approx(np.log10(50 * 8 * 0.5 / (10 + 5)))
    assert found["crossover"] == crossover(100, 3, 40, 33) == 3
    assert speed_up(*tables(), residual=0.25)["depth"] == 8


def test_a_depth_that_never_suffices_is_a_lower_bound_and_says_so():
    found = speed_up(*tables(), residual=0.1)
    assert found["reached"] is False and found["depth"] == 8 and found["batch"] == 2
