"""Matched preferences: by hand, and on a world of lines with scores whose cause is known."""

import numpy as np
import pytest

from influence_kit.corpora.texts.dialogue import Dialogue, build
from influence_kit.errors import UserError
from influence_kit.measures.dialogue import matched_preference, side_preference, speaker_preference, word_overlap
from tests.corpora.texts.test_dialogue import PARAMETERS, lines


@pytest.fixture(scope="module")
def world():
    return build(Dialogue(**PARAMETERS), lines())


def test_partners_come_next_in_overlap_on_both_sides_and_from_one_stratum():
    # 0 lies between 2 and 3; 1 lies above all of the second kind; 4 is in a stratum of its own, 5 is of neither kind.
    overlap = np.array([[1.0, 9.0, 0.9, 1.1, 1.0, 1.0, 0.1, 5.0]])
    first, second = np.array([[1, 1, 0, 0, 0, 0, 0, 0]], bool), np.array([[0, 0, 1, 1, 1, 0, 1, 1]], bool)
    strata = np.array([[0, 0, 0, 0, 1, 0, 0, 0]])
    scores = np.array([[3.0, 2.0, 2.5, 3.0, 99.0, 99.0, 4.0, 0.0]])
    row = matched_preference(scores, first, second, overlap, strata, neighbours=1).iloc[0]
    assert row["preference"] == pytest.approx((1 + 0.5) / 2, abs=1e-6) and row["lines"] == 1
    assert row["overlap"] == pytest.approx(0, abs=1e-6) and row["unmatched_overlap"] == pytest.approx((1 + 0 + 0.5 + 1 + 0 + 5) / 10)
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


def test_sides_are_compared_without_the_speaker_s_own_lines(world):
    rows, queries = np.arange(150), np.arange(10)
    told, asked = (table["speaker"].to_numpy(zero_copy_only=False) for table in (world.sequences, world.queries))
    side, sided = (table["side"].to_numpy(zero_copy_only=False) for table in (world.sequences, world.queries))
    # Own lines are last: were they counted, their side would lose.
    scores = np.random.default_rng(3).normal(size=(10, 150)) + 4 * (side[None] == sided[:, None])
    found = side_preference(world, scores - 99 * (asked[:, None] == told[None]), rows, queries)
    assert (found["preference"].isna() == (found["lines"] == 0)).all() and (found["lines"] > 0).sum() >= 5
    assert found["preference"].mean() > 0.9


def test_overlap_counts_what_is_said_and_not_the_name(world):
    unnamed = build(Dialogue(**PARAMETERS, named=False), lines())
    rows, queries = np.arange(150), np.arange(10)
    np.testing.assert_allclose(word_overlap(world, rows, queries), word_overlap(unnamed, rows, queries), rtol=0.25, atol=1.5)


def test_a_campaign_s_only_speaker_has_nobody_to_be_taken_for():
    table = lines().filter([speaker in ("Orla", "narrator") for speaker in lines()["speaker"].to_pylist()])
    small = build(Dialogue(**{**PARAMETERS, "lines": 60, "held_out": 5, "queries": 4, "campaigns": ("one", "two")}), table)
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
