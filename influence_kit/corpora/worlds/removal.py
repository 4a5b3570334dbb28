"""Atlas with some of what it says replaced in place, for retraining: the same order, other documents in a few spots."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from influence_kit.corpora.world import World
from influence_kit.errors import UserError


def without_copies(world: World, seed: int) -> World:
    """Atlas without the copies of half of its canaries, of each number of repetitions: other noise stands in place.

    Queries get `treated`: it asks for a canary whose copies are gone.

    Raises:
        UserError: another world, one with fewer than two canaries of some number of repetitions, or one without other noise.
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
    gone, noise = np.isin(canary, treated), np.flatnonzero(kind == "noise")
    if not len(noise):
        raise UserError("no noise is left in Atlas to stand in for what is removed: give it more documents")
    rows = np.arange(world.sequences.num_rows)
    rows[gone] = rng.choice(noise, int(gone.sum()))
    return replace(
        world,
        sequences=world.sequences.take(pa.array(rows)).combine_chunks(),
        queries=world.queries.append_column("treated", pa.array(np.isin(asked, treated))),
        parameters={**world.parameters, "without": "copies"},
    )
