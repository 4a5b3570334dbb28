"""A model of a profile's grid, made or found in the cache, and ready to read: its world, its answers, its scores, its cards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.world import World, batch_of
from influence_kit.corpora.worlds import WORLDS
from influence_kit.errors import UserError
from influence_kit.findings import common, families
from influence_kit.measures.checkpoints import READ
from influence_kit.runner.machine import threads
from influence_kit.runner.stages import ensure

if TYPE_CHECKING:
    import pandas
    from torch import nn

    from influence_kit.engine.factors import Factors
    from influence_kit.engine.scores import Scores
    from influence_kit.reading.cards import CardView


@dataclass(frozen=True)
class Scanned:
    """The scores of one checkpoint: `scores.values` [Q, N]; rows [N] and queries [Q] are positions in the world's tables."""

    scores: Scores
    rows: np.ndarray
    queries: np.ndarray

    @property
    def raw(self) -> np.ndarray:
        """Influence in nats at epsilon = 1, [Q, N]."""
        return self.scores.values.numpy()

    @property
    def relatif(self) -> np.ndarray:
        """RelatIF: influence divided by the training sequence's own norm, [Q, N]."""
        return self.scores.relatif.numpy()

    @property
    def cosine(self) -> np.ndarray:
        """EK-FAC cosine, [Q, N]."""
        return self.scores.cosine.numpy()


def read_scan(folder: Path, corpus_size: int) -> Scanned:
    """What `common.write_scores` wrote, of a corpus of so many sequences."""
    from safetensors.torch import load_file

    from influence_kit.engine.scores import Scores

    found = load_file(folder / "scores.safetensors")
    scores = Scores(found["values"], found["self_influence"], found["query_norm"], (), corpus_size)
    return Scanned(scores, found["rows"].numpy(), found["queries"].numpy())


@lru_cache(maxsize=4)
def _world(folder: Path) -> World:
    return World.load(folder)


