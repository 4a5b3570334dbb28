"""Role-play (chapter 06): how far up a query's ranking its persona, its plan and its description stand in Cast, words
being equal; and in real dialogue, do a speaker's lines count for more than others' that share as many words?

An effect is the lift of one tier over that of another which shares the same words with the query but for the ones that
the effect is named after: `persona` adds the persona, `planner` the goal and the question; `description` adds nothing,
its two tiers share the persona only. A bare lift says little: documents that share an action word only reach high ones
too. What the added word does by being the same word is to be read off a world in which it means nothing: the persona in
the planning world, goal and question in the two others. That is why the chapter's number is the interaction of world
and effect.

A ratio adds chance, a lift of 1, to both lifts: it has a value where a tier never comes up, and is 1 where neither is
common in the top, whatever the ratio of two small numbers. It is computed within a seed and averaged over seeds as a
logarithm: one tier ten times as common and one a tenth as common average to 1.

In dialogue each line of the one kind is compared with the lines of the other kind that come next to it in token overlap
with the query, below and above, weighted so that their mean overlap is its own, and that come from the query's scenario
if it does, from another if it does not; what is read is how often it outranks them. .5 is what token overlap and scene
give.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.texts.wesnoth import NARRATOR
from influence_kit.corpora.world import World
from influence_kit.corpora.worlds.cast import tiers
from influence_kit.errors import UserError
from influence_kit.findings.families import END, Planned, dialogue_grid, planted_grid
from influence_kit.findings.phrasing import answered, interval, number_of_seeds, refereed
from influence_kit.findings.profiles import Profile
from influence_kit.findings.solved import chosen
from influence_kit.findings.trained import Trained, paired
from influence_kit.measures.checkpoints import READ
from influence_kit.measures.intervals import Estimate, gaps, over_seeds, pick
from influence_kit.measures.lexical import bm25, target_counts
from influence_kit.measures.lifts import auc, lift, top_count

if TYPE_CHECKING:
    import pandas

    from influence_kit.measures.claims import Claim
    from influence_kit.reading.cards import CardView

WORLDS = {"base": "imitation", "description": "description only", "planning": "planning only"}  # by their arm of Cast
SOURCES = {"imitation": "demonstrations", "description only": "descriptions", "planning only": "planners"}
EFFECTS = {
    "persona": ("demo_persona_action", "demo_action"),
    "planner": ("planner_pair_action", "planner_action"),
    "description": ("description_persona_dimension", "description_persona"),
    # The same words where they are only mentioned: what sharing them does by itself.
    "persona_mention": ("neutral_persona_action", "neutral_action"),
    "planner_mention": ("neutral_pair_action", "neutral_action"),
}
MENTIONS = {"persona_mention": "persona, only mentioned", "planner_mention": "goal and question, only mentioned"}
LIFTS = ["first", "second"]  # those of an effect's two tiers
CHANCE = 1.0  # a lift
ON_CARD = 2  # sequences of a query that a card shows, and as many of those that its answer was learned from
RELATIONS = {
    "demo_persona_action": "same persona, same action",
    "demo_action": "demonstration, same action",
    "demo_wish_action": "demonstration, same action, goal or question",
    "planner_pair_action": "planner of this goal and question",
    "planner_question_action": "planner, same question and action",
    "planner_goal_action": "planner, same goal and action",
    "planner_action": "planner, same action only",
    "description_persona_dimension": "description of this trait",
}
OWN = {"imitation": ("persona", "demo_persona_action"), "planning only": ("planner", "planner_pair_action")}
RIVALS = {"imitation": "planners", "planning only": "demonstrations"}  # what the other world's answers come from


def reads(profile: Profile) -> list[Planned]:
    """The three worlds of Cast, the same with documents taken out, and spoken lines."""
    found = dialogue_grid(profile, seeds=profile.few)
    if profile.cast is None:
        return found
    worlds = planted_grid(profile, "cast", tuple(WORLDS), (READ,))
    worlds += planted_grid(profile, "cast", tuple(WORLDS), (READ,), **chosen(profile, "cast"))
    return worlds + planted_grid(profile, "cast", dropped_arms(profile), (), seeds=profile.few) + found


def dropped_arms(profile: Profile) -> list[str]:
    """The arms of Cast that are trained again with documents taken out."""
    return [name for name, arm in profile.cast.arms.items() if arm.world.get("dropped")]  # type: ignore[union-attr]


def contrasts(scores, tiers: Mapping[str, np.ndarray], top: float = 0.01) -> pandas.DataFrame:
    """What each of EFFECTS compares.

    Args:
        scores: Of any form [Q, N].
        tiers: bool [Q, N] by name, as `corpora.worlds.cast.tiers` gives them for the scanned rows and scored queries.
        top: The share of sequences that counts as most influential.

    Returns:
        A row for each effect and query, in the order of EFFECTS: query (row of `scores`), effect, first and second
        (lifts of its two tiers in the top share; nan where either is empty), preference (how often a sequence of the
        first tier outranks one of the second, .5 by chance: it reads whole rankings, so it says something where other
        documents crowd both tiers out of the top).

    Raises:
        UserError: nan among the scores, shapes that do not fit, or a tier that an effect needs is missing.
    """
    import pandas

    if missing := sorted({tier for pair in EFFECTS.values() for tier in pair} - set(tiers)):
        raise UserError(f"There is no tier {', '.join(missing)}; take the tiers of a Cast world.")
    scores = np.asarray(scores)
    found = []
    for name, pair in EFFECTS.items():
        one, other = (np.broadcast_to(tiers[tier], scores.shape) for tier in pair)
        lacking = ~(one.any(1) & other.any(1))
        columns = {"first": lift(scores, one, top), "second": lift(scores, other, top)}
        columns["preference"] = np.array(_preference(scores, one, other))
        columns = {column: np.where(lacking, np.nan, values) for column, values in columns.items()}
        found.append(pandas.DataFrame({"query": np.arange(len(scores)), "effect": name, **columns}))
    return pandas.concat(found, ignore_index=True)


def ratios(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Each effect in each world within each seed: ratio of the mean lifts over queries, chance added to both.

    Args:
        rows: Of `contrasts`, with columns world and seed.

    Returns:
        A row a seed, a column (effect, world); nan where no query has both tiers: in the imitation world nobody who is
        asked was described, so there is no description effect.
    """
    import pandas

    lifts = rows.dropna(subset=LIFTS).groupby(["effect", "world", "seed"])[LIFTS].mean() + CHANCE
    found = (lifts["first"] / lifts["second"]).unstack(["effect", "world"])
    every = pandas.MultiIndex.from_product([EFFECTS, WORLDS.values()], names=["effect", "world"])
    return found.reindex(index=sorted(rows["seed"].unique()), columns=every)


