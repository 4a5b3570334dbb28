"""Agreement with a referee: exact cases, and bad input."""

import numpy as np
import pytest

from influence_kit.errors import UserError
from influence_kit.measures.agreement import found_at, lds, own_effects, slopes

RNG = np.random.default_rng(0)


def test_the_score_of_a_perfect_prediction_is_one_whatever_its_scale():
    scores, members = RNG.standard_normal((3, 20)), RNG.random((12, 20)) < 0.5
    truth = members @ scores.T
    assert lds(scores, members, np.exp(truth)) == pytest.approx([1, 1, 1])
    assert lds(-5 * scores, members, truth) == pytest.approx([-1, -1, -1])


def test_a_score_that_knows_nothing_is_near_zero_and_one_that_does_not_vary_has_none():
    scores, members, outputs = RNG.standard_normal((200, 50)), RNG.random((40, 50)) < 0.5, RNG.standard_normal((40, 200))
    assert abs(lds(scores, members, outputs).mean()) < 0.05
    assert np.isnan(lds(np.zeros((1, 50)), members, outputs[:, :1])[0])


@pytest.mark.parametrize(
    ("shapes", "message"),
    [(((2, 5), (4, 6), (4, 2)), "Scores have shape"), (((2, 5), (4, 5), (2, 4)), "outputs"), (((2, 5), (2, 5), (2, 2)), "too few")],
)
def test_shapes_that_do_not_fit_are_refused(shapes, message):
    with pytest.raises(UserError, match=message):
        lds(*(np.ones(shape) for shape in shapes))


def test_the_slope_says_what_a_score_must_be_multiplied_with():
    scores = RNG.standard_normal((2, 30))
    assert slopes(0.2 * scores, scores) == pytest.approx([0.2, 0.2])
    assert np.isnan(slopes(scores, 0 * scores)).all()


def test_precision_and_recall_among_the_highest():
    scores = np.array([[5.0, 4, 3, 2, 1]] * 2)
    planted = np.array([[True, False, True, True, False], [False] * 5])
    precision, recall = found_at(scores, planted, 2)
    assert precision[0] == 0.5 and recall[0] == 0.5 and np.isnan(recall[1])
    assert found_at(scores, planted, 4)[1][0] == 1  # all three of three


def test_own_effects_are_what_others_do_not_lose():
    rng = np.random.default_rng(0)
    asked, log_p = np.array([4, 1, 2]), rng.normal(size=(3, 2, 2, 5))
    found = own_effects(log_p, asked)
    for k, c, r in np.ndindex(3, 2, 2):
        others = [log_p[j, c, r, asked[k]] for j in range(3) if j != k]
        assert found[k, c, r] == pytest.approx(log_p[k, c, r, asked[k]] - np.mean(others))
    # What every training loses alike is no effect, and what one query loses by its own alone is all of it.
    log_p = np.zeros((3, 2, 2, 5)) - rng.normal(size=(1, 2, 2, 5))
    log_p[1, 0, :, 1] -= 3
    found = own_effects(log_p, asked)
    assert found[1, 0] == pytest.approx(-3) and np.abs(np.delete(found, 1, 0)).max() < 1e-9
    with pytest.raises(UserError, match="Only one query"):
        own_effects(log_p[:1], asked[:1])
    with pytest.raises(UserError, match=r"give \[K, C, R, Q\]"):
        own_effects(log_p, asked[:2])
