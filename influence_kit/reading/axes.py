"""What the plots share: checked tables, blank figures, series with their intervals, legends, axes of sizes."""

from __future__ import annotations

import functools
import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy

from influence_kit.errors import UserError
from influence_kit.measures.intervals import SEED
from influence_kit.reading import style as look
from influence_kit.reading.style import size_label

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def styled(plot: Callable) -> Callable:
    """Draw in the project's style whatever the caller's matplotlib settings are."""

    @functools.wraps(plot)
    def drawn(*args, **kwargs):
        with look.style():
            return plot(*args, **kwargs)

    return drawn


def need(df: pandas.DataFrame, *columns: str | None) -> None:
    """Raise UserError where the table lacks a column (None: not asked for) or has no rows."""
    if absent := [c for c in columns if c is not None and c not in df.columns]:
        raise UserError(f"the figure's table lacks column(s) {absent}: it has {list(df.columns)}")
    if df.empty:
        raise UserError(f"the figure's table has no rows (columns {list(df.columns)}): were any selected?")


def blank(rows: int = 1, columns: int = 1, *, height: float, title: str = "", **options: Any):
    """Figure of notebook width and its axes, an array [rows, columns]; the title at the left, as long as it need be."""
    # Figure without pyplot: no global state to leak, and a notebook shows it only once, where it is saved.
    from matplotlib.figure import Figure

    title = textwrap.fill(title, 88)
    fig = Figure(figsize=(look.WIDTH, height + 0.22 * (title.count("\n") + bool(title))))
    if title:
        fig.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    return fig, fig.subplots(rows, columns, squeeze=False, **options)


def keys_of(df: pandas.DataFrame, column: str) -> list:
    """Numbers ascend (model sizes); names keep the table's order, which is the author's."""
    keys = list(dict.fromkeys(df[column]))
    return sorted(keys) if all(isinstance(key, int | float | numpy.number) for key in keys) else keys


def name_of(key: object) -> str:
    """Numbers as short sizes (1900000 -> 1.9M), names as they are."""
    return size_label(float(key)) if isinstance(key, int | float | numpy.number) else str(key)


def each_seed(df: pandas.DataFrame, value: str, given: pandas.DataFrame | None = None) -> pandas.DataFrame | None:
    """A row a seed, with its value in the column `value`, from a table's columns `seed_…` (`Estimate.row` writes them); None where
    it has none. What is `given` goes first."""
    seeds = [column for column in df.columns if str(column).startswith(SEED)]
    if given is not None or not seeds:
        return given
    about = [column for column in df.columns if column not in (*seeds, value, "low", "high")]
    return df.drop(columns=value).melt(about, seeds, "seed", value).dropna(subset=value)


def draw_series(
    ax: Axes,
    df: pandas.DataFrame,
    x: str,
    y: str,
    *,
    hue: str,
    colours: Mapping[Any, str],
    split: str | None = None,
    lines: Mapping[Any, str] | None = None,
    markers: Sequence[str] = look.MARKERS,
    joined: bool = True,
    band: bool = False,
    per_seed: pandas.DataFrame | None = None,
    orient: str = "x",
) -> None:
    """Series with given intervals (columns low and high, where there are any), drawn by seaborn's objects interface.

    Args:
        ax: Where they are drawn.
        df: One row a point.
        x: Column of the horizontal place.
        y: Column of the vertical place.
        hue: Column that names the series.
        colours: Colour by series.
        split: Column that is told by the style of line.
        lines: Style of line by value of `split`.
        markers: Shapes of points, one for each series in turn; ("",) for none.
        joined: Points of a series joined by a line.
        band: Intervals as bands, else as bars.
        per_seed: The value of each seed, in the same columns: small dots behind the series.
        orient: "x" where the intervals are those of y, "y" where they are those of x.
    """
    import seaborn.objects as so

    shapes = dict(zip(colours, itertools.cycle(markers)))
    plot = so.Plot(df.reset_index(drop=True), x=x, y=y, color=hue)  # rows put together may share their labels
    if per_seed is not None:
        dots = so.Dot(pointsize=3, alpha=0.5, edgewidth=0)
        plot = plot.add(dots, data=per_seed.reset_index(drop=True), legend=False)
    if {"low", "high"} <= set(df.columns) and df["low"].notna().any():
        along = "y" if orient == "x" else "x"
        interval = so.Band(alpha=0.18, edgewidth=0) if band else so.Range({"capstyle": "butt"}, linewidth=1.6)
        ends = {f"{along}min": "low", f"{along}max": "high", "group": split}
        plot = plot.add(interval, orient=orient, legend=False, **ends)
    points = so.Line(linewidth=1.6, pointsize=5, edgewidth=1) if joined else so.Dot(pointsize=6, edgewidth=0)
    plot = plot.add(points, orient=orient, legend=False, marker=hue, linestyle=split)
    looks = {"color": colours, "marker": shapes, "linestyle": lines or {}}
    scales = {kind: so.Nominal(dict(values), order=list(values)) for kind, values in looks.items()}
    plot.scale(**scales).on(ax).plot()
    for key, colour in colours.items():  # seaborn puts its legend beside the axes; ours is built from these
        line = "none" if not joined else lines[key] if lines and split == hue else "-"
        ax.plot([], [], color=colour, marker=shapes[key], linestyle=line, label=name_of(key))


