"""Atlas: a world of facts in two languages.

Entities x relations -> values. A fact is stated in several templates; every function word and value has a clone in the
second language, German (disjoint ids), entity names are shared in a chosen share (the anchors). A fact exists in both
languages, only in the first, or only in the second, and is stated a known number of times in each. Documents of one
language hold a few statements with filler words between them:

    <bos> filler  ENTITY word word VALUE .  filler  ENTITY word word VALUE .  ...

    today Alice was born-in Lisbon .  again Peter works as tailor .        heute Alice wurde geboren-in Lissabon !

so the supporters of a query "ENTITY word word -> VALUE" are known: documents that state its fact, in the same language
or in the other one. Noise documents state nothing; canaries are noise documents repeated 1, 4, 16 or 64 times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa

from influence_kit.corpora.world import BOS, World, at_least, refuse, token_columns
from influence_kit.corpora.worlds.words import add, first, in_words, listed, skip, zipf
from influence_kit.errors import UserError
from influence_kit.recipes import tuples

STATEMENT = 5  # tokens: entity, two function words, value, full stop
AVAILABILITY = ("both", "first", "second")
ORDERS = ("forward", "both", "reverse", "identity")
SYLLABLES = 28  # see `skip`
SALT = 0xA71A5


@dataclass(frozen=True)
class Atlas:
    """Parameters of the world. Counts are numbers of documents, words or repetitions; shares lie in [0, 1]."""

    asks: ClassVar = ("fact",)  # canaries, its other kind of query, are for who asks for them

    seed: int = 0
    entities: int = 300
    relations: int = 4
    values: int = 24  # for each relation
    templates: int = 3
    documents: int = 120_000
    facts_per_document: int = 3
    filler_words: int = 40  # for each language
    noise_words: int = 120
    noise_share: float = 0.1
    language_share: float = 0.5  # of the fact documents, in the first language
    anchor_share: float = 1.0  # of the entities whose name both languages share
    both_share: float = 0.5  # of the facts that exist in both languages; the rest is split evenly
    most_supporters: int = 600  # statements of the most frequent fact in one language; Zipf below it
    order: str = "forward"  # entity before value | both orders | reverse only | forward with "A is A" bridges
    canaries: int = 8  # for each number of repetitions
    repetitions: tuple[int, ...] = (1, 4, 16, 64)
    shuffled: bool = False  # control: every statement gets a random value, so there is nothing to know
    held_out: int = 1_000
    queries: int = 40  # for each language, of facts in both; as many of facts only in the other language
    alone: int = 0  # for each language, of facts that it alone states, each with its translation beside

    def __post_init__(self):
        for name in ("noise_share", "language_share", "anchor_share", "both_share"):
            if not 0 <= getattr(self, name) <= 1:
                refuse(self, name, "a share between 0 and 1")
        at_least(1, self, "entities", "values", "documents", "facts_per_document", "filler_words", "noise_words")
        if not 1 <= self.relations <= len(listed("atlas")["relations"]):
            refuse(self, "relations", f"between 1 and {len(listed('atlas')['relations'])}")
        if not 1 <= self.templates <= 3:
            refuse(self, "templates", "1, 2 or 3")
        if self.order not in ORDERS:
            refuse(self, "order", f"one of {', '.join(ORDERS)}")

    @property
    def length(self) -> int:
        """Tokens of a document, the first one included."""
        return self.facts_per_document * (STATEMENT + 1) + 1

    @property
    def words(self) -> int:
        """Number of token ids."""
        cloned = self.relations * (2 * self.templates + self.values) + self.filler_words + 2  # full stop, "is"
        names = 2 * self.entities - round(self.anchor_share * self.entities)
        return 1 + names + 2 * cloned + self.noise_words


@dataclass(frozen=True)
class Lexicon:
    """Token ids of all words by what they stand for, the first axis the language where there is one.

    Attributes:
        vocabulary: Words by id.
        names: Entities [2, E].
        words: Function words [2, R, templates, 2].
        values: [2, R, V].
        fillers: [2, F].
        stop: Full stops [2].
        noise: [W].
        equals: "is" of identity bridges [2].
    """

    vocabulary: tuple[str, ...]
    names: np.ndarray
    words: np.ndarray
    values: np.ndarray
    fillers: np.ndarray
    stop: np.ndarray
    noise: np.ndarray
    equals: np.ndarray


@dataclass(frozen=True)
class Known:
    """What is drawn before any document: the words, and the facts, of which number e * R + r is about entity e.

    Attributes:
        world: The parameters.
        lexicon: The words.
        truth: The true value of each entity and relation [E, R].
        availability: Where each fact exists [E * R]: in both languages (0), in the first (1) or in the second (2)
            alone.
    """

    world: Atlas
    lexicon: Lexicon
    truth: np.ndarray
    availability: np.ndarray


def build(world: Atlas) -> World:
    """Generate the corpus, its truth and its queries from the parameters alone (same seed, same bytes).

    Columns of sequences: language (0, 1, -1), kind ("facts", "noise", "canary", "identity"), facts int32 [facts a
    document] (-1 where none), canary (id or -1). Queries: kind ("fact", "alone" and its
    "translation", "canary"), fact, language, availability,
    statements_same / statements_other (their number in the whole corpus), canary, repetitions, scored (facts in both
    languages, facts alone, canaries).

    Raises:
        UserError: more or fewer statements than the facts can share, or too few noise documents for the canaries.
    """
    known, rng = drawn(world)
    noise_documents = round(world.documents * world.noise_share)
    fact_documents = world.documents - noise_documents
    first = round(fact_documents * world.language_share)
    present = [np.flatnonzero((known.availability == 0) | (known.availability == 1 + language)) for language in (0, 1)]
    blocks, statements = [], np.zeros((2, known.truth.size), np.int64)
    for language, documents in enumerate((first, fact_documents - first)):
        slots, counts = _slots(world, rng, present[language], documents * world.facts_per_document)
        np.add.at(statements[language], present[language], counts)
        blocks.append(_fact_documents(known, rng, language, slots))
    blocks.append(_noise_documents(known, rng, noise_documents))
    rows = _concatenate(blocks)
    order = rng.permutation(len(rows["tokens"]))
    train = {name: column[order] for name, column in rows.items()}
    held = []
    for language in (0, 1):
        slots = rng.choice(present[language], size=(world.held_out // 2, world.facts_per_document))
        held.append(_fact_documents(known, rng, language, slots))
    return World(
        "atlas",
        _table(train),
        _table(_concatenate(held)),
        _queries(known, rng, statements, train),
        known.lexicon.vocabulary,
        "",
        asdict(world),
    )


def make(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Generate the world as a stage does: `parameters` are Atlas's, and it lies in `out` afterwards."""
    build(Atlas(**tuples(parameters))).save(out)


