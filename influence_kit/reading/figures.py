"""Plots: tidy tables in, matplotlib figures out; nothing is computed that a table should hold, nothing is saved.

Each raises UserError where its table lacks a column or has no rows. Columns low and high hold 95 % intervals.
"""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy

from influence_kit.errors import UserError
from influence_kit.reading import style as look
from influence_kit.reading.axes import (
    blank,
    colours_of,
    draw_references,
    draw_series,
    keys_of,
    label_panels,
    legend_below,
    name_of,
    need,
    size_axis,
    styled,
)
from influence_kit.reading.style import number, size_label

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


def ccdf_points(values, limit: int = 400) -> "pandas.DataFrame":
    """Columns influence, ccdf (share of the positive `values` at least as large), at ≤ `limit` log-spaced ranks."""
    import pandas

    values = numpy.sort(numpy.asarray(values, dtype=float))
    values = values[values > 0][::-1]
    ranks = numpy.unique(numpy.geomspace(1, max(len(values), 1), limit).round().astype(int))[: len(values)]
    return pandas.DataFrame({"influence": values[ranks - 1], "ccdf": ranks / max(len(values), 1)})


@styled
def ccdf_panels(df: "pandas.DataFrame", fits: "pandas.DataFrame", unit: str = "nats", columns: int = 3) -> "Figure":
    """CCDF of positive influence, log-log, on one pair of axes' scales.

    df: panel, influence, ccdf (see ccdf_points). fits, one row per panel: panel, xmin, alpha (density exponent; the
    survival exponent is alpha - 1), alpha_low, alpha_high; optional: mu and sigma (lognormal), p_value (KS).
    """
    need(df, "panel", "influence", "ccdf")
    need(fits, "panel", "xmin", "alpha", "alpha_low", "alpha_high")
    panels = keys_of(df, "panel")
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig, axes = blank(rows, columns, 0.9 + 2.4 * rows, sharex=True, sharey=True)
    erfc = numpy.vectorize(math.erfc)
    for ax, panel in zip(axes.flat, panels, strict=False):
        points = df[df["panel"] == panel].sort_values("influence")
        x, ccdf = points["influence"].to_numpy(float), points["ccdf"].to_numpy(float)
        ax.plot(x, ccdf, ".", color=look.INK, markersize=3, label="observed", alpha=0.7)
        for fit in fits[fits["panel"] == panel].itertuples():
            start = ccdf[numpy.searchsorted(x, fit.xmin).clip(max=len(x) - 1)]
            grid = numpy.geomspace(fit.xmin, x[-1], 80)
            power = [start * (grid / fit.xmin) ** (1 - a) for a in (fit.alpha, fit.alpha_high, fit.alpha_low)]
            ax.fill_between(grid, power[1], power[2], color=look.LANGUAGES[0], alpha=0.2, linewidth=0)
            ax.plot(grid, power[0], color=look.LANGUAGES[0], label="power law, 95 % band of the exponent")
            if numpy.isfinite(getattr(fit, "sigma", math.nan)):
                tail = erfc((numpy.log(grid) - fit.mu) / fit.sigma / 2**0.5)
                ax.plot(grid, start * tail / tail[0], "--", color=look.LANGUAGES[1], label="lognormal, same tail")
            ax.axvline(fit.xmin, color=look.FAINT, linewidth=0.8, linestyle=":")
            ax.annotate(f"xmin {number(fit.xmin, 2)} ", (fit.xmin, 0.03), xycoords=("data", "axes fraction"),
                        ha="right", fontsize=8, color=look.FAINT)  # fmt: skip
            title = f"{name_of(panel)}\nα = {fit.alpha:.2f} [{fit.alpha_low:.2f}, {fit.alpha_high:.2f}]"
            if numpy.isfinite(p := getattr(fit, "p_value", math.nan)):
                title += ", KS p < 0.001" if p < 0.001 else f", KS p = {p:.2g}"
            ax.set_title(title, fontsize=8.8)
        ax.set(xscale="log", yscale="log")
    # The few scores next to 0 would stretch the axis by decades and hide the tail.
    axes[0, 0].set(xlim=(0.2 * df[df["ccdf"] < 0.95]["influence"].min(), 2 * df["influence"].max()))
    axes[0, 0].set_ylim(0.6 * df["ccdf"].min(), 1.5)
    label_panels(fig, axes, len(panels), f"influence ({unit})", "share of positive scores at least this large")
    legend_below(fig, axes)
    return fig


