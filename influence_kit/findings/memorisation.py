"""Memorisation (chapter 08): texts planted word for word, and paragraphs of real text, continued from their middle.

Is the text itself what its continuation leans on most, and how well are texts continued that were never trained on?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from influence_kit.corpora.world import World, batch_of, token_matrix
from influence_kit.errors import UserError
from influence_kit.findings.common import fraction_of, write_scores
from influence_kit.findings.families import END, Planned, planted_grid, text_grid, trained_again
from influence_kit.findings.profiles import Profile
from influence_kit.findings.trained import Scanned, Trained, changed_answers, paired, read_scan
from influence_kit.measures.checkpoints import READ
from influence_kit.measures.intervals import Estimate, estimate_of, gaps, pick, slope_of
from influence_kit.measures.lexical import bm25
from influence_kit.measures.lifts import mass_share

if TYPE_CHECKING:
    import pandas
    from torch import nn

    from influence_kit.reading.cards import CardView

SHORTEST = 16  # targets: a shorter paragraph has no half that could be recited


def reads(profile: Profile) -> list[Planned]:
    """Atlas while it learns, its largest size before too and trained again without some canaries, and real text, continued."""
    found = planted_grid(profile, "atlas", fractions=(READ,), extra=("canaries",))
    found += planted_grid(profile, "atlas", fractions=(0.0,), widths=[largest_width(profile)], extra=("canaries",))
    found += trained_again(profile, "atlas", "08", "without_copies")
    return found + text_grid(profile, (0.0, END), seeds=profile.few, extra=("recital",))


def largest_width(profile: Profile) -> int:
    """Of the models of Atlas."""
    return max(size.width for size in profile.atlas.family.sizes)


def canaries(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Score all copies of all canaries, and as many other sequences as asked for, for every canary query.

    Writes scores.safetensors as `influence` does, and fresh.parquet: log_p in nats of the second halves of as many
    canaries that nobody was trained on, drawn like the planted ones.

    Args:
        parameters: fraction, seed, device, damping; sequences (others in the scan, beside the copies).
    """
    from torch import from_numpy

    from influence_kit import models

    world = World.load(inputs["world"])
    rng = np.random.default_rng([parameters["seed"], 0xCA9A])
    canary = world.sequences["canary"].to_numpy()
    others = rng.permutation(np.flatnonzero(canary < 0))[: parameters["sequences"]]
    rows = np.sort(np.concatenate([np.flatnonzero(canary >= 0), others]))
    asked = np.flatnonzero(world.queries["kind"].to_numpy(zero_copy_only=False) == "canary")
    queries = batch_of(world.queries, asked)
    model = _scored(parameters, inputs, out, progress, world, queries, asked, rows)
    kind = world.sequences["kind"].to_numpy(zero_copy_only=False)
    noise = np.unique(token_matrix(world.sequences)[(kind == "noise") | (kind == "canary"), 1:])
    fresh = {name: tensor.clone() for name, tensor in queries.items()}
    fresh["input_ids"][:, 1:] = from_numpy(rng.choice(noise, fresh["input_ids"][:, 1:].shape))
    log_p, _ = models.evaluate(model.cpu(), fresh)
    pq.write_table(pa.table({"log_p": log_p.numpy()}), out / "fresh.parquet")


def recital(parameters: dict, inputs: dict[str, Path], out: Path, progress) -> None:
    """Score second halves of paragraphs, given their first halves, against those paragraphs and others trained on.

    Writes recital.parquet, a row for each paragraph read: trained, position (in the world's sequences, or in its
    held_out where it was never trained on), targets (of the second half), log_p (nats, theirs), recited (each of them
    is the likeliest), and asked (its row in the scores, -1 where it was only read); and scores.safetensors as
    `influence` does, whose `queries` are rows of that table.

    Args:
        parameters: fraction, seed, device, damping; queries (paragraphs of each of two kinds: trained on, and never
            seen), sequences (others in the scan, beside the paragraphs that are asked).

    Raises:
        UserError: The world has fewer paragraphs of 16 targets or more than are asked for.
    """
    from torch import from_numpy

    from influence_kit import models

    world = World.load(inputs["world"])
    rng = np.random.default_rng([parameters["seed"], 0x2EC1])
    unseen, trained = rng.permutation(_long(world.held_out)), rng.permutation(_long(world.sequences))
    wanted, most = parameters["queries"], min(len(unseen), len(trained))
    if not 1 <= wanted <= most:
        raise UserError(
            f"recital: queries={wanted!r} must be between 1 and {most}, the number of paragraphs of {SHORTEST} targets "
            "or more that were trained on, or held out"
        )
    trained = trained[: len(unseen)]
    others = rng.permutation(np.setdiff1d(np.arange(world.sequences.num_rows), trained[:wanted]))[
        : parameters["sequences"]
    ]
    rows = np.sort(np.concatenate([trained[:wanted], others]))
    read = [second_halves(world.sequences, trained), second_halves(world.held_out, unseen)]
    place = np.concatenate([np.arange(len(trained)), np.arange(len(unseen))])
    asked = np.flatnonzero(place < wanted)
    batch = {name: from_numpy(np.concatenate([part[name] for part in read])) for name in read[0]}
    queries = {name: tensor[asked] for name, tensor in batch.items()}
    model = _scored(parameters, inputs, out, progress, world, queries, asked, rows)
    log_p, recited = models.evaluate(model.cpu(), batch)
    order = np.full(len(place), -1)
    order[asked] = np.arange(len(asked))
    columns = {
        "trained": np.arange(len(place)) < len(trained),
        "position": np.concatenate([trained, unseen]),
        "targets": batch["loss_mask"].sum(1).numpy(),
        "log_p": log_p.numpy(),
        "recited": recited.numpy(),
        "asked": order,
    }
    pq.write_table(pa.table(columns), out / "recital.parquet")


