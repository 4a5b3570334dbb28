"""Layers and tokens (chapter 09): where in a model influence sits, and where in a text.

A score is a sum over blocks (the paper's Eq 30), so that a ranking by some of the blocks alone is a ranking by
influence on that part of the model. Block shares are read from the sequences that matter: the top of each query's
ranking by all blocks.

A token map holds a score for each position of a sequence, [M, T] for M pairs of a query and a sequence. Scores of
`token_scores` belong to the *updating* position, whose gradient changes the weights; the token that is predicted there
is the next one. `by_token` reads such a map under either alignment, as scores of tokens:

    updating     the score at position t is the token's at t
    predicted    it is that of the token at t + 1
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.world import World, batch_of, token_matrix
from influence_kit.corpora.worlds import atlas, cast, deep, ladder
from influence_kit.errors import UserError
from influence_kit.findings.common import write_scores
from influence_kit.findings.families import END, Planned, planted_grid, section
from influence_kit.findings.profiles import Profile
from influence_kit.findings.trained import Trained
from influence_kit.measures.intervals import Estimate, estimate_of, over_seeds, pick
from influence_kit.measures.lifts import lift, top_members

if TYPE_CHECKING:
    import pandas
    from torch import Tensor, nn

    from influence_kit.engine.factors import Factors
    from influence_kit.reading.cards import CardView

SHARED = ("source", "kind", "language")  # a token is replaced by one of sequences that agree in these
THIRDS = ("lower", "middle", "upper")
# Two kinds of sequence with equal overlap in words with the query, the first of which also shares what it means; for
# languages, sequences that mean the same in the other and in the query's own language.
CONTRASTS = {"rule": ("T2", "T0r"), "language": ("other", "own"), "persona": ("demo_persona_action", "demo_action")}
ASKED = {"rule": "rule", "language": "fact", "persona": "role-play"}  # the kind of query that each is read from
ALIGNMENTS = ("updating", "predicted")
STATED = ("fact", "quote")  # kinds of query whose answer stands in a document
COMPOSED = (
    "rule",
    "role-play",
)  # kinds whose answer has to be worked out; translations are too rarely right to be compared


def reads(profile: Profile) -> list[Planned]:
    """Deep before and after training, by block, and its token maps."""
    section(profile, "deep", "09")
    found = planted_grid(profile, "deep", fractions=(0.0,), extra=("layers",))
    return found + planted_grid(profile, "deep", extra=("layers", "maps"))


def layers(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Score the scan again; write scores.safetensors as `influence` does, with layer_values [Q, N, B] by block.

    Args:
        parameters: fraction, seed, device, damping; sequences (at most so many of the scan's, 0 for all of them).
    """
    import torch
    from safetensors.torch import load_file

    from influence_kit import models
    from influence_kit.engine.factors import Factors
    from influence_kit.engine.scans import score

    world = World.load(inputs["world"])
    model = models.load(inputs["model"], parameters["fraction"], parameters["device"])
    factors = Factors.load(inputs["influence"] / "factors.safetensors")
    scan = load_file(inputs["influence"] / "scores.safetensors")
    rows, queries = scan["rows"], scan["queries"].numpy()
    if limit := parameters.get("sequences", 0):
        generator = torch.Generator().manual_seed(parameters["seed"])
        rows = rows[torch.randperm(len(rows), generator=generator)[:limit].sort().values]
    scores = score(
        model,
        factors,
        batch_of(world.queries, queries),
        batch_of(world.sequences, rows.numpy()),
        parameters["damping"],
        by_layer=True,
        corpus_size=world.sequences.num_rows,
        resume=out / "resume",
        progress=lambda done, to_do: progress(done / to_do, 1, "scan by layer"),
    )
    assert scores.by_layer is not None
    place = torch.from_numpy(blocks(scores.layers))
    summed = scores.by_layer.new_zeros(*scores.values.shape, int(place.max()) + 1).index_add_(2, place, scores.by_layer)
    write_scores(out, replace(scores, by_layer=summed), rows.numpy(), queries)


