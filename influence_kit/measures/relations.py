"""What training sequences are to queries, where it was planted or is known: one kind for every pair."""

from __future__ import annotations

import numpy as np

from influence_kit.corpora.texts.parallel import aligned
from influence_kit.corpora.world import World
from influence_kit.corpora.worlds import atlas, ladder
from influence_kit.errors import UserError


def relations(world: World, rows: np.ndarray, queries: np.ndarray) -> dict[str, np.ndarray]:
    """What the sequences at `rows` are to the queries at `queries`: bool [Q, N] by kind, every pair in just one kind.

    Raises UserError for a world whose relations are not known.
    """
    if world.name not in KINDS:
        raise UserError(f"no relations are known in the world {world.name!r}: {', '.join(KINDS)} have them")
    of_world, rest = KINDS[world.name]
    kinds = of_world(world, rows, queries)
    return kinds | {rest: ~np.logical_or.reduce(list(kinds.values()))}


def _atlas(world: World, rows: np.ndarray, queries: np.ndarray) -> dict[str, np.ndarray]:
    canary, asked = world.sequences["canary"].to_numpy()[rows], world.queries["canary"].to_numpy()[queries]
    kinds = {"verbatim": (canary[None] == asked[:, None]) & (asked >= 0)[:, None]}
    own, other = (tier[queries] for tier in atlas.supporters(world, rows))
    same_name = np.logical_or(*(tier[queries] for tier in atlas.namesakes(world, rows)))
    return kinds | {"same fact, same language": own, "same fact, other language": other, "same name only": same_name}


def _ladder(world: World, rows: np.ndarray, queries: np.ndarray) -> dict[str, np.ndarray]:
    tiers = {name: tier[queries] for name, tier in ladder.tiers(world, rows).items()}
    kinds = {"same rule, shared agent or event": tiers["T1"], "same rule, shared answer": tiers["T2"]}
    return kinds | {
        "same rule, nothing shared": tiers["T3"],
        "other rule, shared word": tiers["T0r"] | tiers["T0a"] | tiers["T0e"],
    }


def _realtext(world: World, rows: np.ndarray, queries: np.ndarray) -> dict[str, np.ndarray]:
    places = np.stack([place[queries] for place in aligned(world, rows).values()])
    asked, spoken = (table["language"].to_numpy(zero_copy_only=False) for table in (world.queries, world.sequences))
    kinds = {"translation": (np.arange(len(rows)) == places[..., None]).any(0)}
    return kinds | {"same language": asked[queries][:, None] == spoken[rows][None]}


# By the world's name: its kinds, and what the other pairs are called.
KINDS = {"atlas": (_atlas, "unrelated"), "ladder": (_ladder, "unrelated"), "realtext": (_realtext, "other language")}
