"""Role-play: effects by hand on made-up rankings, on a Cast world and on lines with scores whose cause is known."""

import numpy as np
import pandas as pd
import pytest

from influence_kit.corpora.texts.dialogue import Dialogue
from influence_kit.corpora.texts.dialogue import build as build_lines
from influence_kit.corpora.worlds.cast import Cast, build, tiers
from influence_kit.errors import UserError
from influence_kit.findings.role_play import (
    EFFECTS,
    ON_CARD,
    OWN,
    RELATIONS,
    WORLDS,
    averaged,
    beyond_rival,
    card,
    changes,
    contrasts,
    costs,
    in_the_top,
    interaction,
    matched_preference,
    predicted_removal,
    ratios,
    speaker_preference,
    word_overlap,
)
from influence_kit.measures.checkpoints import READ
from influence_kit.measures.intervals import difference_in_differences, over_seeds
from influence_kit.measures.lifts import lift
from tests.corpora.texts.test_dialogue import PARAMETERS, lines


@pytest.fixture(scope="module")
def cast_tiers():
    return tiers(build(Cast(answer_from="planning", documents=12_000, queries=80, scored=80, personas=24)))


def made_up(first, second, seed=11, effect="persona", world="imitation"):
    return pd.DataFrame({"first": first, "second": second, "seed": seed, "effect": effect, "world": world})


def of(rows, name):
    return rows[rows["effect"] == name]


def effect_of(*tables):
    return ratios(pd.concat(tables))["persona", "imitation"]


def test_an_effect_is_a_ratio_of_means_with_chance_and_queries_without_a_tier_are_left_out():
    assert effect_of(made_up([6.0, 4.0, np.nan], [3.0, 1.0, 9.0])).to_dict() == {11: pytest.approx((5 + 1) / (2 + 1))}


def test_seeds_are_averaged_on_the_log_scale():
    found = averaged(effect_of(made_up([15.0, 15.0], [1.0, 1.0]), made_up([1.0, 1.0], [3.0, 3.0], seed=12)))
    assert found.value == pytest.approx(2) and found.seeds == (11, 12) and found.low < 1 / 2 < 8 < found.high


def test_chance_gives_every_ratio_a_value_and_none_an_effect_that_is_not_there():
    assert effect_of(made_up([0.0, 0.0], [0.0, 0.0]))[11] == 1
    assert effect_of(made_up([0.2, 0.0], [0.0, 0.0]))[11] == pytest.approx(1.1)
    assert np.isnan(averaged(effect_of(made_up([np.nan], [1.0]))).value)


def test_the_interaction_is_one_where_worlds_are_alike_and_finds_what_sets_them_apart():
    told = {
        ("persona", "imitation"): 7,
        ("persona", "planning only"): 1,
        ("planner", "imitation"): 3,
        ("planner", "planning only"): 31,
    }

    def read(lifts):
        parts = [made_up([lift], [1.0], seed, *key) for key, lift in lifts.items() for seed in (11, 12, 13)]
        return interaction(ratios(pd.concat(parts)))

    assert read(told).value == pytest.approx((8 / 2) * (32 / 4)) and len(read(told).per_seed) == 3
    assert read(dict.fromkeys(told, 9.0)).value == 1
    swapped = {key: told[key[0], {"imitation": "planning only", "planning only": "imitation"}[key[1]]] for key in told}
    assert read(swapped).value == pytest.approx(1 / 32)
    assert np.isnan(read({key: told[key] for key in list(told)[:3]}).value)


def test_effects_find_what_caused_the_scores_and_nothing_else(cast_tiers):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=cast_tiers["demo_rest"].shape)
    action = sum(member for name, member in cast_tiers.items() if name.endswith("action"))
    for cause, tier in (("persona", "demo_persona_action"), ("planner", "planner_pair_action")):
        rows = contrasts(noise + action + 2 * cast_tiers[tier], cast_tiers)
        found = ratios(rows.assign(seed=11, world="imitation")).loc[11].xs("imitation", level="world")
        assert found[cause] > 3 and found.drop(cause).between(0.4, 2).all()
        assert rows.groupby("effect")["preference"].mean()[cause] > 0.8


