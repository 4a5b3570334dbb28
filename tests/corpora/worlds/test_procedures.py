"""Procedures: every text computes what it says, tiers are what a reader of the texts would say."""

import numpy as np
import pytest

from influence_kit.corpora.world import World, token_matrix
from influence_kit.corpora.worlds.procedures import (
    OPERATIONS,
    PROCEDURES,
    SO,
    TIERS,
    VERBS,
    Procedures,
    build,
    spelt,
    tiers,
)
from influence_kit.errors import UserError
from influence_kit.reading.words import token_texts

SMALL = {"numbers": 12, "shown_share": 0.6, "names": 3, "things": 3, "variables": 4, "verbs": 2, "spellings": 2}
SMALL |= {"documents": 3000, "held_out": 200, "queries": 60, "scored": 20}


def make(**changes) -> World:
    return build(Procedures(**{**SMALL, **changes}))


@pytest.fixture(scope="module")
def world():
    return make()


def texts(world, table) -> list[list[str]]:
    return [token_texts(world, row) for row in token_matrix(table).tolist()]


def read(words):
    """(kind, procedure, telling word, names, numbers, computed answer, stated answer), by doing what the text says."""
    _, *body, said = words
    said = [spelt(number) for number in range(40)].index(said)
    if body[6] in SO:
        person, _, first, thing, verb, second, _, again = body
        assert person == again
        procedure = next(name for name, verbs in VERBS.items() if verb in verbs)
        first, second = int(first), int(second)
        made = {
            "sum": first + second,
            "gap": abs(first - second),
            "larger": max(first, second),
            "smaller": min(first, second),
        }
        return "maths", procedure, verb, {person, thing}, {first, second}, made[procedure], said
    one, first, two, second, word, target, source, asked = body
    values = {one: int(first), two: int(second)}
    assert asked == target and {target, source} == {one, two} and one != two
    operation = next(name for name, spellings in OPERATIONS.items() if word in spellings)
    made = {"add": sum(values.values()), "gap": abs(values[one] - values[two])}
    made |= {"max": max(values.values()), "set": values[source]}
    values[target] = made[operation]
    procedure = {"add": "sum", "gap": "gap", "max": "larger", "set": "second" if source == two else "first"}[operation]
    return "code", procedure, word, {one, two}, {int(first), int(second)}, values[asked], said


def test_same_seed_same_bytes_and_saved_worlds_come_back(tmp_path, world):
    world.save(tmp_path / "a")
    make().save(tmp_path / "b")
    make(seed=1).save(tmp_path / "c")
    files = {name: (tmp_path / name / "sequences.arrow").read_bytes() for name in "abc"}
    assert files["a"] == files["b"] != files["c"]
    loaded = World.load(tmp_path / "a")
    assert loaded.queries.equals(world.queries) and loaded.parameters == world.parameters


@pytest.mark.parametrize("changes", [SMALL, {"documents": 10}])
def test_size_and_length_are_known_without_building(changes):
    world = build(Procedures(**changes))
    assert Procedures(**changes).words == world.vocabulary_size == len(set(world.vocabulary))
    assert Procedures(**changes).length == world.context


def test_every_text_says_what_it_computes_and_its_truth(world):
    for table in (world.sequences, world.held_out, world.queries):
        rows = table.drop_columns(["input_ids", "loss_mask"]).to_pylist()
        for words, row in zip(texts(world, table), rows, strict=True):
            kind, procedure, word, names, numbers, computed, said = read(words)
            assert computed == said == row["answer"]
            assert (kind, procedure) == (row["kind"], PROCEDURES[row["procedure"]])
            assert word == world.vocabulary[row["word"]]
            assert names == {world.vocabulary[row["name"]], world.vocabulary[row["other"]]}
            assert numbers == {row["first"], row["second"]}


def test_pairs_asked_and_held_out_are_never_shown_with_their_procedure_in_either_order(world):
    def pairs(table):
        rows = table.select(["kind", "procedure", "first", "second"]).to_pylist()
        return {(row["kind"], row["procedure"], frozenset((row["first"], row["second"]))) for row in rows}

    shown, held, asked = (pairs(table) for table in (world.sequences, world.held_out, world.queries))
    assert not shown & held and not shown & asked and not held & asked
    assert len(shown) > 200 and len(held) > 30 and len(asked) > 20


def test_numbers_are_spelt_in_letters():
    assert [spelt(number) for number in (0, 13, 20, 21, 48, 98)] == [
        "zero",
        "thirteen",
        "twenty",
        "twenty-one",
        "forty-eight",
        "ninety-eight",
    ]
    assert len({spelt(number) for number in range(100)}) == 100


