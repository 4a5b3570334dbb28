"""Worlds with some of what they say replaced in place, for retraining: the same order and seed, other words in a few spots."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from influence_kit.corpora.atlas import STATEMENT
from influence_kit.corpora.world import World, token_columns, token_matrix
from influence_kit.errors import UserError


def without_translations(world: World, seed: int) -> World:
    """Atlas without what its second language says of half of the facts that both languages state.

    Each such statement is replaced, with its filler word, by one of a fact that the second language alone states. Queries get
    `treated` (the fact is among that half): asked in the first language it lost its translations, asked in the second its
    own statements. Raises UserError for another world, or one without facts in both languages and in the second alone.
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
            f"{len(both)} facts are stated in both languages and {len(alone)} in the second alone: give Atlas a both_share between 0 "
            "and 1, and more facts"
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
        sequences = sequences.set_column(sequences.column_names.index(name), sequences.schema.field(name).name, column)
    lost = np.isin(world.queries["fact"].to_numpy(), treated)
    queries = world.queries.append_column("treated", pa.array(lost))
    return replace(world, sequences=sequences, queries=queries, parameters={**world.parameters, "without": "translations"})
