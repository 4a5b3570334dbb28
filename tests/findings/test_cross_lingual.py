"""Chapter 05: planted influence gives the numbers that can be told by hand."""

import re

import numpy as np
import pytest

from influence_kit.corpora.worlds.atlas import Atlas, build
from influence_kit.findings.cross_lingual import crossing, crossing_cards, per_odds, read, strongest_sums
from influence_kit.reading.style import size_label
from tests.findings.conftest import ATLAS


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
    world = build(Atlas(**ATLAS))
    table = world.queries.to_pandas()
    own, other = (table[table["kind"] == kind] for kind in ("alone", "translation"))
    assert len(own) == len(other) == 6 and own["fact"].tolist() == other["fact"].tolist()
    assert (own["language"].to_numpy() + other["language"].to_numpy() == 1).all() and own["scored"].all()
    assert (own["statements_same"] > 0).all() and (other["statements_same"] == 0).all()
    assert not set(table[table["kind"] == "fact"].index) & set(own.index)


@pytest.mark.parametrize("score", ["raw", "relatif"])
def test_the_card_is_of_the_question_nearest_to_the_numbers_and_says_what_each_sequence_shown_crosses(
    atlas_models, score
):
    sums = [[read(run, score, k)[["own", "crossed"]].to_numpy() for k in range(1, 5)] for run in atlas_models]
    for place in range(len(sums[0][0])):
        # of each of the four strongest, in each model
        each = [np.diff([[0, 0], *(table[place] for table in tables)], axis=0) for tables in sums]
        numbers = [tables[-1][place, 1] / tables[-1][place, 0] for tables in sums]
        said = crossing_cards(atlas_models, numbers, score).html
        for run, number in zip(atlas_models, numbers, strict=True):
            assert f"{number:.2f} with {size_label(run.parameters)}" in said
        asked = (
            atlas_models[0].world.queries.take(atlas_models[0].scan(kind="translation").queries[[place]]).to_pylist()[0]
        )
        assert f"{asked['prompt']} → {asked['completion']}" in said
        parts = sorted(f"{crossed / own:.2f}" for model in each for own, crossed in model)
        assert sorted(re.findall(r"does (\S+) of it to the translation", said)) == parts
