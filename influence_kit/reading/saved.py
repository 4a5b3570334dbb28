"""One way to write a figure: stable bytes, with its table, alt text and provenance."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from influence_kit.errors import UserError
from influence_kit.files import write_whole
from influence_kit.reading import fonts
from influence_kit.reading.style import STYLE, style

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class SavedFigure:
    """A figure's files and its alt text; as a cell's last value it shows the PNG with that text.

    Only image/png is offered: notebook viewers that strip styles show it, and nbconvert reads `alt` from the metadata.

    Attributes:
        name: The files' name without its ending.
        alt: What the figure shows, in words and numbers.
        png: Path of the picture; `svg`, `parquet` and `csv` likewise.
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
    fig: Figure, folder: str | Path, name: str, *, table: pandas.DataFrame, alt: str, provenance: dict
) -> SavedFigure:
    """Write `name`.png, .svg, .parquet and .csv: the same inputs give the same bytes on one machine.

    Args:
        fig: What was drawn.
        folder: Where the files go; made where it is not there.
        name: A plain file name without its ending.
        table: What was drawn, estimates as rows of `Estimate.row`; the CSV keeps 9 significant digits, the parquet all.
        alt: What the figure shows, in words and numbers (see `figures.describe`).
        provenance: Where it comes from, as JSON can hold it, without clock or path; goes into each file but the CSV.

    Raises:
        UserError: an empty table or alt text, a name that is a path, or intervals without the values of their seeds.
    """
    import pyarrow
    import pyarrow.parquet

    if table.empty or not alt.strip():
        raise UserError(f"figure {name!r} has {len(table)} table rows and alt text {alt!r}: give both (see describe)")
    if not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"figure name {name!r} is not a plain file name: use letters, digits, '-', '_' and '.'")
    if {"low", "high"} <= set(table.columns) and not {"estimate", "interval"} <= set(table.columns):
        raise UserError(
            f"figure {name!r} has intervals without their seeds: make the rows of its table by Estimate.row"
        )
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
    files = {"png": png.getvalue(), "svg": drawing, "parquet": parquet.getvalue(), "csv": text}
    paths = {kind: folder / f"{name}.{kind}" for kind in files}
    for kind, content in files.items():
        write_whole(paths[kind], content)
    return SavedFigure(name=name, alt=alt, **{kind: str(path) for kind, path in paths.items()})
