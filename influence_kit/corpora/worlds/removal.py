"""Worlds with some of what they say replaced in place, for retraining: the same order, other words in a few spots.

Queries of the changed world say which of them lost something (`treated`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from influence_kit.corpora.world import World, token_columns, token_matrix
from influence_kit.corpora.worlds.atlas import STATEMENT
from influence_kit.errors import UserError


def without_translations(world: World, seed: int) -> World:
    """Atlas without what its second language says of half of the facts that both languages state.

    Each such statement is replaced, with its filler word, by one of a fact that the second language alone states.
    Queries get `treated` (the fact is among that half): asked in the first language it lost its translations, asked in
    the second its own statements.

    Raises:
        UserError: another world, or one without facts in both languages and in the second alone.
    """
    if world.name != "atlas":
        raise UserError(f"{world.name!r} states no facts in two languages: translations can be taken from Atlas alone")
    language = world.sequences["language"].to_numpy()
    facts = token_matrix(world.sequences, "facts").copy()
    stated = [np.unique(facts[language == one]) for one in (0, 1)]
    both = np.intersect1d(*stated)  # type: ignore[call-overload]
    both, alone = both[both >= 0], np.setdiff1d(stated[1], stated[0])
    alone = alone[alone >= 0]
    if len(both) < 2 or not len(alone):
        raise UserError(
            f"{len(both)} facts are stated in both languages and {len(alone)} in the second alone: give Atlas a "
            "both_share between 0 and 1, and more facts"
        )
    rng = np.random.default_rng([seed, 0x7A45])
    treated = rng.permutation(both)[: len(both) // 2]
    second = (language == 1)[:, None]
    gone, givers = np.argwhere(second & np.isin(facts, treated)), np.argwhere(second & np.isin(facts, alone))
    tokens, given = token_matrix(world.sequences).copy(), givers[rng.integers(0, len(givers), len(gone))]
    width, source = STATEMENT + 1, tokens.copy()
    for place in range(width):  # after the document's first token, statements of `width` tokens each
        tokens[gone[:, 0], 1 + gone[:, 1] * width + place] = source[given[:, 0], 1 + given[:, 1] * width + place]
    facts[gone[:, 0], gone[:, 1]] = facts[given[:, 0], given[:, 1]]
    columns = token_columns(tokens, token_matrix(world.sequences, "loss_mask"))
    columns["facts"] = pa.FixedSizeListArray.from_arrays(pa.array(facts.ravel()), facts.shape[1])
    sequences = world.sequences
    for name, column in columns.items():
        sequences = sequences.set_column(sequences.column_names.index(name), name, column)
    return _treated(world, sequences, np.isin(world.queries["fact"].to_numpy(), treated), "translations")


def without_copies(world: World, seed: int) -> World:
    """Atlas without the copies of half of its canaries, of each number of repetitions: other noise stands in place.

    Queries get `treated`: it asks for a canary whose copies are gone.

    Raises:
        UserError: another world, or one with fewer than two canaries of some number of repetitions.
    """
    if world.name != "atlas":
        raise UserError(f"{world.name!r} has no canaries: their copies can be taken from Atlas alone")
    asked, times = (world.queries[name].to_numpy() for name in ("canary", "repetitions"))
    rng, treated = np.random.default_rng([seed, 0x7A46]), np.zeros(0, int)
    for count in np.unique(times[asked >= 0]):
        alike = np.unique(asked[times == count])
        if len(alike) < 2:
            raise UserError(
                f"{len(alike)} canary is planted {count} times, so none is left to compare with: give Atlas 2 or more"
            )
        treated = np.append(treated, rng.permutation(alike)[: len(alike) // 2])
    canary, kind = (world.sequences[name].to_numpy(zero_copy_only=False) for name in ("canary", "kind"))
    sequences = _in_place(world.sequences, np.isin(canary, treated), kind == "noise", rng)
    return _treated(world, sequences, np.isin(asked, treated), "copies")


def without_procedure(world: World, seed: int) -> World:
    """Procedures without most texts of half of its procedures: those under half of the names stay.

    Of each kind of text, half of the procedures and half of the names are drawn. Queries that ask for a drawn procedure
    under two drawn names are `treated`. Texts of drawn procedures are gone unless both of their names are drawn too; in
    their place stand texts that have neither a drawn procedure nor a drawn name.

    Raises:
        UserError: another world, or one with fewer than four procedures or names of a kind.
    """
    return _without_texts(world, seed, same_procedure=True)


def without_names(world: World, seed: int) -> World:
    """The counterpart of `without_procedure`: the same queries `treated`, as many texts gone, the same put in place.

    Gone are texts with a drawn name, unless their procedure is drawn too. Raises as `without_procedure`.
    """
    return _without_texts(world, seed, same_procedure=False)


def _without_texts(world: World, seed: int, same_procedure: bool) -> World:
    """Either of the two, with what both need. Where one has more texts to lose than the other, as many are drawn."""
    if world.name != "procedures":
        raise UserError(
            f"{world.name!r} has no procedures: give `without: procedure` and `without: names` to the world Procedures"
        )
    rng = np.random.default_rng([seed, 0x7A47])
    told, asked = (
        {name: table[name].to_numpy(zero_copy_only=False) for name in ("kind", "procedure", "name", "other")}
        for table in (world.sequences, world.queries)
    )
    # Of sequences and of queries: has a drawn procedure, has two drawn names, has none.
    marks, lost = np.zeros((3, len(told["kind"])), bool), np.zeros((3, len(asked["kind"])), bool)
    for kind in np.unique(told["kind"]):
        here = told["kind"] == kind
        # In programs one variable can be either name; a word problem's person and thing have words of their own.
        known = np.unique(told["procedure"][here]), np.unique([told["name"][here], told["other"][here]])
        if min(map(len, known)) < 4:
            raise UserError(
                f"{kind}: {len(known[0])} procedures and {len(known[1])} names cannot be halved: give the world more"
            )
        procedures, names = (rng.permutation(values)[: len(values) // 2] for values in known)
        for found, drawn in ((told, marks), (asked, lost)):
            procedure, name, other = (
                np.isin(found[column], values)
                for column, values in (("procedure", procedures), ("name", names), ("other", names))
            )
            drawn |= (found["kind"] == kind) & np.stack([procedure, name & other, ~name & ~other])
    procedure, both, neither = marks
    sequences = world.sequences
    for kind in np.unique(told["kind"]):
        here = told["kind"] == kind
        removable = (~procedure & ~neither, procedure & ~both)
        either = [rng.permutation(np.flatnonzero(here & member)) for member in removable]
        gone = np.zeros(len(here), bool)
        gone[either[int(same_procedure)][: min(map(len, either))]] = True
        sequences = _in_place(sequences, gone, here & ~procedure & neither, rng)
    treated = lost[0] & lost[1]
    if missing := set(asked["kind"]) - set(asked["kind"][treated]):
        raise UserError(
            f"no query of {', '.join(sorted(missing))} asks for what is drawn: give the world more than {len(treated)} "
            "queries"
        )
    return _treated(world, sequences, treated, "procedure" if same_procedure else "names")


def _in_place(sequences: pa.Table, gone: np.ndarray, givers: np.ndarray, rng: np.random.Generator) -> pa.Table:
    """The table with the rows where `gone` replaced by rows drawn from those where `givers`."""
    rows = np.arange(sequences.num_rows)
    if not givers.any():
        raise UserError(
            "nothing unrelated is left in the world to stand in for what is removed: give it more documents"
        )
    rows[gone] = rng.choice(np.flatnonzero(givers), int(gone.sum()))
    return sequences.take(pa.array(rows)).combine_chunks()


def _treated(world: World, sequences: pa.Table, treated: np.ndarray, without: str) -> World:
    queries = world.queries.append_column("treated", pa.array(treated))
    return replace(world, sequences=sequences, queries=queries, parameters={**world.parameters, "without": without})
