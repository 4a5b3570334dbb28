"""What chapter 12 found, in sentences and tables: every number and every turn of phrase follows from what was computed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from influence_kit.corpora.sentences import load_facts
from influence_kit.findings.a_real_language_model import (
    LANGUAGES,
    PLANTED,
    SOURCES,
    Reading,
    agreement,
    kept,
    middle,
    over_facts,
    rounding,
    tails,
)
from influence_kit.measures.intervals import Estimate, pick

if TYPE_CHECKING:
    import pandas

PAPER_PAIR = 0.26  # what a flipped sentence keeps in the one pair that the paper shows with numbers
CLOSE = 0.8  # a correlation from which two measurements are said to agree
THIRDS = ("lower", "middle", "upper")
BY = {"influence": "influence", "apart": "influence, more than on other prompts", "words": "shared words (BM25)"}
Row = dict[str, Any]


def in_short(run: Reading, rows: pandas.DataFrame) -> str:
    """The answer, in a few sentences."""
    real = kept(pick(rows, nonsense=False))
    flipped, reworded, answer = (middle(real[group]) for group in ("flipped", "reworded", "answer_only"))
    steps = middle(kept(pick(rows, nonsense=False), "step")["flipped"])
    loses = middle(real["reworded"] - real["flipped"])
    agree = over_facts(agreement(pick(rows, nonsense=False)), bounds=(-1, 1))
    head = (
        "**A sentence that is turned round loses its influence here too**"
        if flipped.high < 0.5
        else ("**A sentence that is turned round keeps much of its influence here**")
    )
    than = (
        "more than" if loses.low > 0 else "less than" if loses.high < 0 else "no more, as far as these facts tell, than"
    )
    return (
        f"{head}: in {run.name} it is left with {flipped:.2f} of what the fact as asked has (the median of {flipped.n} facts; in brackets, here and below, "
        f"95 % intervals), the answer's name alone with {answer:.2f}. The fact in other words keeps {reworded:.2f}, {than} the turned one. "
        f"One real step of training on each sentence {'agrees' if agree.value >= CLOSE else 'does not rank them alike'}: it leaves the "
        f"turned one {steps:.2f}, and over a fact's sentences it correlates with influence by {agree:.2f}."
    )


def about(run: Reading) -> str:
    """Which model this is, where it is from, how its texts begin, how well it knows what is asked, and what factors rest on."""
    found, scan = run.origin, run.scan("facts")
    names = run.queries["name"].to_numpy()[scan.queries]
    sizes = (
        f" ({found['weights'] / 1e6:.0f} million weights, {', '.join(found['types'])})" if "weights" in found else ""
    )
    licence = f", licence {found['license']}" if found.get("license") else ""
    source = f" from `{found['source']}`{licence}" if found.get("source") else ""
    made_up = np.isin(names, [fact.name for fact in load_facts() if fact.nonsense])
    known, unknown = (-scan.log_p[made_up == which].mean() for which in (False, True))
    left = run.scan().error.max()
    (rows, tokens), wanted = run.fitted_on, run.planned.made["factors"].parameters["fit"]
    fewer = f" ({wanted} were asked for; the texts hold no more)" if rows < wanted else ""
    return (
        f"**{run.name}**{sizes}{source}. {run.world.parameters['begins']['said']} The answers to real facts cost it "
        f"{known:.1f} nats on average, those to nonsense ones {unknown:.1f}. Factors are fitted on {rows} rows of {tokens} tokens"
        f"{fewer}. Directions of queries are kept at low rank, which leaves out {left:.0%} of a prompt's at most.{_not_read(run.world.parameters['not_read'])}"
    )


def _not_read(files: list[str], named: int = 5) -> str:
    """Which files of the user's folder were passed over, in a sentence; "" where none was."""
    more = f" and {len(files) - named} more" if len(files) > named else ""
    shown = ", ".join("`" + file.replace("`", "'") + "`" for file in files[:named])
    return f" *Not read, being no .txt, .jsonl or .parquet: {shown}{more}.*" if files else ""


def planted_table(found: pandas.DataFrame) -> pandas.DataFrame:
    """AUC of planted passages over real texts, by kind and by what ranks them: lines of a figure."""
    import pandas

    lines = [over_facts(part["auc"], bounds=(0, 1)).row(**about) for about, part in _planted_parts(found)]
    return pandas.DataFrame(lines).drop(columns="seed_0", errors="ignore")


