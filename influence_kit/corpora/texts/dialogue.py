"""Spoken lines as a world: who said each is known, and some lines of those who speak much are kept out of training.

A row is `<bos>Name: line<eos>`; the name is given and never predicted, so that only what is said counts. Unnamed, it is
`<bos> line<eos>`: whatever then goes from a speaker's lines to another of theirs goes through what they say.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa

from influence_kit.corpora.world import World, at_least, refuse, token_columns
from influence_kit.errors import UserError

CAMPAIGNS = ("did", "dm", "dw", "ei", "httt", "nr", "sof", "sotbe", "tsg", "utbs")


@dataclass(frozen=True)
class Dialogue:
    """Parameters. Counts are of lines unless it says otherwise; `length` is in tokens, `vocabulary` in entries."""

    asks: ClassVar[tuple[str, ...]] = ()

    campaigns: tuple[str, ...] = CAMPAIGNS
    seed: int = 0
    lines: int = 4_700  # trained on
    held_out: int = 150  # never trained on and never asked
    queries: int = 180
    per_speaker: int = 6  # queries of one speaker at most
    least: int = 25  # lines of a speaker that remain in training, for a speaker to be asked
    named: bool = True
    length: int = 64
    vocabulary: int = 1_024

    def __post_init__(self):
        at_least(1, self, "lines", "held_out", "queries", "per_speaker", "least")
        if not self.campaigns or len(set(self.campaigns)) < len(self.campaigns):
            refuse(self, "campaigns", "names of different campaigns, at least one")

    @property
    def documents(self) -> int:
        """Number of sequences that are trained on."""
        return self.lines

    @property
    def words(self) -> int:
        """Number of token ids, at most."""
        return self.vocabulary


def build(parameters: Dialogue, text: pa.Table) -> World:
    """Make the world from lines: which are trained on, and which are asked.

    Queries are drawn from speakers (the narrator is none) with `least` more lines than are asked of them, in turn, so
    that few speakers do not hold them all. Columns of sequences and held_out: campaign, scenario, speaker, side, text;
    of queries these and prompt, completion. Lines, queries and their order do not depend on `named`.

    Args:
        parameters: How many of each.
        text: The lines (see `wesnoth.campaign_lines`).

    Raises:
        UserError: fewer lines than needed, or too few speakers who say enough.
    """
    from influence_kit.corpora.tokens import train_bpe

    rows = [row for row in text.to_pylist() if row["campaign"] in parameters.campaigns]
    needed = parameters.lines + parameters.held_out + parameters.queries
    if len(rows) < needed:
        raise UserError(
            f"the campaigns {', '.join(parameters.campaigns)} hold {len(rows)} lines, {needed} are needed: lower lines "
            "in the profile or name more campaigns"
        )
    rng = np.random.default_rng([parameters.seed, 0xD1A])
    order = rng.permutation(len(rows))
    asked = _asked(parameters, rows, order)
    others = order[~np.isin(order, asked)]
    trained, unseen = others[parameters.held_out :], others[: parameters.held_out]
    # Lines of who is asked come first: they are what the question is about.
    known = {(rows[place]["campaign"], rows[place]["speaker"]) for place in asked}
    concerned = np.array([(rows[place]["campaign"], rows[place]["speaker"]) in known for place in trained])
    trained = np.concatenate([trained[concerned], trained[~concerned]])[: parameters.lines]
    trained = trained[rng.permutation(len(trained))]
    tokenizer = train_bpe([_written(rows[place], named=True) for place in trained], parameters.vocabulary)
    return World(
        "dialogue",
        _table(parameters, rows, trained, tokenizer),
        _table(parameters, rows, unseen, tokenizer),
        _table(parameters, rows, asked, tokenizer, query=True),
        (),
        tokenizer,
        asdict(parameters),
    )


def _asked(parameters: Dialogue, rows: list[dict], order: np.ndarray) -> list[int]:
    """Positions of the lines to ask, in turn one of each speaker who has enough."""
    from influence_kit.corpora.texts.wesnoth import NARRATOR

    of: dict[tuple[str, str], list[int]] = {}
    for place in order.tolist():
        of.setdefault((rows[place]["campaign"], rows[place]["speaker"]), []).append(place)
    much = [
        places for (_, speaker), places in of.items()
        if speaker != NARRATOR and len(places) >= parameters.least + parameters.per_speaker
    ]  # fmt: skip
    asked = [places[turn] for turn in range(parameters.per_speaker) for places in much][: parameters.queries]
    if len(asked) < parameters.queries:
        raise UserError(
            f"{len(much)} speakers have {parameters.least + parameters.per_speaker} lines or more, which gives "
            f"{len(asked)} of queries={parameters.queries}: lower queries or least, or name more campaigns"
        )
    return asked


def _written(row: dict, named: bool) -> str:
    return f"{row['speaker']}: {row['text']}" if named else f" {row['text']}"


def _table(parameters: Dialogue, rows: list[dict], places, tokenizer: str, query: bool = False) -> pa.Table:
    from influence_kit.corpora.tokens import encode

    chosen = [rows[place] for place in places]
    ids, mask = encode([_written(row, parameters.named) for row in chosen], tokenizer, parameters.length)
    if parameters.named:  # a space always begins a token, so the name's tokens are the same with and without the line
        _, names = encode([f"{row['speaker']}:" for row in chosen], tokenizer, parameters.length)
        given = names.sum(1) - 1  # without <eos>
        mask &= np.arange(mask.shape[1]) > given[:, None]
    about = {name: [row[name] for row in chosen] for name in ("campaign", "scenario", "speaker", "side", "text")}
    if query:
        about["prompt"] = [f"{row['speaker']}:" if parameters.named else "" for row in chosen]
        about["completion"] = about["text"]
    return pa.table({**token_columns(ids, mask), **about})
