"""Deep: Atlas, Ladder and Cast in one corpus, for models that are to answer queries of five kinds.

The three worlds share the first token and no word. Each document is one of theirs, padded on the right to one length,
and keeps the columns that its world planted, so that `atlas.supporters`, `ladder.tiers` and `cast.tiers` sort it as
they would at home; what a world does not plant is -1, False or empty in the rows of the others. Queries:

    fact         a fact of Atlas that training states in both languages
    translation  a fact that training states only in the other language than the query's
    quote        the second half of a canary of Atlas, a random text repeated verbatim
    rule         the response to a pair of Ladder that is never shown
    role-play    the answer of a persona of Cast that was only ever shown answering other questions
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from influence_kit.corpora.world import BOS, World, refuse, token_columns, token_matrix
from influence_kit.corpora.worlds import atlas, cast, ladder
from influence_kit.corpora.worlds.words import add, in_words
from influence_kit.errors import UserError
from influence_kit.recipes import tuples

SOURCES = ("atlas", "ladder", "cast")
KINDS = ("fact", "translation", "quote", "rule", "role-play")
# Smaller than the worlds are on their own: one model has to learn all three of them.
ATLAS: dict[str, Any] = {"entities": 80, "relations": 3, "values": 12, "facts_per_document": 2, "most_supporters": 900}
ATLAS |= {"filler_words": 20, "noise_words": 60, "canaries": 16, "repetitions": (64,)}
LADDER = {"agent_classes": 6, "event_classes": 6, "response_classes": 6, "dropped_cells": 0}
CAST = {"personas": 32, "mix": (0.6, 0.15, 0.1, 0.15), "queries": 160}


@dataclass(frozen=True)
class Deep:
    """Parameters of the mixture; atlas, ladder and cast change those of the worlds in it (see ATLAS, LADDER, CAST).

    Atlas gives queries of three kinds, so it has facts in both languages and in one, canaries, and statements in the
    forward order; Cast is its imitation world.
    """

    asks: ClassVar[tuple[str, ...]] = KINDS

    seed: int = 0
    documents: int = 240_000
    mix: tuple[float, ...] = (1 / 3, 5 / 12, 1 / 4)  # documents of Atlas, Ladder and Cast
    held_out: int = 900  # a third of each
    scored: int = 16  # queries of each kind that influence is computed for
    atlas: Mapping[str, Any] = field(default_factory=dict)
    ladder: Mapping[str, Any] = field(default_factory=dict)
    cast: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if len(self.mix) != 3 or min(self.mix) <= 0 or abs(sum(self.mix) - 1) > 1e-9:
            refuse(self, "mix", "three shares above 0 that sum to 1")
        if self.documents < 30:
            refuse(self, "documents", "30 or more")
        if self.held_out < 6:
            refuse(self, "held_out", "6 or more, a third of each world's")
        if self.scored < 2:
            refuse(self, "scored", "2 or more queries of each kind")
        for name in SOURCES:
            for taken in {"seed", "documents", "held_out", "scored"} & set(getattr(self, name)):
                raise UserError(f"Deep: {name}.{taken} is not its own: set it for all three worlds at once")
        if self.parts["atlas"].order != "forward":
            raise UserError(f"Deep: atlas.order={self.parts['atlas'].order!r} must be 'forward': keys end statements")
        if self.parts["cast"].answer_from != "imitation":
            raise UserError(f"Deep: cast.answer_from={self.parts['cast'].answer_from!r} must be 'imitation'")

    @property
    def parts(self) -> dict[str, Any]:
        """The three worlds' parameters, by source.

        Raises:
            UserError, TypeError: wrong or unknown ones.
        """
        counts = [round(share * self.documents) for share in self.mix[:2]]
        counts.append(self.documents - sum(counts))
        classes = {"atlas": atlas.Atlas, "ladder": ladder.Ladder, "cast": cast.Cast}
        defaults: dict[str, dict] = {"atlas": ATLAS, "ladder": LADDER, "cast": CAST}
        defaults["ladder"] = LADDER | {"queries": self.scored}
        defaults["cast"] = CAST | {"scored": self.scored}
        found = {}
        for name, documents in zip(SOURCES, counts):
            own = tuples({**defaults[name], **getattr(self, name)})
            found[name] = classes[name](seed=self.seed, documents=documents, held_out=max(2, self.held_out // 3), **own)
        return found

    @property
    def length(self) -> int:
        """Tokens of a row, the first one included."""
        return max(part.length for part in self.parts.values())

    @property
    def words(self) -> int:
        """Number of token ids; the three worlds share the first."""
        return 1 + sum(part.words - 1 for part in self.parts.values())


def build(world: Deep) -> World:
    """Generate the corpus, its truth and its queries from the parameters alone (same seed, same bytes).

    Columns of sequences and of held_out: source (one of SOURCES), number (row in the source's own corpus), and all that
    the sources plant. Queries: kind (one of KINDS), scored, prompt, completion, source, number, and all that the
    sources plant.
    """
    parts = {
        "atlas": atlas.build(world.parts["atlas"]),
        "ladder": ladder.build(world.parts["ladder"]),
        "cast": cast.build(world.parts["cast"]),
    }
    vocabulary, shift = [BOS], {}
    for name, part in parts.items():
        shift[name] = len(vocabulary) - 1  # of every id but the first token's
        add(vocabulary, part.vocabulary[1:])
    rng = np.random.default_rng([world.seed, 0xDEE9])
    sequences = _joined({name: part.sequences for name, part in parts.items()}, shift, world.length)
    held_out = _joined({name: part.held_out for name, part in parts.items()}, shift, world.length)
    asked = {name: part.queries for name, part in parts.items()}
    asked["atlas"] = asked["atlas"].drop_columns(["scored"])  # which of its queries are is for `_asked` to say
    queries = _joined(asked, shift, world.length)
    parameters = asdict(world) | {"relations": parts["atlas"].parameters["relations"]}  # what atlas.supporters reads
    return World(
        "deep",
        sequences.take(pa.array(rng.permutation(sequences.num_rows))),
        held_out,
        _asked(queries, tuple(vocabulary), world.scored),
        tuple(vocabulary),
        "",
        parameters,
    )


def make(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Generate the world as a stage does: `parameters` are Deep's, and it lies in `out` afterwards."""
    build(Deep(**tuples(parameters))).save(out)


def supporters(world: World, rows: np.ndarray | None = None) -> np.ndarray:
    """Which sequences teach each query its answer, by its kind.

    fact: states it in the query's language; translation: states it in the other one; quote: a copy of the canary; rule:
    shows another pair of the same cell; role-play: a demonstration of the same persona that ends in the same action.

    Args:
        world: A Deep world.
        rows: Positions of the sequences [N]; all by default.

    Returns:
        bool [Q, N].
    """
    kind = world.queries["kind"].to_numpy(zero_copy_only=False)
    own, other = atlas.supporters(world, rows)
    rule, persona = ladder.tiers(world, rows), cast.tiers(world, rows)
    told = world.sequences["canary"].to_numpy() if rows is None else world.sequences["canary"].to_numpy()[rows]
    canary = world.queries["canary"].to_numpy()[:, None]
    found = {
        "fact": own,
        "translation": other,
        "quote": (told[None] == canary) & (canary >= 0),
        "rule": rule["T1"] | rule["T2"] | rule["T3"],
        "role-play": persona["demo_persona_action"],
    }
    # Demonstrations that share the goal or the question as well are a tier of their own, whoever they are of.
    asked, shown = (t["persona"].to_numpy() for t in (world.queries, world.sequences))
    shown = shown if rows is None else shown[rows]
    found["role-play"] = found["role-play"] | (persona["demo_wish_action"] & (asked[:, None] == shown[None]))
    return np.stack([found[one][place] for place, one in enumerate(kind)])


def marks(world: World, queries: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where sequences that support a query hold its answer.

    Args:
        world: A Deep world.
        queries: Positions of queries [M].
        rows: Positions of sequences [M], one for each of the queries.

    Returns:
        bool [M, T] three times. key: the tokens of the answer. span: the whole statement that ends in it. rival: the
        same of the document's other statements, in Atlas, which share its frame and its length and are not asked for.
        All False where the sequence does not support the query. For a quote, key and span are its second half.
    """
    queries, rows = np.asarray(queries), np.asarray(rows)
    key, span, rival = np.zeros((3, len(rows), world.context), bool)
    asked = world.queries.take(pa.array(queries))
    told = world.sequences.take(pa.array(rows))
    kind, fact = asked["kind"].to_pylist(), asked["fact"].to_numpy()
    facts = told["facts"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
    completion = token_matrix(asked, "loss_mask")
    supports = supporters(world, rows)[queries, np.arange(len(rows))]
    for pair in np.flatnonzero(supports):
        if kind[pair] in ("fact", "translation"):
            for place, stated in enumerate(facts[pair]):
                start = 2 + place * (atlas.STATEMENT + 1)
                end = start + atlas.STATEMENT - 2  # where the value stands
                if stated == fact[pair]:
                    span[pair, start : end + 1], key[pair, end] = True, True
                else:
                    rival[pair, start : end + 1] = True
        elif kind[pair] == "quote":
            key[pair] = span[pair] = completion[pair]
        else:
            end = ladder.LENGTH - 1 if kind[pair] == "rule" else cast.LENGTH - 2
            span[pair, 2 : end + 1], key[pair, end] = True, True
    return key, span, rival


def _joined(tables: dict[str, pa.Table], shift: dict[str, int], length: int) -> pa.Table:
    """Rows of the three worlds below one another, in the joint vocabulary, with the columns of all of them."""
    tokens, masks = [], []
    for name, table in tables.items():
        ids = token_matrix(table)
        room = ((0, 0), (0, length - ids.shape[1]))
        tokens.append(np.pad(np.where(ids > 0, ids + shift[name], 0), room))
        masks.append(np.pad(token_matrix(table, "loss_mask"), room))
    columns = token_columns(np.concatenate(tokens), np.concatenate(masks))
    columns["source"] = pa.array([name for name, table in tables.items() for _ in range(table.num_rows)], pa.string())
    columns["number"] = pa.array(np.concatenate([np.arange(t.num_rows) for t in tables.values()]).astype(np.int32))
    for name in dict.fromkeys(name for table in tables.values() for name in table.column_names):
        if name not in columns:
            columns[name] = _column(name, list(tables.values()))
    return pa.table(columns)


def _column(name: str, tables: list[pa.Table]) -> pa.Array:
    """A column of the tables that have it, and of the others -1, False or an empty text."""
    kind = next(table.schema.field(name).type for table in tables if name in table.column_names)
    parts = []
    for table in tables:
        if name in table.column_names:
            parts.append(table[name].combine_chunks().cast(kind))
        elif pa.types.is_fixed_size_list(kind):
            nothing = pa.array(np.full(table.num_rows * kind.list_size, -1), kind.value_type)
            parts.append(pa.FixedSizeListArray.from_arrays(nothing, kind.list_size).cast(kind))
        else:
            nothing = "" if pa.types.is_string(kind) else False if pa.types.is_boolean(kind) else -1
            parts.append(pa.repeat(pa.scalar(nothing, kind), table.num_rows))
    return pa.concat_arrays(parts)


def _asked(queries: pa.Table, vocabulary: tuple[str, ...], scored: int) -> pa.Table:
    """The queries with their kind, whether each is scored, and their text in the joint vocabulary."""
    source, kind, availability = (queries[name].to_pylist() for name in ("source", "kind", "availability"))
    names = {"ladder": "rule", "cast": "role-play"}
    kinds = [
        names.get(of) or ("quote" if one == "canary" else "fact" if where == "both" else "translation")
        for of, one, where in zip(source, kind, availability)
    ]
    chosen = queries["scored"].to_numpy(zero_copy_only=False).copy()
    language = queries["language"].to_numpy()
    for name in ("fact", "translation"):  # of both languages alike
        for spoken, number in ((0, (scored + 1) // 2), (1, scored // 2)):
            chosen[np.flatnonzero((np.array(kinds) == name) & (language == spoken))[:number]] = True
    chosen[np.flatnonzero(np.array(kinds) == "quote")[:scored]] = True
    text = in_words(vocabulary, token_matrix(queries), token_matrix(queries, "loss_mask"))
    for name, column in {"kind": kinds, "scored": chosen, **text}.items():
        queries = queries.set_column(queries.column_names.index(name), name, pa.array(column))
    return queries