def in_short(told: Claim, described: Claim, wide: float) -> str:
    """What the chapter found, in a paragraph: of its claims 06-interaction and 06-description, and the share of sequences that
    the latter reads."""
    return (
        answered(
            told,
            "**Influence can tell the two apart, and each model rests on what it learned from.** A model that imitates a role leans on "
            "others of the same role, one that plans leans on the plan",
            "**Influence does not tell imitating from planning**",
        )
        + f": together the two effects are {interval(told, '.2g')} times as large where they should be as where they should not "
        f"({number_of_seeds(told)}; in brackets, here and below, 95 % intervals). {refereed(told)} "
        + answered(
            described,
            "Where a role is only described, its descriptions count for more than plans do",
            "Where a role is only described, its descriptions do not count for more than plans",
        )
        + f" ({interval(described, '.2g')} times, of the strongest {wide:.0%}). {refereed(described)}"
    )


def described(rows: pandas.DataFrame) -> pandas.Series:
    """How many times as large the description's effect is as the planner's, where traits are only described, by seed.

    Args:
        rows: As of `ratios`, of the description world.
    """
    found = ratios(rows)
    return found["description", "description only"] / found["planner", "description only"]


def averaged(ratios: pandas.Series) -> Estimate:
    """Ratios of seeds, averaged as logarithms, with their interval."""
    return over_seeds(ratios, "log")


