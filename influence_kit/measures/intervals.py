"""Estimates with intervals over seeds (worlds and initialisations).

A number is computed within each seed from its units (queries), then averaged over seeds, each counting once; the interval is
Student's t over the seeds' numbers and speaks for seeds that were not run. Ratios are averaged as logarithms, an effect of size is
a slope over log10 size within each seed. Coverage of a 95 % interval for a mean, 60 queries a seed, 1,500 simulations each with three
seeds, by the ratio of the variance between seeds to the sampling variance of a seed's mean:

    ratio                           0     .5      2      8    100
    hierarchical bootstrap       .971   .959   .888   .800   .739
    t over the seeds' values     .950   .955   .954   .952   .944

A bootstrap of few clusters cannot reach beyond its own values (Cameron, Gelbach and Miller 2008), so it is left to single seeds, where
it speaks for units alone and says so. Where all seeds agree to the last digit t has no width, which is a fact about few units and no
certainty: shares then get the exact binomial interval of Clopper and Pearson over the units.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict, Unpack

import numpy as np

from influence_kit.errors import UserError

METHODS = ("t", "log")
SEED = "seed_"  # a table's columns of the values within each seed: seed_11, seed_12, …
T, LOG, EXACT, UNITS = "t over seeds", "t over seeds, of logarithms", "exact binomial", "bootstrap of one seed's units"
CHUNK = 2_000_000  # resampled values held at once


def _number(value: float, spec: str) -> str:
    if not math.isfinite(value):
        return str(value)
    text = format(value, spec)
    # A small number must not turn into 0 because its interval is wide.
    return f"{value:.2g}" if value != 0 and float(text) == 0 else text


class Options(TypedDict, total=False):
    """How an interval is made.

    Attributes:
        level: Probability that it is to hold; 0.95.
        draws: Number of resamples of a single seed's units; 2000.
        seed: Of their generator; equal seeds give equal intervals; 0.
        method: "t" (the default), or "log": a ratio, averaged over seeds as a logarithm. One seed has its units resampled, and
            the note says so.
        bounds: What the number can be at least and at most (an accuracy: `(0, 1)`); the interval is cut there.
    """

    level: float
    draws: int
    seed: int
    method: str
    bounds: tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval, printed as `0.38 [0.30, 0.45]`.

    Attributes:
        value: The estimate.
        low: Lower end of the interval.
        high: Upper end.
        n: Units (queries) used, over all seeds.
        seeds: Labels of the seeds used.
        note: What a reader must know of the interval; empty when there is nothing to say.
        per_seed: The number within each seed; `value` is their mean, or `exp` of the logarithms' mean.
        how: How the interval follows from them: "t over seeds", … (`recomputed`).
    """

    value: float
    low: float
    high: float
    n: int
    seeds: tuple = ()
    note: str = ""
    per_seed: Mapping = field(default_factory=dict)
    how: str = ""

    @property
    def interval(self) -> tuple[float, float]:
        return self.low, self.high

    def row(self, **about) -> dict:
        """A line of a table: what it is about, estimate, low and high, how the interval was made, and the value of each seed."""
        numbers = {"estimate": self.value, "low": self.low, "high": self.high, "interval": self.how}
        return {**about, **numbers, **{f"{SEED}{label}": value for label, value in self.per_seed.items()}}

    def __format__(self, spec: str) -> str:
        """Format all three numbers by `spec`; by default to two digits of the interval's width."""
        if not spec:
            finite = [abs(x) for x in (self.value, self.low, self.high) if math.isfinite(x)]
            largest, width = max(finite, default=0.0), self.high - self.low
            if not math.isfinite(width) or width <= 0:
                spec = ".3g"
            elif largest < 1e-3 or largest >= 1e5:
                spec = f".{min(6, max(1, 1 + math.floor(math.log10(largest)) - math.floor(math.log10(width))))}e"
            else:
                spec = f".{max(0, 1 - math.floor(math.log10(width)))}f"
        if math.isfinite(self.value) and math.isnan(self.low) and math.isnan(self.high):
            return f"{_number(self.value, spec)} [–]"  # one seed alone gives no interval
        return f"{_number(self.value, spec)} [{_number(self.low, spec)}, {_number(self.high, spec)}]"

    def __str__(self) -> str:
        return format(self)


