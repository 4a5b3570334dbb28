"""A language model that others trained, out of a package or the reader's own (chapter 12): what the paper's findings are on it.

Its training data is in no package, so that influence is that of candidate texts: what one more copy of each would do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from influence_kit.corpora.sentences import GROUPS, load_facts
from influence_kit.corpora.world import World, batch_of
from influence_kit.errors import UserError, first_line
from influence_kit.files import sha256 as hash_of
from influence_kit.files import working_folder
from influence_kit.findings import common, real_stages
from influence_kit.findings.own import model_of
from influence_kit.findings.profiles import Profile
from influence_kit.findings.real_stages import REFERENCE, apart, with_role
from influence_kit.measures.intervals import Estimate, bootstrap
from influence_kit.measures.lexical import bm25, idf_overlap, shares_tokens, target_counts, token_counts
from influence_kit.measures.lifts import auc, ranks
from influence_kit.runner.stages import Stage, ensure

if TYPE_CHECKING:
    import pandas

    from influence_kit.findings.chapter import Chapter
    from influence_kit.reading.cards import CardView

SECTION = "real"  # of a profile that has this chapter
MEMORY = 3e9  # bytes of query directions that a scan may hold
LARGE = 100_000_000  # bytes of a model's files
LIMIT = 2000  # of the user's texts
SHOWN = {
    "reworded": "in other words",
    "flipped": "swapped round",
    "name_only": "the name alone",
    "answer_only": "the answer alone",
    "other": "another fact, same words",
}
SOURCES = {
    "help": "software help",
    "lines": "spoken lines of a game",
    "sayings": "sayings and anecdotes",
    "jargon": "hackers' dictionary",
    "planted": "planted",
}
PLANTED = {"on_theme": "planted: on the theme", "shared_words": "planted: shares its words"}
LANGUAGES = {"de": "German", "tr": "Turkish", "ko": "Korean", "zh-cn": "Chinese", REFERENCE: "English"}


@dataclass(frozen=True)
class Planned:
    """The stages of one model, by what they make: help, lines, sayings, weights, world, factors, influence, facts, languages, steps,
    untrained, rounded, maps; those that a reader's own texts have no use for are left out."""

    made: Mapping[str, Stage] = field(hash=False)
    name: str = ""

    @property
    def stages(self) -> list[Stage]:
        """All, inputs before what is made of them."""
        return list(self.made.values())