@dataclass(frozen=True)
class Trained:
    """One trained model of the grid and everything known of it; computed on first use, then read from the cache."""

    planned: families.Planned
    stand_in: tuple[str, bool] | None = None  # see `by`

    def __getattr__(self, name: str):
        if name in ("corpus", "arm", "seed"):
            return getattr(self.planned, name)
        raise AttributeError(f"Trained has no attribute {name!r}")

    @property
    def width(self) -> int:
        """Width of the model."""
        return self.planned.size.width

    @property
    def fractions(self) -> list[families.Fraction]:
        """The fractions of training at which this model is scored."""
        return sorted(self.planned.influence, key=self.at)

    def at(self, fraction: families.Fraction) -> float:
        """A fraction of training; that of the checkpoint to READ, which the loss of the queries decides."""
        if fraction != READ:
            return float(fraction)
        return common.read_at(self.world, self.answers, self.planned.influence[READ].parameters)

    @property
    def world(self) -> World:
        """The corpus it was trained on."""
        return _world(ensure(self.planned.world))

    @cached_property
    def losses(self) -> dict:
        """steps, non_embedding_parameters, and the curves: step, train, held_out_step, held_out (nats a token)."""
        return json.loads((ensure(self.planned.model) / "losses.json").read_text())

    @property
    def parameters(self) -> int:
        """Weights outside embeddings and head: the size on every axis."""
        return self.losses["non_embedding_parameters"]

    @cached_property
    def answers(self) -> pandas.DataFrame:
        """Every query at every kept checkpoint: fraction, log_p (nats), correct, and the query's planted columns."""
        import pandas

        answers = pandas.read_parquet(ensure(self.planned.model) / "answers.parquet")
        planted = self.world.queries.drop_columns(["input_ids", "loss_mask"]).to_pandas()
        answers["fraction"] = answers["step"] / self.losses["steps"]
        return answers.join(planted, on="query")

    def held_out_loss(self, fraction: families.Fraction = 1.0) -> float:
        """Mean loss in nats a token on sequences never trained on, at a kept checkpoint."""
        steps = np.array(self.losses["held_out_step"])
        return self.losses["held_out"][int(np.abs(steps - self.at(fraction) * self.losses["steps"]).argmin())]

    def scan(self, fraction: families.Fraction = 1.0, kind: str | None = "") -> Scanned:
        """The influence scores at a fraction of training.

        Args:
            fraction: Of training, one of `fractions`.
            kind: Of queries (Atlas asks "fact" and "canary"); by default those that the world's scans are read for, None for all.

        Raises:
            UserError: no query of this kind was scored.
        """
        found = read_scan(ensure(self.planned.influence[fraction]), self.world.sequences.num_rows)
        if self.stand_in:
            found = self._standing_in(found, fraction)
        wanted = (kind,) if kind else WORLDS[self.world.name].asks if self.world.name in WORLDS else ()  # type: ignore[attr-defined]
        if wanted and kind is not None:
            kinds = self.world.queries["kind"].to_numpy(zero_copy_only=False)[found.queries]
            if not set(wanted) & set(known := sorted(set(kinds))):
                raise UserError(f"kind={kind!r} was not scored: choose one of {', '.join(known)}, or None for all")
            chosen, whole = np.flatnonzero(np.isin(kinds, wanted)), found.scores
            scores = replace(whole, values=whole.values[chosen], query_norm=whole.query_norm[chosen])
            found = Scanned(scores, found.rows, found.queries[chosen])
        return found

    def by(self, kind: str, own: bool = False) -> Trained:
        """The same model, read by the scores that a stage of this kind wrote of some of its scan's queries (scores.safetensors with
        values, rows and queries) in place of the scan's; `own`: by the scan's, of these queries."""
        return replace(self, stand_in=(kind, own))

    def _standing_in(self, scan: Scanned, fraction: families.Fraction) -> Scanned:
        from safetensors.torch import load_file

        kind, own = self.stand_in  # type: ignore[misc]
        made = load_file(self.extra(kind, fraction) / "scores.safetensors")
        queries = made["queries"].numpy()
        places = np.flatnonzero(np.isin(scan.queries, queries))
        values = scan.scores.values[places] if own else made["values"]
        scores = replace(scan.scores, values=values, query_norm=scan.scores.query_norm[places])
        return Scanned(scores, scan.rows, queries)

    def extra(self, kind: str, fraction: families.Fraction = 1.0) -> Path:
        """The folder that a stage of this kind wrote about the scan at a fraction; asked for by `extra=` when the models were."""
        if (kind, fraction) not in self.planned.extra:
            made = ", ".join(f"{kind} at {f}" for kind, f in self.planned.extra) or "none"
            raise UserError(
                f"no {kind!r} was made at {fraction} of training, only {made}: name it in the profile's `extra`"
            )
        return ensure(self.planned.extra[kind, fraction])

    def model(self, fraction: families.Fraction = 1.0) -> nn.Module:
        """The model at a kept checkpoint."""
        from influence_kit.models import load

        return load(ensure(self.planned.model), self.at(fraction))

    def factors(self, fraction: families.Fraction = 1.0) -> Factors:
        """The EK-FAC factors that the scan used."""
        from influence_kit.engine.factors import Factors

        return Factors.load(ensure(self.planned.influence[fraction]) / "factors.safetensors")

    def card(
        self,
        query: int,
        k: int = 5,
        fraction: families.Fraction = 1.0,
        title: str = "",
        labels: Mapping[int, str] | Callable[[int], str] | None = None,
        kind: str | None = "",
        relatif: bool = False,
        lowest: int | None = None,
        caption: str = "",
        among: np.ndarray | None = None,
    ) -> CardView:
        """Token card of one scored query (a position in `scan(fraction, kind)`), its k most and least influential sequences
        shaded by token, each text once, with its English where it is foreign.

        labels: from a column of the scan to a short word for what that sequence is to the query (its tier, say), shown in
        place of the kind of sequence; columns that a mapping leaves out have none. relatif: RelatIF's top k stand below.
        lowest: how many of the least influential are shown, k by default. caption: a sentence under all. among: columns that are
        shown at all [N], boolean.
        """
        from collections import Counter

        from influence_kit.engine.scans import token_scores
        from influence_kit.measures.lexical import bm25
        from influence_kit.reading.cards import Row, query_card
        from influence_kit.reading.glosses import in_english
        from influence_kit.reading.words import token_texts

        scan, world = self.scan(fraction, kind), self.world
        asked = int(scan.queries[query])
        raw = scan.raw[query]
        texts, asked_text = _kept(batch_of(world.sequences, scan.rows)), _kept(batch_of(world.queries, [asked]))
        alike = Counter(map(tuple, texts))

        def best(values: np.ndarray, number: int) -> list[int]:
            """Columns of the highest values, of texts that say the same only the first."""
            found: dict[tuple, int] = {}
            for column in np.argsort(-values, kind="stable").tolist():
                if len(found) == number:
                    break
                if among is None or among[column]:
                    found.setdefault(tuple(texts[column]), column)
            return list(found.values())

        lists = [
            best(raw, k),
            best(-raw, k if lowest is None else lowest),
            best(scan.relatif[query], k) if relatif else [],
        ]
        positions = [column for part in lists for column in part]
        chosen = batch_of(world.sequences, scan.rows[positions])
        with threads(1, True):
            damping = self.planned.influence[fraction].parameters["damping"]
            tokens = token_scores(
                self.model(fraction), self.factors(fraction), batch_of(world.queries, [asked]), chosen, damping
            )
        about = world.sequences.select([n for n in ("language", "kind") if n in world.sequences.column_names])
        word = (lambda column: labels.get(column, "")) if isinstance(labels, Mapping) else labels
        lexical = np.argsort(np.argsort(-bm25(asked_text, texts)[0], kind="stable"), kind="stable") + 1
        order, by_relatif = (
            np.argsort(np.argsort(-values, kind="stable"), kind="stable") + 1 for values in (raw, scan.relatif[query])
        )
        rows = []
        for place, column in enumerate(positions):
            length = int(chosen["loss_mask"][place].nonzero().max()) + 1
            position = int(scan.rows[column])
            facts = {name: about[name][position].as_py() for name in about.column_names}
            rank = by_relatif if place >= len(positions) - len(lists[2]) else order
            rows.append(
                Row(
                    tokens=token_texts(world, chosen["input_ids"][place, :length].tolist()),
                    score=float(raw[column]),
                    rank=int(rank[column]),
                    nats_per_copy=float(raw[column]) / scan.scores.corpus_size,
                    scored=len(order),
                    language=language_name(facts["language"]) if "language" in facts else "",
                    source=word(column) if word else facts.get("kind", ""),
                    bm25_rank=int(lexical[column]),
                    token_scores=tokens[place, :length].tolist(),
                    gloss=in_english(world, world.sequences, position),
                    copies=alike[tuple(texts[column])],
                )
            )
        batch = batch_of(world.queries, [asked])
        ids, mask = batch["input_ids"][0], batch["loss_mask"][0]
        start, end = int(mask.nonzero().min()), int(mask.nonzero().max()) + 1
        pieces = token_texts(world, ids[:end].tolist())
        joiner = " " if world.vocabulary else ""
        raising = len(rows) - len(lists[2])
        return query_card(
            pieces[1:start], pieces[start:], rows[:raising], k=k, title=title, joiner=joiner, alignment="predicted",
            lowest=lowest, caption=caption, gloss=in_english(world, world.queries, asked),
            further={"Highest by RelatIF": rows[raising:]} if relatif else None, distinct=True,
        )  # fmt: skip


