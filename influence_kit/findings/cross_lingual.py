"""What crosses from one language to another (chapter 05): influence on a translated question in Atlas, ranks of
translations in real text.

The number fixed beforehand is the paper's design (Figs 15, 16). A question asks for a fact that its language alone states;
its translation is never answered by any sequence. Of the influence that the 10 strongest sequences of the question's language
have on it, how much have they on its translation? L10 is the median over facts of the one sum over the other, of influence on the
answer's log-odds: on log p it vanishes as p comes near 1, for the question sooner than for its translation. 0: nothing crosses; 1:
language does not matter. A seed's number for a size rests on all models of that size that were trained on its world.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.texts.parallel import aligned
from influence_kit.corpora.world import World, batch_of
from influence_kit.corpora.worlds.atlas import Atlas, drawn
from influence_kit.findings.families import END, Fraction, Planned, planted_grid, text_grid
from influence_kit.findings.profiles import Profile
from influence_kit.findings.solved import chosen
from influence_kit.findings.trained import Trained
from influence_kit.measures.checkpoints import READ, nearest
from influence_kit.measures.intervals import Estimate, estimate_of
from influence_kit.measures.lexical import idf_overlap, shares_tokens, target_counts
from influence_kit.measures.lifts import auc, recall_at
from influence_kit.reading.style import size_label
from influence_kit.recipes import tuples

if TYPE_CHECKING:
    import pandas

    from influence_kit.reading.cards import CardView

KNOWN = ["crossed", "own"]
STRONGEST, ON_CARD = 10, 4


def reads(profile: Profile) -> list[Planned]:
    """Atlas at the end and at equal loss, and real text."""
    found = planted_grid(profile, "atlas", on_one_world(profile), fractions=(END, READ)) + text_grid(profile)
    return found + planted_grid(profile, "atlas", **chosen(profile, "atlas"))


def on_one_world(profile: Profile) -> list[str]:
    """Arms of Atlas whose models are trained on the world as it stands: the first ones, and those trained again."""
    arms = profile.atlas.arms if profile.atlas else {}
    return ["base", *(name for name, arm in arms.items() if arm.again)]


def per_odds(values: np.ndarray, log_p: np.ndarray) -> np.ndarray:
    """Influence on the log-odds of answers, [Q, N], from that on their log p: score / (1 - p)."""
    return values / np.maximum(-np.expm1(log_p.astype(float)), 1e-7)[:, None]


def strongest_sums(
    own: np.ndarray, translated: np.ndarray, asked: np.ndarray, spoken: np.ndarray, k: int = STRONGEST
) -> pandas.DataFrame:
    """One row per question: sums over its k strongest sequences among those in its language.

    Args:
        own: Influence [Q, N] on questions.
        translated: The same on their translations, row by row.
        asked: Language of each question [Q].
        spoken: Language of each sequence [N].

    Returns:
        own and crossed, the sums of influence on the question and on its translation; unrelated, that on the
        translations of other questions of its language, their mean.
    """
    import pandas

    rows = []
    for place, language in enumerate(asked):
        among = np.flatnonzero(spoken == language)
        top = among[np.argsort(-own[place, among], kind="stable")[:k]]
        others = np.flatnonzero((asked == language) & (np.arange(len(asked)) != place))
        unrelated = translated[np.ix_(others, top)].sum(1).mean() if len(others) else np.nan
        rows.append((own[place, top].sum(), translated[place, top].sum(), unrelated))
    return pandas.DataFrame(rows, columns=["own", "crossed", "unrelated"])


def answered(run: Trained, kind: str, fraction: Fraction = END) -> pandas.DataFrame:
    """A model's answers to one kind of question at a checkpoint, by their row."""
    kept = run.answers["fraction"]
    at = run.answers[kept == nearest(run.at(fraction), kept.unique())]
    return at[at["kind"] == kind].set_index("query")