def ratio_of_means(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean of the first column over the mean of the second, of [..., units, 2] with `axis` the units' axis."""
    means = np.mean(values, axis=axis)
    with np.errstate(divide="ignore", invalid="ignore"):
        return means[..., 0] / means[..., 1]


def _of_samples(statistic: Callable, samples: np.ndarray) -> np.ndarray:
    """The statistic of each of [draws, units(, k)], at once where it knows an axis (numpy's and scipy's convention)."""
    try:
        vectorised = "axis" in inspect.signature(statistic).parameters
    except ValueError:
        vectorised = False
    found = statistic(samples, axis=1) if vectorised else [statistic(sample) for sample in samples]
    found = np.asarray(found, dtype=float)
    if found.shape != samples.shape[:1]:
        raise UserError(
            f"The statistic {getattr(statistic, '__name__', statistic)!r} turned {samples.shape[0]} samples of shape "
            f"{samples.shape[1:]} into an array of shape {found.shape}; it must give one number a sample."
        )
    return found


def _by_seed(values, seeds) -> dict:
    """Units of each seed, those with a nan dropped; seeds in sorted order."""
    values, seeds = np.asarray(values, dtype=float), np.asarray(seeds)
    if values.ndim not in (1, 2) or seeds.shape != values.shape[:1]:
        raise UserError(
            f"Values have shape {values.shape} and seeds {seeds.shape}; give [units] or [units, k] and one seed a unit."
        )
    usable = ~np.isnan(values if values.ndim == 1 else values.sum(1))
    return {label: values[(seeds == label) & usable] for label in np.unique(seeds).tolist()}


def _resampled(arms: Sequence[np.ndarray], number: Callable, draws: int, rng: np.random.Generator) -> np.ndarray:
    """`draws` values of one seed's number, its units drawn anew in every arm: [draws]."""
    parts = []
    step = max(1, CHUNK // max(arm.size for arm in arms))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        parts.append(number(*[arm[rng.integers(0, len(arm), (size, len(arm)))] for arm in arms]))
    return np.concatenate(parts) if parts else np.empty(0)


def over_seeds(
    per_seed: Mapping,
    method: str = "t",
    level: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    n: int = 0,
) -> Estimate:
    """Mean over seeds and Student's t interval of a number that was computed within each.

    Args:
        per_seed: The number of each seed: {11: .43, 12: .38}, or a Series by seed.
        method, level, bounds: As in `Options`.
        n: Units behind the numbers; the seeds themselves by default.

    Returns:
        An `Estimate`; without interval (nan) where there is one seed, all nan where a seed has no number.

    Raises:
        UserError: An unknown method, or a level that is none.
    """
    from scipy.stats import t

    if method not in METHODS:
        raise UserError(f"No interval is called {method!r}; choose one of {', '.join(METHODS)}.")
    if not 0 < level < 1:
        raise UserError(f"The level {level} is not a probability between 0 and 1.")
    per_seed = {label: float(value) for label, value in sorted(per_seed.items())}
    labels, n = tuple(per_seed), n or len(per_seed)
    if not per_seed:
        return Estimate(math.nan, math.nan, math.nan, 0, (), "no unit has a value")
    how, (low, high) = _how(LOG if method == "log" else T, bounds), bounds
    values = np.array(list(per_seed.values()))
    if method == "log":
        with np.errstate(all="ignore"):
            values = np.where(values > 0, np.log(values), math.nan)
    if missing := [str(label) for label, value in zip(labels, values, strict=True) if not math.isfinite(value)]:
        note = f"no {'positive ' if method == 'log' else ''}value in seed {', '.join(missing)}"
        return Estimate(math.nan, math.nan, math.nan, n, labels, note, per_seed, how)
    value, half = values.mean(), math.nan
    if len(values) > 1:
        half = t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    ends = np.array([value, value - half, value + half])
    value, *ends = (np.exp(ends) if method == "log" else ends).tolist()
    low, high = np.clip(ends, low, high).tolist()
    note = (
        "one seed has no interval over seeds" if math.isnan(low) else "the seeds agree: no width" if low == high else ""
    )
    return Estimate(value, low, high, n, labels, note, per_seed, how)


def _how(made: str, bounds: tuple[float, float]) -> str:
    cut = [f"{side} {end:g}" for side, end in zip(("below", "above"), bounds, strict=True) if math.isfinite(end)]
    return made + (f", cut {' and '.join(cut)}" if cut else "")


def clopper_pearson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The exact binomial interval of a share: 24 of 24 gives .858 to 1."""
    from scipy.stats import beta

    tail = (1 - level) / 2
    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits else 0.0
    return low, float(beta.ppf(1 - tail, hits + 1, n - hits)) if hits < n else 1.0


def recomputed(per_seed: Mapping, how: str, level: float = 0.95) -> tuple[float, float, float]:
    """Estimate, low and high once more, from what a table keeps of an estimate.

    Args:
        per_seed: The values of its columns `seed_…`, those that are nan left out.
        how: Its column `interval`.
        level: As in `Options`.
    """
    values = {label: value for label, value in per_seed.items() if not math.isnan(value)}
    if how.startswith(EXACT):
        counts = re.findall(r"(\d+) of (\d+)", how)
        first, *second = (clopper_pearson(int(hits), int(n), level) for hits, n in counts)
        low, high = (first[0] - second[0][1], first[1] - second[0][0]) if second else first
        return over_seeds(values).value, low, high
    ends = dict(re.findall(r"(below|above) (\S+)", how))
    bounds = float(ends.get("below", -math.inf)), float(ends.get("above", math.inf))
    found = over_seeds(values, "log" if how.startswith(LOG) else "t", level, bounds)
    return found.value, found.low, found.high


def _estimate(
    groups: dict,
    number: Callable,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    method: str = "t",
    bounds: tuple[float, float] = (-math.inf, math.inf),
    shares: bool = False,
) -> Estimate:
    """Mean over seeds of a seed's number.

    Args:
        groups: For each seed its arms (one, or the two that are compared), each [units(, k)].
        number: Maps arms of samples, each [draws, units(, k)], to a number a sample [draws].
        level, draws, seed, method, bounds: As in `Options`.
        shares: The number is the mean of the first arm, less that of the second if there is one.
    """
    groups = {label: arms for label, arms in groups.items() if all(len(arm) for arm in arms)}
    with np.errstate(all="ignore"):
        values = {label: number(*[arm[None] for arm in arms])[0] for label, arms in groups.items()}
        found = over_seeds(values, method, level, bounds, sum(len(arm) for arms in groups.values() for arm in arms))
        if len(groups) == 1 and math.isfinite(found.value):
            simulated = _resampled(next(iter(groups.values())), number, draws, np.random.default_rng(seed))
            notes = ["one seed: the interval is over units only and says nothing of other seeds"]
            if (undefined := np.isnan(simulated)).any():
                notes.append(f"{undefined.mean():.1%} of the resamples had no value")
            tails = [(1 - level) / 2, (1 + level) / 2]
            ends = np.quantile(simulated[~undefined], tails) if not undefined.all() else (math.nan, math.nan)
            low, high = np.clip(ends, *bounds).tolist()
            found = replace(found, low=low, high=high, note="; ".join(notes), how=UNITS)
    arms = [np.concatenate(arm) for arm in zip(*groups.values(), strict=True)]
    if found.low < found.high or not math.isfinite(found.low):
        return found
    if shares and all(np.isin(arm, (0, 1)).all() for arm in arms):
        counts = [(int(arm.sum()), len(arm)) for arm in arms]
        how = f"{EXACT}, " + " less ".join(f"{hits} of {n}" for hits, n in counts)
        _, low, high = recomputed(found.per_seed, how, level)
        return replace(found, low=low, high=high, how=how, note="the seeds agree: the interval is the units' exact one")
    return replace(found, note="no variation between units or seeds: the interval has no width")


def bootstrap(values, seeds, statistic: Callable = np.mean, **options: Unpack[Options]) -> Estimate:
    """A number over seeds and units with its interval: mean over seeds of `statistic(units of the seed)`.

    Units are taken to be a seed's own; where every seed asks the same queries the interval speaks for new seeds, not
    for new queries.

    Args:
        values: [units], or [units, k] when the statistic needs columns of one unit together, such as `ratio_of_means`.
            Units with a nan are left out.
        seeds: Label of each unit's seed [units]; a seed with a single unit is fine (a number per seed).
        statistic: Maps the units of one seed to a number. If it takes `axis` it is called once for all resamples.
        options: How the interval is made.

    Returns:
        An `Estimate` in the unit of the statistic; all nan when no unit has a value.

    Raises:
        UserError: Shapes that do not fit, an unknown method, or a statistic that is not one number.
    """
    groups = {label: (units,) for label, units in _by_seed(values, seeds).items()}
    shares = statistic is np.mean and np.ndim(values) == 1
    return _estimate(groups, lambda units: _of_samples(statistic, units), shares=shares, **options)


def difference(
    a, a_seeds, b, b_seeds, statistic: Callable = np.mean, matched_units: bool = False, **options: Unpack[Options]
) -> Estimate:
    """`statistic(a) - statistic(b)` within each seed, averaged over seeds: "large minus small" with matched seeds.

    The difference is taken within a seed, so what a seed does to both arms cancels. `n` counts the units of both arms.

    Args:
        a: [units] or [units, k], as in `bootstrap`.
        a_seeds: The seed of each unit of `a` [units].
        b: Likewise, its number of units free unless they are matched.
        b_seeds: [units], the same seeds as in `a_seeds`.
        statistic: As in `bootstrap`.
        matched_units: Row i of `a` and of `b` is the same unit (one query, two models): rows are then drawn together
            and `n` counts pairs.
        options: How the interval is made.

    Raises:
        UserError: Seeds that only one arm has, unequal shapes of matched units, and as `bootstrap`.
    """
    in_a, in_b = np.unique(a_seeds).tolist(), np.unique(b_seeds).tolist()
    if in_a != in_b:
        raise UserError(
            f"The two arms have seeds {in_a} and {in_b}; a contrast needs the same seeds in both, so leave out those "
            "that only one of them has."
        )

    def between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return _of_samples(statistic, first) - _of_samples(statistic, second)

    if not matched_units:
        units, others = _by_seed(a, a_seeds), _by_seed(b, b_seeds)
        shares = statistic is np.mean and np.ndim(a) == 1
        return _estimate({label: (units[label], others[label]) for label in units}, between, shares=shares, **options)
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or not np.array_equal(a_seeds, b_seeds):
        raise UserError(
            f"Matched units need both arms in one shape and one order of seeds; these are {a.shape} and {b.shape}."
        )
    width = 1 if a.ndim == 1 else a.shape[1]
    together = np.concatenate([a.reshape(-1, width), b.reshape(-1, width)], axis=1)

    def within(pairs: np.ndarray) -> np.ndarray:
        first, second = pairs[..., :width], pairs[..., width:]
        return between(first[..., 0], second[..., 0]) if a.ndim == 1 else between(first, second)

    return _estimate({label: (pairs,) for label, pairs in _by_seed(together, a_seeds).items()}, within, **options)


def pick(rows, **where):
    """The rows of a table whose columns have these values: `pick(rows, size=1000, arm="base")`."""
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows


def largest(rows):
    """The rows of the largest model of a table that has a column `size`."""
    return pick(rows, size=rows["size"].max())


def smallest(rows):
    """The rows of the smallest model of a table that has a column `size`."""
    return pick(rows, size=rows["size"].min())


def estimate_of(rows, columns, statistic: Callable = np.mean, **options) -> Estimate:
    """`bootstrap` of a column, or of columns together, of a table that has a column `seed`, with its `options`."""
    return bootstrap(rows[columns], rows["seed"], statistic, **options)


def difference_of(rows, others, columns, others_columns=None, statistic: Callable = np.mean, **options) -> Estimate:
    """`difference` of two tables that have a column `seed`, in the same columns unless the second has others."""
    second = columns if others_columns is None else others_columns
    return difference(rows[columns], rows["seed"], others[second], others["seed"], statistic, **options)


def largest_minus_smallest(rows, columns, statistic: Callable = np.mean, **options) -> Estimate:
    """`difference_of` the rows of the largest model and of the smallest; the table has columns `seed` and `size`."""
    return difference_of(largest(rows), smallest(rows), columns, statistic=statistic, **options)


def slope_of(rows, columns, statistic: Callable = np.mean, x: str = "size", **options) -> Estimate:
    """Change of a number for ten times the size: the least-squares slope over log10 size, all sizes used, within each seed.

    Args:
        rows: A table with columns `seed`, `x` and those named.
        columns: A column, or columns together, whose `statistic` is the number of a size.
        statistic, options: As in `bootstrap`.
        x: The column of the sizes.

    Raises:
        UserError: A seed with fewer than two sizes.
    """
    slopes = {}
    for label, some in rows.groupby("seed"):
        numbers = {size: statistic(one[columns].to_numpy(dtype=float)) for size, one in some.groupby(x)}
        if len(numbers) < 2:
            raise UserError(f"Seed {label} has {len(numbers)} of {x!r}; a slope needs two or more.")
        slopes[label] = float(np.polyfit(np.log10(list(numbers)), list(numbers.values()), 1)[0])
    return over_seeds(slopes, n=len(rows), **options)


def difference_in_differences(rows, column: str = "change", **options) -> Estimate:
    """`difference_of` rows that are `treated` and the others: what a treatment changed beyond what changed anyway."""
    return difference_of(rows[rows["treated"]], rows[~rows["treated"]], column, **options)


def gaps(rows, by: Sequence[str], column: str = "change"):
    """Mean of the rows that are `treated` less that of the others, for each value of some columns: a Series."""
    means = rows.groupby([*by, "treated"])[column].mean().unstack("treated")
    return means[True] - means[False]
