"""Ladder: the rules hold in the texts, tiers are what a reader of the texts would say, drops take what they say."""

import numpy as np
import pytest

from influence_kit.corpora.world import World, token_matrix
from influence_kit.corpora.worlds.ladder import TIERS, Ladder, build, tiers
from influence_kit.corpora.worlds.words import listed
from influence_kit.errors import UserError
from influence_kit.reading.words import token_texts

SMALL = {"agent_classes": 4, "event_classes": 4, "response_classes": 4, "class_words": 8, "flavours": 2}
SMALL |= {"documents": 6000, "queries": 12, "asked": 2, "held_out": 200, "dropped_cells": 4}
WORDS = listed("ladder")
# Class of each word, as spelt; agents and responses by the first letter, events without.
KINDS = {word: kind for kind, words in WORDS["events"].items() for word in words}
KINDS |= {
    word: kind
    for name in ("agents", "responses")
    for kind, letters in WORDS[name].items()
    for words in letters.values()
    for word in words
}


def make(**changes) -> World:
    return build(Ladder(**{**SMALL, **changes}))


@pytest.fixture(scope="module")
def world():
    return make()


def texts(world, table) -> list[list[str]]:
    return [token_texts(world, row) for row in token_matrix(table).tolist()]


def read(words):
    """(agent, event, response), their classes and the letters that flavours are; None for noise."""
    if words[3] not in WORDS["frames"]:
        return None
    _, _, agent, _, event, _, response = words
    kind = [KINDS[word.removesuffix("-2")] for word in (agent, event, response)]
    return (agent, event, response), kind, [agent[0], response[0]]


def test_same_seed_same_bytes_and_saved_worlds_come_back(tmp_path, world):
    world.save(tmp_path / "a")
    make().save(tmp_path / "b")
    make(seed=1).save(tmp_path / "c")
    files = {name: (tmp_path / name / "sequences.arrow").read_bytes() for name in "abc"}
    assert files["a"] == files["b"] != files["c"]
    loaded = World.load(tmp_path / "a")
    assert loaded.queries.equals(world.queries) and loaded.parameters == world.parameters


def test_size_and_length_are_known_without_building(world):
    assert Ladder(**SMALL).words == world.vocabulary_size == len(set(world.vocabulary))
    assert Ladder(**SMALL).length == world.context
    assert Ladder().words == build(Ladder(documents=100)).vocabulary_size


def test_every_text_follows_one_rule_table_and_keeps_the_flavour(world):
    rules, shown = {}, set()
    for table in (world.sequences, world.held_out, world.queries):
        for words in texts(world, table):
            if found := read(words):
                _, (agents, events, responses), (first, second) = found
                assert rules.setdefault((agents, events), responses) == responses and first == second
    assert len(rules) == 16 and all(list(rules.values()).count(word) == 4 for word in set(rules.values()))
    for words in texts(world, world.sequences):
        if found := read(words):
            shown.add(found[0][:2])
    held = {read(words)[0][:2] for words in texts(world, world.held_out)}
    asked = {read(words)[0][:2] for words in texts(world, world.queries)}
    assert len(asked) == world.queries.num_rows
    assert not shown & held and not shown & asked and not held & asked


def test_shares_of_shown_pairs_and_noise(world):
    found = [read(words) for words in texts(world, world.sequences)]
    pairs = {item[0][:2] for item in found if item}
    assert len(pairs) == 16 * round(0.3 * 64)
    assert np.mean([item is None for item in found]) == pytest.approx(0.05, abs=0.01)
    kind = world.sequences["kind"].to_pylist()
    assert [item is None for item in found] == [name == "noise" for name in kind]
    assert set(make(noise_share=0.0).sequences["kind"].to_pylist()) == {"rule"}


def test_only_the_response_is_a_target_of_queries_and_held_out(world):
    for table in (world.queries, world.held_out):
        assert token_matrix(table, "loss_mask").tolist() == [[False] * 6 + [True]] * table.num_rows
    assert token_matrix(world.sequences, "loss_mask").all()
    first = world.queries.slice(0, 1).to_pylist()[0]
    words = token_texts(world, first["input_ids"])
    assert first["prompt"] == " ".join(words[1:6]) and first["completion"] == words[6]


def test_tiers_are_what_the_texts_say(world):
    rows = np.arange(0, 3000, 2)
    given = tiers(world, rows)
    assert tuple(given) == TIERS
    assert (sum(member.astype(int) for member in given.values()) == 1).all()
    asked, documents = (texts(world, table) for table in (world.queries, world.sequences))
    for number, query in enumerate(asked):
        (agent, event, response), (a, e, r), _ = read(query)
        for place, row in enumerate(rows):
            expected = "T5"
            if found := read(documents[row]):
                (agent2, event2, response2), (a2, e2, r2), _ = found
                same, shared = (a, e) == (a2, e2), {agent, event, response} & {agent2, event2, response2}
                if same:
                    expected = "T1" if shared & {agent, event} else "T2" if shared else "T3"
                elif shared:
                    expected = "T0a" if agent in shared else "T0e" if event in shared else "T0r"
                elif a == a2 or e == e2 or r == r2:
                    expected = "T4"
            assert given[expected][number, place], (query, documents[row], expected)
    assert all(member.any() for member in given.values())


