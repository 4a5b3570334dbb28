"""Word order (chapter 07): phrases about facts of Atlas, forward and flipped, what influence says of them, and what a
finetuning step on each really does.

The paper writes such sentences by hand for a query like "The first President of the United States was George
Washington" (Grosse et al. 2023, Sec. 5.3.4): the fact as asked, reworded, with one part altered, with a part left out,
and flipped, so that the answer comes before what it is the answer to. Here a query is "ENTITY word word -> VALUE" and a
phrase is one statement at the beginning of a document, padded to the world's length:

    <bos> filler  ENTITY word word VALUE .

Where a part is left out, filler words stand in its place, so that every phrase has the same number of targets. All
phrases of one instance begin with the same filler, so that they differ in the statement only; instances differ in
fillers and in whatever a partition leaves open (another entity, another value, another template).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from influence_kit.corpora.world import World, batch_of, token_matrix
from influence_kit.corpora.worlds.atlas import STATEMENT, Atlas, Known, drawn
from influence_kit.corpora.worlds.words import as_table
from influence_kit.errors import UserError
from influence_kit.findings.common import fraction_of
from influence_kit.findings.families import Planned, planted_grid
from influence_kit.findings.profiles import Profile
from influence_kit.measures.checkpoints import READ
from influence_kit.measures.correlations import rank_correlations
from influence_kit.measures.intervals import Estimate, bootstrap, pick, ratio_of_means
from influence_kit.recipes import tuples

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

    from influence_kit.findings.trained import Trained
    from influence_kit.reading.cards import CardView

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
SHOWN = {
    "reworded": "in other words",
    "without_relation": "without the verb",
    "value_only": "the answer's name alone",
    "flipped": "swapped round",
    "flipped_without_relation": "swapped round, without the verb",
    "translated": "in the other language",
    "translated_flipped": "in the other language, swapped round",
    "irrelevant": "about something else",
}


def reads(profile: Profile) -> list[Planned]:
    """Atlas, and Atlas read in both orders, where their facts are half known, with the phrases of each."""
    base = planted_grid(profile, "atlas", fractions=(READ,), extra=("order",))
    return base + planted_grid(profile, "atlas", ("both_orders",), (READ,), seeds=profile.few, extra=("order",))


def order(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Score every phrase for its query, and measure what finetuning on it does to the query's log-probability.

    Writes order.parquet, a row for each query, partition and instance: query (position in the world's table),
    partition, instance; seen (whether training states the fact in the query's language); log_p (nats, the query's);
    word_log_p (nats, of the last word in the phrase: for a flipped one the entity, so whether the model knows the fact
    that way round); influence (nats at epsilon = 1), relatif; and what `referees.finetuning` measured: delta_half,
    delta, scored_delta, learned, phrase_learned (nats).

    Args:
        parameters: fraction (or READ), seed, device, damping; queries (of each of two kinds: facts stated in the query's
            language, and facts never stated in it), instances (phrases a partition), step (learning rate of one small
            step, on the phrase's summed loss), rate and steps (of `steps` larger ones).
    """
    from influence_kit import models
    from influence_kit.engine.factors import Factors
    from influence_kit.engine.scans import score
    from influence_kit.referees.finetuning import finetuning, log_p

    world = World.load(inputs["world"])
    model = models.load(inputs["model"], fraction_of(parameters, inputs, world), parameters["device"])
    factors = Factors.load(inputs["influence"] / "factors.safetensors")
    rng = np.random.default_rng([parameters["seed"], 0x0DE2])
    kinds = [np.sort(rng.permutation(fact_queries(world, seen))[: parameters["queries"]]) for seen in (True, False)]
    asked = np.concatenate(kinds)
    if not len(asked):
        raise UserError(
            f"there is no fact query to make phrases for: queries={parameters['queries']!r} must be 1 or more"
        )
    table = phrases(world, asked, parameters["instances"], parameters["seed"])
    own = np.repeat(np.arange(len(asked)), len(PARTITIONS) * parameters["instances"])
    queries, sequences = batch_of(world.queries, asked), batch_of(table)
    scores = score(
        model, factors, queries, sequences, parameters["damping"], batch_size=256, corpus_size=world.sequences.num_rows
    )
    model = model.double()
    effects = finetuning(
        model,
        queries,
        sequences,
        own,
        parameters["step"],
        parameters["rate"],
        parameters["steps"],
        tuple(factors.layers),
        lambda done, to_do: progress(done, to_do, "finetuning"),
    )
    columns: dict[str, object] = {name: table[name] for name in ("query", "partition", "instance")}
    columns |= {"seen": own < len(kinds[0]), "log_p": log_p(model, queries).detach().cpu().numpy()[own]}
    columns["word_log_p"] = log_p(model, _only(sequences, STATEMENT)).detach().cpu().numpy()
    columns["influence"] = scores.values.numpy()[own, np.arange(len(own))]
    columns["relatif"] = scores.relatif.numpy()[own, np.arange(len(own))]
    pq.write_table(pa.table({**columns, **effects}), out / "order.parquet")


