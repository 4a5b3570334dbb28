"""Procedures: a world of word problems and toy programs in which it is known which two ask for the same computation.

Every document computes an answer from two numbers by a procedure, and says so in one of two kinds of text, ten words
each:

    maths   <bos> NAME owns FIRST THING VERB SECOND so NAME ANSWER            Dora owns 7 pears finds 4 so Dora eleven
    code    <bos> X FIRST Y SECOND OPERATION TARGET SOURCE TARGET ANSWER      x 7 y 4 add x y x eleven

In maths the verb tells the procedure, and each has several; names and things vary and mean nothing. In code variables
are renamed at will, and the operation tells the procedure, in several spellings: `add x y` puts their sum into x,
`gap x y` their distance, `max x y` the larger one, and `set x y` the value of y; then x is asked for. What `set` makes
depends on *which* of the two assignments the source's name was in, never on the name.

The same procedure thus comes with other names, and the same names come with other procedures: meaning and surface come
apart. Only a share of the pairs of numbers, in whatever order, is ever shown with a procedure (in one kind of text);
queries ask for pairs that never are. Numbers are written in digits, answers in letters, so that no answer repeats a
number's word. With `shuffled` the answers shown are dealt out anew among documents: no procedure is there to learn.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa

from influence_kit.corpora.world import BOS, World, at_least, refuse
from influence_kit.corpora.worlds.words import add, as_table, in_words
from influence_kit.errors import UserError
from influence_kit.recipes import tuples

LENGTH = 10  # tokens of a document, the first one included
KINDS = ("maths", "code")
PROCEDURES = ("sum", "gap", "larger", "smaller", "first", "second")
TIERS = ("SW", "SA", "S0", "ON", "ONA", "OA", "OW", "O0", "KS", "KO")
TRUTH = ("procedure", "word", "name", "other", "first", "second", "answer")  # columns of whole numbers
OWNS, SO = ("owns", "has", "holds"), ("so", "then", "thus")
NAMES = tuple(
    "Anna Boris Clara Dora Emil Fatma Goran Hana Igor Jana Karim Lena "
    "Mira Nils Olga Pavel Qadir Rosa Sami Tilda Umar Vera Willem Yara".split()
)
THINGS = tuple(
    "pears coins books cups eggs kites lamps nuts pens rings shells stamps "
    "bells boots cards corks dolls drums figs forks hats keys maps plums".split()
)
VARIABLES = tuple("abcdefghijklmnpqrstuvwxyz")
# In maths the procedure follows from the verb.
VERBS = {
    "sum": ("finds", "gains", "wins", "earns", "gathers", "collects", "bakes", "receives"),
    "gap": ("owes", "lacks", "misses", "pledges", "promises", "stakes", "needs", "wants"),
    "larger": ("fills-to", "tops-to", "stocks-to", "raises-to", "tunes-to", "lifts-to", "builds-to", "grows-to"),
    "smaller": ("cuts-to", "trims-to", "caps-at", "limits-to", "shrinks-to", "rations-to", "clips-to", "thins-to"),
}
OPERATIONS = {
    "add": ("add", "plus", "join"),
    "gap": ("gap", "dist", "delta"),
    "max": ("max", "most", "top"),
    "set": ("set", "copy", "load"),
}
# What a program computes where the target is its first variable, and where it is its second.
COMPUTES = {"add": ("sum", "sum"), "gap": ("gap", "gap"), "max": ("larger", "larger"), "set": ("second", "first")}
ONES = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve "
    "thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
MOST = 50  # numbers, so that sums stay below a hundred
SALT = 0x9C0DE


@dataclass(frozen=True)
class Procedures:
    """Parameters of the world. Counts are numbers of words, documents or queries; shares lie in [0, 1]."""

    asks: ClassVar[tuple[str, ...]] = KINDS

    seed: int = 0
    numbers: int = 16  # from 0 on
    names: int = 12
    things: int = 12
    variables: int = 16
    verbs: int = 6  # of each procedure
    spellings: int = 3  # of each operation
    code_share: float = 0.5  # of the documents and of the queries
    documents: int = 80_000
    shown_share: float = 0.8  # of the pairs of numbers, for each procedure and kind
    held_out: int = 1_000
    queries: int = 240
    scored: int = 80  # of the queries: those that influence is computed for
    shuffled: bool = False

    def __post_init__(self):
        limits = {"numbers": (2, MOST), "names": (2, len(NAMES)), "things": (2, len(THINGS))}
        limits |= {"variables": (2, len(VARIABLES)), "verbs": (1, len(VERBS["sum"]))}
        limits |= {"spellings": (1, len(OPERATIONS["add"])), "scored": (1, self.queries)}
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                refuse(self, name, f"between {least} and {most}")
        at_least(1, self, "documents", "held_out", "queries")
        if not 0 <= self.code_share <= 1:
            refuse(self, "code_share", "a share from 0 (maths only) to 1 (code only)")
        if not 0 < self.shown_share < 1:
            refuse(
                self, "shown_share", "a share above 0 and below 1: queries are pairs of numbers that are never shown"
            )

    @property
    def length(self) -> int:
        """Tokens of a document, the first one included."""
        return LENGTH

    @property
    def words(self) -> int:
        """Number of token ids."""
        surface = self.names + self.things + self.variables + len(OWNS) + len(SO)
        telling = self.verbs * len(VERBS) + self.spellings * len(OPERATIONS)
        return 1 + surface + telling + self.numbers + 2 * self.numbers - 1


def compute(procedure: str, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """What a procedure makes of two numbers, elementwise."""
    made = {"sum": first + second, "gap": abs(first - second), "first": first, "second": second}
    made |= {"larger": np.maximum(first, second), "smaller": np.minimum(first, second)}
    return made[procedure]


@dataclass(frozen=True)
class _Lexicon:
    """Token ids by what they stand for: verbs [4, V] and operations [4, S] in the order of their dictionaries."""

    vocabulary: tuple[str, ...]
    ids: dict[str, np.ndarray]


def build(world: Procedures) -> World:
    """Generate the corpus, its truth and its queries from the parameters alone (same seed, same bytes).

    Columns of sequences: kind ("maths", "code"); procedure (its place in PROCEDURES); word, the verb or operation; name
    and other, the person and the thing or the target and the source (these three as token ids); first and second, the
    numbers; answer, the number that the text says. held_out has pairs of numbers that are neither shown with their
    procedure and kind nor asked for; its loss mask, like the queries', is True on the answer alone. Queries ask for the
    true answer, procedures of a kind in turn; they have scored, prompt and completion besides.

    Raises:
        UserError: pairs of numbers run out.
    """
    rng = np.random.default_rng([world.seed, SALT])
    lexicon = _lexicon(world)
    shown = _shown(world, rng)
    free = ~shown
    asked = _documents(world, rng, lexicon, _structures(world, rng, world.queries, in_turn=True), free)
    for one, two in (("first", "second"), ("second", "first")):
        free[_table_of(asked["kind"]), asked["procedure"], asked[one] * world.numbers + asked[two]] = False
    if not free.any(2).all():
        raise UserError(
            "Procedures: no pair of numbers is left to hold out: lower shown_share or queries, or raise numbers"
        )
    sequences = _documents(world, rng, lexicon, _structures(world, rng, world.documents), shown)
    held = _documents(world, rng, lexicon, _structures(world, rng, world.held_out), free)
    if world.shuffled:
        # A generator of its own: nothing but the answers changes.
        rng = np.random.default_rng([world.seed, SALT, 1])
        for rows in (sequences, held):
            rows["answer"] = rng.permutation(rows["answer"])
            rows["tokens"][:, -1] = lexicon.ids["answers"][rows["answer"]]
    answer = np.arange(LENGTH) == LENGTH - 1
    # The first of each kind and procedure before any second one.
    asked["scored"] = np.arange(world.queries) < world.scored
    told = in_words(lexicon.vocabulary, asked["tokens"], np.broadcast_to(answer, asked["tokens"].shape))
    return World(
        "procedures",
        as_table(sequences, np.ones(LENGTH, bool)),
        as_table(held, answer),
        as_table({**asked, **told}, answer),
        lexicon.vocabulary,
        "",
        asdict(world),
    )


def make(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Generate the world as a stage does: `parameters` are those of Procedures, and it lies in `out` afterwards."""
    build(Procedures(**tuples(parameters))).save(out)


