"""Where in a model influence sits: shares of blocks, centre of mass over depth, and what each third of the depth is after.

A score is a sum over blocks (the paper's Eq 30), so that a ranking by some of the blocks alone is a ranking by influence on
that part of the model. Block shares are read from the sequences that matter: the top of each query's ranking by all blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.world import World
from influence_kit.corpora.worlds import atlas, cast, ladder
from influence_kit.errors import UserError
from influence_kit.measures.lifts import lift, top_members

if TYPE_CHECKING:
    import pandas

THIRDS = ("lower", "middle", "upper")
# Two kinds of sequence with equal overlap in words with the query, the first of which also shares what it means; for
# languages, sequences that mean the same in the other and in the query's own language.
CONTRASTS = {"rule": ("T2", "T0r"), "language": ("other", "own"), "persona": ("demo_persona_action", "demo_action")}
ASKED = {"rule": "rule", "language": "fact", "persona": "role-play"}  # the kind of query that each is read from


def block_shares(block_values: np.ndarray, top: float = 0.01) -> np.ndarray:
    """Share of each block in the influence of each query's most influential sequences: [Q, B], rows sum to 1.

    block_values [Q, N, B] in nats. The top share of sequences is taken by the sum over blocks; within it each block's
    scores are added up, signs included, and a block that comes out below 0 has no share. nan where no block comes out above.

    Raises UserError for nan among the scores, a wrong shape, or `top` outside (0, 1].
    """
    block_values = np.asarray(block_values)
    if block_values.ndim != 3:
        raise UserError(f"Scores by block have shape {block_values.shape}; give [queries, sequences, blocks].")
    top_of = top_members(block_values.sum(2), top)
    mass = np.maximum(np.einsum("qnb,qn->qb", block_values, top_of.astype(block_values.dtype)), 0).astype(float)
    total = mass.sum(1, keepdims=True)
    return np.divide(mass, total, out=np.full(mass.shape, np.nan), where=total > 0)


def centre_of_mass(shares: np.ndarray) -> np.ndarray:
    """Mean depth of the influence: [Q] of shares [Q, B]; 0 is below the first block, 1 above the last, .5 for even shares."""
    blocks = shares.shape[1]
    return shares @ ((np.arange(blocks) + 0.5) / blocks)


def third_of(blocks: int) -> np.ndarray:
    """Number of the third (0 lower, 1 middle, 2 upper) of each block: [B].

    Raises UserError for fewer than three blocks.
    """
    if blocks < 3:
        raise UserError(f"A model of {blocks} block(s) has no thirds; give one of 3 or more (the paper had 9).")
    return np.repeat(np.arange(3), [len(part) for part in np.array_split(np.arange(blocks), 3)])


def by_third(block_values: np.ndarray) -> dict[str, np.ndarray]:
    """Scores by the blocks of each third alone: [Q, N] for each of THIRDS, in nats; they sum to the whole score."""
    place = third_of(block_values.shape[2])
    return {name: block_values[:, :, place == number].sum(2) for number, name in enumerate(THIRDS)}


def share_table(block_values: np.ndarray, kinds, top: float = 0.01) -> pandas.DataFrame:
    """One row per query: kind, centre (of mass, 0 to 1), spread (standard deviation of the depth, as a share of it), lower,
    middle, upper (shares of thirds), block_0, block_1, …

    Thirds are nan in a model of fewer than three blocks. Raises UserError as `block_shares` does.
    """
    import pandas

    shares = block_shares(block_values, top)
    blocks = shares.shape[1]
    centre, depth = centre_of_mass(shares), (np.arange(blocks) + 0.5) / blocks
    spread = np.sqrt((shares * (depth - centre[:, None]) ** 2).sum(1))
    columns: dict[str, object] = {"kind": np.asarray(kinds), "centre": centre, "spread": spread}
    for number, name in enumerate(THIRDS):
        columns[name] = shares[:, third_of(blocks) == number].sum(1) if blocks >= 3 else np.full(len(shares), np.nan)
    return pandas.DataFrame({**columns, **{f"block_{b}": shares[:, b] for b in range(blocks)}})


def thirds_table(
    world: World, block_values: np.ndarray, rows: np.ndarray, queries: np.ndarray, top: float = 0.01
) -> pandas.DataFrame:
    """What each third of a model's depth lifts in Deep: one row for each scored query that a contrast is read from.

    block_values [Q, N, B] are scores of the sequences at `rows` for the queries at `queries`. Columns: contrast (one of
    CONTRASTS), query, and for lower, middle, upper and whole the lifts of the contrast's two kinds of sequence in the top
    share of the ranking by those blocks alone: lower_first, lower_second, middle_first, …
    """
    import pandas

    kind = world.queries["kind"].to_numpy(zero_copy_only=False)[queries]
    own, other = atlas.supporters(world, rows)
    tiers = {**ladder.tiers(world, rows), "own": own, "other": other, **cast.tiers(world, rows)}
    scores = {**by_third(block_values), "whole": block_values.sum(2)}
    found = []
    for name, pair in CONTRASTS.items():
        asked = np.flatnonzero(kind == ASKED[name])
        columns = {
            f"{third}_{side}": lift(values[asked], tiers[tier][queries[asked]], top)
            for third, values in scores.items()
            for side, tier in zip(("first", "second"), pair)
        }
        found.append(pandas.DataFrame({"contrast": name, "query": queries[asked], **columns}))
    return pandas.concat(found, ignore_index=True)


def preference(lifts: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean of the first column over the sum of both means: [..., units, 2]. .5 is no preference, r / (1 + r) a ratio of r;
    unlike the ratio it has a value where the second kind never comes up. nan where neither does."""
    means = np.mean(lifts, axis=axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        return means[..., 0] / (means[..., 0] + means[..., 1])


def middle_above_ends(lifts: np.ndarray, axis: int = 0) -> np.ndarray:
    """Preference of the middle third less the larger one of lower and upper: [..., units, 6] with the columns lower_first,
    lower_second, middle_first, …"""
    lower, middle, upper = (preference(lifts[..., start : start + 2], axis) for start in (0, 2, 4))
    return middle - np.maximum(lower, upper)


def largest_block(shares: np.ndarray) -> float:
    """Share of the block that holds most on average, as a multiple of an even share: [units, B]; 1 is even, B the most."""
    return float(shares.mean(0).max() * shares.shape[1])


def variance_explained(values, groups) -> float:
    """Share of the variance of values [n] that lies between groups [n], corrected for chance (epsilon squared).

    0 is expected where groups mean nothing (it can come out below), 1 where values differ between groups only. nan where
    values do not differ or there are no two groups with more values than groups.
    """
    values, groups = np.asarray(values, float), np.asarray(groups)
    values, groups = values[~np.isnan(values)], groups[~np.isnan(values)]
    labels, place = np.unique(groups, return_inverse=True)
    spare = len(values) - len(labels)
    if len(labels) < 2 or spare < 1 or not (total := float(((values - values.mean()) ** 2).sum())) > 0:
        return float("nan")
    means = np.bincount(place, values) / np.bincount(place)
    within = float(((values - means[place]) ** 2).sum())
    return 1 - (within / spare) / (total / (len(values) - 1))


def permutation_test(values, groups, seeds, draws: int = 2000, seed: int = 0) -> tuple[float, float, np.ndarray]:
    """Do groups differ in their values? (mean over seeds of `variance_explained`, p, the same for each of the permutations).

    Groups are permuted within seeds. p is one-sided: the share of permutations, the given order among them, that explain as
    much. seeds [n]: of each value.
    """
    values, groups, seeds = np.asarray(values, float), np.asarray(groups), np.asarray(seeds)
    rng = np.random.default_rng(seed)
    parts = [np.flatnonzero((seeds == label) & ~np.isnan(values)) for label in np.unique(seeds)]
    observed = np.mean([variance_explained(values[part], groups[part]) for part in parts])
    permuted = np.array(
        [
            np.mean([variance_explained(values[part], rng.permutation(groups[part])) for part in parts])
            for _ in range(draws)
        ]
    )
    return float(observed), float((1 + (permuted >= observed).sum()) / (1 + draws)), permuted
