"""Atlas without translations: what goes, what stays, and what queries know of it."""

import numpy as np
import pytest

from influence_kit.corpora.atlas import STATEMENT, Atlas, build
from influence_kit.corpora.ladder import Ladder
from influence_kit.corpora.ladder import build as ladder
from influence_kit.corpora.removal import without_translations
from influence_kit.corpora.world import World, token_matrix
from influence_kit.errors import UserError

SMALL = {"entities": 24, "relations": 2, "values": 8, "documents": 2000, "most_supporters": 300, "queries": 6, "canaries": 1}


def make(**changes) -> World:
    return build(Atlas(**{**SMALL, "held_out": 50, **changes}))


def column(table, name):
    return table[name].to_numpy(zero_copy_only=False)


def facts_of(world):
    return np.stack(column(world.sequences, "facts"))


@pytest.fixture(scope="module")
def worlds():
    world = make()
    return world, without_translations(world, seed=5)


def test_nothing_else_changes(worlds):
    world, less = worlds
    before, after = token_matrix(world.sequences), token_matrix(less.sequences)
    changed = (before != after).any(1)
    assert changed.any() and (column(world.sequences, "language")[changed] == 1).all()
    assert less.sequences.schema.equals(world.sequences.schema) and less.held_out.equals(world.held_out)
    assert less.queries.drop_columns(["treated"]).equals(world.queries)
    for name in ("language", "kind", "canary"):
        assert less.sequences[name].equals(world.sequences[name]), name
    assert np.array_equal(token_matrix(less.sequences, "loss_mask"), token_matrix(world.sequences, "loss_mask"))


def test_the_second_language_no_longer_states_the_treated_facts(worlds):
    world, less = worlds
    language = column(world.sequences, "language")
    before, after = facts_of(world), facts_of(less)
    both = np.intersect1d(before[language == 0], before[language == 1])
    both = both[both >= 0]
    gone = np.setdiff1d(both, after[language == 1])
    assert len(gone) == len(both) // 2
    asked = column(world.queries, "fact")
    assert np.array_equal(column(less.queries, "treated"), np.isin(asked, gone))
    # What came in its place is known to the second language alone, and says so in its tokens.
    put = after[before != after]
    assert not np.isin(put, before[language == 0]).any() and len(put)


def test_tokens_say_what_the_columns_say(worlds):
    _, less = worlds
    truth = {}
    for tokens, facts, kind in zip(token_matrix(less.sequences), facts_of(less), column(less.sequences, "kind"), strict=True):
        for place, fact in enumerate(facts if kind == "facts" else []):
            statement = tokens[2 + place * (STATEMENT + 1) : 2 + place * (STATEMENT + 1) + STATEMENT]
            truth.setdefault((fact, column_language(statement)), set()).add((statement[0], statement[3]))
    assert all(len(said) == 1 for said in truth.values())


def column_language(statement):
    """The full stop tells the language."""
    return int(statement[4])


def test_it_repeats_and_can_be_kept(worlds, tmp_path):
    world, less = worlds
    assert without_translations(world, seed=5).sequences.equals(less.sequences)
    assert not without_translations(world, seed=6).sequences.equals(less.sequences)
    less.save(tmp_path)
    assert World.load(tmp_path).sequences.equals(less.sequences)


def test_other_worlds_are_refused():
    with pytest.raises(UserError, match="'ladder' states no facts in two languages"):
        without_translations(ladder(Ladder(documents=400, held_out=20, queries=4)), seed=0)
    with pytest.raises(UserError, match="both_share between 0 and 1"):
        without_translations(make(both_share=1.0), seed=0)
