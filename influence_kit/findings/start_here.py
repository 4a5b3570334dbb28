"""Which training sequences made the model say that? One small model of Atlas (chapter 00)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.world import World, batch_of
from influence_kit.corpora.worlds.atlas import namesakes, supporters
from influence_kit.errors import UserError
from influence_kit.findings.families import Planned, planted_grid
from influence_kit.findings.profiles import Profile
from influence_kit.findings.trained import Scanned, Trained
from influence_kit.measures.intervals import bootstrap
from influence_kit.measures.lexical import bm25, token_counts
from influence_kit.measures.lifts import lift

if TYPE_CHECKING:
    import pandas

OWN, OTHER, NAME = "same fact, query's language", "same fact, other language", "same name, other fact"


def reads(profile: Profile, width: int = 0) -> list[Planned]:
    """One model of Atlas, of one seed: that of a width, or the second smallest. Raises UserError for a width that none has."""
    widths = [size.width for size in profile.atlas.family.sizes]
    if width and width not in widths:
        raise UserError(f"width={width} is not among the profile's models: choose one of {widths}, or 0")
    return planted_grid(profile, "atlas", seeds=profile.seeds[:1], widths=[width or widths[:2][-1]])


def tiers(world: World, scan: Scanned) -> dict[str, np.ndarray]:
    """What the scanned sequences are to the scored queries, bool [Q, N] each."""
    own, other = (tier[scan.queries] for tier in supporters(world, scan.rows))
    return {OWN: own, OTHER: other, NAME: namesakes(world, scan.rows)[0][scan.queries]}


def lifts(
    tiers: Mapping[str, np.ndarray], rankings: Mapping[str, np.ndarray], seed: int, usable: np.ndarray | bool = True
) -> pandas.DataFrame:
    """Lift of each tier in the top 1 % of each ranking, scores [Q, N], a row a query; nan where it is not usable."""
    import pandas

    return pandas.concat(
        pandas.DataFrame(
            {"tier": tier, "ranking": ranking, "lift": np.where(usable, lift(values, member), np.nan), "seed": seed}
        )
        for tier, member in tiers.items()
        for ranking, values in rankings.items()
    )


def wrong_answers(world: World, queries: np.ndarray) -> pandas.DataFrame:
    """Of some queries of Atlas: the token of the answer, its place in the row, and a wrong answer, which is the next
    different one of the same kind of question, and the right one where a kind has but one answer."""
    asks = world.queries.select(["fact", "language"]).to_pandas()
    tokens = batch_of(world.queries)
    asks["place"] = tokens["loss_mask"].int().argmax(1).numpy()
    asks["answer"] = tokens["input_ids"].numpy()[range(len(asks)), asks["place"]]

    def turned(answers: pandas.Series) -> pandas.Series:
        distinct = answers.unique()
        return answers.map(dict(zip(distinct, np.roll(distinct, 1))))

    relation = asks["fact"] % world.parameters["relations"]
    asks["wrong"] = asks.groupby(["language", relation])["answer"].transform(turned)
    return asks.loc[queries]


def wrong_scores(run: Trained, scan: Scanned, asks: pandas.DataFrame) -> np.ndarray:
    """Influence [Q, N] of the scanned sequences on the queries with their wrong answers."""
    from influence_kit.engine.scans import score

    exchanged = batch_of(run.world.queries, scan.queries)
    exchanged["input_ids"].numpy()[range(len(asks)), asks["place"].to_numpy()] = asks["wrong"].to_numpy()
    about = run.planned.influence[1.0].parameters
    model = run.model().to(about["device"])
    return score(
        model, run.factors(), exchanged, batch_of(run.world.sequences, scan.rows), about["damping"]
    ).values.numpy()


def middling(at_end: pandas.DataFrame, own: np.ndarray) -> int:
    """The query of the first language whose loss is nearest half a nat, of those with ten supporters in the scan (or
    the most there are): a fact that is known perfectly leaves almost no gradient to read."""
    first_language = at_end["language"].to_numpy() == 0
    stated = own.sum(1) >= min(10, own[first_language].sum(1).max())
    return int(np.argmin(np.where(stated & first_language, np.abs(-at_end["log_p"].to_numpy() - 0.5), np.inf)))


def word_overlap(world: World, scan: Scanned) -> np.ndarray:
    """BM25 [Q, N] of the scanned sequences for the scored queries."""
    asked, told = (
        batch_of(table, rows)["input_ids"]
        for table, rows in ((world.queries, scan.queries), (world.sequences, scan.rows))
    )
    return bm25(*(token_counts(tokens.numpy(), ignore=[0]) for tokens in (asked, told)))


def places(values: np.ndarray) -> np.ndarray:
    """The place of each sequence in a ranking by scores [N], 1 for the highest."""
    return np.argsort(np.argsort(-values, kind="stable"), kind="stable") + 1


def in_ten_words(scan: Scanned, query: int, tiers: Mapping[str, np.ndarray], overlap: np.ndarray, seed: int) -> str:
    """How many of a query's ten strongest sequences state its fact, by influence and by shared words, and how many over all queries."""
    from influence_kit.measures.lifts import precision_at

    told, rankings = [], {"influence": scan.raw, "shared words": overlap}
    for name, values in rankings.items():
        same, other = (np.nan_to_num(10 * precision_at(values, tiers[tier], 10)[query]) for tier in (OWN, OTHER))
        first = (
            f"place {places(values[query])[tiers[OTHER][query]].min():,}" if tiers[OTHER][query].any() else "no place"
        )
        share = bootstrap(precision_at(values, tiers[OWN] | tiers[OTHER], 10), np.full(len(values), seed))
        told.append(
            f"By {name}, {same:.0f} of the ten highest state the fact in the query's language and {other:.0f} in the other one, which is first "
            f"stated at {first} of {values.shape[1]:,}; over all queries the share of the ten that state it is {share}."
        )
    return " ".join(told)


def first_ten(
    world: World,
    scan: Scanned,
    query: int,
    tiers: Mapping[str, np.ndarray],
    asks: pandas.DataFrame,
    others: Mapping[str, np.ndarray],
) -> pandas.DataFrame:
    """The ten most influential sequences of a query, with what was planted in them, and where other rankings [Q, N] put
    them."""
    import pandas

    from influence_kit.reading.words import token_texts

    first = np.argsort(-scan.raw[query], kind="stable")[:10]
    own, other, named = (tiers[tier][query, first] for tier in (OWN, OTHER, NAME))
    tokens = batch_of(world.sequences, scan.rows[first])["input_ids"].numpy()
    columns = {
        "states the fact": np.select([own, other], ["yes", "in the other language"], "no"),
        "names the entity": np.where(own | other | named, "yes", "no"),
        "says the answer": np.where((tokens == asks["answer"].iloc[query]).any(1), "yes", "no"),
        **{f"place {name}": places(values[query])[first] for name, values in others.items()},
        "sequence": [" ".join(token_texts(world, row[1:].tolist())) for row in tokens],
    }
    return pandas.DataFrame(columns, index=pandas.RangeIndex(1, len(first) + 1, name="place"))