def tiers(world: World, rows: np.ndarray | None = None, procedure: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """What the sequences share with each query; each is in just one tier.

    Of the query's kind and procedure: SW shares names, numbers or the verb (operation) with it, SA the answer alone, S0
    no word. Of its kind and another procedure: ON shares names (the person, the thing, a variable) and not the answer,
    ONA both, OA the answer alone, OW numbers or the operation, O0 no word. Of the other kind: KS the same procedure, KO
    another one, whatever they share (no name can be).

    SA and OA share the same word, S0 and O0 none: only what they compute differs. ON and ONA share more than SA and S0,
    and mean something else.

    Args:
        world: A Procedures world.
        rows: Positions of the sequences [N]; all by default.
        procedure: Other labels of the sequences than the planted ones [N], for controls.

    Returns:
        bool [Q, N] for each of TIERS.
    """
    columns = ["kind", *TRUTH]
    told = world.sequences.select(columns)
    told = told if rows is None else told.take(pa.array(rows))
    asked, found = (
        {name: part[name].to_numpy(zero_copy_only=False) for name in columns} for part in (world.queries, told)
    )
    if procedure is not None:
        found["procedure"] = np.asarray(procedure)

    def same(name: str, of: str = "") -> np.ndarray:
        return asked[name][:, None] == found[of or name][None]

    def either(name: str, other: str) -> np.ndarray:
        return same(name) | same(other) | same(name, other) | same(other, name)

    kind, alike, answer = same("kind"), same("procedure"), same("answer")
    names, telling = either("name", "other"), either("first", "second") | same("word")
    own, apart, bare = kind & alike, kind & ~alike, ~names & ~telling
    return {
        "SW": own & ~bare,
        "SA": own & bare & answer,
        "S0": own & bare & ~answer,
        "ON": apart & names & ~telling & ~answer,
        "ONA": apart & names & ~telling & answer,
        "OA": apart & bare & answer,
        "OW": apart & telling,
        "O0": apart & bare & ~answer,
        "KS": ~kind & alike,
        "KO": ~kind & ~alike,
    }


def spelt(number: int) -> str:
    """A number below a hundred in letters."""
    tens, ones = divmod(number, 10)
    return ONES[number] if number < len(ONES) else "-".join([TENS[tens], *([ONES[ones]] if ones else [])])


def _shown(world: Procedures, rng: np.random.Generator) -> np.ndarray:
    """bool [kinds, procedures, numbers x numbers]: the pairs shown with each, the same in either order."""
    first, second = np.triu_indices(world.numbers)
    shown = np.zeros((len(KINDS), len(PROCEDURES), world.numbers, world.numbers), bool)
    for table in shown.reshape(-1, world.numbers, world.numbers):
        chosen = rng.permutation(len(first))[: max(1, round(world.shown_share * len(first)))]
        table[first[chosen], second[chosen]] = table[second[chosen], first[chosen]] = True
    return shown.reshape(*shown.shape[:2], -1)


def _lexicon(world: Procedures) -> _Lexicon:
    vocabulary, ids = [BOS], {}
    plain = {"owns": OWNS, "so": SO, "names": NAMES[: world.names], "things": THINGS[: world.things]}
    for name, words in {**plain, "variables": VARIABLES[: world.variables]}.items():
        ids[name] = add(vocabulary, words)
    ids["verbs"] = np.stack([add(vocabulary, words[: world.verbs]) for words in VERBS.values()])
    ids["operations"] = np.stack([add(vocabulary, words[: world.spellings]) for words in OPERATIONS.values()])
    ids["numbers"] = add(vocabulary, map(str, range(world.numbers)))
    ids["answers"] = add(vocabulary, map(spelt, range(2 * world.numbers - 1)))
    return _Lexicon(tuple(vocabulary), ids)


# Every way to state a procedure: kind, place of the procedure, place of the verbs or operation, target (code: 0, 1).
STRUCTURES = [("maths", PROCEDURES.index(procedure), place, 0) for place, procedure in enumerate(VERBS)]
STRUCTURES += [
    ("code", PROCEDURES.index(procedure), place, target)
    for place, operation in enumerate(OPERATIONS)
    for target, procedure in enumerate(COMPUTES[operation])
]


def _structures(
    world: Procedures, rng: np.random.Generator, number: int, in_turn: bool = False
) -> tuple[np.ndarray, ...]:
    """Columns of STRUCTURES [number], drawn by kind, then evenly; or in turn, as evenly as the kinds' shares allow."""
    code = rng.random(number) < world.code_share
    if in_turn:
        # Bresenham's line: code falls due as often as its share says, spread over the list.
        due = np.floor(np.arange(1, number + 1) * world.code_share + 1e-9)
        code = np.diff(due, prepend=0) > 0
    many = [sum(kind == wanted for kind, *_ in STRUCTURES) for wanted in KINDS]
    chosen = np.where(code, many[0] + rng.integers(0, many[1], number), rng.integers(0, many[0], number))
    if in_turn:
        chosen = np.where(code, many[0] + (np.cumsum(code) - 1) % many[1], (np.cumsum(~code) - 1) % many[0])
    columns = [np.array([structure[place] for structure in STRUCTURES])[chosen] for place in range(4)]
    return tuple(columns)


def _table_of(kind: np.ndarray) -> np.ndarray:
    return (kind == "code").astype(int)


def _documents(
    world: Procedures,
    rng: np.random.Generator,
    lexicon: _Lexicon,
    structures: tuple[np.ndarray, ...],
    among: np.ndarray,
) -> dict[str, np.ndarray]:
    """Texts and truth of documents of these structures, numbers from `among` bool [kinds, procedures, pairs]."""
    kind, procedure, place, target = structures
    number, ids = len(kind), lexicon.ids
    pair, code = np.zeros(number, int), kind == "code"
    for table in range(len(KINDS)):
        for which in range(len(PROCEDURES)):
            here = (_table_of(kind) == table) & (procedure == which)
            if here.any():
                pair[here] = rng.choice(np.flatnonzero(among[table, which]), int(here.sum()))
    first, second = np.divmod(pair, world.numbers)
    answer = np.zeros(number, int)
    for which, computes in enumerate(PROCEDURES):
        here = procedure == which
        answer[here] = compute(computes, first[here], second[here])

    person, thing = rng.choice(ids["names"], number), rng.choice(ids["things"], number)
    owns, so = rng.choice(ids["owns"], number), rng.choice(ids["so"], number)
    # Two different variables, each ordered pair as likely as the other.
    one = rng.integers(0, world.variables, number)
    two = (one + rng.integers(1, world.variables, number)) % world.variables
    variables = ids["variables"][np.stack([one, two])]
    aim, source = variables[target, np.arange(number)], variables[1 - target, np.arange(number)]
    verb = ids["verbs"][np.where(code, 0, place), rng.integers(0, world.verbs, number)]
    operation = ids["operations"][np.where(code, place, 0), rng.integers(0, world.spellings, number)]

    a, b, says = ids["numbers"][first], ids["numbers"][second], ids["answers"][answer]
    bos = np.zeros(number, int)
    maths = np.stack([bos, person, owns, a, thing, verb, b, so, person, says], 1)
    program = np.stack([bos, variables[0], a, variables[1], b, operation, aim, source, aim, says], 1)
    name, other = np.where(code, aim, person), np.where(code, source, thing)
    truth = (procedure, np.where(code, operation, verb), name, other, first, second, answer)
    tokens = np.where(code[:, None], program, maths)
    return {"tokens": tokens, "kind": kind.astype(object), **dict(zip(TRUTH, truth, strict=True))}