@styled
def coverage_curve(df: "pandas.DataFrame", nulls: "pandas.DataFrame | None" = None) -> "Figure":
    """Share of positive influence held by the strongest share of sequences.

    df: group, share_of_sequences, share_of_influence (0 to 1), low, high; kind 'trained' (default; coloured by size),
    or another word such as 'untrained' or 'shuffled' (dashed). nulls: null, and the same columns (grey).
    """
    needed = "share_of_sequences", "share_of_influence", "low", "high"
    need(df, "group", *needed)
    fig, ((ax,),) = blank(height=4.4)
    df = df if "kind" in df.columns else df.assign(kind="trained")
    trained = keys_of(df[df["kind"] == "trained"], "group")
    colours = colours_of(trained, "sizes")
    controls = [key for key in keys_of(df, "group") if key not in colours]
    colours |= dict(zip(controls, ("#cc79a7", "#e69f00", "#7f5539", "#56b4e9"), strict=False))
    curves = [(df[df["group"] == key], colours[key], name_of(key), "-" if key in trained else "--") for key in colours]
    if nulls is not None:
        need(nulls, "null", *needed)
        greys = colours_of(keys_of(nulls, "null"), "nulls")
        lines = dict(zip(greys, (":", "-."), strict=False))
        curves += [(nulls[nulls["null"] == k], greys[k], f"{k} null", lines.get(k, ":")) for k in greys]
    for part, colour, label, line in curves:
        part = part.assign(**{c: 100 * part[c] for c in needed})
        draw_series(ax, part, "share_of_sequences", "share_of_influence", colour, label, line=line)
    ax.set(xscale="log", xlim=(100 * df["share_of_sequences"].min(), 100), ylim=(0, 102))
    ax.set(xlabel="strongest sequences (share of all)", ylabel="share of positive influence")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g} %")
    ax.axvline(1, color=look.FAINT, linewidth=0.8)
    ax.annotate(" top 1 %", (1, 0.96), xycoords=("data", "axes fraction"), fontsize=8.5, color=look.FAINT)
    legend_below(fig, ax)
    return fig


@styled
def estimate_points(
    df: "pandas.DataFrame",
    x: str = "parameters",
    y: str = "estimate",
    low: str = "low",
    high: str = "high",
    hue: str | None = None,
    *,
    xlabel: str = "non-embedding parameters",
    ylabel: str,
    references: Mapping[str, float] | None = None,
    palette: str = "languages",
    sizes: bool = True,
    log_y: bool = False,
    lines: bool = True,
) -> "Figure":
    """Estimates with 95 % intervals against model size (log axis ticked at the sizes; `sizes=False`: a plain x axis).

    df: `x`, `y`, `low`, `high` and, where there are several series, `hue`. references: label -> height.
    """
    need(df, x, y, low, high, *([hue] if hue else []))
    df = df.rename(columns={low: "low", high: "high"})
    fig, ((ax,),) = blank(height=4.0)
    keys = keys_of(df, hue) if hue else [None]
    colours = colours_of(keys, palette) if hue else {None: look.INK}
    for i, (key, colour) in enumerate(colours.items()):
        # Intervals at one size stand beside each other, not on top of each other.
        dodge = 1.06 ** (i - (len(keys) - 1) / 2) if sizes else 1.0
        part = df[df[hue] == key] if hue else df
        draw_series(ax, part, x, y, colour, name_of(key) if hue else "estimate, 95 % interval", band=False,
                    line="-" if lines else "", marker=look.MARKERS[i % len(look.MARKERS)], dodge=dodge)  # fmt: skip
    draw_references(ax, references)
    if sizes:
        size_axis(ax, df[x])
    if log_y:
        ax.set_yscale("log")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if hue or references:
        legend_below(fig, ax)
    return fig


