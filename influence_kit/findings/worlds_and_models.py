"""What models read, and whether they learned it (chapter 01)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.world import World, batch_of, token_matrix
from influence_kit.findings.families import Planned, planted_grid, text_grid
from influence_kit.findings.profiles import Arm, Profile
from influence_kit.findings.trained import Trained, language_name
from influence_kit.measures.intervals import estimate_of, pick

if TYPE_CHECKING:
    import pandas

STRETCHES = np.geomspace(0.01, 1, 15)  # shares of training that training losses are averaged over


def reads(profile: Profile) -> list[Planned]:
    """All models of Atlas, its shuffled arm for a few seeds, and real text; no scans."""
    shuffled = planted_grid(profile, "atlas", ("shuffled",), fractions=(), seeds=profile.few)
    return planted_grid(profile, "atlas", fractions=()) + shuffled + text_grid(profile, fractions=())


def right(facts: pandas.DataFrame, availability: Sequence[str]) -> pandas.DataFrame:
    """1 where a question about such facts is answered right at the end: a row a seed and query, a column a size."""
    rows = facts[(facts["fraction"] == 1) & facts["availability"].isin(availability)]
    return rows.pivot(index=["seed", "query"], columns="size", values="correct").astype(float).reset_index("seed")


def least(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """The mean of the column with the lowest mean."""
    return np.mean(values, axis=axis).min(-1)


def tokens_read(run: Trained) -> int:
    """Targets that the model was trained on, over all passes."""
    targets = int(token_matrix(run.world.sequences, "loss_mask")[:, 1:].sum())
    return targets * run.losses.get("recipe", {}).get("passes", 1)


def member(run: Trained) -> dict:
    """A model's line in the table of models; of one from elsewhere nobody knows how it was trained."""
    recipe = run.losses.get("recipe", {})
    return {
        "corpus": "Atlas" if run.corpus == "atlas" else "real text",
        "weights outside embeddings": run.parameters,
        "width": run.width if recipe else "",
        "depth": run.planned.size.depth if recipe else "",
        "peak learning rate": recipe.get("learning_rate", ""),
        "vocabulary": run.world.vocabulary_size,
        "sequences": run.world.sequences.num_rows,
        "passes": recipe.get("passes", ""),
        "steps": run.losses["steps"] if recipe else "",
        "tokens read": tokens_read(run),
    }


def variation(runs: Sequence[Trained], arm: Arm | None) -> dict:
    """What an arm of Atlas consists of, and what its models change (None: nothing); its line in the table of arms."""
    world = runs[0].world
    changed = {
        "other initial weights": arm and arm.again,
        "copies of half the canaries replaced": arm and arm.without == "copies",
    }
    spoken = world.sequences["language"].to_numpy()
    return {
        "arm": runs[0].arm,
        "documents in the first language": (spoken == 0).sum(),
        "in the second": (spoken == 1).sum(),
        "in none (random words)": (spoken == -1).sum(),
        "names that both share": f"{world.parameters['anchor_share']:.0%}",
        "values": "random in every statement" if world.parameters["shuffled"] else "as planted",
        "order of a statement": world.parameters["order"],
        "in training": next((words for words, so in changed.items() if so), "as it stands"),
        "widths trained": ", ".join(str(run.width) for run in runs),
    }


def measured(rows: pandas.DataFrame, by: Sequence[str], column: str, **options) -> pandas.DataFrame:
    """Mean and interval of a column over seeds (and queries) in each group."""
    import pandas

    lines = [estimate_of(part, column, **options).row(**dict(zip(by, key))) for key, part in rows.groupby(list(by))]
    return pandas.DataFrame(lines)


def curves(runs: Sequence[Trained]) -> pandas.DataFrame:
    """Training and held-out loss of models against tokens read, averaged over seeds."""
    import pandas

    found = []
    for run in runs:
        about = {"model": run.parameters, "seed": run.seed}
        share, held = (np.array(run.losses[step]) / run.losses["steps"] for step in ("step", "held_out_step"))
        stretch = STRETCHES[np.searchsorted(STRETCHES, share.clip(max=1))]
        train = pandas.DataFrame({"loss": run.losses["train"], "share": stretch})
        found.append(train.groupby("share", as_index=False).mean().assign(split="train", **about))
        held_out = {"loss": run.losses["held_out"], "share": held, "split": "held-out", **about}
        found.append(pandas.DataFrame(held_out)[1:])
    tokens = {run.parameters: tokens_read(run) for run in runs}
    table = measured(pandas.concat(found), ["model", "split", "share"], "loss", bounds=(0, np.inf))
    return table.assign(tokens=table["share"] * table["model"].map(tokens))