def reads(
    profile: Profile,
    model: str = "",
    texts: str = "",
    queries: str | Sequence[Mapping[str, str]] = "",
    sha256: str = "",
    terms: str = "",
    limit: int = LIMIT,
) -> list[Planned]:
    """What is made of the profile's model, then of each of its family, or of the reader's own model, texts and queries; nothing where a
    profile has no `real` section.

    Args:
        profile: Says how much of what.
        model: A folder, a hub name, a .gguf file or `wheel:NAME==VERSION`; by default the profile's.
        texts: A file or folder (see `folder.local_text`) in place of the packaged texts.
        queries: A YAML file with a list of {prompt, completion}, or the list, in place of the packaged prompts.
        sha256: Of the GGUF file, needed with `wheel:`.
        terms: Name of the terms that are accepted, where the licence is no open one.
        limit: Number of the reader's texts that are taken, evenly over all.

    Raises:
        UserError: A model, texts or queries that are not there or not of their form.
    """
    settings = profile.real
    if settings is None:
        return []
    seed, size = profile.seeds[0], settings.model
    asked = own_queries(queries)
    made: dict[str, Stage] = {}
    if not texts:
        fetched: dict[str, tuple] = {
            "help": (common.text, {"source": "libreoffice", "languages": list(settings.languages)}, "help pages"),
            "lines": (common.lines, {"source": "wesnoth", "campaigns": sorted(settings.campaigns)}, "spoken lines"),
        }
        for name, (function, parameters, label) in fetched.items():
            made[name] = Stage("text", function, {"folder": "", **parameters}, label=label, early=True)
    if not texts or not (model or size.pretrained):
        place = {"source": "fortunes", "folder": ""}
        made["sayings"] = Stage("text", real_stages.sayings, place, label="sayings and jargon", early=True)
    source: dict[str, Any] = {"source": model or size.pretrained}
    if not source["source"]:
        parameters = {"width": size.width, "depth": size.depth, "context": 512, "seed": seed}
        given = {"sayings": made["sayings"]}
        made["weights"] = Stage(
            "weights", real_stages.little, parameters | {"vocabulary": 600}, given, label="a little model"
        )
    else:
        accepted = (sha256, terms) if model else (size.sha256, size.terms)
        told, made_of = model_of(source["source"], *accepted)
        source, made = source | told, made | made_of
    called = "" if model else settings.name
    name = called or Path(source["source"] or "a little model").name
    weights = {"weights": made["weights"]} if "weights" in made else {}
    threads = 2 if _is_large(source["source"]) else 1
    shared = {**source, "seed": seed, "damping": settings.damping, "rank": settings.rank, "memory": MEMORY}

    def add(kind: str, function, parameters: dict, label: str, *inputs: str, folder: str = "") -> None:
        given = weights | {other: made[other] for other in inputs if other in made}
        made[kind] = Stage(folder or kind, function, parameters, given, threads, label=f"{label} of {name}")

    about: dict[str, Any] = {
        **source,
        "seed": seed,
        "length": settings.length,
        "opening": size.opening,
        "queries": asked,
        "limit": limit,
    }
    about |= {"texts": str(working_folder() / Path(texts).expanduser()) if texts else "", "aligned": settings.aligned}
    about |= {"languages": list(settings.languages), "numbers": settings.numbers, "more": settings.more}
    about |= {"shortest": settings.shortest, "longest": settings.longest}
    if texts:
        about["text_files"] = _hashed(about["texts"])
    add("world", real_stages.candidates, about, "texts and queries", "help", "lines", "sayings", folder="candidates")
    fit = {"fit": settings.fit, "length": settings.length, "layers": settings.layers}
    add("factors", real_stages.factors, {**source, "seed": seed, **fit}, "factors", "world")
    roles = {"asked": ["prompt"], "scored": ["pool", "planted"]}
    add("influence", real_stages.scan, shared | roles, "scan", "world", "factors", folder="scan")
    roles = {"asked": ["fact"], "scored": ["fact"]}
    add("facts", real_stages.scan, shared | roles, "scan of facts", "world", "factors", folder="scan")
    if not texts:
        roles = {"asked": ["paragraph"], "scored": ["aligned"]}
        add("languages", real_stages.scan, shared | roles, "scan of languages", "world", "factors", folder="scan")
    add("steps", real_stages.steps, {**source, "step": settings.step}, "steps", "world")
    less = fit | settings.untrained.model_dump() | {"asked": ["prompt"]}
    add("untrained", real_stages.untrained, shared | less, "random weights in place", "world", folder="random")
    add("rounded", real_stages.rounded, shared | {"draws": settings.draws}, "rounding", "world", "factors")
    shown = {**source, "damping": settings.damping, "k": settings.shown, "paragraphs": 1}
    add("maps", real_stages.maps, shown, "cards", "world", "factors", "influence", "facts", "languages", folder="cards")
    first = Planned(made, called or ("" if "weights" in made and source["source"] else name))
    alone = [
        settings.model_copy(update={"model": one, "name": "", "family": ()}) for one in settings.family if not model
    ]
    others = [reads(profile.model_copy(update={"real": one}), "", texts, queries, limit=limit) for one in alone]
    return [first, *(other for found in others for other in found)]


