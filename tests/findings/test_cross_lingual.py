"""Chapter 05: planted influence gives the numbers that can be told by hand."""

import numpy as np
import pytest

from influence_kit.corpora.worlds.atlas import Atlas, build
from influence_kit.findings.cross_lingual import crossing, per_odds, strongest_sums


def test_what_crosses_is_the_share_on_translations_of_the_strongest_in_the_questions_own_language():
    asked, spoken = np.array([0, 0, 1]), np.array([0, 0, 0, 1, 1, -1])
    own = np.array([[8.0, 4, 1, 99, 99, 99], [1, 8, 4, 0, 0, 0], [0, 0, 0, 8, 4, 0]])
    translated = 0.25 * own
    found = strongest_sums(own, translated, asked, spoken, k=2)
    assert found["own"].tolist() == [12, 12, 12] and found["crossed"].tolist() == [3, 3, 3]
    assert found["unrelated"].tolist()[:2] == [0.25 * (1 + 8), 0.25 * (4 + 1)] and np.isnan(found["unrelated"][2])
    assert crossing(found.assign(crosses=found["crossed"] / found["own"], seed=1)).value == pytest.approx(0.25)
    shuffled = strongest_sums(own, translated[[1, 0, 2]], asked, spoken, k=2)
    assert shuffled["crossed"].tolist() != found["crossed"].tolist()


def test_influence_on_log_odds_does_not_vanish_with_what_is_known():
    p = np.array([0.5, 0.9])
    np.testing.assert_allclose(per_odds(np.ones((2, 3)), np.log(p)), np.repeat([[2.0], [10.0]], 3, axis=1))
    assert np.isfinite(per_odds(np.ones((1, 1)), np.zeros(1))).all()


def test_a_fact_that_one_language_alone_states_is_asked_there_and_word_for_word_in_the_other():
    about = {"entities": 12, "relations": 2, "values": 6, "documents": 600, "most_supporters": 200, "held_out": 20}
    world = build(Atlas(**about, canaries=1, repetitions=(1,), queries=2, alone=3))
    table = world.queries.to_pandas()
    own, other = (table[table["kind"] == kind] for kind in ("alone", "translation"))
    assert len(own) == len(other) == 6 and own["fact"].tolist() == other["fact"].tolist()
    assert (own["language"].to_numpy() + other["language"].to_numpy() == 1).all() and own["scored"].all()
    assert (own["statements_same"] > 0).all() and (other["statements_same"] == 0).all()
    assert not set(table[table["kind"] == "fact"].index) & set(own.index)