def test_contrasts_are_the_lifts_of_their_tiers(cast_tiers):
    scores = np.random.default_rng(1).random(cast_tiers["demo_rest"].shape)
    rows = contrasts(scores, cast_tiers, top=0.02)
    for name, pair in EFFECTS.items():
        both = cast_tiers[pair[0]].any(1) & cast_tiers[pair[1]].any(1)
        for column, tier in zip(("first", "second"), pair):
            expected = np.where(both, lift(scores, cast_tiers[tier], 0.02), np.nan)
            np.testing.assert_array_equal(of(rows, name)[column], expected)


def test_preferences_compare_the_two_tiers_and_nothing_else(cast_tiers):
    scores = np.random.default_rng(2).random(cast_tiers["demo_rest"].shape) + 5 * cast_tiers["demo_rest"]
    rows = contrasts(scores + 2 * cast_tiers["demo_persona_action"], cast_tiers)
    found = {name: of(rows, name)["preference"].to_numpy() for name in EFFECTS}
    assert (found["persona"][~np.isnan(found["persona"])] == 1).all()
    assert np.nanmean(found["planner"]) == pytest.approx(0.5, abs=0.05)
    without = {**cast_tiers, "demo_action": np.zeros_like(cast_tiers["demo_action"])}
    assert of(contrasts(scores, without), "persona")["preference"].isna().all()


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


def test_a_world_s_own_source_is_compared_with_the_other_s_within_each_seed():
    treated = np.array([True, True, False, False])

    def removal(world, dropped, cost, seed):
        rows = changes(np.zeros(4), np.array([-cost - 0.1, -cost + 0.1, 1.0, 1.0]), treated, np.arange(4))
        return rows.assign(by="retraining", world=world, dropped=dropped, seed=seed)

    known = {("imitation", "demonstrations"): 3, ("imitation", "planners"): 1, ("planning only", "planners"): 9}
    known["planning only", "demonstrations"] = 2
    found = costs(pd.concat(removal(*key, cost + seed, seed) for key, cost in known.items() for seed in (11, 12)))
    assert found["retraining", "imitation", "demonstrations"].tolist() == pytest.approx([3 + 11 + 1, 3 + 12 + 1])
    beyond = beyond_rival(found)
    assert over_seeds(beyond["imitation"]).value == pytest.approx(2)
    assert over_seeds(beyond["planning only"]).value == pytest.approx(7)


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


@pytest.fixture(scope="module")
def world():
    return build_lines(Dialogue(**PARAMETERS), lines())


def test_partners_come_next_in_overlap_on_both_sides_and_from_one_stratum():
    # 0 lies between 2 and 3; 1 lies above all of the second kind; 4 is in a stratum of its own, 5 is of neither kind.
    overlap = np.array([[1.0, 9.0, 0.9, 1.1, 1.0, 1.0, 0.1, 5.0]])
    first, second = np.array([[1, 1, 0, 0, 0, 0, 0, 0]], bool), np.array([[0, 0, 1, 1, 1, 0, 1, 1]], bool)
    strata = np.array([[0, 0, 0, 0, 1, 0, 0, 0]])
    scores = np.array([[3.0, 2.0, 2.5, 3.0, 99.0, 99.0, 4.0, 0.0]])
    row = matched_preference(scores, first, second, overlap, strata, neighbours=1).iloc[0]
    assert row["preference"] == pytest.approx((1 + 0.5) / 2, abs=1e-6) and row["lines"] == 1
    assert row["overlap"] == pytest.approx(0, abs=1e-6) and row["unmatched_overlap"] == pytest.approx(
        (1 + 0 + 0.5 + 1 + 0 + 5) / 10
    )
    row = matched_preference(scores, first, second, overlap, strata, neighbours=9).iloc[0]
    # Below (.1 and .9) lie .5 off on average and above (1.1 and 5) 2.05: weights .804 and .196.
    below, above = 2.05 / 2.55, 0.5 / 2.55
    assert row["preference"] == pytest.approx(below * (0 + 1) / 2 + above * (0.5 + 1) / 2, abs=1e-6)


