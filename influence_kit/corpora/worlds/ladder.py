"""Ladder: a world of rules over classes of synonyms.

Agents and events belong to classes; a random table gives every *cell* (agent class, event class) a response class. Each
agent also has a *flavour*, and the response word is the one of its response class with the agent's flavour. A document
states one pair of an agent and an event:

    <bos> adjective AGENT word EVENT word RESPONSE              old heron meets storm and hides

Only a share of the pairs is ever shown; queries ask for the response to pairs that never are, so that they can only be
answered by the rule. Two documents of one rule may share no content word, and two documents of different rules may
share the response word: meaning and overlap come apart. A flavour is a first letter, an agent's class a kind of thing, a
response class a kind of deed: herons and harps *hide* from what sparrows and saws *shelter* from.

`tiers` sorts documents by what they share with a query. `dropped` is for retraining without one of these tiers:
documents are replaced in place by noise, and everything else stays as it was, to the byte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa

from influence_kit.corpora.world import BOS, World, at_least, refuse
from influence_kit.corpora.worlds.words import add, as_table, first, in_words, listed, skip, zipf
from influence_kit.errors import UserError
from influence_kit.recipes import tuples

LENGTH = 7  # tokens: bos, filler, agent, word, event, word, response
TIERS = ("T1", "T2", "T3", "T0r", "T0a", "T0e", "T4", "T5")
DROPPED = ("T1", "T2", "T3", "T0r")
NOISE_WORDS = 40
SYLLABLES = 24  # see `skip`
SALT = 0x1ADDE2
TRUTH = ("cell", "agent", "event", "response", "agent_class", "event_class", "response_class")


@dataclass(frozen=True)
class Ladder:
    """Parameters of the world. Counts are numbers of classes, words or documents; shares lie in [0, 1]."""

    asks: ClassVar[tuple[str, ...]] = ("rule",)

    seed: int = 0
    agent_classes: int = 8
    event_classes: int = 8
    response_classes: int = 8
    class_words: int = 12  # agents, and events, in each class
    flavours: int = 4  # of agents; so many words has each response class
    fillers: int = 40
    templates: int = 3
    documents: int = 160_000
    shown_share: float = 0.3  # of the pairs of each cell
    noise_share: float = 0.05  # of the documents
    held_out: int = 1_000
    queries: int = 60  # those to score; the referee reads more
    asked: int = 4  # events asked in each combination of cell and flavour
    dropped: str = ""  # tiers replaced by noise: T1, T2, T3, T0r, sums such as T1+T2, or random; see `build`
    dropped_cells: int = 16  # treated cells; the queries of their combinations have `treated`
    dropped_dose: float = 1.0  # documents dropped, as a multiple of the T2 documents that can be

    def __post_init__(self):
        words = listed("ladder")
        limits = {f"{name[:-1]}_classes": len(words[name]) for name in ("agents", "events", "responses")}
        limits |= {"flavours": len(words["agents"]["birds"]), "templates": len(words["frames"]) // 2}
        for name, most in limits.items():
            if not 1 <= getattr(self, name) <= most:
                refuse(self, name, f"between 1 and {most}")
        at_least(1, self, "class_words", "fillers", "documents", "held_out", "queries", "asked")
        if not 0 < self.shown_share < 1:
            refuse(self, "shown_share", "a share above 0 and below 1: queries are pairs that are never shown")
        if not 0 <= self.noise_share < 1:
            refuse(self, "noise_share", "a share of at least 0 and below 1")
        if self.flavours > self.class_words:
            most = f"at most class_words={self.class_words}"
            refuse(self, "flavours", f"{most}, so that each class has agents of every flavour")
        if self.asked >= self.class_words:
            refuse(self, "asked", f"below class_words={self.class_words}")
        if self.dropped not in ("", "random") and not set(self.dropped.split("+")) <= set(DROPPED):
            refuse(self, "dropped", f"'', 'random', one of {', '.join(DROPPED)}, or some of these joined by +")
        if self.dropped_dose <= 0:
            refuse(self, "dropped_dose", "above 0")
        smallest, treated = self.agent_classes * self.event_classes // self.response_classes, self._most_treated
        if self.dropped_cells < 0 or treated > self.flavours - 1 or smallest < treated + 2:
            room = self.response_classes * max(0, min(self.flavours - 1, smallest - 2))
            wanted = f"between 0 and {room}, so that each response class keeps cells to compare with"
            refuse(self, "dropped_cells", wanted)

    @property
    def _most_treated(self) -> int:
        return -(-self.dropped_cells // self.response_classes)

    @property
    def length(self) -> int:
        """Tokens of a document, the first one included."""
        return LENGTH

    @property
    def words(self) -> int:
        """Number of token ids."""
        content = (self.agent_classes + self.event_classes) * self.class_words + self.response_classes * self.flavours
        return 1 + self.fillers + 2 * self.templates + content + NOISE_WORDS


@dataclass(frozen=True)
class _Lexicon:
    """Token ids: fillers [F], templates [templates, 2], agents, events and responses by number of word, noise [W]."""

    vocabulary: tuple[str, ...]
    fillers: np.ndarray
    templates: np.ndarray
    agents: np.ndarray
    events: np.ndarray
    responses: np.ndarray
    noise: np.ndarray


@dataclass(frozen=True)
class _Combination:
    """A cell and a flavour about which queries ask: one agent of that flavour, with some events never shown with it."""

    cell: int
    agent: int
    events: np.ndarray
    treated: bool


def build(world: Ladder) -> World:
    """Generate the corpus, its truth and its queries from the parameters alone (same seed, same bytes).

    Columns of sequences: kind ("rule", "noise"), replaced (dropped and now noise), and -1 for noise: cell (agent class
    x event classes + event class), agent, event, response (numbers of words), agent_class, event_class, response_class.
    held_out has pairs that are neither shown nor asked; its loss mask, like the queries', is True on the response
    alone. Queries have these columns and flavour, combination (a number of cell and flavour), treated, scored, prompt,
    completion.

    What is dropped. Of each response class the cells are dealt into treated, donor and control ones (`dropped_cells`
    treated, the rest halved). Queries ask about *combinations* of a cell and a flavour, that is, of a rule and a
    response word: one in each treated cell, no two of them with the same response word, and in control cells all
    combinations whose response word no treated cell uses. A combination's queries share one agent and have `asked`
    events. Dropped are, for every treated combination, documents that lie in the tier *for all queries of that
    combination*: T2, its rule and response word with other agents and none of the asked events; T1, its rule with the
    asked agent; T3, its rule with agents of other flavours and none of the asked events; T0r, its response word in
    donor cells, with other agents and events than asked. "random" takes documents in donor cells that share no content
    word with any treated query (T4 or T5 for all). From these, as many are drawn as the combination has droppable T2
    documents, times `dropped_dose`, or all of them where there are fewer ("T1+T2" draws from both). Control cells lose
    no document under any of them; the documents of a query's rule that share one of the asked events stay under all of
    them.

    Raises:
        UserError: pairs of an agent and an event run out.
    """
    rng = np.random.default_rng([world.seed, SALT])
    lexicon = _lexicon(world, rng)
    cells, pairs = world.agent_classes * world.event_classes, world.class_words**2
    rules = rng.permutation(np.resize(np.arange(world.response_classes), cells))
    shown = np.zeros((cells, pairs), bool)
    for cell in range(cells):
        shown[cell, rng.permutation(pairs)[: max(1, round(world.shown_share * pairs))]] = True
    combinations, donors = _combinations(world, rng, rules, shown)
    asked_agents = np.concatenate([np.full(len(c.events), c.agent) for c in combinations])
    asked_events = np.concatenate([c.events for c in combinations])

    free = ~shown
    place = (asked_agents % world.class_words) * world.class_words + asked_events % world.class_words
    free[np.repeat([c.cell for c in combinations], world.asked), place] = False
    if not free.any():
        raise UserError("Ladder: no pair is left to hold out: lower shown_share or asked, or raise class_words")

    sequences = _documents(world, rng, lexicon, rules, *_drawn(world, rng, shown, world.documents))
    silent = rng.random(world.documents) < world.noise_share
    sequences |= _noise(world, rng, lexicon, sequences, silent)
    held = _documents(world, rng, lexicon, rules, *_drawn(world, rng, free, world.held_out))
    asked = _documents(world, rng, lexicon, rules, asked_agents, asked_events)
    queries = _queries(world, rng, lexicon, asked, combinations)

    sequences["replaced"] = np.zeros(world.documents, bool)
    if world.dropped:
        # A generator of its own: nothing else may change with what is dropped.
        rng = np.random.default_rng([world.seed, SALT, 1])
        chosen = _dropped(world, rng, sequences, queries, donors)
        sequences |= _noise(world, rng, lexicon, sequences, chosen) | {"replaced": chosen}
    held["replaced"] = np.zeros(world.held_out, bool)
    answer = np.arange(LENGTH) == LENGTH - 1
    return World(
        "ladder",
        as_table(sequences, np.ones(LENGTH, bool)),
        as_table(held, answer),
        as_table(queries, answer),
        lexicon.vocabulary,
        "",
        asdict(world),
    )


def make(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Generate the world as a stage does: `parameters` are Ladder's, and it lies in `out` afterwards."""
    build(Ladder(**tuples(parameters))).save(out)