def read(run: Trained, score: str, k: int = STRONGEST, fraction: Fraction = END) -> pandas.DataFrame:
    """`strongest_sums` of a model's scan in one form of the score, at a checkpoint, a row a fact that one language alone
    states; `crosses` and `strays`, what is crossed and what is unrelated as a share of its own; with log p and correct there, of the
    question (`log_p`, `knows`) and its translation (`transferred`)."""
    kinds = ("alone", "translation")
    scans = [run.scan(fraction, kind) for kind in kinds]
    told = [answered(run, kind, fraction).loc[scan.queries] for kind, scan in zip(kinds, scans, strict=True)]
    own, translated = (
        per_odds(getattr(scan, score), at["log_p"].to_numpy()) for scan, at in zip(scans, told, strict=True)
    )
    spoken = run.world.sequences["language"].to_numpy()[scans[0].rows]
    found = strongest_sums(own, translated, told[0]["language"].to_numpy(), spoken, k)
    answers = {"log_p": told[0]["log_p"], "knows": told[0]["correct"], "transferred": told[1]["correct"]}
    found = found.assign(**{name: column.to_numpy(float) for name, column in answers.items()})
    found = found.assign(crosses=found["crossed"] / found["own"], strays=found["unrelated"] / found["own"])
    return found.assign(size=run.parameters, seed=run.seed, fraction=str(fraction))


def crossing(rows: pandas.DataFrame) -> Estimate:
    """L10 of a table of `read`."""
    return estimate_of(rows, "crosses", np.median)


def crossing_cards(models: Sequence[Trained], numbers: Sequence[float], score: str, k: int = ON_CARD) -> CardView:
    """One question in several models, with the k sequences of its language that influence it most and what part of that each has on
    the question's translation: the question of which these cross as much as the models' `numbers` say, or nearest to it."""
    from influence_kit.reading.cards import side_by_side

    crosses = np.stack([read(run, score, k)["crosses"].to_numpy() for run in models])
    query = int(np.nanargmin(np.abs(crosses - np.array(numbers)[:, None]).sum(0)))
    asked = models[0].world.queries.take(models[0].scan(END, "translation").queries[[query]]).to_pylist()[0]
    parts = ", ".join(
        f"{part:.2f} with {size_label(run.parameters)}" for part, run in zip(crosses[:, query], models, strict=True)
    )
    caption = (
        f"The question of one seed that comes nearest to the numbers above. Its translation is “{asked['prompt']} → {asked['completion']}”. Of what the "
        f"{k} strongest sequences in its own language, all shown, do to the question, this much they do to the translation: {parts} weights; beside each sequence "
        "stand its rank among all that were scored, by raw influence, and its own part."
    )
    return side_by_side([_crossing_card(run, query, score, k, caption) for run in models])


def _crossing_card(run: Trained, query: int, score: str, k: int, caption: str) -> CardView:
    kinds = ("alone", "translation")
    scans = [run.scan(END, kind) for kind in kinds]
    told = [answered(run, kind).loc[scan.queries] for kind, scan in zip(kinds, scans, strict=True)]
    own, crossed = (
        per_odds(getattr(scan, score), at["log_p"].to_numpy())[query] for scan, at in zip(scans, told, strict=True)
    )
    spoken = run.world.sequences["language"].to_numpy()[scans[0].rows]
    title = f"{size_label(run.parameters)} weights"

    def part(column: int) -> str:
        return f"does {crossed[column] / own[column]:.2f} of it to the translation"

    inside = np.flatnonzero(spoken == told[0]["language"].iloc[query])
    among = np.zeros(len(spoken), bool)
    among[inside[np.argsort(-own[inside], kind="stable")[:k]]] = True
    return run.card(query, k, END, title, part, "alone", lowest=0, caption=caption, among=among)


def dealt(run: Trained, fraction: Fraction = END) -> pandas.DataFrame:
    """What a model knows of values that were dealt at random, a row a fact that one language alone states.

    Returns:
        own and crossed: log p of the true value less the mean log p of all values that its relation can have (nats), of
        the question and of its translation. Chance gives 0.
    """
    import pandas
    import torch

    world, known = run.world, drawn(Atlas(**tuples(run.world.parameters)))[0]
    model, found = run.model(fraction), {}
    for name, kind in zip(("own", "crossed"), ("alone", "translation"), strict=True):
        asked = world.queries.drop_columns(["input_ids", "loss_mask"]).to_pandas()
        asked = asked[asked["kind"] == kind]
        batch = batch_of(world.queries, asked.index.to_numpy())
        place = batch["loss_mask"].float().argmax(1)  # of the answer, which the token before it predicts
        with torch.no_grad():
            log_p = model(batch["input_ids"]).logits[torch.arange(len(place)), place - 1].log_softmax(-1)
        values = known.lexicon.values[asked["language"].to_numpy(), asked["fact"].to_numpy() % known.world.relations]
        true = batch["input_ids"][torch.arange(len(place)), place]
        candidates = log_p.gather(1, torch.from_numpy(values))
        found[name] = (log_p.gather(1, true[:, None])[:, 0] - candidates.mean(1)).numpy()
    return pandas.DataFrame(found).assign(size=run.parameters, seed=run.seed)