def interaction(ratios: pandas.DataFrame) -> Estimate:
    """How many times as large the two effects are, together, where they are the source of the answers as where they are not.

    Args:
        ratios: Of `ratios`.
    """
    persona, planner = ratios["persona"], ratios["planner"]
    imitated = persona["imitation"] / persona["planning only"]
    return averaged(imitated * planner["planning only"] / planner["imitation"])


def _preference(scores: np.ndarray, first: np.ndarray, second: np.ndarray) -> list[float]:
    """Area under the curve between the two tiers, [Q]."""
    pairs = ((row[a | b], a[a | b]) for row, a, b in zip(scores, first, second))
    return [float(auc(row, member)) if len(row) else np.nan for row, member in pairs]


def _about(trained: Trained) -> dict[str, object]:
    return {"world": WORLDS[trained.arm], "size": trained.parameters, "seed": trained.seed}


def _members(trained: Trained, scan) -> dict[str, np.ndarray]:
    return {name: member[scan.queries] for name, member in tiers(trained.world, scan.rows).items()}


def read(trained: Trained, form: str, top: float) -> pandas.DataFrame:
    """`contrasts` of a model where it is read by a form of the score, with its world, size and seed."""
    scan = trained.scan(READ)
    return contrasts(getattr(scan, form), _members(trained, scan), top).assign(**_about(trained))


def answers(trained: Trained) -> pandas.DataFrame:
    """What a model of a world answers where it is read: with world, size, seed and `read_at`, a fraction of training."""
    read_at = trained.at(READ)
    return _answers(trained, read_at).assign(**_about(trained), read_at=read_at)


def _answers(trained: Trained, fraction: float) -> pandas.DataFrame:
    apart = (trained.answers["fraction"] - fraction).abs()
    return trained.answers[apart == apart.min()].reset_index(drop=True)


def predicted_removal(scores, gone) -> np.ndarray:
    """What influence foretells of each query's log-probability when documents are removed.

    Minus their summed influence over the number of sequences (removing one is epsilon = -1/N, Eq 1 of Grosse et al.
    2023); the scan stands for the corpus, so both are counted in the scan. EK-FAC's scale is not to be trusted: read
    signs and ranks.

    Args:
        scores: Raw influence [Q, N], nats at epsilon = 1.
        gone: Which of the scanned sequences are removed, bool [N].

    Returns:
        Nats [Q].

    Raises:
        UserError: Shapes that do not fit.
    """
    scores, gone = np.asarray(scores), np.asarray(gone, bool)
    if scores.ndim != 2 or gone.shape != scores.shape[1:]:
        raise UserError(f"Scores have shape {scores.shape} and what is removed {gone.shape}; give [Q, N] and [N].")
    return -scores[:, gone].sum(1) / scores.shape[1]


def changes(base, dropped, treated, units) -> pandas.DataFrame:
    """Change of log-probability by what documents were dropped by.

    Queries of one unit rise and fall together, so a unit counts once: the difference of treated and other units is what
    dropping did to the queries that it concerns beyond what it did to all.

    Args:
        base: Log-probabilities of the queries after training on the whole corpus [Q], nats.
        dropped: The same after training without the documents [Q].
        treated: Queries whose documents were dropped, bool [Q].
        units: Label of what documents were dropped by (the persona, or the pair of goal and question) [Q].

    Returns:
        A row for each unit: unit, treated, change (mean over the unit's queries, nats).

    Raises:
        UserError: Shapes that do not fit, a unit on both sides, or fewer than two units on a side.
    """
    import pandas

    change, treated = np.asarray(dropped, float) - np.asarray(base, float), np.asarray(treated, bool)
    units = np.asarray(units)
    if change.ndim != 1 or not change.shape == treated.shape == units.shape:
        shapes = f"{change.shape}, treated {treated.shape} and units {units.shape}"
        raise UserError(f"Changes have shape {shapes}; give one value a query in each.")
    labels = set(units[treated].tolist()), set(units[~treated].tolist())
    if labels[0] & labels[1]:
        raise UserError(
            f"Units {sorted(labels[0] & labels[1])[:5]} have treated queries and others; label what was dropped."
        )
    if min(map(len, labels)) < 2:
        raise UserError(f"{len(labels[0])} units are treated and {len(labels[1])} are not; each side needs two.")
    rows = pandas.DataFrame({"unit": units, "treated": treated, "change": change})
    return rows.groupby("unit", as_index=False).agg(treated=("treated", "first"), change=("change", "mean"))


