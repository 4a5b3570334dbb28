"""How heavy the tail of influence is, and how much of the mass its top holds (chapter 03).

Two conventions are in use and the paper mixes them. The *density* exponent is the a of p(x) ~ x^-a; the *survival*
exponent is the one of P(X >= x) ~ x^-(a - 1), the slope seen in a log-log plot of the CCDF, and is smaller by one. A
variance exists when the density exponent is above 3 and a mean when it is above 2.

Sources: Grosse et al. 2023 (arXiv 2308.03296), Figures 8 and 9 and Table 1; Clauset, Shalizi and Newman 2009, SIAM
Review 51(4), equation 3.1 and sections 4.1 and 5.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from influence_kit.corpora.worlds.atlas import supporters
from influence_kit.errors import UserError
from influence_kit.findings.families import END, Planned, planted_grid, section, text_grid
from influence_kit.findings.profiles import Profile
from influence_kit.measures.agreement import own_effects
from influence_kit.measures.intervals import Estimate, difference_of, estimate_of, pick
from influence_kit.measures.lifts import lift, precision_at, top_count

if TYPE_CHECKING:
    import pandas

    from influence_kit.findings.trained import Scanned, Trained
    from influence_kit.reading.cards import CardView

CORPORA = {"atlas": "Atlas", "text": "real text"}
GROUP = ["corpus", "model", "score", "parameters"]  # columns that tell one kind of scan
NULLS = {"gaussian": "standard_normal", "laplace": "laplace"}
ALTERNATIVES = ("lognormal", "exponential")  # as the powerlaw package calls them
FRACTIONS = np.geomspace(0.001, 1, 25)  # of the sequences, at which the coverage curve is read
SMALLEST_FIT = 10  # below this an exponent's interval spans everything


def reads(profile: Profile) -> list[Planned]:
    """Trained and untrained models, of Atlas the smallest and the largest, and small ones that were trained again."""
    section(profile, "little_atlas", "03")
    found = planted_grid(profile, "atlas", fractions=(0.0, END), widths=ends(profile))
    return found + text_grid(profile, (0.0, END)) + planted_grid(profile, "little_atlas", extra=("reweighted",))


def ends(profile: Profile) -> list[int]:
    """The smallest and the largest of Atlas's widths."""
    widths = sorted({size.width for size in profile.atlas.family.sizes})
    return [widths[0], widths[-1]]


@dataclass(frozen=True)
class Tail:
    """A power law fitted to the values from `xmin` up.

    Attributes:
        density_exponent: a of p(x) ~ x^-a, no unit.
        low: Lower end of the 95 % interval of the density exponent, given `xmin`.
        high: Its upper end.
        ks: Largest distance between the fitted and the empirical distribution function above `xmin`.
        xmin: Where the tail starts, in the unit of the values.
        count: Number of values at or above `xmin`.
    """

    density_exponent: float
    low: float
    high: float
    ks: float
    xmin: float
    count: int


def _positives(values) -> np.ndarray:
    """Positive values, largest first."""
    values = np.asarray(values, dtype=float).ravel()
    if not np.isfinite(values).all():
        bad = int((~np.isfinite(values)).sum())
        raise UserError(f"{bad} of {values.size} values are nan or infinite; drop or rescore them.")
    positive = np.sort(values[values > 0])[::-1]
    if positive.size < SMALLEST_FIT or positive[0] == positive[-1]:
        raise UserError(
            f"A tail needs at least {SMALLEST_FIT} positive values that differ, and {positive.size} of {values.size} "
            "are positive; scan more sequences."
        )
    return positive


