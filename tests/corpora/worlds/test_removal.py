"""Worlds without some of what they say: what goes, what stays, and what queries know of it."""

import numpy as np
import pytest

from influence_kit.corpora.world import World, token_matrix
from influence_kit.corpora.worlds.atlas import STATEMENT, Atlas, build
from influence_kit.corpora.worlds.ladder import Ladder
from influence_kit.corpora.worlds.ladder import build as ladder
from influence_kit.corpora.worlds.procedures import Procedures
from influence_kit.corpora.worlds.procedures import build as procedures
from influence_kit.corpora.worlds.removal import without_copies, without_names, without_procedure, without_translations
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
    for tokens, facts, kind in zip(
        token_matrix(less.sequences), facts_of(less), column(less.sequences, "kind"), strict=True
    ):
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


@pytest.fixture(scope="module")
def texts():
    return procedures(Procedures(documents=4000, shown_share=0.5, held_out=40, queries=600, scored=20))


def test_a_procedure_goes_but_for_some_names_and_names_go_but_for_some_procedures(texts):
    removed = {"procedure": without_procedure(texts, seed=5), "names": without_names(texts, seed=5)}
    treated = column(removed["procedure"].queries, "treated")
    assert np.array_equal(treated, column(removed["names"].queries, "treated")) and treated.sum() >= 10
    counts, of = {}, {name: column(texts.sequences, name) for name in ("kind", "procedure", "name", "other")}
    for which, less in removed.items():
        gone = ~untouched(texts, less)
        counts[which] = [(gone & (of["kind"] == kind)).sum() for kind in ("maths", "code")]
        assert np.array_equal(of["kind"], column(less.sequences, "kind"))
        for kind in ("maths", "code"):
            here, asked = gone & (of["kind"] == kind), treated & (column(texts.queries, "kind") == kind)
            wanted = np.unique(column(texts.queries, "procedure")[asked])
            names = np.unique([column(texts.queries, name)[asked] for name in ("name", "other")])
            assert len(wanted) and np.isin(of["procedure"][here], wanted).all() == (which == "procedure")
            assert not np.isin(of["procedure"][here], wanted).any() or which == "procedure"
            shares = np.isin(of["name"][here], names), np.isin(of["other"][here], names)
            assert not (shares[0] & shares[1]).any() if which == "procedure" else (shares[0] | shares[1]).all()
            # What comes in its place has neither.
            now = {name: column(less.sequences, name)[here] for name in of}
            assert not np.isin(now["procedure"], wanted).any() and not np.isin([now["name"], now["other"]], names).any()
            # And no text of the treated queries' own procedure and names has gone.
            kept = (
                (of["kind"] == kind)
                & np.isin(of["procedure"], wanted)
                & np.isin(of["name"], names)
                & np.isin(of["other"], names)
            )
            assert not gone[kept].any() and kept.any()
    assert min(counts["names"]) > 100
    # Some that stand in happen to be the same text, so a few fewer are seen to have gone.
    assert counts["names"] == pytest.approx(counts["procedure"], abs=3)


def test_copies_and_procedures_are_taken_from_their_worlds_alone(texts):
    with pytest.raises(UserError, match="'procedures' has no canaries"):
        without_copies(texts, seed=0)
    with pytest.raises(UserError, match="1 canary is planted 1 times"):
        without_copies(make(canaries=1, repetitions=(1, 4)), seed=0)
    for remove in (without_procedure, without_names):
        with pytest.raises(UserError, match="'atlas' has no procedures"):
            remove(make(), seed=0)
    with pytest.raises(UserError, match="asks for what is drawn: give the world more than 2 queries"):
        without_names(procedures(Procedures(documents=400, held_out=20, queries=2, scored=2)), seed=0)
    with pytest.raises(UserError, match="cannot be halved"):
        without_names(
            procedures(
                Procedures(documents=400, held_out=20, queries=20, scored=4, names=2, things=2, variables=2, verbs=1)
            ),
            seed=0,
        )