def test_matching_takes_overlap_out_and_leaves_what_is_not_overlap():
    rng = np.random.default_rng(0)
    first, second = np.zeros((60, 900), bool), np.ones((60, 900), bool)
    first[:, :300] = True
    second[:, :300] = False
    overlap = rng.gamma(2, 1, (60, 900)) + 0.5 * first  # the first kind shares more words
    strata = rng.integers(0, 2, (60, 900))
    by_words = overlap + 0.3 * rng.normal(size=overlap.shape)
    found = matched_preference(by_words, first, second, overlap, strata)
    assert found["unmatched_preference"].min() > 0.55 and found["preference"].mean() == pytest.approx(0.5, abs=0.02)
    assert found["overlap"].to_numpy() == pytest.approx(0, abs=1e-6)
    found = matched_preference(by_words + first, first, second, overlap, strata)
    assert (found["preference"] > 0.8).all() and (found["lines"] > 290).all()


def test_speakers_are_found_when_they_cause_the_scores_and_shuffled_ones_are_not(world):
    rows, queries = np.arange(150), np.arange(10)
    told, asked = (table["speaker"].to_numpy(zero_copy_only=False) for table in (world.sequences, world.queries))
    scores = np.random.default_rng(1).normal(size=(10, 150)) + 3 * (asked[:, None] == told[None])
    own, others = (speaker_preference(world, scores, rows, queries, shuffled=s) for s in (False, True))
    assert own["preference"].mean() > 0.9 and others["preference"].mean() == pytest.approx(0.5, abs=0.12)
    assert (own["speaker"] == asked).all() and (others["speaker"] != asked).all()


def test_overlap_counts_what_is_said_and_not_the_name(world):
    unnamed = build_lines(Dialogue(**PARAMETERS, named=False), lines())
    rows, queries = np.arange(150), np.arange(10)
    np.testing.assert_allclose(
        word_overlap(world, rows, queries), word_overlap(unnamed, rows, queries), rtol=0.25, atol=1.5
    )


def test_a_campaign_s_only_speaker_has_nobody_to_be_taken_for():
    table = lines().filter([speaker in ("Orla", "narrator") for speaker in lines()["speaker"].to_pylist()])
    small = build_lines(
        Dialogue(**{**PARAMETERS, "lines": 60, "held_out": 5, "queries": 4, "campaigns": ("one", "two")}), table
    )
    scores = np.random.default_rng(2).normal(size=(4, 60))
    for shuffled in (False, True):
        found = speaker_preference(small, scores, np.arange(60), np.arange(4), shuffled=shuffled)
        assert found["preference"].isna().all() and (found["lines"] == 0).all()


def test_shapes_that_do_not_fit_are_refused():
    scores = np.zeros((2, 3))
    with pytest.raises(UserError, match=r"\(2, 4\)"):
        matched_preference(scores, scores, scores, np.zeros((2, 4)), scores)
    with pytest.raises(UserError, match="neighbours=0"):
        matched_preference(scores, scores, scores, scores, scores, neighbours=0)


def test_a_card_shows_what_counts_most_and_what_the_answer_was_learned_from_with_their_ranks(cast_models):
    for run in cast_models:
        scan = run.scan(READ)
        name = OWN[WORLDS[run.arm]][1]
        source = tiers(run.world, scan.rows)[name][scan.queries]
        query = int(source.sum(1).argmax())
        ranked = np.argsort(-scan.raw[query], kind="stable")
        own = np.flatnonzero(source[query][ranked])
        assert len(own) > 2 * ON_CARD
        said = in_the_top(run, query, 0.2)
        assert f"{sum(own < 100)} of the 100 sequences that are the strongest 20%" in said
        assert f"by chance {len(own) / 5:.1f}" in said
        shown = card(run, query).cards[0].top
        assert [row.rank for row in shown[:ON_CARD]] == [1, 2]
        assert len(shown) == 2 * ON_CARD and {row.rank - 1 for row in shown[ON_CARD:]} <= set(own.tolist())
        assert [row.source == RELATIONS[name] for row in shown] == [row.rank - 1 in own for row in shown]