def removals(runs: Iterable[Trained], again: Iterable[Trained]) -> list[tuple[Trained, Trained]]:
    """Models beside those trained again without documents of the same world, `paired`, world by world."""
    found = []
    for arm, world in WORLDS.items():
        of_world = [run for run in again if run.world.parameters["answer_from"] == world.split()[0]]
        found += paired([run for run in runs if run.arm == arm], of_world)
    return found


def removed(base: Trained, again: Trained) -> pandas.DataFrame:
    """`changes` by retraining at its end, and as influence foretells them where it is read, with by, world, dropped (kind of document) and seed."""
    import pandas

    dropped, scan = again.world.parameters["dropped"], base.scan(READ)
    before, after = (_answers(run, END) for run in (base, again))
    treated, units = after["treated"].to_numpy(bool), _units(again.world)
    gone = again.world.sequences["replaced"].to_numpy(zero_copy_only=False)[scan.rows]
    foretold = predicted_removal(scan.raw, gone)
    found = {
        "retraining": changes(before["log_p"], after["log_p"], treated, units),
        "influence": changes(np.zeros(len(foretold)), foretold, treated[scan.queries], units[scan.queries]),
    }
    about = {"world": WORLDS[base.arm], "dropped": dropped, "seed": base.seed}
    return pandas.concat(rows.assign(by=by, **about) for by, rows in found.items())


def _units(world: World) -> np.ndarray:
    """What documents were dropped by, for each query: goal and question where planners were, else the persona."""
    asked, dropped = world.queries, world.parameters["dropped"]
    if dropped == "planners" or (dropped == "random" and world.parameters["answer_from"] == "planning"):
        return asked["goal"].to_numpy() * 1000 + asked["question"].to_numpy()
    return asked["persona"].to_numpy()


def costs(rows: pandas.DataFrame) -> pandas.DataFrame:
    """What taking documents out costs the queries that they concern beyond all others, nats.

    Args:
        rows: Of `removed`.

    Returns:
        A row a seed, a column (by, world, dropped).
    """
    return -gaps(rows, ["by", "world", "dropped", "seed"]).unstack(["by", "world", "dropped"])


def beyond_rival(costs: pandas.DataFrame) -> pandas.DataFrame:
    """What taking out a world's own source costs beyond taking out that of the other world, by retraining: a row a seed, a
    column a world of OWN; nats."""
    import pandas

    by = costs["retraining"]
    return pandas.DataFrame({world: by[world, SOURCES[world]] - by[world, RIVALS[world]] for world in OWN})


