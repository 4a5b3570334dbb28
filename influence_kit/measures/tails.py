"""How heavy the tail of influence is, and how much of the mass its top holds.

Two conventions are in use and the paper mixes them. The *density* exponent is the a of p(x) ~ x^-a; the *survival*
exponent is the one of P(X >= x) ~ x^-(a - 1), the slope seen in a log-log plot of the CCDF, and is smaller by one. A
variance exists when the density exponent is above 3 and a mean when it is above 2.

Sources: Grosse et al. 2023 (arXiv 2308.03296), Figures 8 and 9 and Table 1; Clauset, Shalizi and Newman 2009, SIAM
Review 51(4), equations 3.1 and 3.9 and sections 3.3 and 4.1.
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from influence_kit.errors import UserError
from influence_kit.measures.lifts import top_count

SMALLEST_FIT = 10  # below this an exponent's interval spans everything
SMALLEST_SEARCHED = 50  # a shorter tail fits almost anything, so a search for xmin would end there by luck
SEARCHED = 400  # thresholds tried in a search, spread evenly over the ranks


@dataclass(frozen=True)
class Tail:
    """A power law fitted to the values from `xmin` up.

    Attributes:
        density_exponent: a of p(x) ~ x^-a, no unit.
        survival_exponent: a - 1, of P(X >= x) ~ x^-(a - 1).
        low: lower end of the 95 % interval of the density exponent, given `xmin`.
        high: its upper end.
        ks: largest distance between the fitted and the empirical distribution function above `xmin`.
        xmin: where the tail starts, in the unit of the values.
        count: number of values at or above `xmin`.
        rule: how `xmin` was chosen: "top" or "ks".
    """

    density_exponent: float
    survival_exponent: float
    low: float
    high: float
    ks: float
    xmin: float
    count: int
    rule: str = "top"

    def survival(self, x, total: int) -> np.ndarray:
        """Fitted P(X >= x) among `total` values, for x at or above `xmin`; same shape as x."""
        return self.count / total * (np.asarray(x, dtype=float) / self.xmin) ** -self.survival_exponent


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
    """Survival exponents `[...]` and KS distances `[...]` of log(x / xmin), sorted ascending on the last axis."""
    n = excess.shape[-1]
    exponent = n / excess.sum(-1)
    fitted = -np.expm1(-exponent[..., None] * excess)
    steps = np.arange(n + 1) / n
    distance = np.maximum(np.abs(fitted - steps[:-1]), np.abs(fitted - steps[1:])).max(-1)
    return exponent, distance


def _search(positive: np.ndarray) -> int:
    """Length of the tail whose power law has the smallest KS distance, among up to `SEARCHED` thresholds."""
    logs = np.log(positive)
    # A threshold takes every value equal to it, so tails end where the sorted values change.
    lengths = np.append(np.flatnonzero(np.diff(positive)), positive.size - 1) + 1
    lengths = lengths[(lengths >= min(SMALLEST_SEARCHED, positive.size)) & (positive[lengths - 1] < positive[0])]
    if lengths.size > SEARCHED:
        lengths = lengths[np.linspace(0, lengths.size - 1, SEARCHED).round().astype(int)]
    distances = [float(_ks((logs[:n] - logs[n - 1])[::-1])[1]) for n in lengths]
    return int(lengths[int(np.argmin(distances))])


def _tail(positive: np.ndarray, top: int | str) -> Tail:
    from scipy.stats import chi2

    if top == "ks":
        count = _search(positive)
    elif isinstance(top, (int, np.integer)) and top >= SMALLEST_FIT:
        count = int((positive >= positive[min(int(top), positive.size) - 1]).sum())
    else:
        raise UserError(f"top is {top!r}; give a number of values, {SMALLEST_FIT} or more, or 'ks' to search for xmin.")
    xmin = positive[count - 1]
    excess = np.log(positive[:count] / xmin)[::-1]
    if excess[-1] == 0:
        raise UserError(f"The {count} largest values all equal {xmin}; a tail needs values that differ.")
    exponent, distance = _ks(excess)
    # xmin is itself one of the values, so the sum of log excesses is a Gamma variable of shape count - 1.
    low, high = chi2.ppf([0.025, 0.975], 2 * (count - 1)) / (2 * excess.sum())
    return Tail(
        density_exponent=1 + float(exponent),
        survival_exponent=float(exponent),
        low=1 + float(low),
        high=1 + float(high),
        ks=float(distance),
        xmin=float(xmin),
        count=count,
        rule="ks" if top == "ks" else "top",
    )


def fit_tail(values, top: int | str = 500) -> Tail:
    """Maximum-likelihood power law of the upper tail (Hill; Clauset et al., Eq 3.1).

    The paper (Fig 8, Table 1) fits the 500 largest of about five million scores and reports exponents of 1.99 to 4.34.
    `top=500` does the same: xmin is the 500th largest positive value, or the smallest positive one when there are
    fewer. `top="ks"` chooses xmin by the smallest KS distance (Clauset et al., Eq 3.9). Negative values play no part.

    Args:
        values: `[N]` scores of one query, any unit: exponents do not depend on it.
        top: number of largest values, or "ks".

    Returns:
        The `Tail`. Its interval is exact for a power law at a fixed number of values; after a search for xmin it
        leaves out the uncertainty of xmin.

    Raises:
        UserError: fewer than 10 positive values, nan or infinite values, or an unknown `top`.
    """
    # The search is written out because powerlaw 2.0.0 holds exponents to at most 3 unless told otherwise, fits steeper
    # ones numerically at every threshold, and takes seconds where a bootstrap needs hundreds of searches.
    return _tail(_positives(values), top)


def ks_p_value(tail: Tail, values, draws: int = 1000, seed: int = 0) -> float:
    """Probability that a true power law would lie at least as far from its own fit as the data do.

    Parametric bootstrap (Clauset et al., section 4.1): simulate the fitted tail, fit it again by the same rule,
    compare KS distances. For `tail.rule == "ks"` the values below xmin are resampled and xmin is searched for in
    every draw, which takes about a second per 100 draws of 8,000 positive values. Below .1 the power law is rejected
    by their convention.

    Args:
        tail: what `fit_tail(values)` returned.
        values: `[N]`, the values that it was fitted to.
        draws: simulated samples; the smallest possible result is 1 / (draws + 1).

    Raises:
        UserError: `tail` does not belong to `values`.
    """
    positive = _positives(values)
    count = int((positive >= tail.xmin).sum())
    if count != tail.count:
        raise UserError(
            f"The tail holds {tail.count} values from {tail.xmin:.6g} up and the data {count}; "
            "pass the values that the tail was fitted to."
        )
    rng = np.random.default_rng(seed)
    if tail.rule == "ks":
        body = positive[positive < tail.xmin]
        simulated = np.empty(draws)
        for draw in range(draws):
            n_tail = rng.binomial(positive.size, tail.count / positive.size)
            above = tail.xmin * np.exp(rng.exponential(1 / tail.survival_exponent, n_tail))
            below = rng.choice(body, positive.size - n_tail) if body.size else body
            sample = np.sort(np.concatenate([above, below]))[::-1]
            length = _search(sample)
            simulated[draw] = _ks((np.log(sample[:length] / sample[length - 1]))[::-1])[1]
    else:
        simulated = _simulated_distances(tail.count, draws, seed)
    return float((1 + (simulated >= tail.ks).sum()) / (draws + 1))


@lru_cache(maxsize=8)
def _simulated_distances(count: int, draws: int, seed: int) -> np.ndarray:
    """KS distances of refitted power laws, [draws].

    The smallest of the top values is xmin itself, and the distance of a refit does not depend on the exponent: one set
    of draws serves every tail of the same length.
    """
    excess = np.sort(np.random.default_rng(seed).exponential(1.0, (draws, count - 1)), axis=1)
    return _ks(np.concatenate([np.zeros((draws, 1)), excess], axis=1))[1]


def likelihood_ratios(
    values, top: int | str = 500, alternatives: tuple[str, ...] = ("lognormal", "exponential")
) -> dict[str, tuple[float, float]]:
    """Power law against other tails on the same values: `{name: (R, p)}` (Vuong's test; Clauset et al., section 5).

    R is the log-likelihood ratio over its standard deviation: positive when the power law fits better, negative when
    the alternative does; p is the two-sided probability of an |R| as large when neither is better. Every alternative
    is fitted as truncated below at xmin. A truncated lognormal comes as close to a power law as one likes, so it can
    beat it clearly but hardly lose to it: an R near 0 with a large p is all that a true power law gets. (So does a
    stretched exponential, but there powerlaw's optimiser can stop short of the best fit, which makes R too large.)

    Args:
        values: `[N]` scores of one query.
        top: as in `fit_tail`.
        alternatives: names of distributions in the powerlaw package.

    Raises:
        UserError: as `fit_tail`.
    """
    import powerlaw

    positive = _positives(values)
    tail = _tail(positive, top)
    # The ratio does not depend on the unit, and the optimiser starts best from values near 1.
    sample = positive[: tail.count] / tail.xmin
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        # Without an own range powerlaw 2.0.0 stops the exponent at 3 and the power law loses every steep tail.
        fit = powerlaw.Fit(sample, xmin=1.0, verbose=0, parameter_ranges={"alpha": [1, None]})
        ratios = {name: fit.distribution_compare("power_law", name, normalized_ratio=True) for name in alternatives}
    return {name: (float(ratio), float(p)) for name, (ratio, p) in ratios.items()}


def ccdf(values) -> tuple[np.ndarray, np.ndarray]:
    """Empirical P(X >= x) at every distinct value: x ascending and its probability, each `[distinct values]`."""
    x, counts = np.unique(np.asarray(values, dtype=float).ravel(), return_counts=True)
    at_least = np.cumsum(counts[::-1])[::-1]
    return x, at_least / max(counts.sum(), 1)


def coverage(values, fractions) -> np.ndarray:
    """Share of the positive influence mass that the top fractions of *all* sequences hold (paper, Fig 9).

    Args:
        values: `[..., N]` raw scores; negative ones count as sequences and carry no mass.
        fractions: `[F]` in (0, 1].

    Returns:
        `[..., F]` shares in [0, 1]; nan where no score is positive.

    Raises:
        UserError: a fraction outside (0, 1].
    """
    values = np.asarray(values)
    counts = [top_count(values.shape[-1], fraction) for fraction in np.atleast_1d(fractions)]
    mass = np.sort(np.maximum(values, 0), axis=-1)[..., ::-1]
    mass = np.cumsum(mass, axis=-1, dtype=float)
    held, total = mass[..., [n - 1 for n in counts]], mass[..., -1:]
    return np.divide(held, total, out=np.full(held.shape, np.nan), where=total > 0)


def top_share(values, fraction: float = 0.01) -> np.ndarray:
    """Share of the positive influence mass held by the top `fraction` of all sequences (paper, section 5.2.1).

    The paper reports 12 to 52 % for the top 1 % at 22B parameters. It means little without a null: independent Gaussian
    scores give 6.7 %, Laplace scores 9.8 % (`null_coverage`).

    Args:
        values: `[..., N]` raw scores.

    Returns:
        `[...]` shares in [0, 1]; nan where no score is positive.

    Raises:
        UserError: `fraction` outside (0, 1].
    """
    return coverage(values, [fraction])[..., 0]


@dataclass(frozen=True)
class NullCoverage:
    """Coverage of scores that mean nothing: its mean and the ends of the central 95 % of scans, each `[F]`."""

    fractions: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


NULLS = {"gaussian": "standard_normal", "laplace": "laplace"}


def null_coverage(kind: str, fractions, n: int, draws: int = 200, seed: int = 0) -> NullCoverage:
    """Coverage curve of `n` independent scores centred on zero, with the interval a single query's scan falls in.

    Args:
        kind: "gaussian" or "laplace"; the scale plays no part.
        fractions: `[F]` in (0, 1].
        n: sequences in a scan.
        draws: simulated scans.

    Raises:
        UserError: an unknown `kind`, or a fraction outside (0, 1].
    """
    if kind not in NULLS:
        raise UserError(f"No null is called {kind!r}; choose one of {', '.join(sorted(NULLS))}.")
    rng = np.random.default_rng(seed)
    draw = getattr(rng, NULLS[kind])
    shares = np.stack([coverage(draw(size=n), fractions) for _ in range(draws)])
    low, high = np.quantile(shares, [0.025, 0.975], axis=0)
    return NullCoverage(np.atleast_1d(np.asarray(fractions, dtype=float)), shares.mean(0), low, high)
