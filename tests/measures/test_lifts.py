"""Lifts, mass shares, ranks, AUC, recall and precision against hand-made and library values."""

import numpy as np
import pytest

from influence_kit.errors import UserError
from influence_kit.measures import lifts

# Ten sequences, the top fifth is two of them: columns 0 and 1 for the first query, 9 and 8 for the second.
SCORES = np.array([[9.0, 7, 6, 5, 4, 3, 2, 1, 0, -8], [0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
TIER = np.array([1, 0, 1, 0, 0, 0, 0, 0, 0, 1], dtype=bool)


def test_top_members_have_the_exact_count_and_break_ties_by_index():
    scores = np.array([[1.0, 3, 3, 3, 2, 3], [0, 0, 0, 0, 0, 0]])
    top = lifts.top_members(scores, fraction=1 / 3)
    assert np.flatnonzero(top[0]).tolist() == [1, 2] and np.flatnonzero(top[1]).tolist() == [0, 1]
    random = np.random.default_rng(0).integers(0, 4, (20, 999)).astype(float)
    assert (lifts.top_members(random, 0.01).sum(1) == 10).all()


def test_top_members_two_sided():
    assert np.flatnonzero(lifts.top_members(SCORES, 0.2)[0]).tolist() == [0, 1]
    assert np.flatnonzero(lifts.top_members(SCORES, 0.2, two_sided=True)[0]).tolist() == [0, 9]


@pytest.mark.parametrize(("n", "count"), [(700, 7), (701, 8), (99, 1), (16000, 160)])
def test_top_count(n, count):
    assert lifts.top_count(n, 0.01) == count


def test_lift_by_hand():
    # Query 0: one of the two top sequences is in the tier of three: (1/2) / (3/10). Query 1 likewise.
    assert lifts.lift(SCORES, TIER, 0.2) == pytest.approx([5 / 3, 5 / 3])
    assert lifts.lift(SCORES, TIER, 0.2, two_sided=True) == pytest.approx([10 / 3, 5 / 3])
    per_query = np.stack([TIER, np.zeros(10, dtype=bool)])
    assert lifts.lift(SCORES, per_query, 0.2)[0] == pytest.approx(5 / 3)
    assert np.isnan(lifts.lift(SCORES, per_query, 0.2)[1])


def test_lift_of_chance_is_one():
    rng = np.random.default_rng(0)
    assert lifts.lift(rng.normal(size=(160, 4000)), rng.random(4000) < 0.2).mean() == pytest.approx(1, abs=0.1)


def test_mass_share_by_hand():
    assert lifts.mass_share(SCORES, TIER, 0.2) == pytest.approx([9 / 16, 9 / 17])
    assert lifts.mass_share(SCORES, TIER, 0.2, two_sided=True) == pytest.approx([1, 9 / 17])
    assert lifts.mass_share(SCORES, TIER, None) == pytest.approx([15 / 37, 11 / 45])
    assert np.isnan(lifts.mass_share(-np.ones((1, 5)), np.ones(5, dtype=bool), 0.2)).all()


def test_ranks():
    assert lifts.ranks(SCORES, np.array([0, 0])).tolist() == [1, 10]
    assert np.isnan(lifts.ranks(SCORES, np.array([3, -1]))[1])
    assert lifts.ranks(SCORES, np.broadcast_to(TIER, (2, 10))).tolist() == [1, 1]
    assert lifts.ranks(np.ones((1, 9)), np.array([2])).tolist() == [5]


def test_auc_equals_sklearn_with_ties():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 8, (6, 200)).astype(float), rng.random((6, 200)) < 0.2
    expected = [roc_auc_score(y, s) for y, s in zip(positive, scores, strict=True)]
    assert lifts.auc(scores, positive) == pytest.approx(expected, abs=1e-12)
    assert lifts.auc(scores[0], positive[0]) == pytest.approx(expected[0])
    assert lifts.auc(scores, positive[0])[1] == pytest.approx(roc_auc_score(positive[0], scores[1]))
    assert np.isnan(lifts.auc(scores[0], np.zeros(200, dtype=bool)))


def test_recall_and_precision_by_hand():
    assert lifts.recall_at(SCORES, np.array([2, 0]), k=3).tolist() == [1, 0]
    assert lifts.recall_at(SCORES, TIER, k=3) == pytest.approx([2 / 3, 1 / 3])
    assert lifts.precision_at(SCORES, TIER, k=2).tolist() == [0.5, 0.5]
    assert lifts.precision_at(SCORES, TIER, k=50).tolist() == [0.3, 0.3]
    assert np.isnan(lifts.recall_at(SCORES, np.array([-1, 0]), k=1)[0])
    assert np.isnan(lifts.precision_at(SCORES, np.array([-1, 0]), k=1)[0])


def test_rank_and_recall_agree():
    rng = np.random.default_rng(0)
    scores, positive = rng.normal(size=(50, 300)), rng.integers(0, 300, 50)
    for k in (1, 15, 300):
        assert (lifts.recall_at(scores, positive, k) == (lifts.ranks(scores, positive) <= k)).all()


def test_refusals_name_the_value():
    with pytest.raises(UserError, match="1 of 10 scores are nan"):
        lifts.top_members(np.where(np.arange(10) == 3, np.nan, 1.0))
    with pytest.raises(UserError, match=r"\(7,\)"):
        lifts.lift(SCORES, np.ones(7, dtype=bool))
    with pytest.raises(UserError, match="between 2 and 10"):
        lifts.ranks(SCORES, np.array([2, 10]))
    with pytest.raises(UserError, match="1.5"):
        lifts.top_members(SCORES, 1.5)
    with pytest.raises(UserError, match="k is 0"):
        lifts.recall_at(SCORES, TIER, 0)