def _ks(excess: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Survival exponents [...] and KS distances [...] of log(x / xmin), sorted ascending on the last axis."""
    n = excess.shape[-1]
    exponent = n / excess.sum(-1)
    fitted = -np.expm1(-exponent[..., None] * excess)
    steps = np.arange(n + 1) / n
    distance = np.maximum(np.abs(fitted - steps[:-1]), np.abs(fitted - steps[1:])).max(-1)
    return exponent, distance


def fit_tail(values, top: int = 500) -> Tail:
    """Maximum-likelihood power law of the upper tail (Hill; Clauset et al., Eq 3.1).

    The paper (Fig 8, Table 1) fits the 500 largest of about five million scores and reports exponents of 1.99 to 4.34.
    `top=500` does the same: xmin is the 500th largest positive value, or the smallest positive one when there are
    fewer. Negative values play no part.

    Args:
        values: Scores of one query [N], any unit: exponents do not depend on it.
        top: Number of largest values.

    Returns:
        The `Tail`. Its interval is exact for a power law at a fixed number of values.

    Raises:
        UserError: Fewer than 10 positive values, nan or infinite values, or a `top` below 10.
    """
    from scipy.stats import chi2

    positive = _positives(values)
    if top < SMALLEST_FIT:
        raise UserError(f"top is {top!r}; give a number of values, {SMALLEST_FIT} or more.")
    count = int((positive >= positive[min(int(top), positive.size) - 1]).sum())
    xmin = positive[count - 1]
    excess = np.log(positive[:count] / xmin)[::-1]
    if excess[-1] == 0:
        raise UserError(f"The {count} largest values all equal {xmin}; a tail needs values that differ.")
    exponent, distance = _ks(excess)
    # xmin is itself one of the values, so the sum of log excesses is a Gamma variable of shape count - 1.
    low, high = 1 + chi2.ppf([0.025, 0.975], 2 * (count - 1)) / (2 * excess.sum())
    return Tail(1 + float(exponent), float(low), float(high), float(distance), float(xmin), count)


def ks_p_value(tail: Tail, draws: int = 1000, seed: int = 0) -> float:
    """Probability that a true power law would lie at least as far from its own fit as the data do.

    Parametric bootstrap (Clauset et al., section 4.1): simulate the fitted tail, fit it again, compare KS distances.
    Below .1 the power law is rejected by their convention. The smallest possible result is 1 / (draws + 1).
    """
    simulated = _simulated_distances(tail.count, draws, seed)
    return float((1 + (simulated >= tail.ks).sum()) / (draws + 1))


@cache
def _simulated_distances(count: int, draws: int, seed: int) -> np.ndarray:
    """KS distances of refitted power laws, [draws].

    The smallest of the top values is xmin itself, and the distance of a refit does not depend on the exponent: one set
    of draws serves every tail of the same length.
    """
    excess = np.sort(np.random.default_rng(seed).exponential(1.0, (draws, count - 1)), axis=1)
    return _ks(np.concatenate([np.zeros((draws, 1)), excess], axis=1))[1]


def _powerlaw(tail: Tail, values, **options):
    """The powerlaw package's fits of the same tail; its unit is xmin, from where optimisers start best."""
    import powerlaw

    positive = _positives(values)
    return powerlaw.Fit(positive[: tail.count] / tail.xmin, xmin=1.0, verbose=0, **options)


def likelihood_ratios(tail: Tail, values) -> dict[str, tuple[float, float]]:
    """Power law against other tails on the same values: `{name: (R, p)}` (Vuong's test; Clauset et al., section 5).

    R is the log-likelihood ratio over its standard deviation: positive when the power law fits better, negative when
    the alternative does; p is the two-sided probability of an |R| as large when neither is better. Every alternative
    is fitted as truncated below at xmin. A truncated lognormal comes as close to a power law as one likes, so it can
    beat it clearly but hardly lose to it: an R near 0 with a large p is all that a true power law gets. (So does a
    stretched exponential, but there powerlaw's optimiser can stop short of the best fit, which makes R too large.)
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        # Without an own range powerlaw 2.0.0 stops the exponent at 3 and the power law loses every steep tail.
        fit = _powerlaw(tail, values, parameter_ranges={"alpha": [1, None]})
        ratios = {name: fit.distribution_compare("power_law", name, normalized_ratio=True) for name in ALTERNATIVES}
    return {name: (float(ratio), float(p)) for name, (ratio, p) in ratios.items()}


def lognormal(tail: Tail, values) -> tuple[float, float]:
    """mu and sigma of the lognormal with the same tail; nan where it has become the power law itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = _powerlaw(tail, values).lognormal
    return (fit.mu + np.log(tail.xmin), fit.sigma) if -fit.mu < 30 * fit.sigma else (np.nan, np.nan)


def coverage(values, fractions) -> np.ndarray:
    """Share of the positive influence mass that the top fractions of *all* sequences hold (paper, Fig 9).

    Args:
        values: Raw scores [..., N]; negative ones count as sequences and carry no mass.
        fractions: [F] in (0, 1].

    Returns:
        Shares [..., F] in [0, 1]; nan where no score is positive.

    Raises:
        UserError: A fraction outside (0, 1].
    """
    values = np.asarray(values)
    counts = [top_count(values.shape[-1], fraction) for fraction in np.atleast_1d(fractions)]
    mass = np.sort(np.maximum(values, 0), axis=-1)[..., ::-1]
    mass = np.cumsum(mass, axis=-1, dtype=float)
    held, total = mass[..., [n - 1 for n in counts]], mass[..., -1:]
    return np.divide(held, total, out=np.full(held.shape, np.nan), where=total > 0)


@dataclass(frozen=True)
class NullCoverage:
    """Coverage of scores that mean nothing: its mean and the ends of the central 95 % of scans, each [F]."""

    fractions: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def null_coverage(kind: str, fractions, n: int, draws: int = 200, seed: int = 0) -> NullCoverage:
    """Coverage curve of `n` independent scores centred on zero, with the interval a single query's scan falls in.

    Args:
        kind: "gaussian" or "laplace"; the scale plays no part.
        fractions: [F] in (0, 1].
        n: Sequences in a scan.
        draws: Simulated scans.

    Raises:
        UserError: An unknown `kind`, or a fraction outside (0, 1].
    """
    if kind not in NULLS:
        raise UserError(f"No null is called {kind!r}; choose one of {', '.join(sorted(NULLS))}.")
    draw = getattr(np.random.default_rng(seed), NULLS[kind])
    shares = np.stack([coverage(draw(size=n), fractions) for _ in range(draws)])
    low, high = np.quantile(shares, [0.025, 0.975], axis=0)
    return NullCoverage(np.atleast_1d(np.asarray(fractions, dtype=float)), shares.mean(0), low, high)


def null_curves(n: int, draws: int) -> pandas.DataFrame:
    """Coverage of random scores, with the interval that a single query's scan falls in."""
    import pandas

    found = {kind.capitalize(): null_coverage(kind, FRACTIONS, n, draws) for kind in NULLS}
    names = {"fractions": "share_of_sequences", "mean": "estimate", "low": "low", "high": "high"}
    return pandas.concat(pandas.DataFrame(vars(c)).rename(columns=names).assign(null=kind) for kind, c in found.items())


def scans(run: Trained) -> Iterator[tuple[dict, np.ndarray, Scanned]]:
    """The scans of a model: what each is called, its scores [Q, N], and the scan itself."""
    for fraction in run.fractions:
        model = "trained" if fraction else "untrained"
        scan = run.scan(fraction)
        about = {"corpus": CORPORA[run.corpus], "model": model, "parameters": run.parameters, "seed": run.seed}
        yield about | {"score": "raw"}, scan.raw, scan
        yield about | {"score": "RelatIF"}, scan.relatif, scan


def random_scans(corpus: str, shape: tuple[int, int], seeds: Iterable[int]) -> Iterator[tuple[dict, np.ndarray]]:
    """Random numbers of the shape of a corpus's scans, under the same kind of names."""
    for kind, name in NULLS.items():
        for seed in seeds:
            about = {"corpus": corpus, "model": kind.capitalize(), "parameters": 0, "seed": seed}
            yield about | {"score": "random"}, getattr(np.random.default_rng(seed), name)(size=shape)


def tail_length(sequences: int, top: int) -> int:
    """How many scores make up a tail in a scan of this size."""
    return max(SMALLEST_FIT, min(top, sequences // 10))


def table_of(about: dict, values: np.ndarray, top: int, tested: int, draws: int) -> pandas.DataFrame:
    """One row a query: the exponent of its tail, how its mass is spread, and slow tests for some of the queries.

    Args:
        about: Further columns.
        values: Scores [Q, N].
        top: Scores in a tail, at most a tenth of them all.
        tested: How many of the queries have the tests, spread evenly; 0 leaves their columns out.
        draws: Simulated samples of each KS test.
    """
    import pandas

    count, n = values.shape
    fits = [fit_tail(scores, tail_length(n, top)) for scores in values]
    found = pandas.DataFrame(coverage(values, FRACTIONS), columns=[f"held {f:.4f}" for f in FRACTIONS])
    found["top 1 %"], found["strongest"] = coverage(values, [0.01, 1 / n]).T
    found["density"] = [fit.density_exponent for fit in fits]
    found["survival"], found["below 3"] = found["density"] - 1, (found["density"] < 3).astype(float)
    chosen = np.linspace(0, count - 1, min(tested, count)).round().astype(int)
    tests = pandas.DataFrame([_tests(values[q], fits[q], draws) for q in chosen], index=chosen, dtype=float)
    return found.join(tests).assign(query=range(count), sequences=n, **about)


def _tests(scores: np.ndarray, tail: Tail, draws: int) -> dict[str, float]:
    """The slow numbers of one query: whether KS rejects the power law, and which of two tails fits better."""
    found: dict[str, float] = {"rejected": ks_p_value(tail, draws) < 0.1}
    for name, (ratio, p) in likelihood_ratios(tail, scores).items():
        found |= {f"R {name}": ratio, f"over {name}": float(np.sign(ratio)) * (p < 0.1)}
    return found


def ordered(frames: Iterable[pandas.DataFrame]) -> pandas.DataFrame:
    """One table, sorted as it is shown: the paper's setting first."""
    import pandas

    names = ["trained", "untrained", "Gaussian", "Laplace", "raw", "RelatIF", "random"]
    place = {name: number for number, name in enumerate(names)}
    by = [*GROUP, "seed", "query"]
    return pandas.concat(frames).sort_values(
        by, key=lambda column: column.map(lambda v: place.get(v, v)), ignore_index=True
    )


def measured(models: Sequence[Trained], seeds: Iterable[int], top: int, tested: int, draws: int) -> pandas.DataFrame:
    """`table_of` every scan of the models, and of random numbers as many as each corpus has; `x gaussian` and `x
    laplace` are the share of the top 1 % over that of such numbers."""
    first = {run.corpus: run for run in reversed(models)}
    read = ((about, values) for run in models for about, values, _ in scans(run))
    drawn = (scan for short, run in first.items() for scan in random_scans(CORPORA[short], run.scan().raw.shape, seeds))
    slow = {"RelatIF": 0}  # the tests are read from raw influence
    rows = ordered(
        table_of(about, values, top, slow.get(about["score"], tested), draws) for about, values in chain(read, drawn)
    )
    for kind in NULLS:
        null = {n: null_coverage(kind, [0.01], n, draws).mean[0] for n in rows["sequences"].unique()}
        rows[f"x {kind}"] = rows["top 1 %"] / rows["sequences"].map(null)
    return rows


def of(rows, corpus: str = "Atlas", model: str = "trained", score: str = "raw", parameters: int | None = None):
    """Rows of one kind of scan; of its largest model unless a size is given."""
    found = pick(rows, corpus=corpus, model=model, score=score)
    return pick(found, parameters=parameters or found["parameters"].max())


def mean(part: pandas.DataFrame, column: str) -> Estimate:
    """Mean over queries, then over seeds, with its 95 % interval."""
    shares = ("held", "top", "strongest", "below", "rejected")
    share = column.startswith(shares) or "share" in column
    return estimate_of(part, column, bounds=(0, 1) if share else (-np.inf, np.inf))


def size_of(parameters: int) -> str:
    """A model's size in short; random numbers have none."""
    from influence_kit.reading.style import size_label

    return size_label(parameters) if parameters else "–"


def by_scan(rows: pandas.DataFrame, columns: Mapping[str, str], spec: str = "") -> pandas.DataFrame:
    """A table with one line for each kind of scan: the means of some columns, under names for readers."""
    return _lines(rows, lambda part: {name: f"{mean(part, column):{spec}}" for name, column in columns.items()})


def counts(rows: pandas.DataFrame, top: int) -> pandas.DataFrame:
    """What each kind of scan rests on."""

    def line(part: pandas.DataFrame) -> dict:
        seeds, n = part["seed"].nunique(), part["sequences"].iloc[0]
        asked = {"queries": len(part) // seeds, "of them tested": part["rejected"].count() // seeds}
        return {"seeds": seeds} | asked | {"sequences scanned": n, "scores in the tail": tail_length(n, top)}

    return _lines(rows, line)


def _lines(rows: pandas.DataFrame, line) -> pandas.DataFrame:
    import pandas

    lines = [dict(zip(GROUP, key, strict=True)) | line(part) for key, part in rows.groupby(GROUP, sort=False)]
    return pandas.DataFrame(lines).assign(parameters=lambda found: found["parameters"].map(size_of)).set_index(GROUP)


def series(rows: pandas.DataFrame, corpus: str) -> pandas.DataFrame:
    """What figures compare: raw influence of all models and RelatIF of trained ones, the paper's setting first."""
    found = rows[(rows["corpus"] == corpus) & ((rows["score"] != "RelatIF") | (rows["model"] == "trained"))].copy()
    found["scores"] = np.where(found["score"] == "random", found["model"], found["model"] + ", " + found["score"])
    found["largest"] = found["parameters"] == found.groupby("scores")["parameters"].transform("max")
    found["main"] = found["scores"] == "trained, raw"
    return found


def estimates(part: pandas.DataFrame, by: Sequence[str], columns: Sequence[str]) -> pandas.DataFrame:
    """Means with intervals, a row for each group and column."""
    import pandas

    return pandas.DataFrame(
        mean(group, column).row(**dict(zip(by, key, strict=True)), of=column)
        for key, group in part.groupby(list(by), sort=False)
        for column in columns
    )


def typical(run: Trained, top: int, draws: int) -> tuple[pandas.DataFrame, dict]:
    """Points and fit of the query with the median exponent."""
    from influence_kit.reading.figures import ccdf_points

    values, panel = run.scan().raw, f"{CORPORA[run.corpus]}, {size_of(run.parameters)}"
    fits = [fit_tail(scores, tail_length(scores.size, top)) for scores in values]
    query = int(np.argsort([fit.density_exponent for fit in fits], kind="stable")[len(fits) // 2])
    tail, scores = fits[query], values[query].astype(float)
    mu, sigma = lognormal(tail, scores)
    fit = {"panel": panel, "query": query, "xmin": tail.xmin, "mu": mu, "sigma": sigma}
    fit |= {"alpha": tail.density_exponent, "alpha_low": tail.low, "alpha_high": tail.high}
    return ccdf_points(scores).assign(panel=panel), fit | {"p_value": ks_p_value(tail, draws)}


def contents(run: Trained) -> Iterator[pandas.DataFrame]:
    """What the strongest sequences of each query of Atlas are, one row a query and kind of scan."""
    import pandas

    for about, values, scan in scans(run):
        states = np.logical_or(*supporters(run.world, scan.rows))[scan.queries]
        noise = np.isin(run.world.sequences["kind"].to_numpy(zero_copy_only=False)[scan.rows], ["noise", "canary"])
        found = {"query": scan.queries}
        for name, member in (("statements", states), ("noise", np.broadcast_to(noise, states.shape))):
            found |= {f"{name}, lift in the top 1 %": lift(values, member)}
            found |= {f"{name}, share of the ten strongest": precision_at(values, member, 10)}
        yield pandas.DataFrame(found).assign(**about)


def left_out(run: Trained) -> pandas.DataFrame:
    """Nats that each asked query loses by its own strongest sequences (one, a percent, a tenth of them), and what
    influence foretells, one row a query."""
    import pandas
    from safetensors.numpy import load_file

    found = load_file(run.extra("reweighted") / "reweighted.safetensors")
    lost = own_effects(found["log_p"][0], found["asked"]).mean(2)
    foretold = own_effects(found["predicted"][0][:, :, None], found["asked"])[:, :, 0]
    names = ("one", "percent", "tenth")
    columns = dict(zip(names, lost.T, strict=True))
    columns |= {f"foretold {name}": column for name, column in zip(names, foretold.T, strict=True)}
    about = {"seed": run.seed, "corpus size": run.world.sequences.num_rows}
    return pandas.DataFrame(columns | about).assign(counts=[found["counts"]] * len(lost))


def by_size(rows: pandas.DataFrame, corpus: str) -> pandas.DataFrame:
    """Share of the strongest 1 % by size, before and after training, with the value of each seed."""
    import pandas

    parts = pick(rows, corpus=corpus, score="raw").groupby(["model", "parameters"], sort=False)
    return pandas.DataFrame(
        mean(part, "top 1 %").row(model=model, parameters=size) for (model, size), part in parts if size
    )


def trained_minus_untrained(rows: pandas.DataFrame, corpus: str) -> Estimate:
    """Share of the strongest 1 % after training minus before, query by query, in the largest model."""
    return difference_of(of(rows, corpus), of(rows, corpus, "untrained"), "top 1 %", matched_units=True)


def in_short(rows: pandas.DataFrame, corpus: str) -> str:
    """How much the strongest sequences of a corpus hold, in a sentence."""
    after, before, chance = (
        mean(part, "top 1 %")
        for part in (of(rows, corpus), of(rows, corpus, "untrained"), of(rows, corpus, "Gaussian", "random"))
    )
    return (
        f"On {corpus} the strongest hundredth of the sequences holds {after:.2f} of the influence that speaks for an answer, {before:.2f} "
        f"before training, and {chance.value:.2f} were influence random numbers; the strongest sequence alone holds "
        f"{mean(of(rows, corpus), 'strongest'):.3f}."
    )


def median_card(models: Sequence[Trained], rows: pandas.DataFrame, corpus: str) -> CardView:
    """One query in the smallest and in the largest model of the first seed, and what each sequence holds of its positive influence:
    the median query by what its strongest sequence holds in the largest."""
    from influence_kit.findings.trained import smallest_and_largest
    from influence_kit.reading.cards import median_query, side_by_side, which_query

    runs = [run for run in models if CORPORA[run.corpus] == corpus]
    held = pick(of(rows, corpus), seed=runs[0].seed).sort_values("query")["strongest"].to_numpy()
    query, average = median_query(held), mean(of(rows, corpus), "strongest").value
    caption = which_query(held, query, average, 0.1, "the share that the larger model's strongest sequence holds")
    return side_by_side([_held_card(run, query, caption) for run in smallest_and_largest(runs, runs[0].seed)])


def _held_card(run: Trained, query: int, caption: str) -> CardView:
    scores = run.scan().raw[query]
    total = scores[scores > 0].sum()
    head = f"{run.parameters:,} weights: the strongest 1 % hold {coverage(scores, 0.01)[0]:.0%}"

    def held(column: int) -> str:
        return f"{scores[column] / total:.1%} of the positive influence" if scores[column] > 0 else ""

    return run.card(query, k=3, lowest=0, title=head, labels=held, caption=caption)


def parts_left_out(again: pandas.DataFrame) -> dict[str, str]:
    """The columns of `left_out` that retraining measured, under names for readers."""
    named = [f"the strongest {int(count):,}" if count > 1 else "the strongest one" for count in again["counts"].iloc[0]]
    return dict(zip(("one", "percent", "tenth"), named, strict=True))