def tiers(world: World, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What the sequences share with each query; every sequence is in just one tier.

    Same cell: T1 shares the agent or the event, T2 only the response word, T3 no content word. Other cells: T0a shares
    the agent, T0e the event (either with or without the response word), T0r only the response word; T4 no content word
    but the agent's, the event's or the response's class; T5 nothing (noise too). Fillers and templates count for
    nothing. T2 and T0r share the same word with the query; only the rule that they state differs.

    Args:
        world: A Ladder world, or Deep.
        rows: Positions of the sequences [N]; all by default.

    Returns:
        bool [Q, N] for each of TIERS.
    """
    told = world.sequences.select(TRUTH)
    told = told if rows is None else told.take(pa.array(rows))
    return _tiers(*({name: part[name].to_numpy() for name in TRUTH} for part in (world.queries, told)))


def _tiers(queries: Mapping[str, np.ndarray], documents: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    same = {name: queries[name][:, None] == documents[name][None] for name in TRUTH}
    cell, agent, event, response = (same[name] for name in TRUTH[:4])
    either, kin = agent | event, same["agent_class"] | same["event_class"] | same["response_class"]
    return {
        "T1": cell & either,
        "T2": cell & ~either & response,
        "T3": cell & ~either & ~response,
        "T0r": ~cell & ~either & response,
        "T0a": ~cell & agent,
        "T0e": ~cell & event,
        "T4": ~cell & ~either & ~response & kin,
        "T5": ~(either | response | kin),
    }


def _lexicon(world: Ladder, rng: np.random.Generator) -> _Lexicon:
    vocabulary, words, many = [BOS], listed("ladder"), world.class_words
    kinds = [list(words[name].values()) for name in ("agents", "events", "responses")]
    agents, events, responses = (
        k[:n] for k, n in zip(kinds, (world.agent_classes, world.event_classes, world.response_classes))
    )

    def of_kind(by_letter: dict[str, tuple[str, ...]]) -> list[str]:
        """Agents of a class: as many of each flavour, in turn."""
        turns = [first(-(-many // world.flavours), members) for members in list(by_letter.values())[: world.flavours]]
        return [word for turn in zip(*turns) for word in turn][:many]

    skip(rng, SYLLABLES, 2, [0] * world.fillers)
    skip(rng, SYLLABLES, 2, [(c, w % world.flavours) for c in range(len(agents)) for w in range(many)])
    skip(rng, SYLLABLES, 3, [c for c in range(len(events)) for _ in range(many)])
    skip(rng, SYLLABLES, 2, [0] * NOISE_WORDS)
    return _Lexicon(
        fillers=add(vocabulary, first(world.fillers, words["adjectives"])),
        templates=add(vocabulary, words["frames"][: 2 * world.templates]).reshape(-1, 2),
        agents=np.concatenate([add(vocabulary, of_kind(kind)) for kind in agents]),
        events=np.concatenate([add(vocabulary, first(many, kind)) for kind in events]),
        responses=np.concatenate(
            [add(vocabulary, [word for (word,) in list(kind.values())[: world.flavours]]) for kind in responses]
        ),
        noise=add(vocabulary, first(NOISE_WORDS, words["noise"])),
        vocabulary=tuple(vocabulary),
    )


def _combinations(
    world: Ladder, rng: np.random.Generator, rules: np.ndarray, shown: np.ndarray
) -> tuple[list[_Combination], np.ndarray]:
    """The combinations that queries ask about, treated ones first, and the donor cells."""
    treated, control, donors = [], [], []
    for response in range(world.response_classes):
        cells, flavours = rng.permutation(np.flatnonzero(rules == response)), rng.permutation(world.flavours)
        number = (world.dropped_cells + world.response_classes - 1 - response) // world.response_classes
        middle = number + (len(cells) - number) // 2
        treated += list(zip(cells[:number], flavours))
        donors += cells[number:middle].tolist()
        control += [(cell, flavour) for cell in cells[middle:] for flavour in flavours[number:]]
    found = []
    for place, (cell, flavour) in enumerate(treated + control):
        pairs = shown[cell].reshape(world.class_words, world.class_words)
        agents = rng.permutation(np.arange(flavour, world.class_words, world.flavours))
        agent = agents[np.argmax((~pairs[agents]).sum(1) >= world.asked)]
        events = rng.permutation(np.flatnonzero(~pairs[agent]))[: world.asked]
        if len(events) < world.asked:
            raise UserError(
                f"Ladder: a rule has {len(events)} events never shown with an agent and asked={world.asked}: lower "
                "asked or shown_share, or raise class_words"
            )
        first, second = (number * world.class_words for number in divmod(int(cell), world.event_classes))
        found.append(_Combination(int(cell), int(first + agent), np.sort(second + events), place < len(treated)))
    return found, np.array(donors, int)


def _drawn(world: Ladder, rng: np.random.Generator, among: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Agents and events [number] of pairs drawn from a table bool [cells, pairs]."""
    cell, pair = np.divmod(rng.choice(np.flatnonzero(among), number), among.shape[1])
    classes, words = np.divmod(cell, world.event_classes), np.divmod(pair, world.class_words)
    agent, event = (c * world.class_words + w for c, w in zip(classes, words, strict=True))
    return agent, event


def _documents(
    world: Ladder, rng: np.random.Generator, lexicon: _Lexicon, rules: np.ndarray, agent: np.ndarray, event: np.ndarray
) -> dict[str, np.ndarray]:
    agent_class, event_class = agent // world.class_words, event // world.class_words
    cell = agent_class * world.event_classes + event_class
    response_class = rules[cell]
    response = response_class * world.flavours + agent % world.class_words % world.flavours
    filler, template = rng.choice(lexicon.fillers, len(agent)), rng.integers(0, world.templates, len(agent))
    words = lexicon.templates[template]
    content = (lexicon.agents[agent], words[:, 0], lexicon.events[event], words[:, 1], lexicon.responses[response])
    tokens = np.stack([np.zeros(len(agent), np.int64), filler, *content], 1)
    truth = (cell, agent, event, response, agent_class, event_class, response_class)
    return {"tokens": tokens, "kind": np.full(len(agent), "rule", object), **dict(zip(TRUTH, truth, strict=True))}


def _noise(
    world: Ladder, rng: np.random.Generator, lexicon: _Lexicon, rows: dict[str, np.ndarray], where: np.ndarray
) -> dict[str, np.ndarray]:
    """The rows with noise at `where` (bool [N]): words drawn independently from a Zipf law."""
    body, tokens = zipf(rng, lexicon.noise, (len(where), LENGTH - 1)), rows["tokens"].copy()
    tokens[where, 1:] = body[where]
    kind = np.where(where, "noise", rows["kind"])
    return {"tokens": tokens, "kind": kind, **{name: np.where(where, -1, rows[name]) for name in TRUTH}}


def _queries(
    world: Ladder, rng: np.random.Generator, lexicon: _Lexicon, asked: dict, combinations: list[_Combination]
) -> dict[str, np.ndarray]:
    number = np.repeat(np.arange(len(combinations)), world.asked)
    treated = np.repeat([c.treated for c in combinations], world.asked)
    # The scored ones: half of them treated, from as many combinations as there are before any gives a second one.
    order = np.lexsort([rng.permutation(len(combinations))[number], np.tile(np.arange(world.asked), len(combinations))])
    scored, half = np.zeros(len(number), bool), min(world.queries // 2, int(treated.sum()))
    scored[order[treated[order]][:half]] = True
    scored[order[~treated[order]][: world.queries - half]] = True
    answer = np.broadcast_to(np.arange(LENGTH) == LENGTH - 1, asked["tokens"].shape)
    return {
        **asked,
        "flavour": asked["agent"] % world.class_words % world.flavours,
        "combination": number,
        "treated": treated,
        "scored": scored,
        **in_words(lexicon.vocabulary, asked["tokens"], answer),
    }


def _dropped(
    world: Ladder, rng: np.random.Generator, rows: dict[str, np.ndarray], queries: dict, donors: np.ndarray
) -> np.ndarray:
    """bool [N]: the documents to replace; see `build`."""
    in_donor, dropped, wanted = np.isin(rows["cell"], donors), np.zeros(len(rows["cell"]), bool), 0
    unlike = in_donor.copy()
    for number in np.unique(queries["combination"][queries["treated"]]):
        asked = {name: queries[name][queries["combination"] == number] for name in TRUTH}
        members = _tiers(asked, rows)
        dose = round(world.dropped_dose * members["T2"].all(0).sum())
        unlike &= (members["T4"] | members["T5"]).all(0)
        wanted += dose
        if world.dropped != "random":
            members["T0r"] &= in_donor
            candidates = np.any([members[tier].all(0) for tier in world.dropped.split("+")], axis=0)
            dropped[rng.permutation(np.flatnonzero(candidates))[:dose]] = True
    if world.dropped == "random":
        dropped[rng.permutation(np.flatnonzero(unlike))[:wanted]] = True
    return dropped