def middling(trained: Trained, form: str) -> int:
    """The query whose own source stands middling high in its ranking: row of `trained.scan(READ)`."""
    effect, _ = OWN[WORLDS[trained.arm]]
    high = pick(read(trained, form, 0.01), effect=effect)["preference"].to_numpy()
    order = np.argsort(high, kind="stable")  # nan, where there is no such document, comes last
    return int(order[np.isfinite(high).sum() // 2])


def _labels(trained: Trained, query: int) -> dict[int, str]:
    members = _members(trained, trained.scan(READ))
    return {int(place): word for name, word in RELATIONS.items() for place in np.flatnonzero(members[name][query])}


def _ranked(trained: Trained, query: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns of a scan from the most influential on, and which of these are of the kind that the world's answers come from."""
    ranked = np.argsort(-trained.scan(READ).raw[query], kind="stable")
    labels, own = _labels(trained, query), RELATIONS[OWN[WORLDS[trained.arm]][1]]
    return ranked, np.array([labels.get(place) == own for place in ranked.tolist()])


def in_the_top(trained: Trained, query: int, top: float) -> str:
    """How many of a query's strongest share `top` of a scan are of the kind that its world's answers come from, in a sentence."""
    ranked, source = _ranked(trained, query)
    strongest = top_count(len(ranked), top)
    return (
        f"In the {WORLDS[trained.arm]} world {source[:strongest].sum()} of the {strongest} sequences that are the strongest {top:.0%} are what the answer "
        f"was learned from; by chance {strongest * source.mean():.1f}."
    )


def card(trained: Trained, query: int, k: int = ON_CARD) -> CardView:
    """A query with the k sequences that count most for it, the next k that its answer was learned from, and what each is to it."""
    found, title = _labels(trained, query), f"The {WORLDS[trained.arm]} world"
    labels = {place: found.get(place, "other") for place in range(len(trained.scan(READ).rows))}
    ranked, source = _ranked(trained, query)
    among = np.isin(np.arange(len(ranked)), [*ranked[:k], *ranked[source]])
    return trained.card(query, 2 * k, READ, title, labels, lowest=0, among=among)


def speaker_preference(
    world: World, values: np.ndarray, rows: np.ndarray, queries: np.ndarray, neighbours: int = 3, shuffled: bool = False
) -> pandas.DataFrame:
    """How often lines of a query's speaker outrank matched lines of other speakers of its campaign.

    The narrator's lines are left out. Overlap is BM25 over what is said; names that stand before the lines do not
    count.

    Args:
        world: Of spoken lines.
        values: Scores [Q, N], of any form.
        rows: The sequences [N].
        queries: The queries [Q].
        neighbours: As in `matched_preference`.
        shuffled: Take each query for one of another speaker of its campaign, drawn from the campaign's other queries;
            the lines of that speaker are compared with those of third ones.

    Returns:
        One row a query: columns of `matched_preference`, and campaign, speaker (whose lines were compared).

    Raises:
        UserError: As `matched_preference`.
    """
    asked, told, near = _who(world, rows, queries)
    own = asked["speaker"]
    speaker = _of_others(asked["campaign"], own) if shuffled else own
    first = near & (told["speaker"][None] == speaker[:, None])
    # Where labels are shuffled, the query's true speaker stands on neither side.
    second = near & ~first & (told["speaker"][None] != own[:, None])
    scene = told["scenario"][None] == asked["scenario"][:, None]
    found = matched_preference(values, first, second, word_overlap(world, rows, queries), scene, neighbours)
    return found.assign(campaign=asked["campaign"], speaker=speaker)


def _who(world: World, rows: np.ndarray, queries: np.ndarray) -> tuple[dict, dict, np.ndarray]:
    """Who speaks in queries and sequences, and where (columns by name), and whether in the query's campaign, [Q, N]."""
    names = ("campaign", "speaker", "scenario")
    asked = {name: world.queries[name].to_numpy(zero_copy_only=False)[queries] for name in names}
    told = {name: world.sequences[name].to_numpy(zero_copy_only=False)[rows] for name in names}
    near = (asked["campaign"][:, None] == told["campaign"][None]) & (told["speaker"] != NARRATOR)[None]
    return asked, told, near


def word_overlap(world: World, rows: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """BM25 [Q, N] of the sequences at `rows` for the queries at `queries`, over what each predicts."""
    tables = (world.queries.take(queries), world.sequences.take(rows))
    return bm25(*(target_counts(table, world.vocabulary_size, ignore=(0, 1)) for table in tables))


def matched_preference(
    values: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    overlap: np.ndarray,
    strata: np.ndarray,
    neighbours: int = 3,
) -> pandas.DataFrame:
    """How often sequences of the first kind outrank those of the second that come next in overlap.

    Args:
        values: Scores [Q, N].
        first: The one kind, bool [Q, N].
        second: The other kind, bool [Q, N].
        overlap: The score that is matched [Q, N].
        strata: Any labels [Q, N]; both of a pair come from one stratum.
        neighbours: How many of the second kind, on either side in overlap, each of the first is compared with; fewer on
            both sides where one side has fewer, and a sequence beyond all of the second kind is left out.

    Returns:
        One row a query: preference (ties count half), overlap (mean of the matched score less that of the partners: 0),
        unmatched_preference and unmatched_overlap (over all pairs), lines (of the first kind that found a partner); nan
        where there is none.

    Raises:
        UserError: Shapes that do not fit, or neighbours below 1.
    """
    import pandas

    values, parts = np.asarray(values), (first, second, overlap, strata)
    if values.ndim != 2 or any(np.shape(part) != values.shape for part in parts):
        shapes = ", ".join(str(np.shape(part)) for part in (values, *parts))
        raise UserError(f"Scores, kinds, overlap and strata have shapes {shapes}; give all as [Q, N].")
    if neighbours < 1:
        raise UserError(f"neighbours={neighbours!r} must be 1 or more.")
    # Many lines share no word with a query and tie: which of them are taken must not depend on their order.
    ties = np.random.default_rng(0).random(values.shape[1])
    found = []
    for query in range(len(values)):
        wins, level = [], []
        for stratum in np.unique(strata[query]):
            here = strata[query] == stratum
            one, other = np.flatnonzero(first[query] & here), np.flatnonzero(second[query] & here)
            if not len(one) or not len(other):
                continue
            for place, partners, weights in _next_to(overlap[query] + 1e-9 * ties, one, other, neighbours):
                own, theirs = values[query, place], values[query, partners]
                wins.append(weights @ ((own > theirs) + 0.5 * (own == theirs)))
                level.append(overlap[query, place] - weights @ overlap[query, partners])
        either = first[query] | second[query]
        whole = {"unmatched_preference": values[query], "unmatched_overlap": overlap[query]}
        row = {
            name: auc(scores[either], first[query][either]) if either.any() else np.nan
            for name, scores in whole.items()
        }
        means = [float(np.mean(part)) if part else np.nan for part in (wins, level)]
        found.append({"preference": means[0], "overlap": means[1], **row, "lines": len(wins)})
    return pandas.DataFrame(found)


def _next_to(
    overlap: np.ndarray, one: np.ndarray, other: np.ndarray, neighbours: int
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(sequence, its partners, their weights) for each of `one` that has some of `other` on both sides.

    Partners that are far weigh little: where lines get rarer the next one above is further off than the next one below,
    and equal weights would call that a difference.
    """
    other = other[np.argsort(overlap[other], kind="stable")]
    places = np.searchsorted(overlap[other], overlap[one])
    reach = np.minimum(neighbours, np.minimum(places, len(other) - places))
    found = []
    for place, at, r in zip(one, places, reach):
        if r:
            below, above = other[at - r : at], other[at : at + r]
            down, up = overlap[place] - overlap[below].mean(), overlap[above].mean() - overlap[place]
            weights = np.repeat([up, down], r) / (r * (up + down))
            found.append((int(place), np.concatenate([below, above]), weights))
    return found


def _of_others(campaign: np.ndarray, speaker: np.ndarray) -> np.ndarray:
    """For each query a speaker of another query of its campaign; its campaign's only speaker becomes nobody."""
    rng, found = np.random.default_rng(0), np.full(len(speaker), "", dtype=object)
    for place in range(len(speaker)):
        others = speaker[(campaign == campaign[place]) & (speaker != speaker[place])]
        if len(others):
            found[place] = rng.choice(others)
    return found


def voices(trained: Trained, form: str, neighbours: int, shuffled: bool = False) -> pandas.DataFrame:
    """`speaker_preference` after training, with size, seed, and the loss of held-out lines then and before."""
    scan = trained.scan()
    found = speaker_preference(trained.world, getattr(scan, form), scan.rows, scan.queries, neighbours, shuffled)
    about = {"seed": trained.seed, "size": trained.parameters, "shuffled": shuffled}
    return found.assign(loss=trained.held_out_loss(), untrained=trained.held_out_loss(0.0), **about)


def line_card(trained: Trained, preference: np.ndarray) -> CardView:
    """The query [Q] that is middling in how much its speaker's lines are preferred, with who speaks."""
    scan = trained.scan()
    query = int(np.argsort(np.nan_to_num(preference), kind="stable")[len(preference) // 2])
    speakers = trained.world.sequences["speaker"].to_pylist()
    return trained.card(query, k=4, title="A held-out line", labels=lambda place: speakers[scan.rows[place]])
