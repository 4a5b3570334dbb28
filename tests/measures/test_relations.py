"""What sequences are to queries: by what was planted."""

from dataclasses import replace

import numpy as np
import pytest

from influence_kit.corpora.worlds import atlas, ladder
from influence_kit.errors import UserError
from influence_kit.measures.relations import relations


@pytest.fixture(scope="module")
def small_atlas():
    parameters = {"entities": 12, "relations": 2, "values": 6, "documents": 600, "most_supporters": 200}
    return atlas.build(
        atlas.Atlas(**parameters, canaries=2, repetitions=(1, 4), noise_share=0.2, held_out=20, queries=4)
    )


@pytest.fixture(scope="module")
def small_ladder():
    return ladder.build(ladder.Ladder(documents=2000, held_out=20, queries=8))


def test_every_pair_has_one_relation_and_it_is_the_planted_one(small_atlas, small_ladder):
    for world in (small_atlas, small_ladder):
        rows, queries = np.arange(0, world.sequences.num_rows, 2), np.arange(world.queries.num_rows)
        kinds = relations(world, rows, queries)
        assert (sum(member.astype(int) for member in kinds.values()) == 1).all()
        assert all(member.any() for member in kinds.values())
    kinds = relations(small_atlas, np.arange(small_atlas.sequences.num_rows), np.arange(small_atlas.queries.num_rows))
    repetitions = small_atlas.queries["repetitions"].to_numpy()
    np.testing.assert_array_equal(kinds["verbatim"].sum(1), np.where(repetitions > 0, repetitions, 0))


def test_a_world_without_known_relations_is_refused(small_ladder):
    with pytest.raises(UserError, match="no relations are known in the world 'other'"):
        relations(replace(small_ladder, name="other"), np.arange(3), np.arange(2))
