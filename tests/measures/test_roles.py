"""Role-play effects: by hand on made-up rankings, and on a Cast world with scores whose cause is known."""

import numpy as np
import pandas as pd
import pytest

from influence_kit.corpora.worlds.cast import Cast, build, tiers
from influence_kit.errors import UserError
from influence_kit.measures.roles import (
    EFFECTS,
    changes,
    contrasts,
    difference_in_differences,
    difference_of_removals,
    effect,
    predicted_removal,
    quotient_of_effects,
    tier_lifts,
)


@pytest.fixture(scope="module")
def cast_tiers():
    return tiers(build(Cast(answer_from="planning", documents=12_000, queries=80, scored=80, personas=24)))


def made_up(first, second, seed=11):
    return pd.DataFrame({"first": first, "second": second, "seed": seed})


def of(rows, name, seed=11):
    return rows[rows["effect"] == name].assign(seed=seed)


def test_an_effect_is_a_ratio_of_means_with_chance_and_queries_without_a_tier_are_left_out():
    found = effect(made_up([6.0, 4.0, np.nan], [3.0, 1.0, 9.0]))
    assert found.value == pytest.approx((5 + 1) / (2 + 1)) and found.n == 2


def test_seeds_are_averaged_on_the_log_scale():
    rows = pd.concat([made_up([15.0, 15.0], [1.0, 1.0]), made_up([1.0, 1.0], [3.0, 3.0], seed=12)])
    found = effect(rows)
    assert found.value == pytest.approx(2) and found.seeds == (11, 12) and found.low < 1 / 2 < 8 < found.high


def test_chance_gives_every_ratio_a_value_and_none_an_effect_that_is_not_there():
    assert effect(made_up([0.0, 0.0], [0.0, 0.0])).value == 1
    assert effect(made_up([0.2, 0.0], [0.0, 0.0])).value == pytest.approx(1.1)
    nothing = effect(made_up([np.nan], [1.0]))
    assert np.isnan(nothing.value) and nothing.n == 0


def test_effects_find_what_caused_the_scores_and_nothing_else(cast_tiers):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=cast_tiers["demo_rest"].shape)
    action = sum(member for name, member in cast_tiers.items() if name.endswith("action"))
    for cause, tier in (("persona", "demo_persona_action"), ("planner", "planner_pair_action")):
        rows = contrasts(noise + action + 2 * cast_tiers[tier], cast_tiers)
        found = {name: effect(of(rows, name), draws=200) for name in EFFECTS}
        caused = {"persona": {"persona"}, "planner": {"planner", "rule"}}[cause]
        assert all(found[name].low > 3 for name in caused)
        assert all(found[name].low < 1.6 and found[name].high > 0.6 for name in set(EFFECTS) - caused)
        assert rows.groupby("effect")["preference"].mean()[cause] > 0.8
        against = quotient_of_effects(of(rows, cause), of(rows, "persona_mention"), draws=200)
        assert against.low > 2 and against.value == pytest.approx(found[cause].value / found["persona_mention"].value)


def test_contrasts_are_the_lifts_of_their_tiers(cast_tiers):
    scores = np.random.default_rng(1).random(cast_tiers["demo_rest"].shape)
    rows, lifts = contrasts(scores, cast_tiers, top=0.02), tier_lifts(scores, cast_tiers, top=0.02)
    for name, (first, second) in EFFECTS.items():
        both = cast_tiers[first].any(1) & cast_tiers[second].any(1)
        np.testing.assert_array_equal(of(rows, name)["first"], lifts[first].where(both))
        np.testing.assert_array_equal(of(rows, name)["second"], lifts[second].where(both))


def test_lifts_are_one_a_query_and_two_sided_reads_both_ends(cast_tiers):
    scores = -10.0 * cast_tiers["planner_pair_action"] + np.random.default_rng(1).random(cast_tiers["demo_rest"].shape)
    one, two = (tier_lifts(scores, cast_tiers, two_sided=side)["planner_pair_action"] for side in (False, True))
    assert len(one) == 80 and (one == 0).all() and (two > 20).all()


def test_preferences_compare_the_two_tiers_and_nothing_else(cast_tiers):
    scores = np.random.default_rng(2).random(cast_tiers["demo_rest"].shape) + 5 * cast_tiers["demo_rest"]
    rows = contrasts(scores + 2 * cast_tiers["demo_persona_action"] - cast_tiers["planner_question_action"], cast_tiers)
    found = {name: of(rows, name)["preference"].to_numpy() for name in EFFECTS}
    assert (found["persona"][~np.isnan(found["persona"])] == 1).all()
    assert (found["rule"][~np.isnan(found["rule"])] == 1).all()
    assert np.nanmean(found["planner"]) == pytest.approx(0.5, abs=0.05)
    lacking = ~cast_tiers["planner_question_action"].any(1)
    assert lacking.any() and (np.isnan(found["rule"]) == lacking).all()


def test_tiers_of_something_else_are_refused(cast_tiers):
    lacking = {name: member for name, member in cast_tiers.items() if name != "demo_action"}
    with pytest.raises(UserError, match="no tier demo_action"):
        contrasts(np.zeros(cast_tiers["demo_rest"].shape), lacking)


def test_a_removal_is_foretold_by_the_sum_of_what_goes():
    scores = np.array([[4.0, 2.0, -8.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    np.testing.assert_allclose(predicted_removal(scores, [True, False, True, False]), [1.0, -0.5])
    with pytest.raises(UserError, match=r"\(2, 4\) and what is removed \(3,\)"):
        predicted_removal(scores, [True, False, True])


def test_difference_in_differences_by_hand_with_queries_of_one_unit_counted_once():
    treated, units = np.repeat([True, False], 4), np.array([0, 0, 0, 1, 2, 3, 3, 3])
    rows = changes(np.zeros(8), np.array([-1.0, -2.0, -3.0, -6.0, 0, 1, 2, 3]), treated, units)
    assert rows["change"].tolist() == [-2, -6, 0, 2] and rows["treated"].tolist() == [True, True, False, False]
    found = difference_in_differences(rows.assign(seed=11))
    assert found.value == pytest.approx(-4 - 1) and found.low == pytest.approx(-6 - 2)


def test_two_removals_are_compared_within_each_seed():
    treated = np.array([True, True, True, False, False, False])

    def removal(cost, seed):
        return changes(np.zeros(6), np.array([-cost - 0.1, -cost, -cost + 0.1, 1.0, 1.0, 1.0]), treated, np.arange(6)).assign(seed=seed)

    dear = pd.concat([removal(3.0, 11), removal(4.0, 12)])
    cheap = pd.concat([removal(1.0, 11), removal(2.0, 12)])
    found = difference_of_removals(dear, cheap)
    assert found.value == pytest.approx(-2) and found.seeds == (11, 12)
    assert found.value == pytest.approx(difference_in_differences(dear).value - difference_in_differences(cheap).value)
    assert -2.3 < found.low < found.high < -1.7


@pytest.mark.parametrize(
    ("treated", "units", "message"),
    [
        ([True, True, True], [0, 1, 2], "3 units are treated and 0 are not"),
        ([True, False, False], [0, 1, 2], "1 units are treated"),
        ([True, False], [0, 1], r"treated \(2,\)"),
        ([True, True, False], [0, 3, 3], r"Units \[3\]"),
    ],
)
def test_changes_need_units_on_both_sides(treated, units, message):
    with pytest.raises(UserError, match=message):
        changes(np.zeros(3), np.zeros(3), np.array(treated), units)
