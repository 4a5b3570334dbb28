"""What the plots share: checked tables, blank figures, order and colours of groups, lines with intervals."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy

from influence_kit.errors import UserError
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


def need(df: "pandas.DataFrame", *columns: str) -> None:
    """Raise UserError where the table lacks a column or has no rows."""
    if absent := [c for c in columns if c not in df.columns]:
        raise UserError(f"the figure's table lacks column(s) {absent}: it has {list(df.columns)}")
    if df.empty:
        raise UserError(f"the figure's table has no rows (columns {list(df.columns)}): were any selected?")


def blank(rows: int = 1, columns: int = 1, height: float = 3.6, **options):
    """Figure of notebook width and its axes, an array [rows, columns]."""
    # Figure without pyplot: no global state to leak, and a notebook shows it only once, where it is saved.
    from matplotlib.figure import Figure

    fig = Figure(figsize=(look.WIDTH, height))
    return fig, fig.subplots(rows, columns, squeeze=False, **options)


def colours_of(keys: list, palette: str) -> dict:
    """Colour per key; palette 'sizes' (light to dark), 'languages' (distinct) or 'nulls' (greys)."""
    if palette == "sizes":
        return dict(zip(keys, look.size_colours(len(keys)), strict=True))
    pool = {"languages": look.LANGUAGES, "nulls": look.NULLS}[palette]
    return {key: pool[i % len(pool)] for i, key in enumerate(keys)}


def keys_of(df: "pandas.DataFrame", column: str) -> list:
    """Numbers ascend (model sizes); names keep the table's order, which is the author's."""
    keys = list(dict.fromkeys(df[column]))
    return sorted(keys) if all(isinstance(key, int | float | numpy.number) for key in keys) else keys


def name_of(key) -> str:
    """Numbers as short sizes (1900000 -> 1.9M), names as they are."""
    return size_label(float(key)) if isinstance(key, int | float | numpy.number) else str(key)


def legend_below(fig: "Figure", axes, columns: int = 6) -> None:
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


def label_panels(fig: "Figure", axes, used: int, xlabel: str, ylabel: str) -> None:
    """Label the lowest panel of each column and the left side; hide the panels beyond the first `used`."""
    for ax in axes.flat[used:]:
        ax.set_visible(False)
    for ax in axes.flat[max(0, used - axes.shape[1]) : used]:
        ax.set_xlabel(xlabel)
        ax.xaxis.set_tick_params(labelbottom=True)
    fig.supylabel(ylabel, fontsize=9.5)


def size_axis(ax: "Axes", sizes) -> None:
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


def draw_series(
    ax: "Axes", df: "pandas.DataFrame", x: str, y: str, colour: str, label: str,
    *, line: str = "-", marker: str = "", band: bool = True, dodge: float = 1.0,
) -> None:  # fmt: skip
    """A line with its interval, as a band or as bars; columns low and high where there are any."""
    df = df.sort_values(x)
    at, value = df[x].to_numpy(float) * dodge, df[y].to_numpy(float)
    if {"low", "high"} <= set(df.columns) and df["low"].notna().any():
        low, high = df["low"].to_numpy(float), df["high"].to_numpy(float)
        if band:
            ax.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
        else:
            ax.vlines(at, low, high, color=colour, linewidth=1.6)
    ax.plot(at, value, linestyle=line or "none", color=colour, label=label, marker=marker)


def draw_references(ax: "Axes", references: Mapping[str, float] | None, skip: int = 0) -> None:
    """Grey horizontal lines, label -> height; `skip` line styles are taken already."""
    for i, (label, height) in enumerate((references or {}).items(), start=skip):
        ax.axhline(height, color=look.FAINT, linestyle=("--", ":", "-.")[i % 3], linewidth=1.1, label=label)
