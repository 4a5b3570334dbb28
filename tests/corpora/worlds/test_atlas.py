"""Atlas: what is planted is there, in the numbers that were asked for; same seed, same bytes."""

import numpy as np
import pytest

from influence_kit.corpora.world import World, batch_of, token_matrix
from influence_kit.corpora.worlds.atlas import STATEMENT, Atlas, build, drawn, namesakes, supporters
from influence_kit.corpora.worlds.words import listed
from influence_kit.errors import UserError
from influence_kit.reading.words import token_texts

SMALL = {
    "entities": 24,
    "relations": 2,
    "values": 8,
    "documents": 2000,
    "most_supporters": 300,
    "queries": 6,
    "canaries": 1,
    "held_out": 50,
}
RELATIONS = listed("atlas")["relations"].values()
TRANSLATIONS = {tuple(pair.split("/")) for relation in RELATIONS for pair in relation["values"]}
# (English, German, English, German) of the two words of each way to state a relation.
WAYS = [
    (*relation["ways"][place].split("/"), *relation["ways"][place + 1].split("/"))
    for relation in RELATIONS
    for place in (0, 2, 4)
]


def names_of(world: World) -> list[int]:
    return np.unique(drawn(Atlas(**world.parameters))[0].lexicon.names).tolist()


def make(**changes) -> World:
    return build(Atlas(**{**SMALL, **changes}))


def column(table, name):
    return table[name].to_numpy(zero_copy_only=False)


def facts_of(world):
    return np.stack(column(world.sequences, "facts"))


@pytest.fixture(scope="module")
def world():
    return make()


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path, world):
    files = {}
    for name, made in (("a", world), ("b", make()), ("c", make(seed=1))):
        made.save(tmp_path / name)
        files[name] = [(tmp_path / name / f).read_bytes() for f in ("sequences.arrow", "queries.arrow", "world.json")]
    assert files["a"] == files["b"] and files["a"][0] != files["c"][0]


def test_saved_world_comes_back_and_opens_as_a_dataset(tmp_path, world):
    from datasets import Dataset

    world.save(tmp_path)
    loaded = World.load(tmp_path)
    assert loaded.sequences.equals(world.sequences) and loaded.queries.equals(world.queries)
    assert loaded.vocabulary == world.vocabulary and loaded.context == 19
    dataset = Dataset.from_file(str(tmp_path / "sequences.arrow"))
    assert dataset[7]["input_ids"] == world.sequences["input_ids"][7].as_py()


def test_every_statement_says_its_fact_in_its_language(world):
    """Read the facts back from the text alone: each (entity, relation words, value) triple must be true."""
    words = world.vocabulary
    seen = {}
    for ids, facts, language in zip(
        token_matrix(world.sequences), facts_of(world), column(world.sequences, "language"), strict=True
    ):
        if language < 0:
            continue
        for place, fact in enumerate(facts):
            start = 1 + place * (STATEMENT + 1) + 1
            name, first, second, value, stop = (words[t] for t in ids[start : start + STATEMENT])
            assert stop == ".!"[language]
            assert seen.setdefault((fact, language), (name, value)) == (name, value)
            assert any(way[language::2] == (first, second) for way in WAYS)
    both = {fact for fact, language in seen if language == 0} & {fact for fact, language in seen if language == 1}
    assert all(seen[fact, 0][0] == seen[fact, 1][0] for fact in both)  # shared names
    assert all((seen[fact, 0][1], seen[fact, 1][1]) in TRANSLATIONS for fact in both)


def test_availability_is_kept(world):
    stated = [set(facts_of(world)[column(world.sequences, "language") == language].ravel()) for language in (0, 1)]
    queries = world.queries.to_pandas()
    for row in queries[queries["kind"] == "fact"].itertuples():
        assert (row.fact in stated[row.language]) == (row.availability == "both")
        assert row.fact in stated[1 - row.language]


def test_counts_of_supporters_are_the_truth_table_s(world):
    stated, language = facts_of(world), column(world.sequences, "language")
    for row in world.queries.to_pandas().query("kind == 'fact'").itertuples():
        assert (stated[language == row.language] == row.fact).sum() == row.statements_same
        assert (stated[language == 1 - row.language] == row.fact).sum() == row.statements_other


def test_statements_follow_a_clipped_zipf_law():
    made = make(documents=4000, most_supporters=300, both_share=1.0)
    stated = facts_of(made)[column(made.sequences, "language") == 0]
    counts = np.sort(np.unique(stated, return_counts=True)[1])[::-1]
    assert counts.max() == 300 and counts.min() >= 1 and counts.sum() == 4000 * 0.9 / 2 * 3
    free = counts[counts < 300]
    rank = np.flatnonzero(counts < 300) + 1
    np.testing.assert_allclose(free * rank, np.median(free * rank), rtol=0.05)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 0.5), (0.9, 0.9)])
