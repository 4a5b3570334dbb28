"""Estimates with intervals over seeds (worlds and initialisations) and, within each seed, units (queries).

A number is computed within each seed and averaged over seeds, each seed counting once. Its interval has to speak for
seeds that were not run, and with three of them the choice of method matters. Coverage of a 95 % interval for a mean,
60 queries a seed, 1,500 simulations each, by the ratio of the variance between seeds to the sampling variance of a
seed's mean:

    ratio                           0     .5      2      8    100    mean width, relative to the known-variance one
    hierarchical bootstrap       .971   .959   .888   .800   .739    1.25 to  .73
    t over the seeds' values     .950   .955   .954   .952   .944    1.93 to 1.97
    the wider of the two         .987   .974   .960   .961   .959    1.99 to 1.98

The bootstrap of three clusters cannot reach beyond its own three values: when seeds differ by more than queries do,
its interval runs from the smallest to the largest of them and misses the median with probability 2 / 2^3. Few
clusters are known to undercover (Cameron, Gelbach and Miller 2008; Hesterberg 2015 for percentile intervals of small
samples). Student's t over the seeds' values is exact for normal ones, yet three values that agree by luck give an
interval narrower than the queries' own noise. So the default is the smallest interval that holds both.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import numpy as np

from influence_kit.errors import UserError

METHODS = ("wider", "bootstrap", "t")
CHUNK = 2_000_000  # resampled values held at once


def _number(value: float, spec: str) -> str:
    if not math.isfinite(value):
        return str(value)
    text = format(value, spec)
    # A small number must not turn into 0 because its interval is wide.
    return f"{value:.1e}" if value != 0 and float(text) == 0 else text


class Options(TypedDict, total=False):
    """How an interval is made.

    Attributes:
        level: Probability that it is to hold; 0.95.
        draws: Number of resamples; 2000.
        seed: Of the generator; equal seeds give equal intervals; 0.
        method: "wider" (the default), "bootstrap" or "t". With one seed units alone are resampled and the note says so;
            "t" is then nan.
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
    """

    value: float
    low: float
    high: float
    n: int
    seeds: tuple = ()
    note: str = ""

    @property
    def interval(self) -> tuple[float, float]:
        return self.low, self.high

    def row(self, **about) -> dict:
        """A line of a table: what it is about, then estimate, low and high."""
        return {**about, "estimate": self.value, "low": self.low, "high": self.high}

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


def _estimate(
    groups: dict,
    number: Callable,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    method: str = "wider",
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """Mean over seeds of a seed's number.

    Args:
        groups: For each seed its arms (one, or the two that are compared), each [units(, k)].
        number: Maps arms of samples, each [draws, units(, k)], to a number a sample [draws].
        level, draws, seed, method, bounds: As in `Options`.
    """
    from scipy.stats import t

    if method not in METHODS:
        raise UserError(f"No interval is called {method!r}; choose one of {', '.join(METHODS)}.")
    if not 0 < level < 1:
        raise UserError(f"The level {level} is not a probability between 0 and 1.")
    groups = {label: arms for label, arms in groups.items() if all(len(arm) for arm in arms)}
    labels, n = tuple(groups), sum(len(arm) for arms in groups.values() for arm in arms)
    if not groups:
        return Estimate(math.nan, math.nan, math.nan, 0, (), "no unit has a value")
    with np.errstate(all="ignore"):
        values = np.array([number(*[arm[None] for arm in arms])[0] for arms in groups.values()])
        value = values.mean()
        if np.isnan(value):
            missing = [str(label) for label, found in zip(labels, values, strict=True) if np.isnan(found)]
            return Estimate(math.nan, math.nan, math.nan, n, labels, f"no value in seed {', '.join(missing)}")
        lows, highs, notes = [], [], []
        tails = [(1 - level) / 2, (1 + level) / 2]
        if method != "t":
            rng = np.random.default_rng(seed)
            chosen = rng.integers(0, len(groups), (draws, len(groups)))
            table = np.empty(chosen.shape)
            for index, arms in enumerate(groups.values()):
                here = chosen == index
                table[here] = _resampled(arms, number, int(here.sum()), rng)
            simulated = table.mean(1)
            undefined = np.isnan(simulated)
            if undefined.any():
                notes.append(f"{undefined.mean():.1%} of the resamples had no value")
            low, high = np.quantile(simulated[~undefined], tails) if not undefined.all() else (math.nan, math.nan)
            lows, highs = [low], [high]
        if len(groups) == 1:
            notes.append("one seed: the interval is over units only and says nothing of other seeds")
            if method == "t":
                lows, highs = [math.nan], [math.nan]
        elif method != "bootstrap":
            half = t.ppf(tails[1], len(groups) - 1) * values.std(ddof=1) / math.sqrt(len(groups))
            lows, highs = lows + [value - half], highs + [value + half]
    # min and max of numpy pass a nan on: an interval that could not be made must not look like one.
    low, high = np.clip([np.min(lows), np.max(highs)], *bounds)
    if low == high:
        notes.append("no variation between units or seeds: the interval has no width")
    return Estimate(float(value), float(low), float(high), n, labels, "; ".join(notes))


def bootstrap(values, seeds, statistic: Callable = np.mean, **options: Unpack[Options]) -> Estimate:
    """A number over seeds and units with its interval: mean over seeds of `statistic(units of the seed)`.

    The hierarchical bootstrap draws seeds with replacement, then units within each drawn seed. With three seeds it
    covers 74 to 97 % (see the module's table); `method="wider"`, the default, is the smallest interval holding
    both it and Student's t over the seeds' values; for normal values it covers at least the level,
    whichever of seeds and queries vary more.

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
    return _estimate(groups, lambda units: _of_samples(statistic, units), **options)


def difference(
    a, a_seeds, b, b_seeds, statistic: Callable = np.mean, matched_units: bool = False, **options: Unpack[Options]
) -> Estimate:
    """`statistic(a) - statistic(b)` within each seed, averaged over seeds: "large minus small" with matched seeds.

    Seeds are drawn jointly for both arms, so what a seed does to both cancels. `n` counts the units of both arms.

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
        return _estimate({label: (units[label], others[label]) for label in units}, between, **options)
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


def difference_in_differences(rows, column: str = "change", **options) -> Estimate:
    """`difference_of` rows that are `treated` and the others: what a treatment changed beyond what changed anyway."""
    return difference_of(rows[rows["treated"]], rows[~rows["treated"]], column, **options)


def rank_correlation_of(rows, columns: Sequence[str]) -> Estimate:
    """Spearman's correlation of two columns of a table within each of its seeds, with Student's t over the seeds."""

    def correlation(sample: np.ndarray) -> float:
        import pandas

        return pandas.DataFrame(sample).corr("spearman").iloc[0, 1]

    return estimate_of(rows, list(columns), correlation, method="t", bounds=(-1, 1))


def gaps(rows, by: Sequence[str], column: str = "change"):
    """Mean of the rows that are `treated` less that of the others, for each value of some columns: a Series."""
    means = rows.groupby([*by, "treated"])[column].mean().unstack("treated")
    return means[True] - means[False]
