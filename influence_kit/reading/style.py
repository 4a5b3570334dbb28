"""One look for every figure, and one way to write it: stable bytes, with its table, alt text and provenance."""

import base64
import contextlib
import io
import json
import logging
import os
import re
import warnings
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from influence_kit.errors import UserError
from influence_kit.reading import fonts

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

POSITIVE, NEGATIVE = "#d55e00", "#0072b2"
LANGUAGES = ("#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1a1a1a", "#7f5539")  # Okabe-Ito, less the two of the sign
NULLS = ("#6e6e6e", "#a3a3a3", "#c9c9c9")
MARKERS = "os^Dv<P"
INK, FAINT = "#1a1a1a", "#767676"
WIDTH = 8.0  # inches: a notebook's column

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
def style():
    """Context in which figures are drawn and written; starts from matplotlib's defaults: no user setting leaks in."""
    import matplotlib.style

    finder = logging.getLogger("matplotlib.font_manager")
    level = finder.level
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # fonts.fallbacks says it once, with the remedy
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


def number(value: float, digits: int = 3, sign: bool = False) -> str:
    """Significant digits, never decimals: 1e-5 does not become 0."""
    return f"{value:{'+' if sign else ''}.{digits}g}".replace("e-0", "e-").replace("e+0", "e")


def size_label(parameters: float) -> str:
    """1234567 -> '1.2M'."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= unit:
            return f"{parameters / unit:.{1 if parameters < 10 * unit else 0}f}".removesuffix(".0") + letter
    return f"{parameters:g}"


def write_atomic(path: Path, data: bytes) -> Path:
    """Write beside and rename: a reader, or a run that was killed, never meets half a file."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return path


@dataclass(frozen=True, repr=False)
class SavedFigure:
    """A figure's files and its alt text; as a cell's last value it shows the PNG with that text.

    Only image/png is offered: notebook viewers that strip styles show it, and nbconvert reads `alt` from the metadata.
    """

    name: str
    alt: str
    png: str
    svg: str
    parquet: str
    csv: str

    def __repr__(self) -> str:
        return self.alt  # what an executed notebook keeps as text: no path of the machine that made it

    def _repr_mimebundle_(self, include=None, exclude=None):
        from matplotlib.image import imread

        data = Path(self.png).read_bytes()
        width = round(imread(io.BytesIO(data)).shape[1] * STYLE["figure.dpi"] / STYLE["savefig.dpi"])
        bundle = {"image/png": base64.b64encode(data).decode(), "text/plain": self.alt}
        return bundle, {"image/png": {"alt": self.alt, "width": width}}


def save_figure(
    fig: "Figure", folder: str | Path, name: str, table: "pandas.DataFrame", alt: str, provenance: dict
) -> SavedFigure:
    """Write `name`.png, .svg, .parquet and .csv: the same inputs give the same bytes on one machine.

    `table` is what was drawn; the CSV keeps 9 significant digits, the parquet all. `provenance` (JSON-able, without
    clock or path) goes into each but the CSV. Raises UserError for an empty table or alt text, or a name with a path.
    """
    import pyarrow
    import pyarrow.parquet

    if table.empty or not alt.strip():
        raise UserError(f"figure {name!r} has {len(table)} table rows and alt text {alt!r}: give both (see describe)")
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"figure name {name!r} is not a plain file name: use letters, digits, '-', '_' and '.'")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    origin = json.dumps(provenance, sort_keys=True, ensure_ascii=False)
    png, svg, parquet = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with style():
        for text in fig.findobj(match=lambda artist: hasattr(artist, "set_fontfamily")):
            if len(needed := fonts.families(text.get_text())) > 1:  # type: ignore[attr-defined]
                text.set_fontfamily(needed)  # type: ignore[attr-defined]
        fig.savefig(png, format="png", metadata={"Software": None, "Description": alt, "Provenance": origin})
        kept = {"Date": None, "Creator": "influence_kit", "Title": name, "Description": alt, "Source": origin}
        fig.savefig(svg, format="svg", metadata=kept)
    drawing = re.sub(  # screen readers read <desc>, not the RDF block that matplotlib writes
        r"(<svg\b)([^>]*>)", lambda m: f'{m[1]} role="img"{m[2]}\n <desc>{escape(alt)}</desc>',
        svg.getvalue().decode(), count=1,
    )  # fmt: skip
    # Model sizes beside names of controls in one column: an Arrow column has one type.
    mixed = [c for c in table.columns if table[c].dtype == object and table[c].map(type).nunique() > 1]
    table = table.astype(dict.fromkeys(mixed, str))
    columns = pyarrow.Table.from_pandas(table, preserve_index=False)
    pyarrow.parquet.write_table(columns.replace_schema_metadata({"influence_kit": origin}), parquet)
    text = table.to_csv(index=False, float_format="%.9g", lineterminator="\n")
    data = {"png": png.getvalue(), "svg": drawing.encode(), "parquet": parquet.getvalue(), "csv": text.encode()}
    files = {kind: str(write_atomic(folder / f"{name}.{kind}", content)) for kind, content in data.items()}
    return SavedFigure(name=name, alt=alt, **files)
