"""Synthetic sentences about a fact of Atlas, one partition for each thing that can be wrong with them.

The paper writes such sentences by hand for a query like "The first President of the United States was George Washington"
(Grosse et al. 2023, Sec. 5.3.4): the fact as asked, reworded, with one part altered, with a part left out, and flipped, so that the
answer comes before what it is the answer to. Here a query is "ENTITY word word -> VALUE" and a phrase is one statement at
the beginning of a document, padded to the world's length:

    <bos> filler  ENTITY word word VALUE .

Where a part is left out, filler words stand in its place, so that every phrase has the same number of targets. All
phrases of one instance begin with the same filler, so that they differ in the statement only; instances differ in fillers and
in whatever a partition leaves open (another entity, another value, another template).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from influence_kit.corpora.world import World, token_columns, token_matrix
from influence_kit.corpora.worlds.atlas import STATEMENT, Atlas, _availability, _Lexicon, _lexicon
from influence_kit.errors import UserError

PARTITIONS = {
    "forward": "the fact as asked: ENTITY word word VALUE",
    "reworded": "the fact in another template",
    "without_relation": "ENTITY filler filler VALUE",
    "entity_only": "ENTITY and fillers",
    "value_only": "VALUE, first, and fillers: the bare name of the paper, whose queries end in a name",
    "altered_entity": "another entity, for which it is false",
    "altered_relation": "the words of another relation",
    "altered_value": "another value of the same relation",
    "irrelevant": "a true fact of another entity and another relation",
    "flipped": "VALUE word word ENTITY, in the words asked",
    "flipped_without_relation": "VALUE filler filler ENTITY",
    "translated": "the fact in the other language",
    "translated_flipped": "the flipped fact in the other language",
}


@dataclass(frozen=True)
class _Known:
    """What Atlas drew when it made a world: its words, the true value [E, R], and where each fact exists [E * R]."""

    world: Atlas
    lexicon: _Lexicon
    truth: np.ndarray
    availability: np.ndarray


def phrases(world: World, queries: Sequence[int] | np.ndarray, instances: int = 3, seed: int = 0) -> pa.Table:
    """Phrases of every partition for fact queries of an Atlas world, `instances` of each.

    queries: positions in `world.queries`. Rows are ordered by query, partition (as in PARTITIONS) and instance; columns:
    query (position), partition, instance, and `input_ids` and `loss_mask` of the world's length (first token and padding are no
    targets). The same world, instances and seed give the same phrases of a query, whichever others are asked.

    Raises UserError for a world that is no Atlas, a query that asks for no fact, fewer than one instance, or a world too small
    to alter (it needs 2 entities, relations, values and templates).
    """
    if instances < 1:
        raise UserError(f"instances={instances} must be 1 or more")
    known = _known(world)
    rows: dict[str, list] = {"query": [], "partition": [], "instance": [], "tokens": []}
    for query in map(int, queries):
        if not 0 <= query < world.queries.num_rows or world.queries["fact"][query].as_py() < 0:
            raise UserError(f"query {query} asks for no fact: choose rows of `queries` whose kind is 'fact'")
        for partition, statements in _statements(world, known, query, instances, seed).items():
            for instance, statement in enumerate(statements):
                for name, value in zip(rows, (query, partition, instance, statement), strict=True):
                    rows[name].append(value)
    length = token_matrix(world.sequences).shape[1] if world.sequences.num_rows else world.context
    return _table(rows, length)


def fact_queries(world: World, seen: bool = True) -> np.ndarray:
    """Positions of an Atlas world's fact queries that training states in the query's language, or (`seen=False`) never does.

    An unseen fact is stated in the other language only. Its entity is known: Atlas has no entity that is never mentioned.
    """
    stated = world.queries["statements_same"].to_numpy()
    return np.flatnonzero((world.queries["fact"].to_numpy() >= 0) & ((stated > 0) if seen else (stated == 0)))


def _known(world: World) -> _Known:
    """Draw again what `atlas.build` drew first, and see that it is this world."""
    if world.name != "atlas":
        raise UserError(f"phrases are made for Atlas worlds, this one is {world.name!r}")
    parameters: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in world.parameters.items()}
    about = Atlas(**parameters)
    for name in ("entities", "relations", "values", "templates"):
        if getattr(about, name) < 2:
            raise UserError(
                f"phrases alter every part of a fact: Atlas needs {name} of 2 or more, has {getattr(about, name)}"
            )
    rng = np.random.default_rng([about.seed, 0xA71A5])
    lexicon = _lexicon(about, rng)
    truth = rng.integers(0, about.values, size=(about.entities, about.relations))
    availability = _availability(about, rng, about.entities * about.relations)
    if lexicon.vocabulary != world.vocabulary:
        raise UserError("this Atlas world was made by another version of the generator: build it again")
    return _Known(about, lexicon, truth, availability)


def _statements(world: World, known: _Known, query: int, instances: int, seed: int) -> dict[str, list[list[int]]]:
    """Token ids filler + statement of every instance, by partition."""
    about, lexicon = known.world, known.lexicon
    rng = np.random.default_rng([about.seed, seed, query, 0x0DE2])
    row = world.queries.slice(query, 1).to_pylist()[0]
    language, (entity, relation) = row["language"], divmod(row["fact"], about.relations)
    value = int(known.truth[entity, relation])
    asked = [int(token) for token in row["input_ids"]]
    template = lexicon.words[language, relation].tolist().index(asked[3:5])
    if asked[2] != lexicon.names[language, entity] or asked[5] != lexicon.values[language, relation, value]:
        raise AssertionError(f"query {query} is not the fact that was drawn for it")
    own = int(np.flatnonzero(lexicon.fillers[language] == asked[1])[0])
    free = np.delete(np.arange(about.filler_words), own) if about.filler_words > 1 else np.array([own])
    leads = _distinct(rng, free, instances)
    templates = _distinct(rng, np.delete(np.arange(about.templates), template), instances)
    relations = _distinct(rng, np.delete(np.arange(about.relations), relation), instances)
    values = _distinct(rng, np.delete(np.arange(about.values), value), instances)
    entities = _distinct(rng, _false_for(known, entity, relation, value), instances)
    facts = _distinct(rng, _unrelated(known, entity, relation, language), instances)
    stop = lexicon.stop.tolist()
    found: dict[str, list[list[int]]] = {partition: [] for partition in PARTITIONS}
    for i in range(instances):
        filler, *others = (lexicon.fillers[language, [leads[i], *_distinct(rng, free, 3)]]).tolist()

        def say(first, words, last, spoken=language, lead=filler):
            return [int(token) for token in (lead, first, *words, last, stop[spoken])]

        a, b = lexicon.names[language, entity], lexicon.values[language, relation, value]
        words = lexicon.words[language, relation, template]
        there = 1 - language
        abroad = lexicon.names[there, entity], lexicon.values[there, relation, value]
        foreign = {"spoken": there, "lead": lexicon.fillers[there, leads[i]]}
        other_entity, other_relation = divmod(int(facts[i]), about.relations)
        other_value = lexicon.values[language, other_relation, known.truth[other_entity, other_relation]]
        made = {
            "forward": say(a, words, b),
            "reworded": say(a, lexicon.words[language, relation, templates[i]], b),
            "without_relation": say(a, others[:2], b),
            "entity_only": say(a, others[:2], others[2]),
            "value_only": say(b, others[:2], others[2]),
            "altered_entity": say(lexicon.names[language, entities[i]], words, b),
            "altered_relation": say(a, lexicon.words[language, relations[i], template], b),
            "altered_value": say(a, words, lexicon.values[language, relation, values[i]]),
            "irrelevant": say(
                lexicon.names[language, other_entity],
                lexicon.words[language, other_relation, templates[i]],
                other_value,
            ),
            "flipped": say(b, words, a),
            "flipped_without_relation": say(b, others[:2], a),
            "translated": say(abroad[0], lexicon.words[there, relation, template], abroad[1], **foreign),
            "translated_flipped": say(abroad[1], lexicon.words[there, relation, template], abroad[0], **foreign),
        }
        for partition, statement in made.items():
            found[partition].append(statement)
    return found


def _distinct(rng: np.random.Generator, among: np.ndarray, count: int) -> np.ndarray:
    """`count` of them in random order, each as often as any other (none twice while there are others left)."""
    rounds = -(-count // len(among))
    return np.concatenate([rng.permutation(among) for _ in range(rounds)])[:count]


def _false_for(known: _Known, entity: int, relation: int, value: int) -> np.ndarray:
    """Entities of which the value is not true; every other one where it is true of all."""
    others = np.delete(np.arange(known.world.entities), entity)
    wrong = others[known.truth[others, relation] != value]
    return wrong if len(wrong) else others


def _unrelated(known: _Known, entity: int, relation: int, language: int) -> np.ndarray:
    """Facts of other entities and other relations; those that exist in the language, where there are any."""
    facts = np.arange(known.world.entities * known.world.relations)
    facts = facts[(facts // known.world.relations != entity) & (facts % known.world.relations != relation)]
    stated = np.isin(known.availability[facts], (0, language + 1))
    return facts[stated] if stated.any() else facts


def _table(rows: dict[str, list], length: int) -> pa.Table:
    statements = np.array(rows["tokens"], np.int64).reshape(-1, STATEMENT + 1)
    tokens = np.zeros((len(statements), length), np.int64)
    tokens[:, 1 : STATEMENT + 2] = statements
    mask = np.zeros(tokens.shape, bool)
    mask[:, 1 : STATEMENT + 2] = True
    return pa.table(
        {
            "query": pa.array(rows["query"], pa.int32()),
            "partition": pa.array(rows["partition"], pa.string()),
            "instance": pa.array(rows["instance"], pa.int32()),
            **token_columns(tokens, mask),
        }
    )