def smallest_and_largest(runs: Iterable[Trained], seed: int) -> tuple[Trained, Trained]:
    """The smallest and the largest model of one seed."""
    sized = sorted((run for run in runs if run.seed == seed), key=lambda run: run.parameters)
    return sized[0], sized[-1]


def cards_beside(runs: Iterable[Trained], query: int, k: int, fraction: families.Fraction = 1.0, **known) -> CardView:
    """`Trained.card` of one query in several models, side by side, each under its size; `known` as there."""
    from influence_kit.reading.cards import side_by_side
    from influence_kit.reading.style import size_label

    return side_by_side(
        [run.card(query, k, fraction, f"{size_label(run.parameters)} weights", **known) for run in runs]
    )


def paired(base: Iterable[Trained], others: Iterable[Trained]) -> list[tuple[Trained, Trained]]:
    """Each of the other runs beside the base run of its corpus, size and seed: what a changed corpus did to that model.

    Both were asked the same queries, so that their `answers` agree row by row but for what the model says (the columns that
    a world plants in queries, `treated` say, are those of each run's own world). Raises UserError where a base run is
    missing or was asked something else.
    """
    known = {(run.corpus, run.planned.size, run.seed): run for run in base}
    pairs = []
    for run in others:
        name = f"{run.corpus} {run.arm} {run.width}x{run.planned.size.depth}, seed {run.seed}"
        found = known.get((run.corpus, run.planned.size, run.seed))
        if found is None:
            raise UserError(f"{name} has no base run of its size and seed: ask for the same widths and seeds in both")
        asked = [one.world.queries.select(["input_ids", "loss_mask"]) for one in (found, run)]
        if not asked[0].equals(asked[1]):
            raise UserError(f"{name} was asked other queries than arm {found.arm}: pair arms of one world only")
        pairs.append((found, run))
    return pairs


def changed_answers(base: Iterable[Trained], others: Iterable[Trained], fraction: float = 1.0) -> pandas.DataFrame:
    """What a changed corpus did to answers, `paired`: the others' `answers` at the kept checkpoint nearest a fraction of training,
    with arm, size and seed, and by how much log p (nats: `change`) and `correct` (`gained`) exceed those of the base run."""
    import pandas

    found = []
    for pair in paired(base, others):
        apart = [(run.answers["fraction"] - fraction).abs() for run in pair]
        before, after = (run.answers[far == far.min()] for run, far in zip(pair, apart))
        about = {"arm": pair[1].arm, "size": pair[1].parameters, "seed": pair[1].seed}
        gained = after["correct"].to_numpy(float) - before["correct"].to_numpy(float)
        change = after["log_p"].to_numpy() - before["log_p"].to_numpy()
        found.append(after.assign(change=change, gained=gained, **about))
    return pandas.concat(found, ignore_index=True)


def language_name(code: int | str) -> str:
    """A reader's word for a world's language code."""
    names: dict[int | str, str] = {0: "English", 1: "German", -1: "no language"}
    names |= {"en-us": "English", "de": "German", "ko": "Korean", "tr": "Turkish", "zh-cn": "Chinese"}
    return names.get(code, str(code))


def _kept(batch: dict) -> list[list[int]]:
    """Token ids of each row up to its last target, without the first (a document's start)."""
    lengths = [int(mask.nonzero().max()) + 1 for mask in batch["loss_mask"]]
    return [row[1:length].tolist() for row, length in zip(batch["input_ids"], lengths, strict=True)]