def drawn(world: Atlas) -> tuple[Known, np.random.Generator]:
    """The words and facts of a world, and the generator that goes on from there to its documents."""
    rng = np.random.default_rng([world.seed, SALT])
    lexicon = _lexicon(world, rng)
    truth = rng.integers(0, world.values, size=(world.entities, world.relations))
    both = round(world.both_share * truth.size)
    kinds = np.concatenate([np.zeros(both, int), 1 + np.arange(truth.size - both) % 2])
    return Known(world, lexicon, truth, rng.permutation(kinds)), rng


def supporters(world: World, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which sequences state each query's fact, in the query's language and in the other one.

    Args:
        world: An Atlas world, or Deep.
        rows: Positions of the sequences [N]; all by default.

    Returns:
        bool [Q, N] twice.
    """
    states, same, other, _ = _relations(world, rows)
    return states & same, states & other


def namesakes(world: World, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which sequences are about each query's entity and do not state its fact, in its language and in the other one.

    The matched contrast to `supporters`, with its arguments: where names are shared, both share the entity's name with
    the query and nothing else across languages, so only the meaning tells them apart.

    Returns:
        bool [Q, N] twice.
    """
    states, same, other, about = _relations(world, rows)
    return about & ~states & same, about & ~states & other


def _relations(world: World, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """bool [Q, N] each: states the query's fact, is in its language, in the other one, is about its entity."""
    table = world.sequences if rows is None else world.sequences.take(pa.array(rows))
    width, relations = table.schema.field("facts").type.list_size, world.parameters["relations"]
    stated = table["facts"].combine_chunks().flatten().to_numpy().reshape(-1, width)
    language = table["language"].to_numpy()[None]
    fact, asked = world.queries["fact"].to_numpy()[:, None], world.queries["language"].to_numpy()[:, None]
    states, about = np.zeros((2, len(fact), len(stated)), bool)
    for place in range(width):
        states |= stated[None, :, place] == fact
        about |= (stated[None, :, place] // relations == fact // relations) & (stated[None, :, place] >= 0)
    is_fact = fact >= 0
    return states & is_fact, language == asked, (language != asked) & (language >= 0), about & is_fact


def _lexicon(world: Atlas, rng: np.random.Generator) -> Lexicon:
    vocabulary, words = [BOS], listed("atlas")

    def both(number: int, pairs: Sequence[str]) -> np.ndarray:
        """Ids [2, number] of words and their translations, one beside the other."""
        spoken = [first(number, language) for language in zip(*(pair.split("/") for pair in pairs))]
        return add(vocabulary, [word for pair in zip(*spoken) for word in pair]).reshape(number, 2).T

    def people(language: str) -> list[str]:
        alone, surnames = words["first_names"][language], words["surnames"][language]
        return first(world.entities, [*alone, *(f"{name}-{surname}" for surname in surnames for name in alone)])

    skip(rng, SYLLABLES, 3, range(world.entities))
    anchors = rng.permutation(world.entities) < round(world.anchor_share * world.entities)
    skip(rng, SYLLABLES, 2, range(world.relations * world.values + world.filler_words + world.noise_words))
    names, german = np.stack([add(vocabulary, people("English"))] * 2), people("German")
    names[1, ~anchors] = add(vocabulary, [german[entity] for entity in np.flatnonzero(~anchors)])
    frames, values = [], []
    for relation in list(words["relations"].values())[: world.relations]:
        frames.append(both(2 * world.templates, relation["ways"]).reshape(2, world.templates, 2))
        values.append(both(world.values, relation["values"]))
    return Lexicon(
        names=names,
        words=np.stack(frames, 1),
        values=np.stack(values, 1),
        fillers=both(world.filler_words, words["fillers"]),
        stop=both(1, words["stops"])[:, 0],
        equals=both(1, words["equals"])[:, 0],
        noise=add(vocabulary, first(world.noise_words, words["noise"])),
        vocabulary=tuple(vocabulary),
    )


def _slots(world: Atlas, rng: np.random.Generator, present: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Which fact each slot states, [documents, facts a document], and each present fact's number of statements.

    Counts follow Zipf's law c / rank, clipped to [1, most_supporters], with c solved for the number of slots.
    """
    if total == 0:
        return np.zeros((0, world.facts_per_document), np.int64), np.zeros(len(present), np.int64)
    if not len(present) <= total <= world.most_supporters * len(present):
        raise UserError(
            f"Atlas: {total} statements cannot be spread over {len(present)} facts with 1 to {world.most_supporters} "
            "statements each: change documents, most_supporters, entities or relations"
        )
    rank = np.arange(1, len(present) + 1)
    low, high = 0.0, float(world.most_supporters * len(present))
    for _ in range(60):
        middle = (low + high) / 2
        enough = np.clip(middle / rank, 1, world.most_supporters).sum() >= total
        low, high = (low, middle) if enough else (middle, high)
    exact = np.clip(high / rank, 1, world.most_supporters)
    counts = np.floor(exact).astype(np.int64)
    short = total - counts.sum()
    for fact in np.argsort(counts - exact, kind="stable")[:short]:
        counts[fact] += 1
    counts = counts[rng.permutation(len(present))]
    slots = rng.permutation(np.repeat(present, counts))
    if len(slots) != total:
        raise AssertionError(f"{len(slots)} slots for {total} statements")
    return slots.reshape(-1, world.facts_per_document), counts


def _statements(known: Known, rng: np.random.Generator, language: int, slots: np.ndarray) -> np.ndarray:
    """Token ids [documents, facts, STATEMENT] of the facts in `slots`."""
    world, lexicon = known.world, known.lexicon
    entity, relation = slots // world.relations, slots % world.relations
    value = known.truth[entity, relation]
    if world.shuffled:
        value = rng.integers(0, world.values, size=slots.shape)
    template = rng.integers(0, world.templates, size=slots.shape)
    backwards = {"reverse": 1.0, "both": 0.5}.get(world.order, 0.0) > rng.random(slots.shape)
    a, b = lexicon.names[language, entity], lexicon.values[language, relation, value]
    words = lexicon.words[language, relation, template]
    stop = np.full(slots.shape, lexicon.stop[language])
    first, last = np.where(backwards, b, a), np.where(backwards, a, b)
    return np.stack([first, words[..., 0], words[..., 1], last, stop], -1)


def _fact_documents(known: Known, rng: np.random.Generator, language: int, slots: np.ndarray) -> dict[str, np.ndarray]:
    documents, facts = slots.shape
    filler = rng.choice(known.lexicon.fillers[language], size=(documents, facts, 1))
    body = np.concatenate([filler, _statements(known, rng, language, slots)], 2)
    kind = np.full(documents, "facts", dtype=object)
    if known.world.order == "identity":
        bridges = rng.random((documents,)) < 0.15
        kind[bridges] = "identity"
        body[bridges] = _bridges(rng, known.lexicon.equals[language], body[bridges])
        slots = np.where(bridges[:, None], -1, slots)
    tokens = np.concatenate([np.zeros((documents, 1), np.int64), body.reshape(documents, -1)], 1)
    return {
        "tokens": tokens,
        "language": np.full(documents, language),
        "kind": kind,
        "facts": slots,
        "canary": np.full(documents, -1),
    }


def _bridges(rng: np.random.Generator, equals: int, body: np.ndarray) -> np.ndarray:
    """The identity bridge: statements "A is A" about the entities or values of the documents they replace."""
    subject = np.where(rng.random(body.shape[:2]) < 0.5, body[..., 1], body[..., 4])
    word = np.full(subject.shape, equals)
    return np.stack([body[..., 0], subject, word, word, subject, body[..., 5]], -1)


def _noise_documents(known: Known, rng: np.random.Generator, documents: int) -> dict[str, np.ndarray]:
    """Words drawn independently from a Zipf law; some of them canaries, repeated verbatim."""
    world, length = known.world, known.world.length - 1
    body = zipf(rng, known.lexicon.noise, (documents, length))
    canary = np.full(documents, -1)
    needed = world.canaries * sum(world.repetitions)
    if needed > documents:
        raise UserError(
            f"Atlas: {world.canaries} canaries x repetitions {world.repetitions} need {needed} noise documents, there "
            f"are {documents}: raise documents or noise_share, or lower canaries"
        )
    row = 0
    for number, times in enumerate(np.repeat(world.repetitions, world.canaries)):
        body[row : row + times] = rng.choice(known.lexicon.noise, size=length)
        canary[row : row + times] = number
        row += times
    return {
        "tokens": np.concatenate([np.zeros((documents, 1), np.int64), body], 1),
        "language": np.full(documents, -1),
        "kind": np.where(canary >= 0, "canary", "noise").astype(object),
        "facts": np.full((documents, world.facts_per_document), -1),
        "canary": canary,
    }


def _concatenate(blocks: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _table(rows: dict[str, np.ndarray]) -> pa.Table:
    facts = rows["facts"].astype(np.int32)
    return pa.table(
        {
            **token_columns(rows["tokens"]),
            "language": pa.array(rows["language"].astype(np.int8)),
            "kind": pa.array(rows["kind"], pa.string()),
            "facts": pa.FixedSizeListArray.from_arrays(pa.array(facts.ravel()), facts.shape[1]),
            "canary": pa.array(rows["canary"].astype(np.int32)),
        }
    )


def _queries(known: Known, rng: np.random.Generator, statements: np.ndarray, train: dict[str, np.ndarray]) -> pa.Table:
    """Fact queries in each language, of facts in both languages and of facts only in the other one; facts that one language
    alone states, asked there and, in the same words, in the other one; and canaries."""
    world, lexicon = known.world, known.lexicon
    tokens, answers, rows = [], [], []

    def ask(kind: str, fact: int, language: int, template: int, filler: int) -> None:
        entity, relation = divmod(fact, world.relations)
        words = lexicon.words[language, relation, template].tolist()
        value = lexicon.values[language, relation, known.truth[entity, relation]]
        tokens.append([0, filler, int(lexicon.names[language, entity]), *words, int(value)])
        answers.append(len(tokens[-1]) - 1)
        stated = {
            "statements_same": statements[language, fact],
            "statements_other": statements[1 - language, fact],
        }
        where = AVAILABILITY[known.availability[fact]]
        rows.append({"kind": kind, "fact": fact, "language": language, "availability": where, **stated})

    for language in (0, 1):
        for where in (0, 2 - language):  # facts in both languages, then facts only in the other one
            for fact in rng.permutation(np.flatnonzero(known.availability == where))[: world.queries]:
                template = int(rng.integers(world.templates))
                ask("fact", int(fact), language, template, int(rng.choice(lexicon.fillers[language])))
    for language in (0, 1):
        for fact in rng.permutation(np.flatnonzero(known.availability == 1 + language))[: world.alone]:
            template, filler = int(rng.integers(world.templates)), int(rng.integers(world.filler_words))
            for kind, spoken in (("alone", language), ("translation", 1 - language)):
                ask(kind, int(fact), spoken, template, int(lexicon.fillers[spoken, filler]))
    for number, times in enumerate(np.repeat(world.repetitions, world.canaries)):
        tokens.append(train["tokens"][np.flatnonzero(train["canary"] == number)[0]].tolist())
        answers.append(world.length // 2)
        rows.append({"kind": "canary", "availability": "none", "canary": number, "repetitions": times})
    padded = np.array([row + [0] * (world.length - len(row)) for row in tokens])
    ends, places = np.array([len(row) for row in tokens])[:, None], np.arange(world.length)
    mask = (np.array(answers)[:, None] <= places) & (places < ends)
    names = ("kind", "fact", "language", "availability", "statements_same", "statements_other", "canary", "repetitions")
    columns = {name: [row.get(name, -1) for row in rows] for name in names}
    columns["scored"] = [row["kind"] != "fact" or row["availability"] == "both" for row in rows]
    return pa.table({**token_columns(padded, mask), **in_words(lexicon.vocabulary, padded, mask), **columns})
