"""Word order: what a flipped phrase is worth to a query, in influence and in what a finetuning step really does.

Works on the table that the `order` stage writes: one row for each query, partition and instance, with the columns
query, partition, instance and one column for each quantity (influence, relatif, delta); with a column `seed` where several models are
put below one another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from influence_kit.errors import UserError
from influence_kit.measures.intervals import Estimate, bootstrap, ratio_of_means

if TYPE_CHECKING:
    import pandas

RATIOS = {
    "flipped": ("flipped", "forward"),
    "bare": ("flipped", "flipped_without_relation"),  # what the relation's words add to a flipped phrase
    "name": ("flipped", "value_only"),  # what a flipped phrase has beyond its answer alone
    "reworded": ("reworded", "forward"),
    "translated": ("translated", "forward"),
    "translated_flipped": ("translated_flipped", "translated"),
    "altered_value": ("altered_value", "forward"),
}


def by_partition(table: pandas.DataFrame, quantity: str = "influence") -> pandas.DataFrame:
    """Mean over instances: one row a (seed, query), one column a partition. Seed is 0 where the table has none.

    Raises UserError for a quantity that is no column, or a query that lacks a partition.
    """
    if quantity not in table.columns:
        raise UserError(f"{quantity!r} is no column of this table: choose one of {', '.join(map(str, table.columns))}")
    if "seed" not in table.columns:
        table = table.assign(seed=0)
    means = table.groupby(["seed", "query", "partition"])[quantity].mean().unstack("partition")
    if means.isna().to_numpy().any():
        lacking = [str(name) for name in means.columns[means.isna().any()]]
        raise UserError(f"some queries have no finite {quantity} for {', '.join(lacking)}: make the phrases again")
    return means


def ratio(means: pandas.DataFrame, above: str, below: str, **options) -> Estimate:
    """Mean of one partition over the mean of another, means over queries within a seed; averaged over seeds.

    A ratio of means, not a mean of ratios: single queries may have next to nothing below. `options` go to `bootstrap`.
    Raises UserError for a partition that is no column.
    """
    for name in (above, below):
        if name not in means.columns:
            raise UserError(f"there are no {name!r} phrases here, only {', '.join(map(str, means.columns))}")
    return bootstrap(means[[above, below]].to_numpy(), _seeds(means), ratio_of_means, **options)


def ratios(means: pandas.DataFrame, **options) -> dict[str, Estimate]:
    """Each of RATIOS. Where the partition below does next to nothing the interval says so; read `excess` there."""
    return {name: ratio(means, *parts, **options) for name, parts in RATIOS.items()}


def excess(means: pandas.DataFrame, above: str, below: str, unit: str = "forward", **options) -> Estimate:
    """What one partition has beyond another, in units of a third: (mean above - mean below) / mean unit, as `ratio` otherwise.

    For partitions that do next to nothing, where a quotient would have nothing below it.
    """
    for name in (above, below, unit):
        if name not in means.columns:
            raise UserError(f"there are no {name!r} phrases here, only {', '.join(map(str, means.columns))}")
    pairs = np.stack([means[above] - means[below], means[unit]], 1)
    return bootstrap(pairs, _seeds(means), ratio_of_means, **options)


def levels(means: pandas.DataFrame, **options) -> dict[str, Estimate]:
    """Mean over queries of every partition, in the quantity's own unit."""
    return {str(name): bootstrap(means[name].to_numpy(), _seeds(means), **options) for name in means.columns}


def agreement(predicted: pandas.DataFrame, true: pandas.DataFrame) -> pandas.DataFrame:
    """How one quantity follows another over the partitions of each query: one row a (seed, query).

    predicted, true: of `by_partition`, for the same queries and partitions. Columns: pearson, spearman (over partitions, nan
    where either does not vary), and slope (least squares of predicted on true, through the origin: predicted units per unit of true
    change, which tells whether a scale that is the same for all queries would do).
    Raises UserError when rows or columns differ.
    """
    import pandas

    if not (predicted.index.equals(true.index) and predicted.columns.equals(true.columns)):
        raise UserError("predicted and true change must be of the same queries and partitions, in one order")
    x, y = predicted.to_numpy(float), true.to_numpy(float)
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (x * y).sum(1) / (y * y).sum(1)
    found = {"pearson": _correlation(x, y), "spearman": _correlation(_ranks(x), _ranks(y)), "slope": slope}
    return pandas.DataFrame(found, index=predicted.index)


def _seeds(means: pandas.DataFrame) -> np.ndarray:
    return means.index.get_level_values("seed").to_numpy()


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))


def _ranks(x: np.ndarray) -> np.ndarray:
    from scipy.stats import rankdata

    return rankdata(x, axis=1)
