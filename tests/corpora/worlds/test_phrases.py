"""Phrases say what their partition's name promises; read back from the words alone, against what training states."""

import numpy as np
import pytest

from influence_kit.corpora.world import World, token_matrix
from influence_kit.corpora.worlds.atlas import ENDINGS, Atlas, build
from influence_kit.corpora.worlds.phrases import PARTITIONS, fact_queries, phrases
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
INSTANCES = 4


@pytest.fixture(
    scope="module", params=[{}, {"anchor_share": 0.0}, {"order": "both"}], ids=["plain", "no_anchors", "both"]
)
def world(request):
    return build(Atlas(**SMALL, **request.param))


@pytest.fixture(scope="module")
def made(world):
    asked = np.concatenate([fact_queries(world, True), fact_queries(world, False)])
    return phrases(world, asked, INSTANCES, seed=5)


class Stated:
    """What the training text says, from its words alone: relation words and values by relation, and the facts."""

    def __init__(self, world):
        self.names, self.facts, self.of_relation = set(), {}, {}
        for ids, facts, language in zip(
            token_matrix(world.sequences),
            np.stack(world.sequences["facts"].to_numpy(zero_copy_only=False)),
            world.sequences["language"].to_pylist(),
            strict=True,
        ):
            for place, fact in enumerate(facts):
                if language >= 0 and fact >= 0:
                    first, *words, last, _ = (world.vocabulary[t] for t in ids[2 + 6 * place : 7 + 6 * place])
                    name, value = (first, last) if first[0].isupper() else (last, first)
                    self.facts[name, language, fact % 2] = value
                    self.of_relation.setdefault((language, fact % 2), set()).add(tuple(words))


def rows_of(world, made):
    """(query's row, its words, partition, instance, phrase's words) of every phrase; words without <bos>."""
    queries = world.queries.to_pylist()
    for row in made.to_pylist():
        query = queries[row["query"]]
        length = sum(row["loss_mask"]) + 1
        words = token_texts(world, row["input_ids"][1:length])
        yield query, token_texts(world, query["input_ids"][1:6]), row["partition"], row["instance"], words


def test_every_query_has_every_partition_in_order(world, made):
    table = made.select(["query", "partition", "instance"]).to_pandas()
    expected = [(p, i) for p in PARTITIONS for i in range(INSTANCES)]
    for _, group in table.groupby("query", sort=False):
        assert list(zip(group["partition"], group["instance"], strict=True)) == expected


def test_shape_is_the_world_s_with_one_statement_and_padding(world, made):
    tokens, mask = token_matrix(made), token_matrix(made, "loss_mask")
    assert tokens.shape[1] == token_matrix(world.sequences).shape[1] == 19
    assert (mask == ((np.arange(19) >= 1) & (np.arange(19) <= 6))).all()
    assert (tokens[:, 0] == 0).all() and (tokens[:, 7:] == 0).all() and (tokens[:, 1:7] > 0).all()