@styled
def estimate_bars(
    df: "pandas.DataFrame",
    *,
    xlabel: str,
    reference: Mapping[str, float] | None = None,
    log_x: bool = False,
    hue: str | None = None,
) -> "Figure":
    """Forest plot, one line per row, top to bottom in the table's order, the number written at the right.

    df: label, estimate, low, high; `hue`: a column that colours the rows. reference: label -> place of a vertical line.
    """
    need(df, "label", "estimate", "low", "high", *([hue] if hue else []))
    fig, ((ax,),) = blank(height=1.1 + 0.32 * len(df))
    colours = colours_of(keys_of(df, hue), "languages") if hue else {}
    for place, row in enumerate(df.to_dict("records")):
        colour = colours[row[hue]] if hue else look.INK
        ax.hlines(place, row["low"], row["high"], color=colour, linewidth=2)
        ax.plot(row["estimate"], place, "o", color=colour, label=name_of(row[hue]) if hue else "_")
        text = f"{number(row['estimate'])}  [{number(row['low'])}, {number(row['high'])}]"
        ax.annotate(text, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=8.5)
    for label, at in (reference or {}).items():
        ax.axvline(at, color=look.FAINT, linestyle="--", linewidth=1.1, label=label)
    ax.set(yticks=range(len(df)), yticklabels=df["label"], ylim=(len(df) - 0.4, -0.6), xlabel=xlabel)
    ax.grid(axis="y", visible=False)
    if log_x:
        ax.set_xscale("log")
    if hue or reference:
        legend_below(fig, ax)
    return fig


@styled
def path_over_training(
    df: "pandas.DataFrame",
    value: str,
    *,
    ylabel: str,
    x: str = "tokens",
    xlabel: str = "training tokens",
    group: str = "model",
    split: str | None = None,
    references: Mapping[str, float] | None = None,
    log_x: bool = True,
) -> "Figure":
    """A quantity along checkpoints, one line per model, 95 % band where the table has low and high.

    df: `group` (parameter counts or names, light to dark), `x`, `value`; low, high; `split`: shown by line style.
    """
    need(df, group, x, value, *([split] if split else []))
    fig, ((ax,),) = blank(height=3.9)
    splits = keys_of(df, split) if split else [None]
    for i, (key, colour) in enumerate(colours_of(keys_of(df, group), "sizes").items()):
        label = name_of(key)  # said once, by the first line that there is
        for part, line in zip(splits, ("-", "--", ":", "-."), strict=False):
            rows = df[(df[group] == key) & ((df[split] == part) if split else True)]
            marker = look.MARKERS[i % len(look.MARKERS)] if len(rows) <= 12 else ""
            if len(rows):
                draw_series(ax, rows, x, value, colour, label, line=line, marker=marker)
                label = "_"
    for part, line in zip(splits if split else [], ("-", "--", ":", "-."), strict=False):
        ax.plot([], [], line, color=look.FAINT, label=str(part))
    draw_references(ax, references, skip=len(splits) - 1)
    if log_x:
        ax.set_xscale("log" if (df[x] > 0).all() else "symlog")
    ax.xaxis.set_major_formatter(lambda tokens, _: size_label(tokens))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    legend_below(fig, ax, columns=8)
    return fig


def loss_curves(df: "pandas.DataFrame", references: Mapping[str, float] | None = None) -> "Figure":
    """Losses in training. df: model, tokens, split ('train', 'held-out'), loss (nats per token); low, high."""
    return path_over_training(df, "loss", ylabel="loss (nats per token)", split="split", references=references)


