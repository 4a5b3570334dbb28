"""What a lexical filter keeps: ties by enumeration, relations by what was planted, recall on scores made for the purpose."""

from itertools import pairwise, permutations

import numpy as np
import pytest

from influence_kit.corpora.worlds import atlas, ladder
from influence_kit.errors import UserError
from influence_kit.measures.prefilter import ALL, all_survive, overlap, prefilter, relations, survival


def enumerated(row, member, k):
    """(survival [N], chance that all members survive) over every order of ties."""
    kept, whole, number = np.zeros(len(row)), 0, 0
    for order in permutations(range(len(row))):
        if all(row[a] >= row[b] for a, b in pairwise(order)):
            passes = np.zeros(len(row), bool)
            passes[list(order[:k])] = True
            kept, whole, number = kept + passes, whole + passes[member].all(), number + 1
    return kept / number, whole / number


def test_ties_are_broken_at_random():
    row, member = np.array([1.0, 3, 1, 0, 1, 3]), np.array([1, 1, 1, 0, 0, 0], bool)
    for k in range(1, 7):
        kept, whole = enumerated(row, member, k)
        np.testing.assert_allclose(survival(row[None], k)[0], kept)
        np.testing.assert_allclose(all_survive(row[None], member[None], k)[0], whole)
        assert survival(row[None], k).sum() == pytest.approx(k)


@pytest.fixture(scope="module")
def small_atlas():
    parameters = {"entities": 12, "relations": 2, "values": 6, "documents": 600, "most_supporters": 200}
    return atlas.build(atlas.Atlas(**parameters, canaries=2, repetitions=(1, 4), noise_share=0.2, held_out=20, queries=4))


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


def test_verbatim_copies_pass_the_filter_and_the_other_language_does_not(small_atlas):
    rows, queries = np.arange(small_atlas.sequences.num_rows), np.arange(small_atlas.queries.num_rows)
    kinds, lexical = relations(small_atlas, rows, queries), overlap(small_atlas, rows, queries)
    passes = survival(lexical, 30)
    kept = {name: passes[member].mean() for name, member in kinds.items()}
    assert kept["verbatim"] == 1
    assert kept["same fact, same language"] > 2 * kept["same fact, other language"]


def test_recall_of_scores_that_follow_the_filter_or_oppose_it(small_ladder):
    rows, queries = np.arange(small_ladder.sequences.num_rows), np.arange(8)
    lexical = overlap(small_ladder, rows, queries) + 1e-6 * np.random.default_rng(0).random((8, len(rows)))
    along = prefilter(small_ladder, lexical, rows, queries, (0.01, 1), lexical)
    every = along[along["relation"] == ALL]
    assert (every["top"] == 10).all() and (every["kept"] == 10).all() and (every["whole"] == 1).all()
    parts = along[along["relation"] != ALL].groupby(["query", "share"])[["top", "kept"]].sum()
    assert (parts == 10).to_numpy().all() and along.loc[along["relation"] != ALL, "whole"].isna().all()
    against = prefilter(small_ladder, -lexical, rows, queries, (0.5, 1), lexical)
    sums = against[against["relation"] == ALL].groupby("share")[["kept", "whole"]].mean()
    assert sums.loc[0.5].tolist() == [0, 0] and sums.loc[1].tolist() == [10, 1]


def test_a_random_filter_keeps_its_share(small_ladder):
    rows, queries = np.arange(small_ladder.sequences.num_rows), np.arange(8)
    rng = np.random.default_rng(1)
    values = rng.normal(size=(8, len(rows)))
    found = prefilter(small_ladder, values, rows, queries, (0.2,), rng.random(values.shape), k=200)
    every = found[found["relation"] == ALL]
    assert every["kept"].sum() / every["top"].sum() == pytest.approx(0.2, abs=0.03)


def test_a_world_without_known_relations_is_refused(small_ladder):
    from dataclasses import replace

    with pytest.raises(UserError, match="no relations are known in the world 'other'"):
        relations(replace(small_ladder, name="other"), np.arange(3), np.arange(2))


def test_overlap_sees_the_response_word_of_ladder_and_not_the_rule():
    small = {"agent_classes": 4, "event_classes": 4, "response_classes": 4, "class_words": 8, "flavours": 2}
    world = ladder.build(ladder.Ladder(**small, documents=3000, queries=12, asked=2, held_out=50, dropped_cells=4))
    rows, queries = np.arange(world.sequences.num_rows), np.arange(12)
    values, members = overlap(world, rows, queries, b=0.75), ladder.tiers(world, rows)
    sharing = [values[members[tier][queries]].mean() for tier in ("T2", "T0r", "T3", "T5")]
    assert sharing[0] == pytest.approx(sharing[1], rel=0.05) and sharing[1] > 2 * max(sharing[2:])