STAGES = {"order": order}


def _only(batch: Mapping[str, Tensor], place: int) -> dict[str, Tensor]:
    """The same rows with one target each, the token at `place`."""
    mask = batch["loss_mask"].new_zeros(batch["loss_mask"].shape)
    mask[:, place] = True
    return {"input_ids": batch["input_ids"], "loss_mask": mask}


def phrases(world: World, queries: Sequence[int] | np.ndarray, instances: int = 3, seed: int = 0) -> pa.Table:
    """Phrases of every partition for fact queries of an Atlas world, `instances` of each.

    The same world, instances and seed give the same phrases of a query, whichever others are asked.

    Args:
        world: An Atlas world of 2 entities, relations, values and templates or more, so that each can be altered.
        queries: Positions in `world.queries`.
        instances: Phrases a partition.
        seed: Of whatever a partition leaves open.

    Returns:
        Rows ordered by query, partition (as in PARTITIONS) and instance; columns query (position), partition, instance,
        and `input_ids` and `loss_mask` of the world's length (first token and padding are no targets).

    Raises:
        UserError: Another world, a query that asks for no fact, fewer than one instance, or a world too small to alter.
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
    places = np.arange(token_matrix(world.sequences).shape[1])
    told = (places > 0) & (places < STATEMENT + 2)
    tokens = np.zeros((len(rows["tokens"]), len(places)), np.int64)
    tokens[:, told] = rows["tokens"]
    return as_table({**rows, "tokens": tokens}, told)


def fact_queries(world: World, seen: bool = True) -> np.ndarray:
    """Positions of an Atlas world's fact queries that training states in the query's language, or (`seen=False`) not.

    An unseen fact is stated in the other language only. Its entity is known: Atlas mentions every one.
    """
    stated = world.queries["statements_same"].to_numpy()
    return np.flatnonzero((world.queries["fact"].to_numpy() >= 0) & ((stated > 0) if seen else (stated == 0)))


def _known(world: World) -> Known:
    """Draw again what `atlas.build` drew first, and see that it is this world."""
    if world.name != "atlas":
        raise UserError(f"phrases are made for Atlas worlds, this one is {world.name!r}")
    about = Atlas(**tuples(world.parameters))
    for name in ("entities", "relations", "values", "templates"):
        if getattr(about, name) < 2:
            raise UserError(
                f"phrases alter every part of a fact: Atlas needs {name} of 2 or more, has {getattr(about, name)}"
            )
    known, _ = drawn(about)
    if known.lexicon.vocabulary != world.vocabulary:
        raise UserError("this Atlas world was made by another version of the generator: build it again")
    return known


def _statements(world: World, known: Known, query: int, instances: int, seed: int) -> dict[str, list[list[int]]]:
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


def _false_for(known: Known, entity: int, relation: int, value: int) -> np.ndarray:
    """Entities of which the value is not true; every other one where it is true of all."""
    others = np.delete(np.arange(known.world.entities), entity)
    wrong = others[known.truth[others, relation] != value]
    return wrong if len(wrong) else others


def _unrelated(known: Known, entity: int, relation: int, language: int) -> np.ndarray:
    """Facts of other entities and other relations; those that exist in the language, where there are any."""
    facts = np.arange(known.world.entities * known.world.relations)
    facts = facts[(facts // known.world.relations != entity) & (facts % known.world.relations != relation)]
    stated = np.isin(known.availability[facts], (0, language + 1))
    return facts[stated] if stated.any() else facts


def read(trained: Trained) -> pandas.DataFrame:
    """What the `order` stage wrote where a model is read, with its size, seed and arm.

    odds and step are influence and the true small step on the answer's log-odds, not its log-probability (divided by
    1 - p): a fact that is nearly known, whose log-probability has nowhere to go, then weighs as much as any other.
    """
    import pandas

    found = pandas.read_parquet(trained.extra("order", READ) / "order.parquet")
    unknown = -np.expm1(found["log_p"])
    found = found.assign(odds=found["influence"] / unknown, step=found["delta"] / unknown)
    return found.assign(size=trained.parameters, seed=trained.seed, arm=trained.arm)


def means(
    rows: pandas.DataFrame, size: int, quantity: str = "odds", seen: bool = True, arm: str = "base"
) -> pandas.DataFrame:
    """Mean over instances of a quantity: one row a (seed, query), one column a partition.

    Args:
        rows: Of `read`, of many models.
        size: Of the models.
        quantity: A column: odds, influence, relatif, step, delta, learned, ...
        seen: Facts stated in the query's language, or those stated only in the other.
        arm: The order in which the models read their facts.

    Raises:
        UserError: A quantity that is no column, or a query that lacks a partition.
    """
    if quantity not in rows.columns:
        raise UserError(f"{quantity!r} is no column of this table: choose one of {', '.join(map(str, rows.columns))}")
    same = pick(rows, size=size, arm=arm, seen=seen)
    found = same.groupby(["seed", "query", "partition"])[quantity].mean().unstack("partition")
    if found.isna().to_numpy().any():
        lacking = [str(name) for name in found.columns[found.isna().any()]]
        raise UserError(f"some queries have no finite {quantity} for {', '.join(lacking)}: make the phrases again")
    return found


def ratio(table: pandas.DataFrame, above: str, below: str = "forward") -> Estimate:
    """Mean of one partition over the mean of another, in a table of `means`: within a seed, averaged over seeds.

    A ratio of means, not a mean of ratios: single queries may have next to nothing below. Not of logarithms: what is
    above may be negative.
    """
    return bootstrap(table[[above, below]].to_numpy(), _seeds(table), ratio_of_means)


def followed(predicted: pandas.DataFrame, true: pandas.DataFrame) -> Estimate:
    """Rank correlation of one quantity with another over the partitions of each query; both of `means`.

    Raises:
        UserError: They are of other queries or partitions.
    """
    if not (predicted.index.equals(true.index) and predicted.columns.equals(true.columns)):
        raise UserError("predicted and true change must be of the same queries and partitions, in one order")
    return bootstrap(rank_correlations(predicted, true), _seeds(predicted), bounds=(-1, 1))


def departure(rows: pandas.DataFrame) -> Estimate:
    """How far a small step is from twice half of it, in units of its own size: 0 where the model is linear."""
    curved = np.stack([(rows["delta"] - 2 * rows["delta_half"]).abs(), rows["delta"].abs()], 1)
    return bootstrap(curved, rows["seed"], ratio_of_means)


def middling(table: pandas.DataFrame, seed: int) -> int:
    """The query of a seed, in a table of `means`, whose flipped phrase keeps a middling share of the forward one's."""
    kept = (table["flipped"] / table["forward"]).loc[seed].sort_values()
    return int(kept.index[len(kept) // 2])


def card(trained: Trained, query: int, rows: pandas.DataFrame, title: str) -> CardView:
    """A query and its phrases, the first of each kind of SHOWN, shaded by token; rows: of `read`."""
    from influence_kit.engine.scans import token_scores
    from influence_kit.reading.cards import Row, query_card
    from influence_kit.reading.words import token_texts

    stage, world = trained.planned.extra["order", READ].parameters, trained.world
    kinds = {"forward": "the fact as asked", **SHOWN}
    made = phrases(world, [query], stage["instances"], stage["seed"])
    chosen = [n for n, row in enumerate(made.to_pylist()) if row["instance"] == 0 and row["partition"] in kinds]
    score = pick(rows, seed=trained.seed, query=query, instance=0).set_index("partition")["influence"]
    asked, told = batch_of(world.queries, [query]), batch_of(made, chosen)
    shades = token_scores(trained.model(READ), trained.factors(READ), asked, told, stage["damping"])
    order, shown = score[list(kinds)].rank(ascending=False).astype(int), []
    for place, name in enumerate(made["partition"].take(chosen).to_pylist()):
        length = int(told["loss_mask"][place].nonzero().max()) + 1
        tokens = token_texts(world, told["input_ids"][place, :length].tolist())
        made_row = Row(tokens, float(score[name]), int(order[name]), scored=len(kinds), source=kinds[name])
        shown.append(replace(made_row, token_scores=shades[place, :length].tolist()))
    row = world.queries.slice(query, 1).to_pylist()[0]
    parts = row["prompt"].split(), row["completion"].split()
    return query_card(*parts, shown, k=len(kinds), title=title, joiner=" ", alignment="predicted", what="Sentences")


def _seeds(table: pandas.DataFrame) -> np.ndarray:
    return table.index.get_level_values("seed").to_numpy()
