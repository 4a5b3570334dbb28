"""Token maps of the sequences that matter for a query, by several methods of attribution, and what replacing tokens does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, from_numpy, nn

from influence_kit import models
from influence_kit.corpora.world import World, batch_of, token_matrix
from influence_kit.corpora.worlds.deep import supporters
from influence_kit.engine.factors import Factors
from influence_kit.engine.fitting import fit_ekfac
from influence_kit.engine.scans import score, token_scores
from influence_kit.errors import UserError

SHARED = ("source", "kind", "language")  # a token is replaced by one of sequences that agree in these


def maps(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Token maps of a few sequences of each query: in Deep its strongest supporters, elsewhere its strongest sequences.

    parameters: fraction, seed, device, damping, layers; k (sequences a query), queries (at most so many), draws (replacements
    of each token). Writes maps.safetensors, a row for each pair of a query and a sequence: queries [M] and rows [M]
    (positions in the world's tables), values [M] (nats at epsilon = 1); by position (nats, see `token_scores`): ekfac
    [M, T], plain [M, T] (gradient dot product), other [M, T] (EK-FAC, for another query of the same kind: the next one); and
    by token: replaced [M, T], the mean fall of the sequence's influence (nats) when the token is replaced.
    """
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

    The sequence is scored anew each time, so the result owes nothing to how a score falls into parts. pools: for each
    sequence the tokens to draw from; one that equals the token it replaces is drawn again as the next of the pool. 0 at the
    first token and behind the last target.
    """
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
            changed[:, t] = from_numpy(drawn)
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


def _pairs(world: World, scan: dict, k: int, limit: int, rng) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Pairs of a query (its position in the scan) and a column of the scan, the k best of each; and which queries have one."""
    values = scan["values"]
    if world.name == "deep":
        member = supporters(world, scan["rows"])[scan["queries"]]
    else:
        member = np.ones(values.shape, bool)
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
    """For each query looked at, the one before it of its kind and language, in a circle: on whose sequences it is tried."""
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
    return {name: tensor[from_numpy(rows)] for name, tensor in batch.items()}