def planted_each(found: pandas.DataFrame) -> pandas.DataFrame:
    """The same of each prompt."""
    import pandas

    return pandas.DataFrame(
        {**about, "estimate": value} for about, part in _planted_parts(found) for value in part["auc"]
    )


def _planted_parts(found: pandas.DataFrame) -> Iterator[tuple[Row, pandas.DataFrame]]:
    for group, name in PLANTED.items():
        for by, how in BY.items():
            part, words = pick(found, by=by, group=group), name.partition(": ")[2]
            if len(part):
                yield {"label": f"{words} · {how}", "planted": words}, part


def on_planted(found: pandas.DataFrame) -> str:
    """What planted passages say, in words."""
    theme, words = (pick(found, by="influence", group=group)["auc"].to_numpy() for group in PLANTED)
    gap = over_facts(theme - words)
    alone = over_facts(pick(found, by="apart", group="on_theme")["auc"], bounds=(0, 1))
    if gap.low > 0:
        told = "Passages on the theme stand higher than those that share its words"
    elif gap.high < 0:
        told = (
            "Passages that share a prompt's words stand higher than those on its theme, as in the paper's small models"
        )
    else:
        told = "Whether theme or words count more is open"
    best = pick(found, by="influence").groupby("group")["best"].median()
    return (
        f"{told}: AUC over the real texts {over_facts(theme, bounds=(0, 1)):.2f} against {over_facts(words, bounds=(0, 1)):.2f} "
        f"({gap.n} prompts, {int(found['passages'].max())} passages of each kind). Relative to what a text does to the other prompts, those on the theme have "
        f"{alone:.2f}. The best passage on the theme stands at place {best['on_theme']:.0f} in the middle, the best that shares words at "
        f"{best['shared_words']:.0f}."
    )


def by_fact(rows: pandas.DataFrame) -> pandas.DataFrame:
    """Each fact: its loss, what its changed sentences keep of its influence, and the correlation with real steps."""
    found = kept(rows).drop(columns=["seed", "as_asked"])
    first = rows.groupby("fact", sort=False).first()
    table = found.drop(columns="nonsense").rename(columns=lambda group: group.replace("_", " "))
    table.insert(0, "loss, nats", -first["log_p"])
    table["correlation with real steps"] = agreement(rows)
    table.index = [f"{name} (nonsense)" if first.loc[name, "nonsense"] else name for name in table.index]
    return table


def on_steps(rows: pandas.DataFrame) -> str:
    """Whether a real step is small enough to be linear, in words."""
    both = rows.dropna(subset="delta_half")
    half, whole = both["delta_half"].abs().sum(), both["step"].abs().sum()
    linear = "small enough to be linear" if abs(half / whole - 0.5) < 0.1 else "too large to be linear"
    return (
        f"A step changes what the facts cost by {rows['step'].abs().mean():.2g} nats on average, half a step by {half / whole:.2f} of that: it is "
        f"{linear}."
    )


def languages_table(pairs: pandas.DataFrame) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """AUC of a paragraph's own English by language, by influence and by shared tokens, for a figure; and the same of each paragraph."""
    import pandas

    table, each = [], []
    for code, part in pairs.groupby("language", sort=False):
        for by, column in (("influence", "auc"), ("shared tokens", "overlap")):
            line = {"label": f"{LANGUAGES.get(code, code)} · {by}", "by": by}
            table.append(over_facts(part[column], bounds=(0, 1)).row(**line))
            each += [{**line, "estimate": value} for value in part[column]]
    return pandas.DataFrame(table).drop(columns="seed_0"), pandas.DataFrame(each)


def on_languages(pairs: pandas.DataFrame) -> str:
    """What languages say, in words."""
    told = []
    for code, part in pairs.groupby("language", sort=False):
        beyond = over_facts(part["auc"] - part["overlap"])
        alone = part[~part["shares"]]
        word = "more than" if beyond.low > 0 else "less than" if beyond.high < 0 else "no surer than"
        apart = (
            f", {over_facts(alone['auc'], bounds=(0, 1)):.2f} where they share no rare token" if len(alone) > 2 else ""
        )
        crossed = round(part["crossed"].sum() / part["own"].sum(), 2) + 0.0
        told.append(
            f"**{LANGUAGES.get(code, code)}**: {over_facts(part['auc'], bounds=(0, 1)):.2f}{apart}, {word} shared tokens say "
            f"({over_facts(part['overlap'], bounds=(0, 1)):.2f}); of what the ten strongest other English paragraphs do to the "
            f"English, {crossed:.2f} reaches the translation."
        )
    pairs_told = f"AUC of a paragraph's own English, {len(part)} paragraphs in each language.\n\n- "
    return pairs_told + "\n- ".join(told)


