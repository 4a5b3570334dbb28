"""Whether a sequence that was planted verbatim is what a model's continuation of it leans on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.world import World, token_matrix
from influence_kit.errors import UserError
from influence_kit.measures.lexical import bm25
from influence_kit.measures.lifts import mass_share, ranks

if TYPE_CHECKING:
    import pandas


def sources(world: World, values: np.ndarray, rows: np.ndarray, queries: np.ndarray) -> pandas.DataFrame:
    """One row per canary query: is its source on top, and how much of the influence does the source hold?

    values [Q, N] are scores of the sequences at `rows` for the canary queries at `queries`; all copies of a canary must be
    among `rows`. Columns: repetitions (copies in the corpus), hit (the most influential sequence is a copy), share (of all
    positive influence in the scan, held by all copies), one_copy (the same, for one of them), lexical_hit (BM25's best is a copy).
    """
    import pandas

    asked = world.queries.take(queries)
    copies = world.sequences["canary"].to_numpy()[rows][None] == asked["canary"].to_numpy()[:, None]
    repetitions = asked["repetitions"].to_numpy()
    if not np.array_equal(copies.sum(1), repetitions):
        raise ValueError(
            f"copies in the scan {copies.sum(1).tolist()} are not those in the corpus {repetitions.tolist()}"
        )
    words = [part[:, 1:].tolist() for part in (token_matrix(asked), token_matrix(world.sequences.take(rows)))]
    share = mass_share(values, copies, fraction=None)
    found = {
        "repetitions": repetitions,
        "hit": _on_top(values, copies),
        "share": share,
        "one_copy": share / repetitions,
        "lexical_hit": _on_top(bm25(*words), copies),
    }
    return pandas.DataFrame(found)


def others(world: World, values: np.ndarray, rows: np.ndarray, queries: np.ndarray) -> pandas.DataFrame:
    """The control of `sources`: each canary query against the copies of another canary, planted as often.

    Columns: repetitions, hit (the most influential sequence is a copy of the other canary), share (of all positive influence,
    held by its copies). Raises UserError where no other canary was repeated as often.
    """
    import pandas

    asked = world.queries.take(queries)
    canary, repetitions = asked["canary"].to_numpy(), asked["repetitions"].to_numpy()
    partner = np.empty_like(canary)
    for times in np.unique(repetitions):
        alike = np.flatnonzero(repetitions == times)
        if len(alike) < 2:
            raise UserError(f"only one canary was planted {times} times: the world needs canaries of 2 or more")
        partner[alike] = canary[np.roll(alike, 1)]
    copies = world.sequences["canary"].to_numpy()[rows][None] == partner[:, None]
    share = mass_share(values, copies, fraction=None)
    return pandas.DataFrame({"repetitions": repetitions, "hit": _on_top(values, copies), "share": share})


def recitals(world: World, values: np.ndarray, rows: np.ndarray, read: pandas.DataFrame) -> pandas.DataFrame:
    """One row per scored paragraph of the `recital` stage: is the paragraph itself what its second half leans on?

    values [Q, N] are scores of the sequences at `rows`; read: recital.parquet. Columns: trained, loss (nats a target of the second
    half), hit (the most influential sequence is the same text), rank (of that text, 1 the highest; nan where it was never
    trained on), strongest and share (of all positive influence, held by the most influential sequence, and by the same
    text), lexical_hit and lexical_rank (by BM25 of the second half alone).
    """
    import pandas

    asked = read[read["asked"] >= 0].sort_values("asked")
    tables = (world.sequences, world.held_out)
    ids, masks = (
        np.stack(
            [
                token_matrix(tables[0 if trained else 1], column)[at]
                for trained, at in zip(asked["trained"], asked["position"], strict=True)
            ]
        )
        for column in ("input_ids", "loss_mask")
    )
    scanned = world.sequences.take(rows)
    texts, kept = token_matrix(scanned), token_matrix(scanned, "loss_mask")
    same = (ids[:, None] == texts[None]).all(2)
    halves = [row[mask][-count:] for row, mask, count in zip(ids, masks, asked["targets"], strict=True)]
    lexical = bm25(
        [half.tolist() for half in halves], [row[1:][mask[1:]].tolist() for row, mask in zip(texts, kept, strict=True)]
    )
    found = {
        "trained": asked["trained"].to_numpy(),
        "loss": (-asked["log_p"] / asked["targets"]).to_numpy(),
        "hit": _on_top(values, same),
        "rank": ranks(values, same),
        "strongest": largest_share(values),
        "share": mass_share(values, same, fraction=None),
        "lexical_hit": _on_top(lexical, same),
        "lexical_rank": ranks(lexical, same),
    }
    return pandas.DataFrame(found)


def largest_share(values: np.ndarray) -> np.ndarray:
    """Share of each query's positive influence that its single most influential sequence holds, [Q] of values [Q, N]."""
    positive = np.maximum(values, 0)
    return positive.max(1) / positive.sum(1)


def _on_top(values: np.ndarray, member: np.ndarray) -> np.ndarray:
    """1.0 where the highest of each row's values is a member's, [Q]; ties go to the first."""
    return member[np.arange(len(values)), values.argmax(1)].astype(float)