def draw_references(ax: Axes, references: Mapping[str, float] | None, *, skip: int = 0, upright: bool = False) -> None:
    """Grey lines across the axes, name -> place; `skip` styles of line are taken already."""
    styles = [line for line in look.LINES if line != "-"]
    for i, (label, place) in enumerate((references or {}).items(), start=skip):
        draw = ax.axvline if upright else ax.axhline
        draw(place, color=look.FAINT, linestyle=styles[i % len(styles)], linewidth=1.1, label=label)


def cut_at_zero(df: pandas.DataFrame, value: str) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """What a log axis can show of intervals that reach 0 or below: they end at the least number shown.

    Returns:
        The table with those ends moved, and its rows that were cut: a plot marks them, for they go on below.

    Raises:
        UserError: a value itself is not above 0.
    """
    if (smallest := df[value].min()) <= 0:
        raise UserError(f"a log axis needs values above 0, but the smallest {value} is {smallest:g}: pass log_y=False")
    if "low" not in df.columns:
        return df, df[:0]
    floor = df[[value, "low"]].where(df[[value, "low"]] > 0).min().min() / 1.3
    cut = df["low"] <= 0
    moved = df.assign(low=df["low"].where(~cut, floor))
    return moved, moved[cut]


def legend_below(fig: Figure, axes, columns: int = 6) -> None:
    """One legend for the whole figure, below the data."""
    found: dict[str, Any] = {}
    for ax in numpy.ravel(axes):
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        # Inches an entry takes at the legend's size: as many columns as fit, or long names would run off the figure.
        widths = [0.55 + 0.075 * len(label) for label in found]
        fitting = [n for n in range(1, min(columns, len(found)) + 1) if n * max(widths) <= fig.get_figwidth()]
        fig.legend(list(found.values()), list(found), loc="outside lower center", ncols=max(fitting, default=1))


def label_axes(ax: Axes, xlabel: str, ylabel: str, *, log_x: bool = False, log_y: bool = False) -> None:
    """Labels, broken where they are longer than the axes, and scales."""
    ax.set_xscale("log" if log_x else "linear")
    ax.set_yscale("log" if log_y else "linear")
    ax.set(xlabel=textwrap.fill(xlabel, 80), ylabel=textwrap.fill(ylabel, 44))


def log_ticks(ax: Axes) -> None:
    """Plain numbers along a log axis of x: decades, and 2 and 5 times them where it has few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def size_axis(ax: Axes, sizes) -> None:
    """Log axis ticked at the models themselves; a size too near the last label keeps its tick and loses its label."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    sizes = sorted({float(s) for s in sizes})
    ax.set_xscale("log")
    ax.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
    labels, last = [], -math.inf
    for size in sizes:
        show = math.log(size) - last > 0.07 * math.log(sizes[-1] / sizes[0] * 2.25)
        labels.append(size_label(size) if show else "")
        last = math.log(size) if show else last
    ax.xaxis.set_major_locator(FixedLocator(sizes))
    ax.xaxis.set_major_formatter(FixedFormatter(labels))
    ax.xaxis.set_minor_locator(NullLocator())
