"""Plots: tidy tables in, matplotlib figures out; nothing is computed that a table should hold, nothing is saved.

Columns low and high hold 95 % intervals. `title` is the finding's question or what the figure shows; `per_seed` holds
the value of each seed in the same columns as the table, shown as small dots behind the means. Each function raises
UserError where its table lacks a column or has no rows.

Series with intervals are drawn with seaborn's objects interface. The panels of a tail are matplotlib's own: each holds
a fit, its band and its own limits, which no mapping of columns to marks says shorter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy

from influence_kit.errors import UserError
from influence_kit.reading import style as look
from influence_kit.reading.axes import (
    blank,
    cut_at_zero,
    draw_references,
    draw_series,
    each_seed,
    keys_of,
    label_axes,
    legend_below,
    log_ticks,
    name_of,
    need,
    size_axis,
    styled,
)
from influence_kit.reading.style import colours_of, number, size_label

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def estimate_points(
    df: pandas.DataFrame,
    x: str = "parameters",
    *,
    ylabel: str,
    xlabel: str = "non-embedding parameters",
    hue: str | None = None,
    palette: str | None = None,
    references: Mapping[str, float] | None = None,
    sizes: bool = True,
    log_x: bool = False,
    log_y: bool = False,
    lines: bool = True,
    per_seed: pandas.DataFrame | None = None,
    title: str = "",
) -> Figure:
    """Estimates with their intervals as bars, against model size or another number.

    Args:
        df: `x`, estimate, low, high and, where there are several series, `hue`.
        x: Column of the horizontal place.
        ylabel: What an estimate is, with its unit.
        xlabel: What `x` is, with its unit.
        hue: Column that names the series.
        palette: As in `colours_of`.
        references: Name -> height of a grey line.
        sizes: A log axis ticked at the sizes, series beside each other at each; False: a plain axis.
        log_x: The plain axis is logarithmic.
        log_y: The vertical axis is logarithmic.
        lines: Points of a series are joined.
        per_seed: `x`, estimate and `hue`, a row a seed; by default the table's columns `seed_…`.
        title: The finding's question.
    """
    need(df, x, "estimate", "low", "high", hue)
    fig, ((ax,),) = blank(height=4.0, title=title)
    series = keys_of(df, hue) if hue else ["estimate, 95 % interval"]
    colours = colours_of(series, palette) if hue else {series[0]: look.INK}
    # Intervals at one place stand beside each other, not on top of each other, and a seed's dots beside its bar.
    shared = bool(hue) and bool((df.groupby(x)[hue].nunique() > 1).any())
    step, dots = (0.06, 0.015) if sizes else (0.03, 0.008) if shared else (0.0, 0.0)
    offset = {key: step * (i - (len(series) - 1) / 2) for i, key in enumerate(series)}
    places = numpy.log(df[x][df[x] > 0].astype(float)) if log_x else df[x].astype(float)
    wide = float(numpy.ptp(places)) / 3 or 1.0 if shared and not sizes else 1.0

    def placed(rows: pandas.DataFrame, by: float = 0.0) -> pandas.DataFrame:
        named = rows.assign(_series=rows[hue] if hue else series[0])
        at, moved = named[x].astype(float), wide * (named["_series"].map(offset).astype(float) + by)
        return named.assign(_at=at * numpy.exp(moved) if sizes or log_x else at + moved)

    table, cut = cut_at_zero(df, "estimate") if log_y else (df, df[:0])
    seeds = each_seed(df, "estimate", per_seed)
    if seeds is not None:
        seeds = placed(seeds, -dots)
    draw_series(ax, placed(table), "_at", "estimate", hue="_series", colours=colours, joined=lines, per_seed=seeds)
    draw_references(ax, references)
    label_axes(ax, xlabel, ylabel, log_x=log_x, log_y=log_y)
    if sizes:
        size_axis(ax, df[x])
    _go_on_below(ax, placed(cut), "_at", colours)
    if hue or references:
        legend_below(fig, ax)
    return fig


def _go_on_below(ax: Axes, cut: pandas.DataFrame, x: str, colours: Mapping) -> None:
    """Arrow heads at the ends of intervals that a log axis cannot show whole."""
    for row in cut.to_dict("records"):
        ax.plot(row[x], row["low"], "v", color=colours[row["_series"]], markersize=4)


@styled
def estimate_bars(
    df: pandas.DataFrame,
    *,
    xlabel: str,
    references: Mapping[str, float] | None = None,
    log_x: bool = False,
    hue: str | None = None,
    palette: str | None = None,
    per_seed: pandas.DataFrame | None = None,
    title: str = "",
) -> Figure:
    """Forest plot, one line per row, top to bottom in the table's order, the number written at the right.

    Args:
        df: label, estimate, low, high and, where rows are coloured, `hue`.
        xlabel: What an estimate is, with its unit.
        references: Name -> place of an upright grey line.
        log_x: The axis is logarithmic.
        hue: Column that colours the rows.
        palette: As in `colours_of`.
        per_seed: estimate and all columns of `df` but low and high that tell its rows apart, a row a seed; by default the
            columns `seed_…`.
        title: The finding's question.
    """
    need(df, "label", "estimate", "low", "high", hue)
    fig, ((ax,),) = blank(height=1.1 + 0.32 * len(df), title=title)
    series = keys_of(df, hue) if hue else [""]
    colours = colours_of(series, palette) if hue else {"": look.INK}
    rows = df.assign(_place=numpy.arange(len(df), dtype=float), _series=df[hue] if hue else "")
    seeds = each_seed(df, "estimate", per_seed)
    if seeds is not None:
        need(seeds, "estimate")
        told = [c for c in df.columns if c in seeds.columns and c not in ("estimate", "low", "high")]
        seeds = seeds.merge(rows[[*told, "_place", "_series"]], on=told)
        seeds["_place"] += 0.22  # below the bar, or it would hide them
    table, cut = cut_at_zero(rows, "estimate") if log_x else (rows, rows[:0])
    draw_series(
        ax, table, "estimate", "_place", hue="_series", colours=colours, joined=False, markers="o", per_seed=seeds,
        orient="y",
    )  # fmt: skip
    for row in rows.to_dict("records"):
        text = "–" if math.isnan(row["estimate"]) else number(row["estimate"])
        text += "" if math.isnan(row["low"]) else f"  [{number(row['low'])}, {number(row['high'])}]"
        ax.annotate(text, (1.02, row["_place"]), xycoords=("axes fraction", "data"), va="center", fontsize=8.5)
    for row in cut.to_dict("records"):
        ax.plot(row["low"], row["_place"], "<", color=colours[row["_series"]], markersize=4)
    draw_references(ax, references, upright=True)
    label_axes(ax, xlabel, "", log_x=log_x)
    if log_x:
        log_ticks(ax)
    ax.set(yticks=range(len(df)), yticklabels=df["label"], ylim=(len(df) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)
    if hue or references:
        legend_below(fig, ax)
    return fig


@styled
def path_over_training(
    df: pandas.DataFrame,
    value: str,
    *,
    ylabel: str,
    x: str = "tokens",
    xlabel: str = "training tokens",
    hue: str = "model",
    split: str | None = None,
    palette: str | None = None,
    references: Mapping[str, float] | None = None,
    log_x: bool = True,
    log_y: bool = False,
    per_seed: pandas.DataFrame | None = None,
    title: str = "",
) -> Figure:
    """A quantity along training or another axis, one line a series; intervals as bands, as bars on a log axis.

    Args:
        df: `hue`, `x`, `value`; low and high where there are intervals; `split`.
        value: Column of the quantity.
        ylabel: What it is, with its unit.
        x: Column of the horizontal place.
        xlabel: What `x` is, with its unit.
        hue: Column that names the series: parameter counts, light to dark, or names.
        split: Column that is told by the style of line.
        palette: As in `colours_of`.
        references: Name -> height of a grey line.
        log_x: The horizontal axis is logarithmic.
        log_y: The vertical axis is logarithmic.
        per_seed: The same columns without low and high, a row a seed; by default the columns `seed_…`.
        title: The finding's question.

    Raises:
        UserError: a log axis and a place or a value that is not above 0.
    """
    need(df, hue, x, value, split)
    if log_x and df[x].min() <= 0:
        raise UserError(f"a log axis needs places above 0, but the smallest {x} is {df[x].min():g}: pass log_x=False")
    fig, ((ax,),) = blank(height=3.9, title=title)
    colours = colours_of(keys_of(df, hue), palette)
    splits = dict(zip(keys_of(df, split), look.LINES)) if split else {}
    table, cut = cut_at_zero(df, value) if log_y else (df, df[:0])
    few = table.groupby([hue, *([split] if split else [])]).size().max() <= 12
    markers = look.MARKERS if few else ("",)
    draw_series(
        ax, table, x, value, hue=hue, colours=colours, split=split, lines=splits, markers=markers, band=not log_y,
        per_seed=each_seed(df, value, per_seed),
    )  # fmt: skip
    for name, line in splits.items():
        ax.plot([], [], line, color=look.FAINT, label=str(name))
    draw_references(ax, references, skip=max(0, len(splits) - 1))
    label_axes(ax, xlabel, ylabel, log_x=log_x, log_y=log_y)
    _go_on_below(ax, cut.assign(_series=cut[hue]), x, colours)
    ax.xaxis.set_major_formatter(lambda place, _: size_label(place))
    legend_below(fig, ax, columns=8)
    return fig


@styled
def coverage_curve(df: pandas.DataFrame, nulls: pandas.DataFrame | None = None, *, title: str = "") -> Figure:
    """Share of positive influence held by the strongest share of sequences.

    Args:
        df: group, share_of_sequences, estimate (the share of influence, 0 to 1), low, high; kind "trained" (the default; coloured by
            size), or another word such as "untrained" or "shuffled" (dashed).
        nulls: null, and the same columns (grey).
        title: The finding's question.
    """
    import pandas

    shares = ["share_of_sequences", "estimate", "low", "high"]
    need(df, "group", *shares)
    fig, ((ax,),) = blank(height=4.4, title=title)
    df = df if "kind" in df.columns else df.assign(kind="trained")
    trained = keys_of(df[df["kind"] == "trained"], "group")
    controls = [key for key in keys_of(df, "group") if key not in trained]
    colours = colours_of(trained, "sizes") | dict(zip(controls, look.POOLS["methods"][1:]))
    lines = dict.fromkeys(trained, "-") | dict.fromkeys(controls, "--")
    if nulls is not None:
        need(nulls, "null", *shares)
        grey = nulls.assign(group=nulls["null"] + " null")
        names = keys_of(grey, "group")
        colours |= colours_of(names, "nulls")
        lines |= dict(zip(names, (":", "-.", ":")))
        df = pandas.concat([df, grey])
    curves = df.assign(**{share: 100 * df[share] for share in shares})
    draw_series(
        ax,
        curves,
        shares[0],
        shares[1],
        hue="group",
        colours=colours,
        split="group",
        lines=lines,
        markers=("",),
        band=True,
    )
    label_axes(ax, "strongest sequences (share of all)", "share of positive influence", log_x=True)
    ax.set(xlim=(curves[shares[0]].min(), 100), ylim=(0, 102))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g} %")
    ax.axvline(1, color=look.FAINT, linewidth=0.8)
    ax.annotate(" top 1 %", (1, 0.96), xycoords=("data", "axes fraction"), fontsize=8.5, color=look.FAINT)
    legend_below(fig, ax)
    return fig


def ccdf_points(values, limit: int = 400) -> pandas.DataFrame:
    """What `ccdf_panels` draws of one query's influences.

    Args:
        values: Influence of each sequence [N].
        limit: The most points kept, at ranks spaced evenly in their logarithm.

    Returns:
        Columns influence and ccdf, the share of the positive `values` at least as large.
    """
    import pandas

    values = numpy.sort(numpy.asarray(values, dtype=float))
    values = values[values > 0][::-1]
    ranks = numpy.unique(numpy.geomspace(1, max(len(values), 1), limit).round().astype(int))[: len(values)]
    return pandas.DataFrame({"influence": values[ranks - 1], "ccdf": ranks / max(len(values), 1)})


@styled
def ccdf_panels(df: pandas.DataFrame, fits: pandas.DataFrame, *, title: str = "") -> Figure:
    """CCDF of positive influence (nats), log-log, on one pair of axes' scales, with the fitted power law.

    Args:
        df: panel, influence, ccdf (see `ccdf_points`).
        fits: A row a panel: panel, xmin, alpha (density exponent; the survival exponent is alpha - 1), alpha_low,
            alpha_high; optional: mu and sigma (lognormal), p_value (KS).
        title: The finding's question.
    """
    need(df, "panel", "influence", "ccdf")
    need(fits, "panel", "xmin", "alpha", "alpha_low", "alpha_high")
    panels = keys_of(df, "panel")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig, axes = blank(rows, columns, height=0.9 + 2.4 * rows, title=title, sharex=True, sharey=True)
    for ax, panel in zip(axes.flat, panels, strict=False):
        points = df[df["panel"] == panel].sort_values("influence")
        x, ccdf = points["influence"].to_numpy(float), points["ccdf"].to_numpy(float)
        ax.plot(x, ccdf, ".", color=look.INK, markersize=3, label="observed", alpha=0.7)
        for fit in fits[fits["panel"] == panel].itertuples():
            _draw_fit(ax, fit, x, ccdf)
        ax.set(xscale="log", yscale="log")
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax in axes.flat[max(0, len(panels) - columns) : len(panels)]:
        ax.set_xlabel("influence (nats)")
        ax.xaxis.set_tick_params(labelbottom=True)
    # The few scores next to 0 would stretch the axis by decades and hide the tail.
    axes[0, 0].set(xlim=(0.2 * df[df["ccdf"] < 0.95]["influence"].min(), 2 * df["influence"].max()))
    axes[0, 0].set_ylim(0.6 * df["ccdf"].min(), 1.5)
    for ax in axes[:, 0]:
        ax.set_ylabel("share of positive scores\nat least this large")
    legend_below(fig, axes)
    return fig


def _draw_fit(ax: Axes, fit, x: numpy.ndarray, ccdf: numpy.ndarray) -> None:
    """The power law of one panel with the band of its exponent, the lognormal of the same tail, and its start."""
    power_colour, lognormal_colour = look.POOLS["methods"][:2]
    start = ccdf[numpy.searchsorted(x, fit.xmin).clip(max=len(x) - 1)]
    grid = numpy.geomspace(fit.xmin, x[-1], 80)
    power = [start * (grid / fit.xmin) ** (1 - a) for a in (fit.alpha, fit.alpha_high, fit.alpha_low)]
    ax.fill_between(grid, power[1], power[2], color=power_colour, alpha=0.2, linewidth=0)
    ax.plot(grid, power[0], color=power_colour, label="power law, 95 % band of the exponent")
    if numpy.isfinite(getattr(fit, "sigma", math.nan)):
        tail = numpy.array([math.erfc(z / 2**0.5) for z in (numpy.log(grid) - fit.mu) / fit.sigma])
        ax.plot(grid, start * tail / tail[0], "--", color=lognormal_colour, label="lognormal, same tail")
    ax.axvline(fit.xmin, color=look.FAINT, linewidth=0.8, linestyle=":")
    place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "ha": "right", "fontsize": 8, "color": look.FAINT}
    ax.annotate(f"xmin {number(fit.xmin, 2)} ", (fit.xmin, 0.03), **place)
    title = f"{name_of(fit.panel)}\nα = {fit.alpha:.2f} [{fit.alpha_low:.2f}, {fit.alpha_high:.2f}]"
    if numpy.isfinite(p := getattr(fit, "p_value", math.nan)):
        title += ", KS p < 0.001" if p < 0.001 else f", KS p = {p:.2g}"
    ax.set_title(title, fontsize=8.8)


def describe(
    df: pandas.DataFrame, value: str, *, what: str, by: str | None = None, x: str | None = None, unit: str = ""
) -> str:
    """Alt text from the data: what is shown, and for each group its range, its extremes and the trend over `x`.

    Args:
        df: What is drawn; low and high, where there are any, are the interval of the largest and smallest value.
        value: Column of what is shown.
        what: What is shown, in words.
        by: Column that names the groups.
        x: Column of the horizontal place.
        unit: Unit of the values.
    """
    need(df, value, by, x)
    unit = f" {unit}" if unit else ""

    def at(row) -> str:
        known = "low" in row and row["low"] == row["low"]  # not nan
        interval = f" [{number(row['low'])}, {number(row['high'])}]" if known else ""
        return number(row[value]) + unit + interval + (f" at {x} {name_of(row[x])}" if x else "")

    sentences = [what.rstrip(".") + "."]
    for key in keys_of(df, by) if by else [None]:
        part = (df[df[by] == key] if by else df).dropna(subset=[value])
        head = f"{name_of(key)}: " if by else ""
        if part.empty:
            sentences.append(f"{head}no values.")
            continue
        smallest, largest = part.loc[part[value].idxmin()], part.loc[part[value].idxmax()]
        text = f"{head}{len(part)} values from {at(smallest)} to {at(largest)}" if len(part) > 1 else head + at(largest)
        if x and part[x].nunique() > 2:
            ordered = part.sort_values(x)
            trend = ordered[x].rank().corr(ordered[value].rank())
            word = "rises" if trend >= 0.7 else "falls" if trend <= -0.7 else "shows no steady trend"
            text += f"; {word} along {x} (rank correlation {trend:.2f})"
        sentences.append(text + ".")
    return " ".join(sentences)
