"""Atlas without the copies of some canaries: what goes, what stays, and what queries know of it."""

import numpy as np
import pytest

from influence_kit.corpora.world import World, token_matrix
from influence_kit.corpora.worlds.atlas import Atlas, build
from influence_kit.corpora.worlds.ladder import Ladder
from influence_kit.corpora.worlds.ladder import build as ladder
from influence_kit.corpora.worlds.removal import without_copies
from influence_kit.errors import UserError

SMALL = {
    "entities": 24,
    "relations": 2,
    "values": 8,
    "documents": 2000,
    "most_supporters": 300,
    "queries": 6,
    "canaries": 1,
}


def make(**changes) -> World:
    return build(Atlas(**{**SMALL, "held_out": 50, **changes}))


def column(table, name):
    return table[name].to_numpy(zero_copy_only=False)


def untouched(world, less):
    """Rows that stayed as they were; that nothing else of the world changed."""
    assert less.sequences.schema.equals(world.sequences.schema) and less.held_out.equals(world.held_out)
    assert less.queries.drop_columns(["treated"]).equals(world.queries)
    same = (token_matrix(world.sequences) == token_matrix(less.sequences)).all(1)
    for name in set(world.sequences.column_names) - {"input_ids", "loss_mask", "facts"}:
        assert np.array_equal(column(world.sequences, name)[same], column(less.sequences, name)[same]), name
    return same


def test_half_of_the_canaries_of_each_number_lose_all_their_copies():
    world = make(canaries=4, repetitions=(1, 4))
    less = without_copies(world, seed=5)
    same = untouched(world, less)
    planted, left = column(world.sequences, "canary"), column(less.sequences, "canary")
    treated = column(less.queries, "treated")
    asked, times = column(world.queries, "canary"), column(world.queries, "repetitions")
    assert [treated[times == count].sum() for count in (1, 4)] == [2, 2] and not treated[asked < 0].any()
    for canary, count, gone in zip(asked[asked >= 0], times[asked >= 0], treated[asked >= 0], strict=True):
        assert (left == canary).sum() == (0 if gone else count)
    # Noise stands in their place, verbatim elsewhere in the corpus; nothing but copies went.
    assert np.array_equal(~same, np.isin(planted, asked[treated])) and (left[~same] == -1).all()
    assert (column(less.sequences, "kind")[~same] == "noise").all()
    rows = {row.tobytes() for row in token_matrix(world.sequences)[column(world.sequences, "kind") == "noise"]}
    assert all(row.tobytes() in rows for row in token_matrix(less.sequences)[~same])


def test_it_repeats_and_can_be_kept(tmp_path):
    world = make(canaries=4, repetitions=(1, 4))
    less = without_copies(world, seed=5)
    assert without_copies(world, seed=5).sequences.equals(less.sequences)
    assert not without_copies(world, seed=6).sequences.equals(less.sequences)
    less.save(tmp_path)
    assert World.load(tmp_path).sequences.equals(less.sequences)


def test_copies_are_taken_from_atlas_alone():
    with pytest.raises(UserError, match="'ladder' has no canaries"):
        without_copies(ladder(Ladder(documents=400, held_out=20, queries=4)), seed=0)
    with pytest.raises(UserError, match="1 canary is planted 1 times"):
        without_copies(make(canaries=1, repetitions=(1, 4)), seed=0)