def test_partitions_say_what_their_names_promise(world, made):
    stated = Stated(world)
    fillers = {f for row in token_matrix(world.sequences) for f in [world.vocabulary[row[1]]] if row[1] > 0}
    checked = set()
    for query, (_, name, *words, value), partition, _, phrase in rows_of(world, made):
        language, relation = query["language"], query["fact"] % 2
        lead, first, second, third, last, stop = phrase
        there = 1 - language if "translated" in partition else language
        assert stop == (".", "。")[there] and lead in fillers
        abroad = tuple(word[::-1] + "u" if there else word[:-1][::-1] for word in words)
        own_words, other_words = stated.of_relation[language, relation], stated.of_relation[language, 1 - relation]
        checked.add(partition)
        if partition == "forward":
            assert phrase[1:5] == [name, *words, value]
        elif partition == "reworded":
            assert (first, last) == (name, value) and (second, third) in own_words - {tuple(words)}
        elif partition == "without_relation":
            assert (first, last) == (name, value) and {second, third} <= fillers
        elif partition == "entity_only":
            assert first == name and {second, third, last} <= fillers
        elif partition == "value_only":
            assert first == value and {second, third, last} <= fillers
        elif partition == "altered_entity":
            assert phrase[2:5] == [*words, value] and first != name and first[0].isupper()
            assert stated.facts.get((first, language, relation), None) != value
        elif partition == "altered_relation":
            assert (first, last) == (name, value) and (second, third) in other_words
        elif partition == "altered_value":
            assert phrase[1:4] == [name, *words] and last != value
            assert ENDINGS[relation] in (last[::-1] if language else last)  # a value of the same relation
        elif partition == "irrelevant":
            assert first != name and (second, third) in other_words
            assert stated.facts[first, language, 1 - relation] == last
        elif partition == "flipped":
            assert phrase[1:5] == [value, *words, name]
        elif partition == "flipped_without_relation":
            assert (first, last) == (value, name) and {second, third} <= fillers
        else:
            entity, result = (last, first) if partition == "translated_flipped" else (first, last)
            assert (second, third) == abroad
            assert stated.facts[entity, there, relation] == result
            assert {result, value} == {result, result[:-1][::-1] if there else result[::-1] + "u"}
    assert checked == set(PARTITIONS)


def test_instances_differ_and_share_their_first_filler_across_partitions(world, made):
    leads: dict = {}
    seen: dict = {}
    for query, (own, *_), partition, instance, phrase in rows_of(world, made):
        key = (query["fact"], query["language"])
        seen.setdefault((key, partition), set()).add(tuple(phrase))
        if "translated" not in partition:
            leads.setdefault((key, instance), set()).add(phrase[0])
            assert phrase[0] != own
    assert all(len(phrases_) == INSTANCES for phrases_ in seen.values())
    assert all(len(words) == 1 for words in leads.values())


def test_seen_facts_are_stated_in_the_query_s_language_and_unseen_ones_in_the_other_only(world):
    language = np.array(world.sequences["language"].to_pylist())
    facts = np.stack(world.sequences["facts"].to_numpy(zero_copy_only=False))
    seen, unseen = fact_queries(world, True), fact_queries(world, False)
    assert len(seen) and len(unseen) and not set(seen) & set(unseen)
    for query in (*seen, *unseen):
        row = world.queries.slice(query, 1).to_pylist()[0]
        assert (facts[language == row["language"]] == row["fact"]).any() == (query in seen)
        assert (facts[language == 1 - row["language"]] == row["fact"]).any()


def test_seed_decides_and_other_queries_do_not(world, tmp_path):
    query = int(fact_queries(world)[1])
    alone = phrases(world, [query], 2, seed=1)
    among = phrases(world, [0, query], 2, seed=1)
    assert [row for row in among.to_pylist() if row["query"] == query] == alone.to_pylist()
    assert alone.to_pylist() != phrases(world, [query], 2, seed=2).to_pylist()
    world.save(tmp_path)
    assert phrases(World.load(tmp_path), [query], 2, seed=1).to_pylist() == alone.to_pylist()


def test_what_cannot_be_asked_is_refused(world):
    canary = world.queries["kind"].to_pylist().index("canary")
    with pytest.raises(UserError, match=f"query {canary} asks for no fact"):
        phrases(world, [canary])
    with pytest.raises(UserError, match="instances=0"):
        phrases(world, [0], 0)
    with pytest.raises(UserError, match="templates of 2 or more"):
        phrases(build(Atlas(**{**SMALL, "templates": 1})), [0])
    other = World("ladder", world.sequences, world.held_out, world.queries, world.vocabulary, "", world.parameters)
    with pytest.raises(UserError, match="'ladder'"):
        phrases(other, [0])
    changed = {**world.parameters, "seed": world.parameters["seed"] + 1}
    other = World("atlas", world.sequences, world.held_out, world.queries, world.vocabulary, "", changed)
    with pytest.raises(UserError, match="another version"):
        phrases(other, [0])
