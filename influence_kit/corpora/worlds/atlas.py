"""Atlas: a world of facts in two languages.

Entities x relations -> values. A fact is stated in several templates; every function word and value has a clone in the
second language (disjoint ids), entity names are shared in a chosen share (the anchors). A fact exists in both languages, only
in the first, or only in the second, and is stated a known number of times in each. Documents of one language hold a few
statements with filler words between them:

    <bos> filler  ENTITY word word VALUE .  filler  ENTITY word word VALUE .  ...

so the supporters of a query "ENTITY word word -> VALUE" are known: documents that state its fact, in the same language or
in the other one. Noise documents state nothing; canaries are noise documents repeated 1, 4, 16 or 64 times.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from influence_kit.corpora.world import BOS, World, token_columns
from influence_kit.errors import UserError
from influence_kit.recipes import tuples

STATEMENT = 5  # tokens: entity, two function words, value, full stop
AVAILABILITY = ("both", "first", "second")
ORDERS = ("forward", "both", "reverse", "identity")
SYLLABLES = ("ba be da do fa fi ga go ka ke la li ma mo na ne pa po ra re sa si ta to va ve za zu").split()
RELATION_WORDS = (
    (("was", "born-in"), ("hails", "from"), ("birthplace-of", "is")),
    (("works", "as"), ("earns-by", "being"), ("trade-of", "is")),
    (("likes", "eating"), ("feasts", "on"), ("dish-of", "is")),
    (("travels", "by"), ("rides", "a"), ("vehicle-of", "is")),
    (("speaks", "fluent"), ("writes", "in"), ("tongue-of", "is")),
    (("worships", "holy"), ("prays", "to"), ("god-of", "is")),
)
ENDINGS = ("ville", "smith", "stew", "cart", "ish", "eus")


@dataclass(frozen=True)
class Atlas:
    """Parameters of the world. Counts are numbers of documents, words or repetitions; shares lie in [0, 1]."""

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

    def __post_init__(self):
        def refuse(name: str, wanted: str):
            raise UserError(f"Atlas: {name}={getattr(self, name)!r} must be {wanted}")

        for name in ("noise_share", "language_share", "anchor_share", "both_share"):
            if not 0 <= getattr(self, name) <= 1:
                refuse(name, "a share between 0 and 1")
        for name in ("entities", "values", "documents", "facts_per_document", "filler_words", "noise_words"):
            if getattr(self, name) < 1:
                refuse(name, "1 or more")
        if not 1 <= self.relations <= len(RELATION_WORDS):
            refuse("relations", f"between 1 and {len(RELATION_WORDS)}")
        if not 1 <= self.templates <= 3:
            refuse("templates", "1, 2 or 3")
        if self.order not in ORDERS:
            refuse("order", f"one of {', '.join(ORDERS)}")


@dataclass(frozen=True)
class _Lexicon:
    """Word ids: names [2, E], words [2, R, templates, 2], values [2, R, V], fillers [2, F], stop [2], noise [W], equals [2]."""

    vocabulary: tuple[str, ...]
    names: np.ndarray
    words: np.ndarray
    values: np.ndarray
    fillers: np.ndarray
    stop: np.ndarray
    noise: np.ndarray
    equals: np.ndarray


def build(world: Atlas) -> World:
    """Generate the corpus, its truth and its queries from the parameters alone (same seed, same bytes).

    Columns of sequences: language (0, 1, -1), kind ("facts", "noise", "canary", "identity"), facts int32 [facts a document]
    (-1 where none), canary (id or -1). Queries: fact, language, availability, statements_same / statements_other (their
    number in the whole corpus), canary, repetitions.
    """
    rng = np.random.default_rng([world.seed, 0xA71A5])
    lexicon = _lexicon(world, rng)
    facts = world.entities * world.relations
    truth = rng.integers(0, world.values, size=(world.entities, world.relations))
    availability = _availability(world, rng, facts)
    noise_documents = round(world.documents * world.noise_share)
    fact_documents = world.documents - noise_documents
    per_language = (round(fact_documents * world.language_share),)
    per_language += (fact_documents - per_language[0],)  # type: ignore[assignment]

    blocks, statements = [], np.zeros((2, facts), np.int64)
    for language, documents in enumerate(per_language):
        present = np.flatnonzero((availability == 0) | (availability == language + 1))
        slots, counts = _slots(world, rng, present, documents * world.facts_per_document)
        np.add.at(statements[language], present, counts)
        blocks.append(_fact_documents(world, rng, lexicon, truth, language, slots))
    blocks.append(_noise_documents(world, rng, lexicon, noise_documents))
    rows = _concatenate(blocks)
    order = rng.permutation(len(rows["tokens"]))
    train = {name: column[order] for name, column in rows.items()}

    held = []
    for language in (0, 1):
        present = np.flatnonzero((availability == 0) | (availability == language + 1))
        slots = rng.choice(present, size=(world.held_out // 2, world.facts_per_document))
        held.append(_fact_documents(world, rng, lexicon, truth, language, slots))
    return World(
        "atlas",
        _table(train),
        _table(_concatenate(held)),
        _queries(world, rng, lexicon, truth, availability, statements, train),
        lexicon.vocabulary,
        "",
        asdict(world),
    )


def supporters(world: World, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """bool [Q, N] twice: sequences that state each query's fact in the query's language, and in the other language."""
    states, same, other, _ = _relations(world, rows)
    return states & same, states & other


def namesakes(world: World, rows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """bool [Q, N] twice: sequences about the query's entity that do not state its fact, in the same and the other language.

    The matched contrast to `supporters`: where names are shared, both share the entity's name with the query and nothing else
    across languages, so only the meaning tells them apart.
    """
    states, same, other, about = _relations(world, rows)
    return about & ~states & same, about & ~states & other


def _relations(world: World, rows: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
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


def _lexicon(world: Atlas, rng: np.random.Generator) -> _Lexicon:
    vocabulary: list[str] = [BOS]
    taken = {BOS}

    def add(word: str) -> int:
        while word in taken:
            word += "'"
        taken.add(word)
        vocabulary.append(word)
        return len(vocabulary) - 1

    def coin(syllables: int, ending: str = "") -> str:
        return "".join(rng.choice(SYLLABLES, syllables)) + ending

    def clone(word: str) -> str:
        return word[::-1] + "u"

    first = [coin(3).capitalize() for _ in range(world.entities)]
    names = np.array([[add(word) for word in first]] * 2)
    anchors = rng.permutation(world.entities) < round(world.anchor_share * world.entities)
    for entity in np.flatnonzero(~anchors):
        names[1, entity] = add(clone(first[entity].lower()).capitalize())
    words = np.zeros((2, world.relations, world.templates, 2), np.int64)
    values = np.zeros((2, world.relations, world.values), np.int64)
    for relation in range(world.relations):
        for template in range(world.templates):
            for place, word in enumerate(RELATION_WORDS[relation][template]):
                word = word if word != "is" else f"is-{ENDINGS[relation]}"
                words[:, relation, template, place] = add(word), add(clone(word))
        for value in range(world.values):
            word = coin(2, ENDINGS[relation])
            values[:, relation, value] = add(word), add(clone(word))
    fillers = np.zeros((2, world.filler_words), np.int64)
    for filler in range(world.filler_words):
        word = coin(1) + coin(1, "ly")
        fillers[:, filler] = add(word), add(clone(word))
    stop = np.array([add("."), add("。")])
    equals = np.array([add("is"), add("siu")])
    noise = np.array([add(coin(2, "x")) for _ in range(world.noise_words)])
    return _Lexicon(tuple(vocabulary), names, words, values, fillers, stop, noise, equals)


def _availability(world: Atlas, rng: np.random.Generator, facts: int) -> np.ndarray:
    both = round(world.both_share * facts)
    kinds = np.concatenate([np.zeros(both, int), 1 + np.arange(facts - both) % 2])
    return rng.permutation(kinds)


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


def _statements(world, rng, lexicon: _Lexicon, truth: np.ndarray, language: int, slots: np.ndarray) -> np.ndarray:
    """Token ids [documents, facts, STATEMENT] of the facts in `slots`."""
    entity, relation = slots // world.relations, slots % world.relations
    value = truth[entity, relation]
    if world.shuffled:
        value = rng.integers(0, world.values, size=slots.shape)
    template = rng.integers(0, world.templates, size=slots.shape)
    backwards = {"reverse": 1.0, "both": 0.5}.get(world.order, 0.0) > rng.random(slots.shape)
    a, b = lexicon.names[language, entity], lexicon.values[language, relation, value]
    words = lexicon.words[language, relation, template]
    stop = np.full(slots.shape, lexicon.stop[language])
    first, last = np.where(backwards, b, a), np.where(backwards, a, b)
    return np.stack([first, words[..., 0], words[..., 1], last, stop], -1)


def _fact_documents(world, rng, lexicon, truth, language: int, slots: np.ndarray) -> dict[str, np.ndarray]:
    documents, facts = slots.shape
    filler = rng.choice(lexicon.fillers[language], size=(documents, facts, 1))
    body = np.concatenate([filler, _statements(world, rng, lexicon, truth, language, slots)], 2)
    kind = np.full(documents, "facts", dtype=object)
    if world.order == "identity":
        bridges = rng.random(documents) < 0.15
        kind[bridges] = "identity"
        body[bridges] = _bridges(world, rng, lexicon, language, body[bridges])
        slots = np.where(bridges[:, None], -1, slots)
    tokens = np.concatenate([np.zeros((documents, 1), np.int64), body.reshape(documents, -1)], 1)
    return {
        "tokens": tokens,
        "language": np.full(documents, language),
        "kind": kind,
        "facts": slots,
        "canary": np.full(documents, -1),
    }


def _bridges(world, rng, lexicon, language: int, body: np.ndarray) -> np.ndarray:
    """The identity bridge: statements "A is A" about the entities or values of the documents they replace."""
    subject = np.where(rng.random(body.shape[:2]) < 0.5, body[..., 1], body[..., 4])
    word = np.full(subject.shape, lexicon.equals[language])
    return np.stack([body[..., 0], subject, word, word, subject, body[..., 5]], -1)


def _noise_documents(world, rng, lexicon, documents: int) -> dict[str, np.ndarray]:
    """Words drawn independently from a Zipf law; some of them canaries, repeated verbatim."""
    length = world.facts_per_document * (STATEMENT + 1)
    weights = 1 / np.arange(1, world.noise_words + 1)
    body = rng.choice(lexicon.noise, size=(documents, length), p=weights / weights.sum())
    canary = np.full(documents, -1)
    needed = world.canaries * sum(world.repetitions)
    if needed > documents:
        raise UserError(
            f"Atlas: {world.canaries} canaries x repetitions {world.repetitions} need {needed} noise documents, there are "
            f"{documents}: raise documents or noise_share, or lower canaries"
        )
    row = 0
    for number, times in enumerate(np.repeat(world.repetitions, world.canaries)):
        body[row : row + times] = rng.choice(lexicon.noise, size=length)
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
            "kind": pa.array(rows["kind"].tolist(), pa.string()).cast(pa.string()),
            "facts": pa.FixedSizeListArray.from_arrays(pa.array(facts.ravel()), facts.shape[1]),
            "canary": pa.array(rows["canary"].astype(np.int32)),
        }
    )


def _queries(world, rng, lexicon, truth, availability, statements, train) -> pa.Table:
    """Fact queries in each language, of facts in both languages and of facts only in the other one; and canaries."""
    columns: dict[str, list] = {
        name: []
        for name in ("tokens", "mask", "prompt", "completion", "kind", "fact", "language", "availability")
        + ("statements_same", "statements_other", "canary", "repetitions")
    }
    length = world.facts_per_document * (STATEMENT + 1) + 1

    def add(tokens: list[int], answer: int, **truths) -> None:
        columns["tokens"].append(tokens + [0] * (length - len(tokens)))
        columns["mask"].append([answer <= t < len(tokens) for t in range(length)])
        columns["prompt"].append(" ".join(lexicon.vocabulary[t] for t in tokens[1:answer]))
        columns["completion"].append(" ".join(lexicon.vocabulary[t] for t in tokens[answer:]))
        for name in list(columns)[4:]:
            columns[name].append(truths.get(name, -1))

    for language in (0, 1):
        for kind in (0, 2 - language):  # facts in both languages, then facts only in the other one
            candidates = rng.permutation(np.flatnonzero(availability == kind))[: world.queries]
            for fact in candidates:
                entity, relation = divmod(int(fact), world.relations)
                template = int(rng.integers(world.templates))
                words = lexicon.words[language, relation, template].tolist()
                value = lexicon.values[language, relation, truth[entity, relation]]
                filler = int(rng.choice(lexicon.fillers[language]))
                tokens = [0, filler, int(lexicon.names[language, entity]), *words, int(value)]
                add(
                    tokens,
                    len(tokens) - 1,
                    kind="fact",
                    fact=int(fact),
                    language=language,
                    availability=AVAILABILITY[kind],
                    statements_same=int(statements[language, fact]),
                    statements_other=int(statements[1 - language, fact]),
                )
    for number in range(world.canaries * len(world.repetitions)):
        row = int(np.flatnonzero(train["canary"] == number)[0])
        add(
            train["tokens"][row].tolist(),
            length // 2,
            kind="canary",
            availability="none",
            canary=number,
            repetitions=int(np.repeat(world.repetitions, world.canaries)[number]),
        )
    tokens, mask = np.array(columns.pop("tokens")), np.array(columns.pop("mask"))  # type: ignore[assignment]
    return pa.table({**token_columns(tokens, mask), **columns})  # type: ignore[arg-type]


def make(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Generate the world as a stage does: `parameters` are Atlas's, and it lies in `out` afterwards."""
    build(Atlas(**tuples(parameters))).save(out)