def blocks(names: Iterable[str]) -> np.ndarray:
    """The transformer block of each layer, int64 [L], counted from 0 in the order of the numbers in their names.

    Raises:
        UserError: A layer that belongs to no numbered block.
    """
    numbers = []
    for name in names:
        found = re.search(r"\.(\d+)\.", name)
        if found is None:
            raise UserError(
                f"layer {name!r} has no block number in its name: scan layers of blocks only, such as 'mlp'"
            )
        numbers.append(int(found[1]))
    return np.unique(numbers, return_inverse=True)[1].astype(np.int64)


def maps(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Token maps of the strongest supporters of each query of Deep.

    Writes maps.safetensors, a row for each pair of a query and a sequence: queries [M] and rows [M] (positions in the
    world's tables), values [M] (nats at epsilon = 1); by position (nats, see `token_scores`): ekfac [M, T], plain
    [M, T] (gradient dot product), other [M, T] (EK-FAC, for the next query of the same kind); and by token: replaced
    [M, T], the mean fall of the sequence's influence (nats) when the token is replaced.

    Args:
        parameters: fraction, seed, device, damping, layers; k (sequences a query), queries (at most so many), draws
            (replacements of each token).
    """
    import torch
    from safetensors.torch import load_file, save_file
    from torch import from_numpy

    from influence_kit import models
    from influence_kit.engine.factors import Factors
    from influence_kit.engine.fitting import fit_ekfac
    from influence_kit.engine.scans import token_scores

    world = World.load(inputs["world"])
    model = models.load(inputs["model"], parameters["fraction"], parameters["device"])
    factors = Factors.load(inputs["influence"] / "factors.safetensors")
    scan = {name: tensor.numpy() for name, tensor in load_file(inputs["influence"] / "scores.safetensors").items()}
    for name in ("k", "queries", "draws"):
        if parameters[name] < 1:
            raise UserError(f"maps: {name}={parameters[name]!r} must be 1 or more")
    rng = np.random.default_rng([parameters["seed"], 0x3A25])
    asked, chosen = _pairs(world, scan, parameters["k"], parameters["queries"], rng)
    places, columns = np.array([p for p, _ in chosen]), np.array([c for _, c in chosen])
    queries, rows = scan["queries"][places], scan["rows"][columns]
    sequences = batch_of(world.sequences, rows)
    plain = fit_ekfac(model, sequences, parameters["layers"], method="identity")
    found = {name: torch.zeros(sequences["input_ids"].shape) for name in ("ekfac", "plain", "other", "replaced")}
    following = _following(world, scan["queries"], asked)
    pools = _pools(world, scan["rows"], rows)
    for done, place in enumerate(asked, 1):
        query = batch_of(world.queries, [scan["queries"][place]])
        own = np.flatnonzero(places == place)
        others = np.flatnonzero(places == following[place]) if following[place] != place else own[:0]
        both = _some(sequences, np.concatenate([own, others]))
        scores = token_scores(model, factors, query, both, parameters["damping"])
        found["ekfac"][own], found["other"][others] = scores[: len(own)], scores[len(own) :]
        found["plain"][own] = token_scores(model, plain, query, _some(sequences, own), 0.0)
        found["replaced"][own] = replacing(
            model,
            factors,
            query,
            _some(sequences, own),
            [pools[n] for n in own],
            parameters["draws"],
            parameters["damping"],
            rng,
        )
        progress(done, len(asked), "token maps")
    found |= {"queries": from_numpy(queries), "rows": from_numpy(rows)}
    found["values"] = from_numpy(scan["values"][places, columns])
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, out / "maps.safetensors")


def replacing(
    model: nn.Module,
    factors: Factors,
    query: Mapping[str, Tensor],
    sequences: Mapping[str, Tensor],
    pools: list[np.ndarray],
    draws: int,
    damping: float,
    rng: np.random.Generator,
) -> Tensor:
    """Fall of each sequence's influence on one query, in nats, when one token is replaced: [k, T], the mean over draws.

    The sequence is scored anew each time, so the result owes nothing to how a score falls into parts. 0 at the first
    token and behind the last target.

    Args:
        model, factors, damping: As in `score`.
        query: One query, `input_ids` int64 [1, T], `loss_mask` bool [1, T].
        sequences: The same of k sequences.
        pools: For each sequence the tokens to draw from; one that equals the token it replaces is drawn again as the
            next of the pool.
        draws: Replacements of each token.
        rng: Draws them.

    Raises:
        UserError: A pool of one token.

    Cost: `draws` scores a token of a sequence.
    """
    import torch

    from influence_kit.engine.scans import score

    tokens, mask = sequences["input_ids"], sequences["loss_mask"]
    variants, place = [tokens], []
    for n, (row, keep) in enumerate(zip(tokens, mask, strict=True)):
        pool = np.unique(pools[n])
        if len(pool) < 2:
            raise UserError(f"there is only token {pool.tolist()} to replace tokens with: scan more sequences")
        for t in range(1, int(keep.nonzero().max()) + 1):
            drawn = rng.choice(pools[n], draws)
            same = drawn == int(row[t])
            drawn[same] = pool[(np.searchsorted(pool, drawn[same]) + 1) % len(pool)]
            changed = row.repeat(draws, 1)
            changed[:, t] = torch.from_numpy(drawn)
            variants.append(changed)
            place += [(n, t)] * draws
    where = torch.tensor(place).T
    masks = torch.cat([mask, mask[where[0]]])
    scores = score(
        model, factors, query, {"input_ids": torch.cat(variants), "loss_mask": masks}, damping, self_influence=False
    ).values[0]
    fall = torch.zeros(tokens.shape, dtype=scores.dtype)
    fall.index_put_(tuple(where), (scores[where[0]] - scores[len(tokens) :]) / draws, accumulate=True)
    return fall


STAGES = {"layers": layers, "maps": maps}


def _pairs(world: World, scan: dict, k: int, limit: int, rng) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Which queries have pairs, and these: a query (its place in the scan) and a column of it, the k best of each."""
    values, member = scan["values"], deep.supporters(world, scan["rows"])[scan["queries"]]
    asked = np.arange(len(values))
    if limit < len(asked):
        asked = np.sort(rng.permutation(len(asked))[:limit])
    chosen = []
    for place in asked.tolist():
        best = np.argsort(np.where(member[place], -values[place], np.inf), kind="stable")[:k]
        chosen += [(place, column) for column in best.tolist() if member[place, column]]
    if not chosen:
        raise UserError("no sequence of the scan supports a query: scan more sequences")
    return np.unique([place for place, _ in chosen]), chosen


def _following(world: World, queries: np.ndarray, asked: np.ndarray) -> dict[int, int]:
    """For each query the one before it of its kind and language, in a circle, on whose sequences it is tried."""
    names = [name for name in ("kind", "language") if name in world.queries.column_names]
    columns = [world.queries[name].to_pylist() for name in names]
    groups: dict[tuple, list[int]] = {}
    for place in asked.tolist():
        groups.setdefault(tuple(column[queries[place]] for column in columns), []).append(place)
    return {place: group[number - 1] for group in groups.values() for number, place in enumerate(group)}


def _pools(world: World, scanned: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """For each of the rows, all tokens but the first of the scanned sequences that agree with it in SHARED."""
    names = [name for name in SHARED if name in world.sequences.column_names]
    columns = [world.sequences[name].to_numpy(zero_copy_only=False) for name in names]
    keys = list(zip(*(column[scanned].tolist() for column in columns)))
    tokens, real = token_matrix(world.sequences)[scanned], token_matrix(world.sequences, "loss_mask")[scanned].copy()
    real[:, 0] = False
    found: dict[tuple, np.ndarray] = {}
    wanted = list(zip(*(column[rows].tolist() for column in columns)))
    for key in set(wanted):
        these = np.array([one == key for one in keys])
        found[key] = tokens[these][real[these]].astype(np.int64)
    return [found[key] for key in wanted]


def _some(batch: Mapping[str, Tensor], rows: np.ndarray) -> dict[str, Tensor]:
    return {name: tensor[rows] for name, tensor in batch.items()}


def block_shares(block_values: np.ndarray, top: float = 0.01) -> np.ndarray:
    """Share of each block in the influence of each query's most influential sequences.

    These are taken by the sum over blocks; within them each block's scores are added up, signs included, and a block
    that comes out below 0 has no share.

    Args:
        block_values: Scores by block [Q, N, B], nats.
        top: The share of sequences that counts as most influential, in (0, 1].

    Returns:
        [Q, B], rows sum to 1; nan where no block comes out above 0.

    Raises:
        UserError: nan among the scores, another shape, or `top` outside (0, 1].
    """
    block_values = np.asarray(block_values)
    if block_values.ndim != 3:
        raise UserError(f"Scores by block have shape {block_values.shape}; give [queries, sequences, blocks].")
    top_of = top_members(block_values.sum(2), top)
    mass = np.maximum(np.einsum("qnb,qn->qb", block_values, top_of.astype(block_values.dtype)), 0).astype(float)
    total = mass.sum(1, keepdims=True)
    return np.divide(mass, total, out=np.full(mass.shape, np.nan), where=total > 0)


def centre_of_mass(shares: np.ndarray) -> np.ndarray:
    """Mean depth of the influence, [Q] of shares [Q, B]: 0 is below the first block, 1 above the last."""
    blocks = shares.shape[1]
    return shares @ ((np.arange(blocks) + 0.5) / blocks)


def third_of(blocks: int) -> np.ndarray:
    """Number of the third (0 lower, 1 middle, 2 upper) of each block, [B]. Raises UserError for fewer than three."""
    if blocks < 3:
        raise UserError(f"A model of {blocks} block(s) has no thirds; give one of 3 or more (the paper had 9).")
    return np.repeat(np.arange(3), [len(part) for part in np.array_split(np.arange(blocks), 3)])


def by_third(block_values: np.ndarray) -> dict[str, np.ndarray]:
    """Scores by the blocks of each third alone: [Q, N] for each of THIRDS, in nats; they sum to the whole score."""
    place = third_of(block_values.shape[2])
    return {name: block_values[:, :, place == number].sum(2) for number, name in enumerate(THIRDS)}


def share_table(block_values: np.ndarray, kinds, top: float = 0.01) -> pandas.DataFrame:
    """Where in the depth the influence on each query sits.

    Args:
        block_values: Scores by block [Q, N, B], nats.
        kinds: Kind of each query [Q].
        top: As in `block_shares`.

    Returns:
        One row a query: kind, centre (of mass, 0 to 1), spread (standard deviation of the depth, as a share of it),
        lower, middle, upper (shares of thirds, nan in a model of fewer than three blocks), block_0, block_1, …
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
    """What each third of a model's depth lifts.

    Args:
        world: A Deep world.
        block_values: Scores by block [Q, N, B], nats.
        rows: The sequences [N].
        queries: The queries [Q].
        top: As in `block_shares`.

    Returns:
        One row for each query that a contrast is read from: contrast (one of CONTRASTS), query, and for lower, middle,
        upper and whole the lifts of the contrast's two kinds of sequence in the top share of the ranking by those
        blocks alone: lower_first, lower_second, middle_first, …
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
    """Mean of the first column over the sum of both means: [..., units, 2]. .5 is no preference, r / (1 + r) a ratio of
    r; unlike the ratio it has a value where the second kind never comes up. nan where neither does."""
    means = np.mean(lifts, axis=axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        return means[..., 0] / (means[..., 0] + means[..., 1])


def largest_block(shares: np.ndarray) -> float:
    """Share of the block that holds most on average, over an even share, of shares [units, B]: 1 is even."""
    return float(shares.mean(0).max() * shares.shape[1])


def variance_explained(values, groups) -> float:
    """Share of the variance of values [n] that lies between groups [n], corrected for chance (epsilon squared).

    0 is expected where groups mean nothing (it can come out below), 1 where values differ between groups only. nan
    where values do not differ, or where there are not two groups with more values than groups.
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
    """Do groups differ in their values? Groups are permuted within seeds.

    Args:
        values: [n].
        groups: [n].
        seeds: Of each value [n].
        draws: Number of permutations.
        seed: Of the generator.

    Returns:
        The mean over seeds of `variance_explained`; p, one-sided: the share of permutations, the given order among
        them, that explain as much; and what each of them explains [draws].
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


def by_token(scores: np.ndarray, alignment: str) -> np.ndarray:
    """Scores of tokens [M, T] from scores of updating positions [M, T]. Raises UserError for an unknown alignment."""
    if alignment not in ALIGNMENTS:
        raise UserError(f"alignment={alignment!r} is not one of {', '.join(ALIGNMENTS)}")
    scores = np.asarray(scores, float)
    if alignment == "updating":
        return scores
    return np.concatenate([np.zeros_like(scores[:, :1]), scores[:, :-1]], 1)


def share(scores: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """Share of the |influence| of each map that marked tokens hold, [M]; nan if it is empty or none is marked."""
    mass = np.abs(np.asarray(scores, float))
    total, marked = mass.sum(1), np.asarray(marked, bool)
    usable = (total > 0) & marked.any(1)
    return np.divide((mass * marked).sum(1), total, out=np.full(len(mass), np.nan), where=usable)


def hit(scores: np.ndarray, key: np.ndarray) -> np.ndarray:
    """1.0 where the token of largest |score| is a key token, else 0.0: [M]; ties go to the first, nan as in `share`."""
    mass, key = np.abs(np.asarray(scores, float)), np.asarray(key, bool)
    found = key[np.arange(len(mass)), mass.argmax(1)].astype(float)
    return np.where((mass.max(1) > 0) & key.any(1), found, np.nan)


def preferred(scores: np.ndarray, span: np.ndarray, rival: np.ndarray) -> np.ndarray:
    """1.0 where the span holds more |influence| than its rival, .5 where as much, else 0.0: [M]; nan without either."""
    mass = np.abs(np.asarray(scores, float))
    ours, theirs = (mass * span).sum(1), (mass * rival).sum(1)
    usable = span.any(1) & rival.any(1) & (mass.max(1) > 0)
    return np.where(usable, 0.5 + 0.5 * np.sign(ours - theirs), np.nan)


def chance(marked: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    """What a token drawn at random hits, and what even |influence| would hold: share of the candidates marked, [M].

    nan where nothing is marked.
    """
    marked, candidates = np.asarray(marked, bool), np.asarray(candidates, bool)
    number = candidates.sum(1)
    usable = (number > 0) & marked.any(1)
    return np.divide((marked & candidates).sum(1), number, out=np.full(len(marked), np.nan), where=usable)


def read_maps(
    maps: Mapping[str, np.ndarray], key: np.ndarray, span: np.ndarray, rival: np.ndarray, candidates: np.ndarray
) -> pandas.DataFrame:
    """Every pair of a query and a sequence in every way of reading its map.

    Args:
        maps: Of the `maps` stage, [M, T]: `ekfac`, `plain` and `other` by updating position, `replaced` by token.
        key, span, rival: bool [M, T], see `corpora.worlds.deep.marks`.
        candidates: Tokens that are targets, bool [M, T].

    Returns:
        One row a pair that has a key, and reading: pair, method, alignment ("token" where replacing the token itself
        was scored), hit, key_share, span_share, asked (the span over its rival), chance (of hit and key_share),
        span_chance.
    """
    import pandas

    even, wide = chance(key, candidates), chance(span, candidates)
    tables = []
    for method in ("ekfac", "plain", "other", "replaced"):
        for alignment in ("token",) if method == "replaced" else ALIGNMENTS:
            scores = maps[method] if method == "replaced" else by_token(maps[method], alignment)
            columns = {"pair": np.arange(len(scores)), "method": method, "alignment": alignment}
            columns |= {"hit": hit(scores, key), "key_share": share(scores, key), "span_share": share(scores, span)}
            columns |= {"asked": preferred(scores, span, rival), "chance": even, "span_chance": wide}
            tables.append(pandas.DataFrame(columns)[key.any(1)])
    return pandas.concat(tables, ignore_index=True)


def by_block(trained: Trained, fraction: float = END) -> dict[str, np.ndarray]:
    """What the `layers` stage wrote at a fraction of training."""
    from safetensors.numpy import load_file

    return load_file(trained.extra("layers", fraction) / "scores.safetensors")


def kinds_of(trained: Trained, queries: np.ndarray) -> np.ndarray:
    """Kind of each query [Q]."""
    return trained.world.queries["kind"].to_numpy(zero_copy_only=False)[queries]


def shares_of(trained: Trained, fraction: float, top: float) -> pandas.DataFrame:
    """`share_table` of one checkpoint, with the model's seed."""
    scan = by_block(trained, fraction)
    found = share_table(scan["layer_values"], kinds_of(trained, scan["queries"]), top)
    return found.assign(seed=trained.seed, fraction=fraction)


def thirds_of(trained: Trained, fraction: float, top: float) -> pandas.DataFrame:
    """`thirds_table` of one checkpoint, with the model's seed."""
    scan = by_block(trained, fraction)
    found = thirds_table(trained.world, scan["layer_values"], scan["rows"], scan["queries"], top)
    return found.assign(seed=trained.seed, fraction=fraction)


def explained_by_kind(shares: pandas.DataFrame, draws: int = 300) -> pandas.DataFrame:
    """How much of the variance of the centre of mass lies between kinds of query: one row a seed, observed and shuffled
    (the mean over permutations)."""
    import pandas

    parts = {
        seed: permutation_test(part["centre"], part["kind"], part["seed"], draws)
        for seed, part in shares.groupby("seed")
    }
    return pandas.DataFrame(
        {"seed": seed, "observed": value, "shuffled": permuted.mean()} for seed, (value, _, permuted) in parts.items()
    )


def preferences(thirds: pandas.DataFrame, contrast: str) -> dict[str, Estimate]:
    """`preference` of each third of the depth, and of the whole, in one contrast of `thirds_table`."""
    rows = pick(thirds, contrast=contrast)
    return {
        third: estimate_of(rows, [f"{third}_first", f"{third}_second"], preference, bounds=(0, 1))
        for third in (*THIRDS, "whole")
    }


def maps_of(trained: Trained, fraction: float = END) -> pandas.DataFrame:
    """`read_maps` of one checkpoint, with kind and seed; the key is the answer."""
    world, maps = trained.world, _maps(trained, fraction)
    candidates = token_matrix(world.sequences, "loss_mask")[maps["rows"]].copy()
    candidates[:, 0] = False
    found = read_maps(maps, *deep.marks(world, maps["queries"], maps["rows"]), candidates)
    return found.assign(kind=kinds_of(trained, maps["queries"])[found["pair"]], seed=trained.seed, fraction=fraction)


def _maps(trained: Trained, fraction: float) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(trained.extra("maps", fraction) / "maps.safetensors")


def card_of(trained: Trained, kind: str) -> CardView:
    """Card of a query of Deep that is middling in how many of its 20 strongest sequences support it, not the best."""
    scan = trained.scan(kind=None)
    member = deep.supporters(trained.world, scan.rows)[scan.queries]
    asked = np.flatnonzero(kinds_of(trained, scan.queries) == kind)
    best = [member[query, np.argsort(-scan.raw[query], kind="stable")[:20]].mean() for query in asked]
    query = int(asked[np.argsort(best, kind="stable")[len(best) // 2]])
    labels = {int(column): "supports the answer" for column in np.flatnonzero(member[query])}
    return trained.card(query, k=3, title=f"a {kind}", labels=labels, kind=None)


def hardest_kind(runs: Iterable[Trained]) -> Estimate:
    """Accuracy at the end of training on the compared kind of query that is answered least often."""
    least = {}
    for run in runs:
        answers = pick(run.answers[run.answers["kind"].isin((*STATED, *COMPOSED))], fraction=1)
        least[run.seed] = answers.groupby("kind")["correct"].mean().min()
    return over_seeds(least, bounds=(0, 1))


def where(shares: pandas.DataFrame) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """The queries whose answers stand in a document, and those whose answers have to be worked out."""
    return shares[shares["kind"].isin(STATED)], shares[shares["kind"].isin(COMPOSED)]