def test_language_share(share, expected):
    language = column(make(language_share=share, most_supporters=600).sequences, "language")
    assert (language == 0).sum() / (language >= 0).sum() == pytest.approx(expected, abs=0.01)


def test_without_anchors_the_languages_share_no_token():
    made = make(anchor_share=0.0)
    tokens, language = token_matrix(made.sequences), column(made.sequences, "language")
    assert set(tokens[language == 0].ravel()) & set(tokens[language == 1].ravel()) == {0}


def test_shared_names_are_all_that_the_languages_share(world):
    tokens, language = token_matrix(world.sequences), column(world.sequences, "language")
    shared = set(tokens[language == 0].ravel()) & set(tokens[language == 1].ravel())
    assert len(shared) > 15 and shared - {0} <= set(names_of(world))


def test_shuffled_world_has_nothing_to_know():
    made = make(shuffled=True)
    tokens, stated, language = token_matrix(made.sequences), facts_of(made), column(made.sequences, "language")
    fact = np.bincount(stated[stated >= 0]).argmax()
    values = {
        int(tokens[n, 1 + p * 6 + 4]) for n, p in zip(*np.nonzero(stated == fact), strict=True) if language[n] == 0
    }
    assert len(values) == 8


def test_canaries_are_repeated_as_often_as_asked(world):
    canary, tokens = column(world.sequences, "canary"), token_matrix(world.sequences)
    assert sorted(np.unique(canary[canary >= 0], return_counts=True)[1]) == [1, 4, 16, 64]
    for number in range(4):
        assert len(np.unique(tokens[canary == number], axis=0)) == 1
    queries = world.queries.to_pandas().query("kind == 'canary'")
    assert queries["repetitions"].tolist() == [1, 4, 16, 64]


@pytest.mark.parametrize(
    ("order", "values_first"), [("forward", 0.0), ("reverse", 1.0), ("both", 0.5), ("identity", 0.0)]
)
def test_order_of_entity_and_value(order, values_first):
    made = make(order=order)
    tokens, kind = token_matrix(made.sequences), column(made.sequences, "kind")
    facts = tokens[kind == "facts"]
    last = np.isin(facts[:, 5], names_of(made)).mean()
    assert last == pytest.approx(values_first, abs=0.05)
    bridges = tokens[kind == "identity"]
    assert (len(bridges) > 0) == (order == "identity")
    assert (bridges[:, 2] == bridges[:, 5]).all()  # "A is A"


def test_supporters_and_namesakes_agree_with_a_plain_loop(world):
    rows = np.arange(0, 2000, 7)
    same, other = supporters(world, rows)
    own_namesakes, other_namesakes = namesakes(world, rows)
    stated, language = facts_of(world)[rows], column(world.sequences, "language")[rows]
    for q, query in enumerate(world.queries.to_pandas().itertuples()):
        if query.fact < 0:
            assert not (same[q] | other[q] | own_namesakes[q] | other_namesakes[q]).any()
            continue
        states = (stated == query.fact).any(1)
        about = ((stated // 2 == query.fact // 2) & (stated >= 0)).any(1)
        np.testing.assert_array_equal(same[q], states & (language == query.language))
        np.testing.assert_array_equal(other[q], states & (language == 1 - query.language))
        np.testing.assert_array_equal(own_namesakes[q], about & ~states & (language == query.language))
        np.testing.assert_array_equal(other_namesakes[q], about & ~states & (language == 1 - query.language))


def test_query_mask_marks_the_completion_and_nothing_else(world):
    batch = batch_of(world.queries)
    for ids, mask, prompt, completion in zip(
        batch["input_ids"],
        batch["loss_mask"],
        world.queries["prompt"].to_pylist(),
        world.queries["completion"].to_pylist(),
        strict=True,
    ):
        assert " ".join(token_texts(world, ids[mask].tolist())) == completion
        start = int(mask.nonzero().min())
        assert " ".join(token_texts(world, ids[1:start].tolist())) == prompt


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"language_share": 1.5}, "language_share=1.5"),
        ({"order": "backward"}, "order='backward'"),
        ({"relations": 9}, "relations=9"),
        ({"most_supporters": 3}, "cannot be spread"),
        ({"canaries": 50}, "canaries"),
        ({"templates": 4}, "templates=4"),
    ],
)
def test_impossible_worlds_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        make(**change)
