"""One look for every figure: the style they are drawn in, one palette a meaning, and how numbers are written."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence

from influence_kit.reading import fonts

POSITIVE, NEGATIVE = "#d55e00", "#0072b2"  # the sign of a score, and nothing else
INK, FAINT = "#1a1a1a", "#767676"
MARKERS = "os^Dv<P"
LINES = ("-", "--", ":", "-.")
WIDTH = 8.0  # inches: a notebook's column

# One palette a meaning, each told from the others at a glance: Okabe and Ito's less the two of the sign; Paul Tol's
# "muted"; his "medium contrast". What a meaning's table names keeps its colour in every chapter, the rest follows in
# the order of the pool.
POOLS = {
    "methods": ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1a1a1a", "#7f5539"),
    "worlds": ("#882255", "#999933", "#332288", "#44aa99", "#cc6677", "#88ccee"),
    "languages": ("#004488", "#997700", "#994455", "#6699cc", "#ee99aa", "#eecc66"),
    "roles": ("#117733", "#aa4499", "#b8860b"),
    "nulls": ("#6e6e6e", "#a3a3a3", "#c9c9c9"),
}
KNOWN = {
    "methods": {"EK-FAC": "#009e73", "influence": "#009e73", "gradient dot": "#cc79a7", "BM25": "#56b4e9"},
    "worlds": dict(zip(("Atlas", "Ladder", "Cast", "real text", "spoken lines"), POOLS["worlds"])),
    "roles": dict(zip(("imitation", "description only", "planning only"), POOLS["roles"])),
    "languages": dict(zip(("English", "German", "Turkish", "Korean", "Chinese"), POOLS["languages"])),
}

STYLE = {
    "font.family": [fonts.BASE], "font.size": 9.5, "axes.titlesize": 10, "axes.labelsize": 9.5, "legend.fontsize": 8.5,
    "xtick.labelsize": 8.5, "ytick.labelsize": 8.5, "axes.titlelocation": "left", "text.color": INK,
    "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": FAINT, "ytick.color": FAINT,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.6,
    "lines.markersize": 5, "legend.frameon": False, "figure.dpi": 100, "savefig.dpi": 144, "figure.facecolor": "white",
    "figure.constrained_layout.use": True, "svg.hashsalt": "influence_kit", "svg.fonttype": "path",
}  # fmt: skip


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Context in which figures are drawn and written; starts from matplotlib's defaults: no user setting leaks in."""
    import matplotlib.style

    finder = logging.getLogger("matplotlib.font_manager")
    level = finder.level
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # fonts.fallbacks says it once, with the remedy
        warnings.filterwarnings("ignore", message="The copy keyword is deprecated")  # seaborn 0.13.2 with pandas 3
        finder.setLevel(logging.ERROR)  # fallback fonts seldom have a bold face, and the regular one serves
        try:
            yield
        finally:
            finder.setLevel(level)


def size_colours(count: int) -> list[str]:
    """`count` colours for model sizes, small to large as light to dark: lightness alone carries the order."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    ramp = LinearSegmentedColormap.from_list("sizes", ["#9ad2c0", "#4f9da6", "#3f5f94", "#33266b", "#140a26"])
    return [to_hex(ramp(i / max(count - 1, 1))) for i in range(count)]


def colours_of(keys: Sequence, palette: str | None = None) -> dict:
    """A colour for each series.

    Args:
        keys: Names of the series, in the order in which they are shown.
        palette: "sizes" or one of `POOLS`. None: told from the keys ("595k weights" are sizes, "Atlas" is a world);
            keys that say nothing of themselves take the colours of methods.

    Returns:
        Colour by key. Colours come again where there are more series than a pool holds, told apart by markers.
    """
    if palette is None:
        sizes = all(re.fullmatch(r"[\d.,]+[kMB]?( weights)?", str(key)) for key in keys)
        known = (meaning for meaning, named in KNOWN.items() if set(keys) & set(named))
        palette = "sizes" if sizes else next(known, "methods")
    if palette == "sizes":
        return dict(zip(keys, size_colours(len(keys))))
    fixed = {key: KNOWN[palette][key] for key in keys if key in KNOWN.get(palette, {})}
    free = [colour for colour in POOLS[palette] if colour not in fixed.values()] or POOLS[palette]
    others = [key for key in keys if key not in fixed]
    found = fixed | {key: free[i % len(free)] for i, key in enumerate(others)}
    return {key: found[key] for key in keys}


def number(value: float, digits: int = 3, sign: bool = False) -> str:
    """Significant digits, never decimals: 1e-5 does not become 0."""
    return f"{value:{'+' if sign else ''}.{digits}g}".replace("e-0", "e-").replace("e+0", "e")


def size_label(parameters: float) -> str:
    """1234567 -> '1.2M'."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.{1 if parameters < 10 * unit else 0}f}".removesuffix(".0") + letter
    return f"{parameters:g}"