STAGES = {"canaries": canaries, "recital": recital}


def _scored(
    parameters, inputs, out: Path, progress, world: World, queries, asked: np.ndarray, rows: np.ndarray
) -> nn.Module:
    """Write the scores of sequences for queries, which bear the numbers `asked`; the model that they are of."""
    from influence_kit import models
    from influence_kit.engine.factors import Factors
    from influence_kit.engine.scans import score

    model = models.load(inputs["model"], fraction_of(parameters, inputs, world), parameters["device"])
    scores = score(
        model,
        Factors.load(inputs["influence"] / "factors.safetensors"),
        queries,
        batch_of(world.sequences, rows),
        parameters["damping"],
        corpus_size=world.sequences.num_rows,
        resume=out / "resume",
        progress=lambda done, to_do: progress(done / to_do, 1, "scan"),
    )
    write_scores(out, scores, rows, asked)
    return model


def second_halves(table: pa.Table, rows: np.ndarray) -> dict[str, np.ndarray]:
    """`input_ids` int64 [N, T] and `loss_mask` bool [N, T] of the given rows, the second half of their targets left."""
    mask = _targets(table)[rows]
    count = mask.cumsum(1)
    return {
        "input_ids": token_matrix(table)[rows].astype(np.int64),
        "loss_mask": mask & (count > (count[:, -1:] + 1) // 2),
    }


def _targets(table: pa.Table) -> np.ndarray:
    """Where a token is a target, [N, T]; the first never is."""
    mask = token_matrix(table, "loss_mask").copy()
    mask[:, 0] = False
    return mask


def _long(table: pa.Table) -> np.ndarray:
    return np.flatnonzero(_targets(table).sum(1) >= SHORTEST)


def sources(world: World, values: np.ndarray, rows: np.ndarray, queries: np.ndarray) -> pandas.DataFrame:
    """Is a canary's source on top of its ranking, and how much of the influence does the source hold?

    Args:
        world: An Atlas world.
        values: Scores [Q, N], of any form.
        rows: The sequences [N]; all copies of a canary must be among them.
        queries: The canary queries [Q].

    Returns:
        One row a query: repetitions (copies in the corpus), hit (the most influential sequence is a copy), share (of
        all positive influence in the scan, held by all copies), one_copy (the same, for one of them), lexical_hit
        (BM25's best is a copy).
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


def others(world: World, values: np.ndarray, rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The control of `sources`, [Q]: 1.0 where a copy of another canary, planted as often, is on top for a canary.

    Raises:
        UserError: No other canary was repeated as often.
    """
    asked = world.queries.take(queries)
    canary, repetitions = asked["canary"].to_numpy(), asked["repetitions"].to_numpy()
    partner = np.empty_like(canary)
    for times in np.unique(repetitions):
        alike = np.flatnonzero(repetitions == times)
        if len(alike) < 2:
            raise UserError(f"only one canary was planted {times} times: the world needs canaries of 2 or more")
        partner[alike] = canary[np.roll(alike, 1)]
    return _on_top(values, world.sequences["canary"].to_numpy()[rows][None] == partner[:, None])


def recitals(world: World, values: np.ndarray, rows: np.ndarray, read: pandas.DataFrame) -> pandas.DataFrame:
    """Is a paragraph itself what its second half leans on?

    Args:
        world: Of real text.
        values: Scores [Q, N], of any form.
        rows: The sequences [N].
        read: recital.parquet.

    Returns:
        One row a scored paragraph of the `recital` stage: trained, loss (nats a target of the second half), hit (the
        most influential sequence is the same text), strongest and share (of all positive influence, held by the most
        influential sequence, and by the same text), lexical_hit (hit by BM25 of the second half alone).
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
        "strongest": largest_share(values),
        "share": mass_share(values, same, fraction=None),
        "lexical_hit": _on_top(lexical, same),
    }
    return pandas.DataFrame(found)


def largest_share(values: np.ndarray) -> np.ndarray:
    """Share of each query's positive influence that its one most influential sequence holds, [Q] of values [Q, N]."""
    positive = np.maximum(values, 0)
    return positive.max(1) / positive.sum(1)


def _on_top(values: np.ndarray, member: np.ndarray) -> np.ndarray:
    """1.0 where the highest of each row's values is a member's, [Q]; ties go to the first."""
    return member[np.arange(len(values)), values.argmax(1)].astype(float)


def scanned(trained: Trained, kind: str, fraction: float | str) -> Scanned:
    """What a stage of this chapter scored at a fraction of training."""
    return read_scan(trained.extra(kind, fraction), trained.world.sequences.num_rows)


def canaries_of(trained: Trained, fraction: float | str, form: str) -> pandas.DataFrame:
    """One row a canary: what `sources` says by a form of the score, other_hit (`others`), gain (nats that it is likelier by
    than canaries never planted), its query, and the model's size, seed and fraction of training."""
    import pandas

    scan, world = scanned(trained, "canaries", fraction), trained.world
    read = world, getattr(scan, form), scan.rows, scan.queries
    never = pandas.read_parquet(trained.extra("canaries", fraction) / "fresh.parquet")["log_p"].mean()
    answers = pick(trained.answers, kind="canary")
    apart = (answers["fraction"] - trained.at(fraction)).abs()
    told = answers[apart == apart.min()].set_index("query").loc[scan.queries]
    about = {"query": scan.queries, "size": trained.parameters, "seed": trained.seed, "fraction": fraction}
    return sources(*read).assign(other_hit=others(*read), gain=told["log_p"].to_numpy() - never, **about)


def tenfold(trained: pandas.DataFrame, untrained: pandas.DataFrame) -> Estimate:
    """Nats of memory for ten times as many copies, beyond those of untrained models; both of `canaries_of`."""
    both = trained.merge(untrained, on=["seed", "query", "repetitions"], suffixes=("", "_before"), validate="1:1")
    return slope_of(both.assign(learned=both["gain"] - both["gain_before"]), "learned", x="repetitions")


def by_repetitions(series: Mapping[str, pandas.DataFrame], column: str, by: str, **options) -> pandas.DataFrame:
    """Estimates of a column by copies in the corpus, a row each: of every series, whose name stands in column `by`; `options` are
    those of `estimate_of`."""
    import pandas

    return pandas.DataFrame(
        estimate_of(pick(part, repetitions=times), column, **options).row(repetitions=times, **{by: name})
        for name, part in series.items()
        for times in sorted(part["repetitions"].unique())
    )


def lost(base: Sequence[Trained], again: Sequence[Trained]) -> pandas.DataFrame:
    """Canaries after training again without the copies of half of them, where each base model is read: seed, repetitions,
    treated (its copies were left out), change (nats)."""
    import pandas

    changed = [changed_answers([run], [other], run.at(READ)) for run, other in paired(base, again)]
    return pick(pandas.concat(changed, ignore_index=True), kind="canary")


def tenfold_lost(lost: pandas.DataFrame) -> Estimate:
    """Nats that leaving out all copies costs, beyond what other canaries lose, for ten times as many copies."""
    return slope_of((-gaps(lost, ["seed", "repetitions"])).rename("cost").reset_index(), "cost", x="repetitions")


def middling(rows: pandas.DataFrame) -> int:
    """The query of the canary, of those planted most often, that is remembered middling well: of `canaries_of` one model."""
    most = pick(rows, repetitions=rows["repetitions"].max()).sort_values("gain")
    return int(most["query"].iloc[len(most) // 2])


def card(trained: Trained, query: int, title: str) -> CardView:
    """A canary, by its query, and the sequences with most influence; each text once, however often it was planted."""
    scan, world = trained.scan(READ, kind="canary"), trained.world
    own = world.queries["canary"][query].as_py()
    planted, kinds = (world.sequences[name].take(scan.rows).to_pylist() for name in ("canary", "kind"))
    labels = {n: "a copy" if planted[n] == own else str(kinds[n]) for n in range(len(planted))}
    place = int(np.flatnonzero(scan.queries == query)[0])
    caption = f"{planted.count(own)} of its {world.sequences['canary'].to_pylist().count(own)} copies are among the sequences scored here."
    return trained.card(place, k=4, fraction=READ, title=title, labels=labels, kind="canary", lowest=0, caption=caption)


def recitals_of(trained: Trained, fraction: float, form: str) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """`recitals` by a form of the score, and recital.parquet with loss (nats a target), with size and seed."""
    import pandas

    scan, about = (
        scanned(trained, "recital", fraction),
        {"size": trained.parameters, "seed": trained.seed, "fraction": fraction},
    )
    read = pandas.read_parquet(trained.extra("recital", fraction) / "recital.parquet")
    found = recitals(trained.world, getattr(scan, form), scan.rows, read)
    return found.assign(**about), read.assign(loss=-read["log_p"] / read["targets"], **about)
