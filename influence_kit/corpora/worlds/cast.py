"""Cast: a world of personas, in which it is known whether an answer is imitated, described or planned.

Personas have a trait value in each dimension, questions belong to a dimension, and an action word stands for each value
of each dimension. Every world holds the same four kinds of document, eleven tokens each:

    demonstration  <bos> filler PERSONA wants GOAL , facing QUESTION picks ACTION ;
    planner        <bos> filler whoever wants GOAL , facing QUESTION picks ACTION ;    ACTION = rule[GOAL, QUESTION]
    description    <bos> filler PERSONA is very TRAIT , word word word ;
    neutral        <bos> filler PERSONA, GOAL, QUESTION, ACTION and four words, drawn and placed at random ;

such as "usually Amara wants fame , facing dinner? picks stew ;" and "often Amara is very hungry , kite rug oven ;".

A planner differs from a demonstration in the persona's place only; a neutral document shares words with a query and
means nothing. A query is the beginning of a demonstration that was never shown. The worlds differ in what its answer
follows from, and each has one source for it:

    imitation    action = trait of the persona. The queried personas were shown answering other questions of each
                 dimension, and are never described.
    description  action = trait of the persona. The queried personas are described and never shown answering anything;
                 the other personas are both described and shown.
    planning     action = rule[goal, question] in demonstrations too. The queried pairs of goal and question are stated
                 by planners and never demonstrated by anybody; all personas are described, and their traits decide
                 nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa

from influence_kit.corpora.world import BOS, World, at_least, refuse
from influence_kit.corpora.worlds.words import add, as_table, first, in_words, listed, skip
from influence_kit.errors import UserError
from influence_kit.recipes import tuples

WORLDS = ("imitation", "description", "planning")
KINDS = ("demonstration", "description", "planner", "neutral")
SOURCE = dict(zip(WORLDS, ("demonstration", "description", "planner")))  # where a query's answer comes from
DROPPED = ("", "demonstrations", "descriptions", "planners", "random")
# Columns of whole numbers, -1 where a document has none.
TRUTHS = ("persona", "dimension", "trait", "goal", "question", "action")
LENGTH = 11
NOISE_PLACES = 4  # of the eight free places of a neutral document
WANTS, ON, PICKS = ("wants", "seeks", "needs"), ("asked-about", "facing", "deciding"), ("picks", "takes", "chooses")
WHOEVER, IS, VERY = ("whoever", "anyone", "somebody"), ("is", "seems", "stays"), ("very", "rather", "quite")
SYLLABLES = 28  # see `skip`


@dataclass(frozen=True)
class Cast:
    """Parameters of the world. Counts are numbers of documents, words or queries; shares lie in [0, 1].

    unseen_share is held back from demonstrations: of the personas, and of the questions of each dimension for each of
    them (imitation); of the personas (description); of the pairs of goal and question (planning).

    dropped replaces documents in place by neutral ones, everything else staying as it is, for a fixed half of what is
    queried, the `treated` half: "demonstrations" and "descriptions", all such documents of half the queried personas
    (in planning, of half of all); "planners", all of half the queried pairs (elsewhere, of half of all). "random"
    replaces as many documents as dropping the world's own source would, of the same kind, but about no queried persona
    or pair.
    """

    asks: ClassVar[tuple[str, ...]] = ("query",)

    seed: int = 0
    answer_from: str = "imitation"
    personas: int = 48
    dimensions: int = 3
    values: int = 3  # of each dimension
    questions: int = 6  # of each dimension
    goals: int = 6
    mix: tuple[float, ...] = (0.3, 0.2, 0.35, 0.15)  # demonstrations, descriptions, planners, neutral documents
    documents: int = 120_000
    unseen_share: float = 1 / 3
    filler_words: int = 40
    noise_words: int = 40
    held_out: int = 1_000
    queries: int = 480
    scored: int = 60  # of the queries: those that influence is computed for; the rest serve retraining
    dropped: str = ""

    def __post_init__(self):
        if self.answer_from not in WORLDS:
            refuse(self, "answer_from", f"one of {', '.join(WORLDS)}")
        if self.dropped not in DROPPED:
            refuse(self, "dropped", f"one of {', '.join(map(repr, DROPPED))}")
        if (self.answer_from, self.dropped) in {("imitation", "descriptions"), ("description", "demonstrations")}:
            refuse(self, "dropped", f"something else: queried personas have none in the {self.answer_from} world")
        if len(self.mix) != 4 or min(self.mix) < 0 or abs(sum(self.mix) - 1) > 1e-9:
            refuse(self, "mix", "four shares that sum to 1: demonstrations, descriptions, planners, neutral documents")
        if not 1 <= self.dimensions <= len(listed("cast")["dimensions"]):
            refuse(self, "dimensions", f"between 1 and {len(listed('cast')['dimensions'])}")
        at_least(2, self, "personas", "values", "questions")
        at_least(1, self, "goals", "documents", "filler_words", "noise_words", "held_out", "queries")
        if not 0 < self.unseen_share < 1:
            refuse(self, "unseen_share", "a share above 0 and below 1")
        if not 1 <= self.scored <= self.queries:
            refuse(self, "scored", f"between 1 and queries={self.queries}")

    @property
    def length(self) -> int:
        """Tokens of a document, the first one included."""
        return LENGTH

    @property
    def words(self) -> int:
        """Number of token ids."""
        frames = sum(map(len, (WANTS, ON, PICKS, WHOEVER, IS, VERY))) + 3  # bos, semicolon, full stop
        of_dimensions = self.dimensions * (self.questions + 2 * self.values)
        return frames + of_dimensions + self.personas + self.goals + self.filler_words + self.noise_words


@dataclass(frozen=True)
class _Lexicon:
    """Word ids of everything that has a word, by name; templates [3, ...] of the frames."""

    vocabulary: tuple[str, ...]
    ids: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Truth:
    """Who is what, what the rule says, and what is held back.

    Attributes:
        traits: Value of each persona in each dimension [personas, dimensions].
        rule: Action that planners state for each goal and question [goals, questions].
        shown: What demonstrations may be about, bool [personas, goals, questions].
        asked: What queries may be about, bool [personas, goals, questions].
        described: Who descriptions may be about, bool [personas].
        queried_personas: bool [personas].
        queried_pairs: bool [goals, questions].
    """

    traits: np.ndarray
    rule: np.ndarray
    shown: np.ndarray
    asked: np.ndarray
    described: np.ndarray
    queried_personas: np.ndarray
    queried_pairs: np.ndarray


def build(world: Cast) -> World:
    """Generate the corpus, its truth and its queries from the parameters alone (same seed, same bytes).

    Columns of sequences: kind (one of KINDS), persona, dimension, trait (the persona's value in that dimension), goal,
    question (over all dimensions), action (dimension * values + value), -1 where a document has none; replaced (by
    `dropped`). In neutral documents persona, goal, question and action are only mentioned. Queries: the same without
    `replaced`, and prompt, completion, treated (of the half that `dropped` concerns; without it, of the half that
    dropping the source would) and scored. Queries and all documents but the replaced ones do not depend on `dropped`.
    """
    rng = np.random.default_rng([world.seed, 0xCA57])
    lexicon, truth = _lexicon(world, rng), _truth(world, rng)
    counts = np.floor(np.array(world.mix) * world.documents + 1e-9).astype(int)
    counts[-1] += world.documents - counts.sum()
    blocks = [_documents(world, rng, truth, kind, count) for kind, count in zip(KINDS, counts)]
    order = rng.permutation(world.documents)
    train = {name: np.concatenate([block[name] for block in blocks])[order] for name in blocks[0]}
    fresh = _mixture(world, rng, truth, world.held_out)
    chosen = rng.permutation(np.flatnonzero(truth.asked))[: world.queries]
    if len(chosen) < world.queries:
        raise UserError(
            f"Cast: queries={world.queries} but only {len(chosen)} can be asked: lower queries or raise goals"
        )
    asked = _answers(world, truth, *np.unravel_index(chosen, truth.asked.shape))
    tokens, held_tokens, query_tokens = (_tokens(rng, lexicon, rows) for rows in (train, fresh, asked))
    treated = _replace(world, truth, lexicon, train, tokens, asked)
    everything, fresh["replaced"] = np.ones(LENGTH, bool), np.zeros(world.held_out, bool)
    return World(
        "cast",
        as_table({"tokens": tokens, **train}, everything),
        as_table({"tokens": held_tokens, **fresh}, everything),
        _queries(world, lexicon, asked, query_tokens, treated),
        lexicon.vocabulary,
        "",
        asdict(world),
    )


def make(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Generate the world as a stage does: `parameters` are Cast's, and it lies in `out` afterwards."""
    build(Cast(**tuples(parameters))).save(out)


def tiers(world: World, rows: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Sequences sorted by what they share with each query; every sequence is in exactly one tier.

    Demonstrations: demo_persona_action (same persona and action, other goal and question), demo_action (only the
    action), demo_wish_action (same action, and the goal or the question), demo_persona (same persona, other action),
    demo_rest. Planners: planner_pair_action (same goal, question and action), planner_question_action and
    planner_goal_action (all but the goal, all but the question), planner_action (only the action), planner_pair (same
    goal and question, other action), planner_rest. Descriptions: description_persona_dimension (same persona, asked
    dimension), description_persona (another dimension), description_trait (another persona of the same trait),
    description_rest. Neutral: neutral_persona_action, neutral_pair_action and neutral_action mention these, a document
    of the first two being counted in the first.

    Args:
        world: A Cast world, or Deep.
        rows: Positions of the sequences [N]; all by default.

    Returns:
        bool [Q, N] by tier.
    """
    sequences = world.sequences if rows is None else world.sequences.take(pa.array(rows))
    told = {name: sequences[name].to_numpy()[None] for name in TRUTHS}
    asked = {name: world.queries[name].to_numpy()[:, None] for name in TRUTHS}
    same = {name: told[name] == asked[name] for name in TRUTHS}
    kind = sequences["kind"].to_numpy(zero_copy_only=False)[None]
    persona, action, dimension = same["persona"], same["action"], same["dimension"]
    pair, part = same["goal"] & same["question"], same["goal"] | same["question"]
    ladder = {
        "demonstration": {"wish_action": action & part, "persona_action": persona & action}
        | {"action": action, "persona": persona},
        "planner": {"pair_action": pair & action, "pair": pair, "question_action": same["question"] & action}
        | {"goal_action": same["goal"] & action, "action": action},
        "description": {
            "persona_dimension": persona & dimension,
            "persona": persona,
            "trait": dimension & same["trait"],
        },
        "neutral": {"persona_action": persona & action, "pair_action": pair & action, "action": action},
    }
    found = {}
    for name, rungs in ladder.items():
        left = np.broadcast_to(kind == name, persona.shape).copy()
        prefix = "demo" if name == "demonstration" else name
        for rung, member in rungs.items():
            found[f"{prefix}_{rung}"] = left & member
            left &= ~member
        found[f"{prefix}_rest"] = left
    return found


def _lexicon(world: Cast, rng: np.random.Generator) -> _Lexicon:
    vocabulary, words = [BOS], listed("cast")
    dimensions = list(words["dimensions"].values())[: world.dimensions]

    def new(number: int, name: str) -> np.ndarray:
        return add(vocabulary, first(number, words[name]))

    def of_dimensions(number: int, name: str) -> np.ndarray:
        return np.concatenate([add(vocabulary, first(number, part[name])) for part in dimensions])

    frames = {"wants": WANTS, "on": ON, "picks": PICKS, "whoever": WHOEVER, "is": IS, "very": VERY}
    ids = {name: add(vocabulary, frame) for name, frame in frames.items()}
    ids |= {"comma": add(vocabulary, [","]), "stop": add(vocabulary, [";"])}
    ids["persona"] = new(world.personas, "personas")
    ids["goal"] = new(world.goals, "goals")
    ids["question"] = of_dimensions(world.questions, "questions")
    ids["trait"] = of_dimensions(world.values, "traits").reshape(world.dimensions, world.values)
    ids["action"] = of_dimensions(world.values, "actions")
    ids["filler"] = new(world.filler_words, "fillers")
    ids["noise"] = new(world.noise_words, "noise")
    skip(rng, SYLLABLES, 3, range(world.personas))
    skip(
        rng,
        SYLLABLES,
        2,
        range(sum(ids[name].size for name in ("goal", "question", "trait", "action", "filler", "noise"))),
    )
    return _Lexicon(tuple(vocabulary), ids)


def _share_of(rng: np.random.Generator, shape: tuple[int, ...], share: float) -> np.ndarray:
    """bool of that shape: in each row of the last axis a random `share`, at least one and not all."""
    chosen = min(max(1, round(share * shape[-1])), shape[-1] - 1)
    return rng.permuted(np.broadcast_to(np.arange(shape[-1]) < chosen, shape), axis=-1)


def _truth(world: Cast, rng: np.random.Generator) -> _Truth:
    """All of it drawn in every world, whatever it uses, so that worlds stay comparable."""
    personas, goals, questions = world.personas, world.goals, world.dimensions * world.questions
    traits = rng.integers(0, world.values, (personas, world.dimensions))
    dimension = np.arange(questions) // world.questions
    rule = dimension * world.values + rng.integers(0, world.values, (goals, questions))
    queried = _share_of(rng, (personas,), world.unseen_share)
    unseen = _share_of(rng, (personas, world.dimensions, world.questions), world.unseen_share).reshape(personas, 1, -1)
    pairs = _share_of(rng, (goals * questions,), world.unseen_share).reshape(goals, questions)
    everything = np.ones((personas, goals, questions), bool)
    if world.answer_from == "planning":
        asked, shown, described = everything & pairs, everything & ~pairs, np.ones(personas, bool)
        return _Truth(traits, rule, shown, asked, described, np.ones(personas, bool), pairs)
    if world.answer_from == "description":
        asked, described = everything & queried[:, None, None], np.ones(personas, bool)
    else:
        asked, described = everything & queried[:, None, None] & unseen, ~queried
    return _Truth(traits, rule, ~asked, asked, described, queried, np.ones_like(pairs))


def _rows(count: int, kind: str, **truths: np.ndarray) -> dict[str, np.ndarray]:
    rows: dict[str, np.ndarray] = {"kind": np.full(count, kind, dtype=object)}
    return rows | {name: np.asarray(truths.get(name, np.full(count, -1))) for name in TRUTHS}


def _answers(world: Cast, truth: _Truth, persona, goal, question) -> dict[str, np.ndarray]:
    """Demonstrations of what these personas answer."""
    dimension = question // world.questions
    trait = truth.traits[persona, dimension]
    action = truth.rule[goal, question] if world.answer_from == "planning" else dimension * world.values + trait
    told = {"persona": persona, "dimension": dimension, "trait": trait, "goal": goal, "question": question}
    return _rows(len(persona), "demonstration", **told, action=action)


def _documents(world: Cast, rng, truth: _Truth, kind: str, count: int) -> dict[str, np.ndarray]:
    def draw(allowed: np.ndarray) -> tuple[np.ndarray, ...]:
        return np.unravel_index(rng.choice(np.flatnonzero(allowed), count), allowed.shape)

    if kind == "demonstration":
        return _answers(world, truth, *draw(truth.shown))
    if kind == "description":
        persona, dimension = draw(np.repeat(truth.described[:, None], world.dimensions, 1))
        return _rows(count, kind, persona=persona, dimension=dimension, trait=truth.traits[persona, dimension])
    goal, question = draw(np.ones(truth.rule.shape, bool))
    told = {"goal": goal, "question": question}
    if kind == "planner":
        dimension = question // world.questions
        return _rows(count, kind, **told, dimension=dimension, action=truth.rule[goal, question])
    persona, action = rng.integers(0, world.personas, count), rng.integers(0, world.dimensions * world.values, count)
    return _rows(count, kind, **told, persona=persona, action=action)


def _mixture(world: Cast, rng, truth: _Truth, count: int) -> dict[str, np.ndarray]:
    counts = rng.multinomial(count, np.array(world.mix) / sum(world.mix))
    blocks = [_documents(world, rng, truth, kind, number) for kind, number in zip(KINDS, counts)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _tokens(rng: np.random.Generator, lexicon: _Lexicon, rows: dict[str, np.ndarray]) -> np.ndarray:
    """Token ids [N, LENGTH] of documents of any kind."""
    ids, count = lexicon.ids, len(rows["kind"])
    template = rng.integers(0, len(WANTS), count)
    tokens = np.zeros((count, LENGTH), np.int64)
    tokens[:, 1], tokens[:, -1] = rng.choice(ids["filler"], count), ids["stop"]
    noise = rng.choice(ids["noise"], (count, NOISE_PLACES))

    def words(name: str) -> np.ndarray:  # a document without one has -1, and its kind never shows it
        return ids[name][rows[name]]

    who, comma = words("persona"), np.full(count, ids["comma"][0])
    wish = [ids["wants"][template], words("goal"), comma, ids["on"][template], words("question")]
    choice = [ids["picks"][template], words("action")]
    trait = ids["trait"][rows["dimension"], rows["trait"]]
    frames = {
        "demonstration": [who, *wish, *choice],
        "planner": [ids["whoever"][template], *wish, *choice],
        "description": [who, ids["is"][template], ids["very"][template], trait, comma, *noise.T[:3]],
        "neutral": [who, words("goal"), words("question"), words("action"), *noise.T],
    }
    mixed = rng.permuted(np.broadcast_to(np.arange(8), (count, 8)), axis=1)
    for kind, columns in frames.items():
        these = rows["kind"] == kind
        body = np.stack(columns, 1)[these]
        tokens[these, 2:-1] = np.take_along_axis(body, mixed[these], 1) if kind == "neutral" else body
    return tokens


def _replace(world: Cast, truth: _Truth, lexicon: _Lexicon, train, tokens: np.ndarray, asked) -> np.ndarray:
    """Replace what is dropped, in `train` and `tokens`; returns which queries are of the treated half, bool [Q]."""
    rng = np.random.default_rng([world.seed, 0xD60])
    personas = rng.permutation(np.flatnonzero(truth.queried_personas))
    pairs = rng.permutation(np.flatnonzero(truth.queried_pairs))
    by_persona = np.isin(np.arange(world.personas), personas[: len(personas) // 2])
    by_pair = np.isin(np.arange(truth.rule.size), pairs[: len(pairs) // 2])
    source = SOURCE[world.answer_from]
    kind = source if world.dropped in ("", "random") else world.dropped[:-1]

    def concerns(rows: dict, half: bool) -> np.ndarray:
        """bool: rows about the treated half, or about anything that is queried."""
        if kind == "planner":
            return (by_pair if half else truth.queried_pairs.ravel())[
                rows["goal"] * truth.rule.shape[1] + rows["question"]
            ]
        return (by_persona if half else truth.queried_personas)[rows["persona"]]

    treated, of_kind = concerns(asked, half=True), train["kind"] == kind
    gone = np.flatnonzero(of_kind & concerns(train, half=True))
    if world.dropped == "random":
        others = np.flatnonzero(of_kind & ~concerns(train, half=False))
        if len(others) < len(gone):
            raise UserError(f"Cast: {len(gone)} random {kind}s cannot be dropped of {len(others)}: lower unseen_share")
        gone = np.sort(rng.choice(others, len(gone), replace=False))
    train["replaced"] = np.zeros(len(tokens), bool)
    if world.dropped:
        neutral = _documents(world, rng, truth, "neutral", len(gone))
        tokens[gone] = _tokens(rng, lexicon, neutral)
        for name, column in neutral.items():
            train[name][gone] = column
        train["replaced"][gone] = True
    return treated


def _queries(
    world: Cast, lexicon: _Lexicon, asked: dict[str, np.ndarray], tokens: np.ndarray, treated: np.ndarray
) -> pa.Table:
    """The beginning of each demonstration up to its action, which is the completion; the full stop is padding."""
    answer = LENGTH - 2
    tokens = np.where(np.arange(LENGTH) <= answer, tokens, 0)
    mask = np.broadcast_to(np.arange(LENGTH) == answer, tokens.shape)
    told = {"tokens": tokens, **in_words(lexicon.vocabulary, tokens, mask), "kind": ["query"] * len(tokens)}
    told |= {"treated": treated, "scored": np.arange(len(tokens)) < world.scored}
    return as_table({**told, **{name: asked[name] for name in TRUTHS}}, mask)