@styled
def language_matrix(
    df: "pandas.DataFrame", *, unit: str, neutral: float | None = None, log: bool = False, panel: str | None = None
) -> "Figure":
    """Heat map, language of the query by language of the sequence, the number (and interval) in each cell.

    df: query_language, sequence_language, value; low, high; `panel`: a column of small multiples (one scale for all).
    neutral: the value without effect (1 for a lift): the scale is symmetric about it, blue below, vermillion above.
    """
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize

    need(df, "query_language", "sequence_language", "value", *([panel] if panel else []))
    panels = keys_of(df, panel) if panel else [None]
    queries, sequences = keys_of(df, "query_language"), keys_of(df, "sequence_language")
    values = df["value"].to_numpy(float)
    if log and (values <= 0).any():
        raise UserError(f"a log scale needs values above 0, but the smallest is {values.min()}: pass log=False")
    if neutral is None:
        colours, norm = ["#ffffff", "#7fbfb3"], (LogNorm if log else Normalize)(values.min(), values.max())
    else:
        colours = ["#66aad1", "#ffffff", "#e69e66"]  # the two colours at alpha .6, so that black numbers stay legible
        if log:
            reach = numpy.exp(numpy.abs(numpy.log(values / neutral)).max()) * 1.001
            norm = LogNorm(neutral / reach, neutral * reach)
        else:
            reach = numpy.abs(values - neutral).max() or 1.0
            norm = Normalize(neutral - reach, neutral + reach)
    fig, axes = blank(1, len(panels), 1.2 + 0.55 * len(queries), sharey=True)
    mesh = None
    for ax, key in zip(axes.flat, panels, strict=True):
        grid = numpy.full((len(queries), len(sequences)), numpy.nan)
        for row in (df[df[panel] == key] if panel else df).to_dict("records"):
            i, j = queries.index(row["query_language"]), sequences.index(row["sequence_language"])
            grid[i, j] = row["value"]
            ax.text(j, i - (0.12 if "low" in row else 0), number(row["value"]), ha="center", va="center", fontsize=9)
            if "low" in row:
                interval = f"[{number(row['low'], 2)}, {number(row['high'], 2)}]"
                ax.text(j, i + 0.22, interval, ha="center", va="center", fontsize=6.8)
        cmap = LinearSegmentedColormap.from_list("matrix", colours)
        corners = numpy.arange(len(sequences) + 1) - 0.5, numpy.arange(len(queries) + 1) - 0.5
        mesh = ax.pcolormesh(*corners, grid, norm=norm, cmap=cmap, edgecolors="white", linewidth=1.5)
        ax.set(xticks=range(len(sequences)), xticklabels=sequences, yticks=range(len(queries)), yticklabels=queries)
        ax.grid(visible=False)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_title(name_of(key) if panel else "")
    axes[0, 0].invert_yaxis()
    fig.supxlabel("language of the training sequence", fontsize=9.5)
    axes[0, 0].set_ylabel("language of the query")
    ticks = (numpy.geomspace if log else numpy.linspace)(norm.vmin, norm.vmax, 5)  # type: ignore[arg-type]
    fig.colorbar(mesh, ax=axes, label=unit, ticks=ticks, format=lambda value, _: number(value, 2)).minorticks_off()
    return fig


@styled
def score_histogram(df: "pandas.DataFrame", panel: str | None = None, unit: str = "nats", bins: int = 60) -> "Figure":
    """Scores of both signs on one symmetric axis (asinh: linear around 0, logarithmic beyond), counts logarithmic.

    df: influence; `panel`: a column of small multiples.
    """
    need(df, "influence", *([panel] if panel else []))
    panels = keys_of(df, panel) if panel else [None]
    size = df["influence"].abs()
    if not (reach := float(size.max())) > 0:
        raise UserError("all scores in the histogram are 0: look at the query's gradient, which must have vanished")
    linear = float(size[size > 0].median())
    edges = linear * numpy.sinh(numpy.linspace(-1, 1, bins + 1) * math.asinh(reach / linear))
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    fig, axes = blank(rows, columns, 0.8 + 2.3 * rows, sharex=True, sharey=True)
    ticks: list[float] = []
    gap = 0.16 * columns * math.asinh(reach / linear)
    for power in range(math.floor(math.log10(reach)), math.floor(math.log10(linear)) - 1, -1):
        place = math.asinh(10.0**power / linear)
        if place > gap and (not ticks or math.asinh(ticks[-1] / linear) - place > gap):
            ticks.append(10.0**power)
    for ax, key in zip(axes.flat, panels, strict=False):
        values = (df[df[panel] == key] if panel else df)["influence"]
        for half, colour in ((values[values < 0], look.NEGATIVE), (values[values >= 0], look.POSITIVE)):
            label = f"{'lowers' if colour == look.NEGATIVE else 'raises'} the completion's log probability"
            ax.hist(half, edges, color=colour, alpha=0.6, label=label)
        ax.set_xscale("asinh", linear_width=linear)
        ax.set(yscale="log", xlim=(-reach * 1.05, reach * 1.05), xticks=[-t for t in ticks] + [0] + ticks)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e-0", "e-") if value else "0")
        ax.minorticks_off()
        ax.set_title(name_of(key) if panel else "")
    label_panels(fig, axes, len(panels), f"influence ({unit})", "sequences")
    legend_below(fig, axes)
    return fig


def describe(
    df: "pandas.DataFrame", value: str, *, what: str, by: str | None = None, x: str | None = None, unit: str = ""
) -> str:
    """Alt text from the data: what is shown, and for each group its range, its extremes and the trend over `x`.

    Columns low and high, where there are any, give the interval of the largest and smallest value.
    """
    need(df, value, *[column for column in (by, x) if column])
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