def transfer_path(run: Trained) -> pandas.DataFrame:
    """log p of facts asked in the language that alone states them, and accuracy of their translations, at every kept
    checkpoint."""
    import pandas

    told = run.answers.groupby(["kind", "fraction"])[["log_p", "correct"]].mean()
    found = pandas.DataFrame({"log_p": told.loc["alone"]["log_p"], "transferred": told.loc["translation"]["correct"]})
    return found.reset_index().assign(size=run.parameters, seed=run.seed)


def translation_ranks(world: World, values: np.ndarray, rows: np.ndarray, k: int = 15) -> pandas.DataFrame:
    """One row per query and other language: how high the query's translation ranks among that language's sequences.

    Args:
        values: Scores [Q, N] of the sequences at `rows` for all queries of a parallel world.
        k: The highest scores whose recall is read.

    Returns:
        Columns query, asked, language, auc, recall (at k), the same for IDF-weighted token overlap (overlap_auc,
        overlap_recall), chance_recall, and shares (the pair has a token in common that fewer than 5 % of the scanned
        sequences have).
    """
    import pandas

    spoken = world.sequences["language"].to_numpy(zero_copy_only=False)[rows]
    asked = world.queries["language"].to_numpy(zero_copy_only=False)
    words, others = target_counts(world.queries), target_counts(world.sequences.take(rows))
    overlap, shared = idf_overlap(words, others), shares_tokens(words, others)
    found = []
    for language, place in aligned(world, rows).items():
        columns = np.flatnonzero(spoken == language)
        chosen = np.flatnonzero(place >= 0)
        right = columns[None] == place[chosen, None]
        ours, theirs = values[np.ix_(chosen, columns)], overlap[np.ix_(chosen, columns)]
        measures = {"auc": auc(ours, right), "overlap_auc": auc(theirs, right)}
        measures |= {"recall": recall_at(ours, right, k), "overlap_recall": recall_at(theirs, right, k)}
        about = {"query": chosen, "asked": asked[chosen], "language": language, "shares": shared[chosen, place[chosen]]}
        found.append(pandas.DataFrame({**about, **measures, "chance_recall": min(1.0, k / len(columns))}))
    return pandas.concat(found, ignore_index=True)


def read_text(run: Trained, score: str, k: int, fraction: float = END) -> pandas.DataFrame:
    """`translation_ranks` of a model of real text in one form of the score, at a checkpoint, with its held-out loss
    there."""
    scan = run.scan(fraction)
    found = translation_ranks(run.world, getattr(scan, score), scan.rows, k)
    return found.assign(size=run.parameters, seed=run.seed, fraction=fraction, loss=run.held_out_loss(fraction))


def auc_by_size(rows: pandas.DataFrame) -> Iterator[dict]:
    """AUC of influence and of token overlap by size, for all pairs and for those that share no rare token: lines of a
    table."""
    for name, part in (("all pairs", rows), ("no shared rare token", rows[~rows["shares"]])):
        for label, column in (("influence", "auc"), ("token overlap", "overlap_auc")):
            for size, at in part.groupby("size"):
                yield estimate_of(at, column, bounds=(0, 1)).row(parameters=size, series=f"{label}: {name}")


def median_text_query(rows: pandas.DataFrame, language: str = "en-us") -> int:
    """The query in a language whose translations' mean AUC is the median, of a table of `read_text` of one model."""
    mean = rows[rows["asked"] == language].groupby("query")["auc"].mean().sort_values(kind="stable")
    return int(mean.index[len(mean) // 2])


def of_text_card(small: pandas.DataFrame, large: pandas.DataFrame, query: int) -> str:
    """What a card of real text shows, in a sentence: how high the query's translations stand in two models."""
    before, after = (rows[rows["query"] == query]["auc"].mean() for rows in (small, large))
    against = "" if after > before else " This query goes against the paper's picture."
    return (
        "The median query of the largest model on real text, and what influences it most; foreign paragraphs have theirs in "
        f"English. Its translations stand above {before:.0%} of the others in the small model, above {after:.0%} in the large.{against}"
    )