def own_queries(queries: str | Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Prompts and completions that a reader asks, from a YAML file or as they are; none: the packaged ones are asked.

    Raises:
        UserError: No such file, or not a list of prompt and completion.
    """
    found: Any = queries
    if isinstance(queries, str):
        if not queries:
            return []
        path = working_folder() / Path(queries).expanduser()
        if not path.is_file():
            raise UserError(
                f"queries={queries!r}: {path} does not exist: give a YAML file with a list of prompt and completion"
            )
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(
                f"queries={queries!r} is not YAML that can be read ({first_line(error)}): mend it"
            ) from error
    form = "- {prompt: The capital of France is, completion: ' Paris'}"
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        raise UserError(f"queries={queries!r} holds no list: write lines such as {form}")
    for query in found:
        sound = isinstance(query, Mapping) and set(query) == {"prompt", "completion"}
        if not sound or not all(isinstance(part, str) for part in query.values()) or not query["completion"].strip():
            raise UserError(f"queries: {query!r} is no prompt with a completion: write lines such as {form}")
    return [dict(query) for query in found]


def _is_large(source: str) -> bool:
    """Whether a model is so large that a pass over it keeps two threads busy: it is fetched, or its files are."""
    files = [Path(source)] if Path(source).is_file() else Path(source).rglob("*") if source else []
    return bool(source) and (not Path(source).exists() or sum(f.stat().st_size for f in files if f.is_file()) > LARGE)


@cache
def _hashed(place: str) -> list[list[str]]:
    """Names and sha256 of a file's or folder's files, so that others in the same place make other stages; nothing of a hub name."""
    path = Path(place)
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [[file.name if file == path else file.relative_to(path).as_posix(), hash_of(file)] for file in files]


@dataclass(frozen=True)
class Scan:
    """Scores [Q, N] (nats at epsilon = 1), the same by block [Q, N, B], positions of queries [Q] and rows [N] in the world's tables,
    log p [Q] (nats), and the relative error of the queries' directions [Q]."""

    values: np.ndarray
    block_values: np.ndarray
    queries: np.ndarray
    rows: np.ndarray
    log_p: np.ndarray
    error: np.ndarray


@dataclass(frozen=True)
class Reading:
    """Everything known of one model; made on first use, then read from the cache."""

    planned: Planned

    def folder(self, kind: str) -> Path:
        """Of a stage."""
        return ensure(self.planned.made[kind])

    @cached_property
    def world(self) -> World:
        """What is scored and what is asked."""
        return World.load(self.folder("world"))

    @cached_property
    def sequences(self) -> pandas.DataFrame:
        """What is known of every sequence, without its tokens."""
        return self.world.sequences.drop_columns(["input_ids", "loss_mask"]).to_pandas()

    @cached_property
    def queries(self) -> pandas.DataFrame:
        """What is known of every query, without its tokens."""
        return self.world.queries.drop_columns(["input_ids", "loss_mask"]).to_pandas()

    @cached_property
    def origin(self) -> dict[str, Any]:
        """Where the weights are from."""
        return real_stages.origin(self.folder("weights")) if "weights" in self.planned.made else {}

    @cached_property
    def fitted_on(self) -> tuple[int, int]:
        """Number of rows that factors were fitted on, and of their tokens."""
        from safetensors import safe_open

        with safe_open(str(self.folder("factors") / "factors.safetensors"), "np") as file:
            return tuple(file.get_slice("labels").get_shape())

    @property
    def name(self) -> str:
        """What the model calls itself, or is called."""
        return self.planned.name or self.origin.get("name", "")

    def scan(self, kind: str = "influence") -> Scan:
        """Of prompts over the pool and what is planted there ("influence"), "facts", "languages", or of random weights ("untrained")."""
        from safetensors.numpy import load_file

        found = load_file(self.folder(kind) / "scores.safetensors")
        return Scan(*(found[name] for name in ("values", "block_values", "queries", "rows", "log_p", "error")))

    @cached_property
    def maps(self) -> pandas.DataFrame:
        """Token scores of what cards show: query, row, token_scores."""
        import pandas

        return pandas.read_parquet(self.folder("maps") / "maps.parquet")


# --- word order


def sentences(run: Reading) -> pandas.DataFrame:
    """A row a sentence about a fact: fact, kind, nonsense, group, text, influence, step (both on its own fact, nats), own (nats, what
    the step does to the sentence), log_p (nats, of the fact)."""
    import pandas

    read, kinds = run.scan("facts"), {fact.name: fact for fact in load_facts()}
    told = real_stages.read_steps(run.folder("steps")).set_index("row")
    asked, about = run.queries["name"].to_numpy(), run.sequences
    rows = []
    for place, query in enumerate(read.queries):
        own = about["name"].to_numpy()[read.rows] == asked[query]
        fact = kinds[asked[query]]
        for column in np.flatnonzero(own):
            row = int(read.rows[column])
            found = {"fact": fact.name, "kind": fact.kind, "nonsense": fact.nonsense, "query": int(query), "row": row}
            found |= {"group": about["group"][row], "text": about["text"][row], "log_p": float(read.log_p[place])}
            found |= {"influence": float(read.values[place, column]), **told.loc[row, ["delta", "delta_half"]]}
            rows.append(found)
    return pandas.DataFrame(rows).rename(columns={"delta": "step"}).assign(seed=0)


def kept(rows: pandas.DataFrame, column: str = "influence") -> pandas.DataFrame:
    """What is left of a fact's influence (or another column) when its sentence is changed: a row a fact, a column a group, each group's
    mean over that of the sentences as asked."""
    means = rows.groupby(["fact", "nonsense", "group"], sort=False)[column].mean().unstack("group")
    return means.div(means["as_asked"], axis=0)[list(GROUPS)].reset_index("nonsense").assign(seed=0)


def over_facts(values, **options) -> Estimate:
    """A mean over facts, with its interval over facts."""
    # Not np.mean itself, with which values that are all 1 would be taken for hits.
    return bootstrap(np.asarray(values, float), np.zeros(len(values), int), _mean, **options)


def middle(values) -> Estimate:
    """A median over facts, with its interval over facts: ratios whose lower part may be near 0 have no mean to speak of."""
    return bootstrap(np.asarray(values, float), np.zeros(len(values), int), _median)


def _mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    return np.mean(values, axis)


def _median(values: np.ndarray, axis: int = 0) -> np.ndarray:
    return np.median(values, axis)


def left(rows: pandas.DataFrame) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """For a figure: what is left of a fact when its sentence is changed, by influence and by one real step, medians over facts; and the
    same of each fact, as far as it lies from -1 to 2."""
    import pandas

    table, each = [], []
    parts = {"": rows[~rows["nonsense"]], ", nonsense": rows[rows["nonsense"]]}
    for group, words in SHOWN.items():
        for which, part in parts.items():
            if which and group != "flipped":
                continue
            for quantity, column in (("influence", "influence"), ("one real step", "step")):
                values, about = (
                    kept(part, column)[group],
                    {"label": f"{words}{which} · {quantity}", "quantity": quantity},
                )
                table.append(middle(values).row(**about))
                each += [{**about, "estimate": value} for value in values if -1 <= value <= 2]
    return pandas.DataFrame(table).drop(columns="seed_0"), pandas.DataFrame(each)


def agreement(rows: pandas.DataFrame, column: str = "step") -> pandas.Series:
    """Pearson correlation of influence with another column over a fact's sentences, by fact."""
    return rows.groupby("fact", sort=False)[["influence", column]].apply(lambda part: part.corr().iloc[0, 1])


# --- languages


def translations(run: Reading) -> pandas.DataFrame:
    """A row a paragraph in another language than English, asked as a query: how high its English stands among the English of all
    paragraphs.

    A score is the same whichever of two texts is the query, so one scan serves: the English paragraphs were the queries of it.
    Columns: language, name, auc, overlap (AUC of shared tokens, weighted by their rareness), shares (it has a rare token in common with
    its English), crossed and own (sums over the 10 strongest other English paragraphs: influence on it, and on its English).
    """
    import pandas

    read, about = run.scan("languages"), run.sequences
    language, name = (about[column].to_numpy()[read.rows] for column in ("language", "name"))
    asked = run.queries["name"].to_numpy()[read.queries]
    words, others = (
        target_counts(run.world.queries.take(read.queries)),
        target_counts(run.world.sequences.take(read.rows)),
    )
    overlap, shared = idf_overlap(words, others), shares_tokens(words, others)
    english = np.array([np.flatnonzero((language == REFERENCE) & (name == one))[0] for one in asked])
    found = []
    for other in [code for code in dict.fromkeys(language) if code != REFERENCE]:
        columns = np.array([np.flatnonzero((language == other) & (name == one))[0] for one in asked])
        right = np.eye(len(asked), dtype=bool)
        measured = {"auc": auc(read.values[:, columns].T, right), "overlap": auc(overlap[:, columns].T, right)}
        sums = []
        for place in range(len(asked)):
            own = read.values[:, english[place]].copy()
            own[place] = -np.inf
            top = np.argsort(-own, kind="stable")[:10]
            sums.append((read.values[top, columns[place]].sum(), own[top].sum()))
        crossed, own_sum = np.array(sums).T
        about_pair = {"language": other, "name": asked, "shares": shared[np.arange(len(asked)), columns]}
        found.append(pandas.DataFrame({**about_pair, **measured, "crossed": crossed, "own": own_sum}))
    return pandas.concat(found, ignore_index=True).assign(seed=0)


# --- prompts


def planted(run: Reading) -> pandas.DataFrame:
    """A row a prompt and kind of planted passage (on_theme, shared_words): auc over the real texts, best (the highest place among all
    that is scored), and the same of shared words (BM25)."""
    import pandas

    read, about = run.scan(), run.sequences.loc[run.scan().rows]
    name, group, role = (about[column].to_numpy() for column in ("name", "group", "role"))
    asked = token_counts(*_whole(run, read.queries))
    lexical = bm25(asked, target_counts(run.world.sequences.take(read.rows)))
    found = []
    for place, query in enumerate(read.queries):
        theme, values = (
            run.queries["theme"][query],
            np.stack([read.values[place], apart(read.values)[place], lexical[place]]),
        )
        for kind in PLANTED:
            member = (name == theme) & (group == kind)
            among = member | (role == "pool")
            if member.any():
                area = auc(values[:, among], np.tile(member[among], (len(values), 1)))
                best = ranks(values, np.tile(member, (len(values), 1)))
                about_one = {
                    "prompt": run.queries["name"][query],
                    "theme": theme,
                    "group": kind,
                    "passages": int(member.sum()),
                }
                measured = zip(("influence", "apart", "words"), np.atleast_1d(area), best, strict=True)
                found += [{**about_one, "by": by, "auc": a, "best": b} for by, a, b in measured]
    return pandas.DataFrame(found, columns=["prompt", "theme", "group", "passages", "by", "auc", "best"]).assign(seed=0)


def _rows(table, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    batch = batch_of(table, rows)
    return batch["input_ids"].numpy(), batch["loss_mask"].numpy()


def _whole(run: Reading, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of queries, and where prompt and completion stand."""
    tokens, targets = _rows(run.world.queries, rows)
    places, ends = np.arange(tokens.shape[1]), targets.shape[1] - targets[:, ::-1].argmax(1)
    return tokens, (places >= _opens(run)) & (places < ends[:, None])


def _opens(run: Reading) -> int:
    """How many tokens stand before a text."""
    return int(run.world.parameters["begins"]["token"] is not None)


def top_sources(run: Reading, share: float = 0.01) -> pandas.DataFrame:
    """How common each source is among the top and the bottom `share` of a prompt's real sequences, over how common it is among all: a
    row a prompt and source."""
    import pandas

    read = run.scan()
    about = run.sequences.loc[read.rows].reset_index(drop=True)
    real = np.flatnonzero(about["role"] == "pool")
    source = about["source"].to_numpy()[real]
    count = max(round(share * len(real)), 1)
    found = []
    for place, query in enumerate(read.queries):
        order = np.argsort(-read.values[place, real], kind="stable")
        for name in dict.fromkeys(source):
            common = (source == name).mean()
            ends = {"top": order[:count], "bottom": order[-count:]}
            lifts = {end: float((source[chosen] == name).mean() / common) for end, chosen in ends.items()}
            found.append({"prompt": run.queries["name"][query], "source": SOURCES.get(name, name), **lifts})
    return pandas.DataFrame(found)


# --- tails and blocks


def tails(run: Reading) -> pandas.DataFrame:
    """A row a prompt and model ("trained", "random weights"), over the same real sequences: exponent of the density of the highest
    eighth of scores (nan where these are too few), and share of positive influence that the top 1 % hold; "Gaussian" has the share
    that chance gives."""
    import pandas

    from influence_kit.findings.heavy_tails import coverage, fit_tail

    found = []
    for model, values in _compared(run).items():
        top = max(values.shape[1] // 8, 10)
        for place, row in enumerate(values):
            fits = model != "Gaussian" and (row > 0).sum() >= top
            exponent = fit_tail(row, top).density_exponent if fits else np.nan
            share = float(coverage(row, [0.01])[0])
            found.append({"model": model, "prompt": place, "exponent": exponent, "share": share})
    return pandas.DataFrame(found).assign(seed=0)


def _compared(run: Reading) -> dict[str, np.ndarray]:
    """Scores of prompts over the same real sequences, of three kinds."""
    less, whole = run.scan("untrained"), run.scan()
    same = whole.values[:, np.isin(whole.rows, less.rows)]
    chance = np.random.default_rng(0).standard_normal((200, same.shape[1]))
    return {"trained": same, "random weights": less.values, "Gaussian": chance}


def coverage_table(run: Reading) -> pandas.DataFrame:
    """Share of positive influence that the strongest sequences hold, means over prompts, trained and with random weights, for a figure."""
    import pandas

    from influence_kit.findings.heavy_tails import coverage

    compared, found = _compared(run), []
    shares = np.geomspace(min(0.005, 2 / compared["trained"].shape[1]), 1, 24)
    for group, values in compared.items():
        kind = {"trained": "trained", "random weights": "untrained"}.get(group, "chance")
        held = coverage(values, shares)
        for place, share in enumerate(shares):
            about = {"group": group, "kind": kind, "share_of_sequences": share}
            found.append(over_facts(held[:, place], bounds=(0, 1)).row(**about))
    return pandas.DataFrame(found).drop(columns="seed_0", errors="ignore")


def block_shares(run: Reading, share: float = 0.01) -> pandas.DataFrame:
    """A row a query: kind (of query), and the share of each block in the absolute influence of its strongest `share` of sequences (at
    least five)."""
    import pandas

    found = []
    names = {"influence": "prompts", "facts": "facts", "languages": "translations"}
    for kind in [kind for kind in names if kind in run.planned.made]:
        read = run.scan(kind)
        about = run.sequences.loc[read.rows].reset_index(drop=True)
        asked = run.queries["name"].to_numpy()[read.queries]
        for place in range(len(read.queries)):
            chosen = np.arange(len(read.rows))
            if kind != "influence":
                chosen = np.flatnonzero((about["name"] == asked[place]) & (about["language"] != REFERENCE))
            strongest = np.argsort(-read.values[place, chosen], kind="stable")[: max(5, round(share * len(chosen)))]
            sums = np.abs(read.block_values[place, chosen[strongest]]).sum(0)
            shares: dict[Any, Any] = dict(enumerate((sums / sums.sum()).tolist()))
            found.append({"kind": names[kind], **shares})
    return pandas.DataFrame(found).assign(seed=0)


# --- rounding


def rounding(run: Reading, rows: pandas.DataFrame) -> tuple[pandas.DataFrame, float]:
    """A row a fact and draw: pearson (of its sentences' influence with that after one more rounding) and flipped (what its flipped
    sentences keep, after it); and the relative change of the weights."""
    import pandas
    from safetensors.numpy import load_file

    found, read = load_file(run.folder("rounded") / "scores.safetensors"), []
    place = {query: i for i, query in enumerate(found["queries"])}
    column = {row: i for i, row in enumerate(found["rows"])}
    for draw, values in enumerate(found["values"]):
        again = [values[place[q], column[r]] for q, r in zip(rows["query"], rows["row"], strict=True)]
        changed = rows.assign(again=again)
        pearson, flipped = agreement(changed, "again"), kept(changed, "again")["flipped"]
        read.append(pandas.DataFrame({"pearson": pearson, "flipped": flipped}).assign(draw=draw))
    return pandas.concat(read).reset_index().assign(seed=0), float(found["relative"].mean())


# --- cards


def prompt_card(run: Reading, query: int, k: int) -> CardView:
    """A prompt's card: the k real texts that raise what was said most and lower it most, those that raise it more than they raise what
    is said to other prompts, and the best of what was planted for it; places are among all that is scored."""
    read = run.scan()
    place = int(np.flatnonzero(read.queries == query)[0])
    values, alone = read.values[place], apart(read.values)[place]
    about = run.sequences.loc[read.rows].reset_index(drop=True)
    real = np.flatnonzero(about["role"] == "pool")
    order = real[np.argsort(-values[real], kind="stable")]
    special = real[np.argsort(-alone[real], kind="stable")]
    lists: dict[str, Sequence] = {
        "": [*order[:k], *order[-k:]],
        "More than any other prompt's answer": list(special[:k]),
    }
    theme = run.queries["theme"][query]
    for group, words in PLANTED.items() if theme else ():
        own = np.flatnonzero((about["name"] == theme) & (about["group"] == group))
        lists[words.capitalize()] = sorted(own, key=lambda column: -values[column])[:1]
    return _card(run, query, read, values, lists, k)


def fact_card(run: Reading, query: int, k: int) -> CardView:
    """A fact's card: all its sentences by their influence, with the kind of each."""
    read = run.scan("facts")
    place = int(np.flatnonzero(read.queries == query)[0])
    own = np.flatnonzero(run.sequences["name"].to_numpy()[read.rows] == run.queries["name"][query])
    order = sorted(own, key=lambda column: -read.values[place, column])
    return _card(run, query, read, read.values[place], {"": [int(column) for column in order]}, k, among=own)


def paragraph_card(run: Reading, query: int, k: int) -> CardView:
    """An English paragraph's card: the k paragraphs, in whatever language, that raise it most and lower it most, itself left out."""
    read = run.scan("languages")
    place = int(np.flatnonzero(read.queries == query)[0])
    about = run.sequences.loc[read.rows].reset_index(drop=True)
    itself = (about["name"] == run.queries["name"][query]) & (about["language"] == REFERENCE)
    among = np.flatnonzero(~itself)
    order = among[np.argsort(-read.values[place, among], kind="stable")]
    return _card(run, query, read, read.values[place], {"": [*order[:k], *order[-k:]]}, k, among=among)


def _card(run: Reading, query: int, read: Scan, values, lists: Mapping[str, Sequence], k: int, among=None) -> CardView:
    from influence_kit.reading.cards import Row, query_card
    from influence_kit.reading.words import tokenizer_texts

    among = np.arange(len(values)) if among is None else among
    place = {int(column): i + 1 for i, column in enumerate(sorted(among, key=lambda column: -values[column]))}
    tokens, mask = _rows(run.world.sequences, read.rows)
    asked, said = (part[0] for part in _rows(run.world.queries, np.array([query])))
    counts = token_counts(*_whole(run, np.array([query]))), target_counts(run.world.sequences.take(read.rows[among]))
    lexical = dict(zip(among.tolist(), _places(bm25(*counts)[0]), strict=True))
    aligned = run.sequences[(run.sequences["role"] == "aligned") & (run.sequences["language"] == REFERENCE)]
    english = dict(zip(aligned["name"], aligned["text"], strict=True))
    shades = run.maps[run.maps["query"] == query].set_index("row")["token_scores"]

    def row(column: int) -> Row:
        position, end = int(read.rows[column]), int(mask[column].nonzero()[0][-1]) + 1
        about = run.sequences.loc[position]
        label = SHOWN.get(about["group"], PLANTED.get(about["group"], SOURCES.get(about["source"], about["source"])))
        translated = about["role"] == "aligned" and about["name"] == run.queries["name"][query]
        shade = shades.get(position)
        return Row(
            tokens=tokenizer_texts(tokens[column, :end].tolist(), run.world.tokenizer),
            score=float(values[column]),
            rank=place[int(column)],
            scored=len(among),
            language="" if about["language"] in ("en", REFERENCE, "und") else LANGUAGES.get(about["language"], ""),
            source="its translation" if translated else "as asked" if about["group"] == "as_asked" else label,
            gloss=english.get(about["name"], "")
            if about["role"] == "aligned" and about["language"] != REFERENCE
            else "",
            bm25_rank=int(lexical[int(column)]),
            token_scores=None if shade is None else list(shade[:end]),
        )

    pieces = tokenizer_texts(asked[: int(said.nonzero()[0][-1]) + 1].tolist(), run.world.tokenizer)
    start, opens = int(said.nonzero()[0][0]), _opens(run)
    first = [row(int(column)) for column in lists[""]]
    further = {head: [row(int(column)) for column in columns] for head, columns in lists.items() if head}
    return query_card(
        pieces[opens:start],
        pieces[start:],
        first,
        k=k,
        title=run.name,
        alignment="predicted",
        further=further,
        distinct=True,
        what="Texts",
    )


def _places(values: np.ndarray) -> np.ndarray:
    """The place of each, 1 for the highest."""
    return np.argsort(np.argsort(-values, kind="stable"), kind="stable") + 1


def reading(chapter: Chapter, **given: Any) -> Reading:
    """The model that a chapter's profile reads, or that it is given in place of it (see `reads`)."""
    return readings(chapter, **given)[0]


def readings(chapter: Chapter, **given: Any) -> list[Reading]:
    """The same, and the models of its family."""
    found = reads(chapter.profile, **given)
    if not found:
        raise UserError(
            f"profile {chapter.profile.name!r} has no `real` section, which this chapter reads: use --profile real"
        )
    chapter.rests_on(stage for one in found for stage in one.stages)
    return [Reading(one) for one in found]


def texts_of(run: Reading) -> Iterator[dict[str, Any]]:
    """What is scored, in numbers: lines of a table."""
    for (role, source), part in run.sequences.groupby(["role", "source"], sort=False):
        yield {"what": role, "source": SOURCES.get(source, source), "sequences": len(part)}


def said(run: Reading) -> list[int]:
    """Positions of the prompts."""
    return with_role(run.world.queries, "prompt").tolist()