def in_short(facts: pandas.DataFrame) -> str:
    """What smallest and largest model know at the end of training, in a sentence."""
    end = pick(facts, fraction=1).assign(shown=lambda rows: rows["availability"] == "both")
    known = {key: estimate_of(part, "correct", bounds=(0, 1)) for key, part in end.groupby(["size", "shown"])}
    small, large = min(known)[0], max(known)[0]
    return (
        f"Of facts that were stated in the language of the question the model of {small:,} weights answers {known[small, True]:.2f} right and that of {large:,} "
        f"{known[large, True]:.2f}; of facts stated only in the other language {known[small, False]:.2f} and {known[large, False]:.2f}."
    )


def documents(world: World, examples: int) -> pandas.DataFrame:
    """Some documents of Atlas of each language and kind, with the columns that were planted."""
    from influence_kit.reading.words import token_texts

    planted = world.sequences.select(["language", "kind", "facts", "canary"]).slice(0, 5_000).to_pandas()
    shown = planted.groupby(["language", "kind"], sort=False).head(examples)
    shown = shown.sort_values(["kind", "language"], kind="stable")
    texts = [" ".join(token_texts(world, row[1:])) for row in token_matrix(world.sequences)[shown.index]]
    shown = shown.assign(language=shown["language"].map(language_name), facts=shown["facts"].map(list), document=texts)
    return shown.assign(canary=shown["canary"].replace(-1, "")).rename_axis("row")


def questions(world: World, examples: int) -> pandas.DataFrame:
    """Some questions about facts of Atlas, with what is known about each."""
    columns = ["prompt", "completion", "language", "availability", "statements_same", "statements_other"]
    asked = pick(world.queries.select(["kind", *columns]).to_pandas(), kind="fact")
    asked = asked.groupby(["availability", "language"], sort=False).head(examples)[columns]
    return asked.assign(language=asked["language"].map(language_name)).rename_axis("query")


def word_losses(runs: Sequence[Trained], document: int) -> pandas.DataFrame:
    """Loss (nats) of every word of a held-out document of Atlas, given the words before it: a column a model."""
    import pandas

    from influence_kit.reading.words import token_texts

    world = runs[0].world
    ids = batch_of(world.held_out, [document])["input_ids"]
    parts = ["filler", "name", "first word", "second word", "value", "full stop"] * world.parameters[
        "facts_per_document"
    ]
    words = token_texts(world, ids[0, 1:].tolist())
    table = pandas.DataFrame({"word": words, "part": parts}, index=pandas.RangeIndex(1, len(words) + 1, name="place"))
    for run in runs:
        predicted = run.model()(ids).logits[0, :-1].log_softmax(-1).detach()
        table[f"{run.parameters:,} weights"] = -predicted.gather(1, ids[0, 1:, None])[:, 0].numpy()
    return table.round(2)


def paragraphs(world: World, pairs: int) -> pandas.DataFrame:
    """Some paragraphs of real text that are there in every language."""
    import pandas

    about = world.sequences.select(["pair_id", "language", "text"]).to_pandas()
    spoken = list(world.parameters["languages"])
    whole = about.groupby("pair_id", sort=False)["language"].transform("nunique") == len(spoken)
    shown = about[about["pair_id"].isin(about[whole]["pair_id"].unique()[:pairs])]
    shown = shown.assign(language=pandas.Categorical(shown["language"], spoken)).sort_values(["pair_id", "language"])
    shown["language"] = shown["language"].map(language_name)
    return shown.set_index(["pair_id", "language"])


def by_language(world: World) -> pandas.DataFrame:
    """What there is of real text in each language."""
    import pandas

    tables = {name: getattr(world, name) for name in ("sequences", "held_out", "queries")}
    spoken = {name: table["language"].to_numpy(zero_copy_only=False) for name, table in tables.items()}
    targets = token_matrix(world.sequences, "loss_mask")
    lines = []
    for language in world.parameters["languages"]:
        count = {name: (said == language).sum() for name, said in spoken.items()}
        lengths = targets[spoken["sequences"] == language].sum(1)
        lines.append(
            {
                "language": language_name(language),
                "paragraphs trained on": count["sequences"],
                "held out": count["held_out"],
                "queries": count["queries"],
                "tokens a paragraph (median)": int(np.median(lengths)),
                f"fill all {targets.shape[1]} tokens": f"{(lengths == lengths.max()).mean():.0%}",
            }
        )
    return pandas.DataFrame(lines).set_index("language")