def on_tails(run: Reading) -> str:
    """What tails say, in words."""
    found = tails(run)
    shares = {model: over_facts(part["share"], bounds=(0, 1)) for model, part in found.groupby("model")}
    exponents = {
        model: over_facts(part["exponent"].dropna()) for model, part in found.groupby("model") if model != "Gaussian"
    }
    trained, random, chance = (shares[name] for name in ("trained", "random weights", "Gaussian"))
    most = "more" if trained.low > random.high else "less" if trained.high < random.low else "about as much"
    return (
        f"The strongest 1 % of texts hold {_percent(trained)} of all positive influence on an answer, {most} "
        f"{'as' if most.startswith('about') else 'than'} with random weights ({_percent(random)}); Gaussian scores would give "
        f"{_percent(chance)}. The density of the highest eighth of scores falls with an exponent of {exponents['trained']:.1f}, with random "
        f"weights {exponents['random weights']:.1f} (2 to 4 in the paper)."
    )


def _percent(share: Estimate) -> str:
    return f"{share.value:.0%} [{share.low:.0%}, {share.high:.0%}]"


def blocks_table(shares: pandas.DataFrame) -> pandas.DataFrame:
    """Share of each block by kind of query, means over queries: lines of a figure."""
    import pandas

    blocks = [column for column in shares if isinstance(column, int)]
    return pandas.DataFrame(
        [
            over_facts(part[block], bounds=(0, 1)).row(queries=kind, block=block + 1)
            for kind, part in shares.groupby("kind", sort=False)
            for block in blocks
        ]
    ).drop(columns="seed_0")


def on_blocks(shares: pandas.DataFrame) -> str:
    """Shares of the lower, middle and upper third by kind of query, in words."""
    from influence_kit.findings.layers_and_tokens import third_of

    blocks = [column for column in shares if isinstance(column, int)]
    if len(blocks) < 3:
        return f"A model of {len(blocks)} block{'s' * (len(blocks) > 1)} has no thirds."
    thirds = third_of(len(blocks))
    told = []
    for kind, part in shares.groupby("kind", sort=False):
        sums = [
            over_facts(part[blocks].to_numpy()[:, thirds == third].sum(1), bounds=(0, 1)) for third in np.unique(thirds)
        ]
        most = THIRDS[int(np.argmax([one.value for one in sums]))]
        listed = ", ".join(f"{name} {_percent(one)}" for name, one in zip(THIRDS, sums))
        told.append(f"**{kind}**: {listed}; most in the {most} third.")
    return "Shares of the thirds of the model's depth.\n\n- " + "\n- ".join(told)


def on_rounding(run: Reading, rows: pandas.DataFrame) -> str:
    """What one more rounding does, in words."""
    found, change = rounding(run, rows)
    mean = found.groupby("fact")["pearson"].mean()
    before, after = kept(rows)["flipped"], found.groupby("fact")["flipped"].mean()
    pearson = over_facts(mean, bounds=(-1, 1))
    hurt = [f"{name} ({value:.2f})" for name, value in mean[mean < CLOSE].sort_values().items()]
    worst = f" It matters most for {', '.join(hurt[:4])}." if hurt else " No fact's sentences change their order much."
    return (
        f"Each draw changes the weights by {change:.0%}. Over a fact's sentences influence before and after correlates by {pearson:.2f} "
        f"({found['draw'].nunique()} draws).{worst} A turned sentence keeps {middle(before):.2f} before and {middle(after):.2f} after."
    )


def sources(lifts: pandas.DataFrame) -> pandas.DataFrame:
    """Lifts of each source, means over prompts."""
    table = lifts.groupby("source")[["top", "bottom"]].mean()
    table = table.reindex([words for words in SOURCES.values() if words in table.index] or table.index)
    table.columns = ["in the top 1 %", "in the bottom 1 %"]
    return table.rename_axis("times as common as among all")