def test_scored_queries_are_half_treated_and_from_many_combinations(world):
    queries = world.queries.to_pandas()
    assert queries.scored.sum() == 12 and (queries.scored & queries.treated).sum() == 6
    assert (
        queries[queries.scored & queries.treated].combination.nunique()
        == queries[queries.treated].combination.nunique()
        == 4
    )
    per = queries.groupby("combination")
    assert (per.size() == 2).all() and (per.agent.nunique() == 1).all() and (per.treated.nunique() == 1).all()
    assert not set(queries[queries.treated].response) & set(queries[~queries.treated].response)
    assert not set(queries[queries.treated].cell) & set(queries[~queries.treated].cell)


@pytest.mark.parametrize("tier", ["T1", "T2", "T3", "T0r", "random"])
def test_a_dropped_tier_goes_from_treated_queries_and_not_from_control(world, tier):
    less = make(dropped=tier)
    assert less.vocabulary == world.vocabulary and less.held_out.equals(world.held_out)
    assert less.queries.equals(world.queries)
    before, after = (token_matrix(one.sequences) for one in (world, less))
    replaced = less.sequences["replaced"].to_numpy(zero_copy_only=False)
    # In place: other rows are untouched, the replaced ones are noise, and were rules before.
    assert replaced.any() and not world.sequences["replaced"].to_numpy(zero_copy_only=False).any()
    assert (before[~replaced] == after[~replaced]).all()
    assert all(read(token_texts(less, row)) is None for row in after[replaced])
    assert all(read(token_texts(world, row)) is not None for row in before[replaced])
    queries, given = world.queries.to_pandas(), tiers(world)
    treated, control = queries.treated.to_numpy(), ~queries.treated.to_numpy()
    own = {name: member[treated][:, replaced] for name, member in given.items()}
    if tier == "random":
        assert not any(own[name].any() for name in ("T1", "T2", "T3", "T0r", "T0a", "T0e"))
    else:
        for number in queries[treated].combination.unique():
            where = (queries[treated].combination == number).to_numpy()
            of_cell = own[tier][where]
            assert (of_cell.all(0) == of_cell.any(0)).all() and of_cell.any()
            for other in {"T1", "T2", "T3"} - {tier}:
                assert not own[other][where].any()
    # Nothing of a control query's rule goes; words of T3 and random documents are some control query's responses.
    for name in {"T1", "T2", "T3"} | ({"T0r"} if tier in ("T1", "T2", "T0r") else set()):
        assert not given[name][control][:, replaced].any()


def test_drops_are_matched_in_number():
    world = build(Ladder(documents=40_000))

    def number(tier, **changes):
        return np.sum(build(Ladder(documents=40_000, dropped=tier, **changes)).sequences["replaced"].to_numpy(False))

    queries, droppable = world.queries.to_pandas(), 0
    member = tiers(world)["T2"]
    for combination in queries[queries.treated].combination.unique():
        droppable += member[(queries.combination == combination).to_numpy()].all(0).sum()
    assert droppable > 900
    assert [number(tier) for tier in ("T2", "T3", "T0r", "random")] == [droppable] * 4
    assert number("T2", dropped_dose=0.5) == pytest.approx(droppable / 2, abs=8)
    assert number("T0r", dropped_dose=3.0) == pytest.approx(3 * droppable, abs=1)
    assert (
        number("T1", dropped_dose=9.0) < droppable
    )  # all there are: fewer agents share the word than have the flavour


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"agent_classes": 9}, "agent_classes=9"),
        ({"shown_share": 1.0}, "shown_share=1.0"),
        ({"flavours": 6, "class_words": 5}, "flavours=6"),
        ({"asked": 8}, "asked=8"),
        ({"dropped": "T9"}, "dropped='T9'"),
        ({"dropped": "T1+random"}, "dropped='T1+random'"),
        ({"dropped_cells": 5}, "dropped_cells=5 must be between 0 and 4"),
        ({"noise_share": 1.0}, "noise_share=1.0"),
        ({"dropped_dose": 0.0}, "dropped_dose=0.0"),
    ],
)
def test_bad_parameters_are_refused_by_name(changes, word):
    with pytest.raises(UserError, match="Ladder: ") as error:
        Ladder(**{**SMALL, **changes})
    assert word in str(error.value)


def test_too_few_unshown_pairs_are_refused():
    with pytest.raises(UserError, match="lower asked or shown_share"):
        make(shown_share=0.95, asked=6)
