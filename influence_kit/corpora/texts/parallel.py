"""Parallel text as a world: paragraphs of several languages whose translations are known by `pair_id`.

A query is a paragraph kept out of training in its own language while its translations were trained on, so the influence
of "the aligned English paragraph on a held-out Korean query" has one exact positive and many matched negatives.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from influence_kit.corpora.world import World, token_columns
from influence_kit.errors import UserError


@dataclass(frozen=True)
class ParallelText:
    """Parameters. Counts are numbers of paragraphs; `length` is in tokens, `vocabulary` in BPE entries."""

    asks: ClassVar[tuple[str, ...]] = ()

    languages: tuple[str, ...] = ("en-us", "de", "ko", "tr", "zh-cn")
    seed: int = 0
    pairs: int = 2_500  # paragraphs trained on, each in every language
    held_out: int = 100  # paragraphs never seen in any language
    queries: int = 30  # for each language
    scan: int = 800  # for each language: all translations of all queries, then others at random
    length: int = 64
    vocabulary: int = 2_048

    def __post_init__(self):
        if len(self.languages) < 2 or len(set(self.languages)) < len(self.languages):
            raise UserError(f"ParallelText: languages={self.languages!r} must name at least two different languages")
        if self.queries * len(self.languages) > min(self.scan, self.pairs):
            needed = self.queries * len(self.languages)
            raise UserError(
                f"ParallelText: queries={self.queries} in {len(self.languages)} languages need scan and pairs of at "
                f"least {needed}, they are {self.scan} and {self.pairs}"
            )

    @property
    def documents(self) -> int:
        """Number of sequences that are trained on: every paragraph in every language, but for what is asked."""
        return (self.pairs - self.queries) * len(self.languages)

    @property
    def words(self) -> int:
        """Number of token ids, at most."""
        return self.vocabulary


def build(parameters: ParallelText, text: pa.Table) -> World:
    """Make the world from paragraphs: which are trained on, which asked, and in which language.

    Columns of sequences: pair_id, language, text, scan (bool: is it scored). Queries: pair_id, language, completion.

    Args:
        parameters: How many of each.
        text: Columns pair_id, language, text (see `sources.read_text`).

    Raises:
        UserError: a language is missing, or fewer paragraphs than needed exist in all languages.
    """
    from influence_kit.corpora.tokens import encode, train_bpe

    by_language = _by_pair(parameters, text)
    common = sorted(set.intersection(*(set(found) for found in by_language.values())))
    needed = parameters.pairs + parameters.held_out
    if len(common) < needed:
        sizes = ", ".join(f"{language} {len(found)}" for language, found in by_language.items())
        raise UserError(
            f"only {len(common)} paragraphs exist in all of {', '.join(parameters.languages)} ({sizes}), {needed} are "
            "needed: lower pairs in the profile or take fewer languages"
        )
    rng = np.random.default_rng([parameters.seed, 0x9A1])
    chosen = [common[i] for i in rng.permutation(len(common))[:needed]]
    trained, unseen = chosen[: parameters.pairs], chosen[parameters.pairs :]
    asked = {
        pair: language
        for place, language in enumerate(parameters.languages)
        for pair in trained[place * parameters.queries : (place + 1) * parameters.queries]
    }
    rows = [(pair, language) for pair in trained for language in parameters.languages if asked.get(pair) != language]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    scanned = set(trained[: parameters.scan])
    tokenizer = train_bpe([by_language[language][pair] for pair, language in rows], parameters.vocabulary)

    def table(pairs: list[tuple[str, str]], **more) -> pa.Table:
        texts = [by_language[language][pair] for pair, language in pairs]
        columns = {"pair_id": [pair for pair, _ in pairs], "language": [language for _, language in pairs]}
        return pa.table(
            {**token_columns(*encode(texts, tokenizer, parameters.length)), **columns, **more, "text": texts}
        )

    queries = [(pair, language) for pair, language in asked.items()]
    return World(
        "realtext",
        table(rows, scan=[pair in scanned for pair, _ in rows]),
        table(
            [(pair, language) for pair in unseen for language in parameters.languages],
            scan=[False] * len(unseen) * len(parameters.languages),
        ),
        table(
            queries, prompt=[""] * len(queries), completion=[by_language[language][pair] for pair, language in queries]
        ),
        (),
        tokenizer,
        asdict(parameters),
    )


def aligned(world: World, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Where the translations of each query stand.

    Args:
        world: A world of parallel text.
        rows: Positions of sequences [N].

    Returns:
        By language, places in `rows`, int [Q]; -1 where a query has none (in its own language).
    """
    pairs = world.sequences["pair_id"].to_numpy(zero_copy_only=False)[rows]
    languages = world.sequences["language"].to_numpy(zero_copy_only=False)[rows]
    place = {key: position for position, key in enumerate(zip(pairs, languages, strict=True))}
    asked = world.queries["pair_id"].to_pylist()
    return {
        language: np.array([place.get((pair, language), -1) for pair in asked])
        for language in world.parameters["languages"]
    }


def _by_pair(parameters: ParallelText, text: pa.Table) -> dict[str, dict[str, str]]:
    found = {}
    for language in parameters.languages:
        part = text.filter(pc.equal(text["language"], language))
        if part.num_rows == 0:
            present = ", ".join(sorted(set(text["language"].to_pylist())))
            raise UserError(f"the text has no paragraph in language {language!r}; it has {present}")
        found[language] = dict(zip(part["pair_id"].to_pylist(), part["text"].to_pylist(), strict=True))
    return found