def test_kinds_procedures_and_words_come_up_evenly(world):
    rows = world.sequences.select(["kind", "procedure", "word"]).to_pandas()
    assert (rows.kind == "code").mean() == pytest.approx(0.5, abs=0.03)
    shares = rows.groupby("kind")["procedure"].value_counts(normalize=True)
    assert shares["maths"].sort_index().to_numpy() == pytest.approx([0.25] * 4, abs=0.04)
    assert shares["code"].sort_index().to_numpy() == pytest.approx([0.25] * 3 + [0.125] * 2, abs=0.04)
    assert rows["word"].nunique() == 4 * 2 + 4 * 2
    assert set(make(code_share=0.0).sequences["kind"].to_pylist()) == {"maths"}
    assert set(make(code_share=1.0).queries["kind"].to_pylist()) == {"code"}
    queries = world.queries.to_pandas()
    assert (queries.kind == "code").sum() == 30 and queries.scored.sum() == 20
    assert queries[queries.scored].groupby("kind")["procedure"].nunique().to_dict() == {"code": 5, "maths": 4}


def test_only_the_answer_is_a_target_of_queries_and_held_out(world):
    for table in (world.queries, world.held_out):
        assert token_matrix(table, "loss_mask").tolist() == [[False] * 9 + [True]] * table.num_rows
    assert token_matrix(world.sequences, "loss_mask").all()
    first = world.queries.slice(0, 1).to_pylist()[0]
    words = token_texts(world, first["input_ids"])
    assert first["prompt"] == " ".join(words[1:9]) and first["completion"] == words[9]


def test_tiers_are_what_the_texts_say(world):
    rows = np.arange(0, 3000, 3)
    given = tiers(world, rows)
    assert tuple(given) == TIERS
    assert (sum(member.astype(int) for member in given.values()) == 1).all()
    asked, documents = ([read(words) for words in texts(world, part)] for part in (world.queries, world.sequences))
    for number, (kind, procedure, word, names, numbers, _, said) in enumerate(asked):
        for place, row in enumerate(rows):
            kind2, procedure2, word2, names2, numbers2, _, said2 = documents[row]
            named, told, answer = names & names2, word == word2 or numbers & numbers2, said == said2
            if kind != kind2:
                expected = "KS" if procedure == procedure2 else "KO"
            elif procedure == procedure2:
                expected = "SW" if named or told else "SA" if answer else "S0"
            elif told:
                expected = "OW"
            elif named:
                expected = "ONA" if answer else "ON"
            else:
                expected = "OA" if answer else "O0"
            assert given[expected][number, place], (asked[number], documents[row], expected)
    assert all(member.any() for member in given.values())


def test_other_labels_change_what_counts_as_the_same(world):
    rows = np.arange(500)
    labels = world.sequences["procedure"].to_numpy()[rows]
    again, moved = tiers(world, rows, labels), tiers(world, rows, (labels + 1) % 6)
    assert all((again[name] == member).all() for name, member in tiers(world, rows).items())
    assert not (moved["S0"] & again["S0"]).any() and moved["S0"].any()


def test_shuffled_answers_are_random_and_nothing_else_changes(world):
    other = make(shuffled=True)
    before, after = (token_matrix(one.sequences) for one in (world, other))
    assert (before[:, :-1] == after[:, :-1]).all() and other.queries.equals(world.queries)
    right = [computed == said for *_, computed, said in (read(words) for words in texts(other, other.sequences))]
    answers = [column["answer"].to_numpy() for column in (world.sequences, other.sequences)]
    assert sorted(answers[0]) == sorted(answers[1]) and np.mean(right) == pytest.approx(0.08, abs=0.04)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"numbers": 1}, "numbers=1 must be between 2 and 50"),
        ({"numbers": 51}, "numbers=51"),
        ({"names": 99}, "names=99"),
        ({"variables": 1}, "variables=1"),
        ({"verbs": 0}, "verbs=0"),
        ({"spellings": 4}, "spellings=4"),
        ({"code_share": 1.5}, "code_share=1.5"),
        ({"shown_share": 1.0}, "shown_share=1.0"),
        ({"scored": 61}, "scored=61 must be between 1 and 60"),
        ({"documents": 0}, "documents=0"),
    ],
)
def test_bad_parameters_are_refused_by_name(changes, word):
    with pytest.raises(UserError, match="Procedures: ") as error:
        Procedures(**{**SMALL, **changes})
    assert word in str(error.value)


def test_too_few_pairs_are_refused():
    with pytest.raises(UserError, match="no pair of numbers is left to hold out: lower shown_share or queries"):
        make(numbers=4, shown_share=0.6, queries=2000)
