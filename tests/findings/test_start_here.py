"""Chapter 00: wrong answers are other answers of the same kind."""

import numpy as np
import pandas
import pytest

from influence_kit.corpora.world import batch_of
from influence_kit.corpora.worlds.atlas import Atlas, build
from influence_kit.errors import UserError
from influence_kit.findings.profiles import load_profile
from influence_kit.findings.start_here import lifts, middling, places, reads, wrong_answers


def test_a_wrong_answer_is_another_answer_to_the_same_kind_of_question():
    parameters = {"entities": 12, "relations": 2, "values": 6, "documents": 300, "most_supporters": 100}
    world = build(Atlas(**parameters, canaries=1, repetitions=(1,), held_out=20, queries=6))
    queries = np.flatnonzero(world.queries["kind"].to_numpy(zero_copy_only=False) == "fact")
    asks = wrong_answers(world, queries)
    tokens = batch_of(world.queries, queries)
    assert tokens["loss_mask"].numpy()[range(len(asks)), asks["place"]].all()
    relation = asks["fact"] % 2
    for _, same in asks.groupby(["language", relation]):
        assert set(same["wrong"]) <= set(same["answer"])
        assert (same["wrong"] != same["answer"]).all() or same["answer"].nunique() == 1


def test_another_width_is_made_beforehand_and_one_that_no_model_has_is_refused():
    profile = load_profile("laptop")
    small, large = (planned.size.width for width in (0, 128) for planned in reads(profile, width))
    assert (small, large) == (32, 128)
    with pytest.raises(UserError, match=r"width=17 is not among the profile's models: choose one of \[16, 32"):
        reads(profile, 17)


def test_lifts_are_left_out_where_a_query_is_not_usable():
    values, member = np.arange(20.0)[None].repeat(2, 0), np.arange(20) >= 19
    found = lifts({"last": member}, {"up": values, "down": -values}, 3, np.array([True, False]))
    assert found["ranking"].tolist() == ["up", "up", "down", "down"] and found["lift"].fillna(-1).tolist() == [
        20,
        -1,
        0,
        -1,
    ]


def test_the_query_shown_is_known_by_half_and_stated_often():
    at_end = pandas.DataFrame({"language": [0, 0, 0, 1], "log_p": [-0.45, -0.6, -3.0, -0.5]})
    assert middling(at_end, np.arange(20)[None] < np.array([3, 12, 12, 12])[:, None]) == 1


def test_places_begin_at_the_highest():
    assert places(np.array([0.1, 0.5, 0.5, -1])).tolist() == [3, 1, 2, 4]
