"""Whether a figure's table came out as committed: what is kept of it, and under which tolerances it is compared."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from influence_kit.measures.intervals import SEED

if TYPE_CHECKING:
    import pandas


def summarise_table(table: pandas.DataFrame) -> dict:
    """What a figure's table must keep: `{"rows": n, "columns": {name: {"mean", "sd", "n"}}}` of its numeric columns.

    sd is the population's; nan and infinite entries are left out and lower n. Columns of an estimate with its interval
    (estimate, low, high) also keep its mean width: where that is wide, the table rests on few units, and a last bit can move
    an end of it by a whole unit.
    """
    columns = {}
    width = math.nan
    if {"low", "high"} <= set(table.columns):
        widths = (table["high"] - table["low"]).to_numpy(dtype=float)
        width = float(widths[np.isfinite(widths)].mean()) if np.isfinite(widths).any() else math.nan
    for name in table.columns:
        column = table[name]
        if column.dtype.kind not in "biuf" or str(name).startswith(
            SEED
        ):  # one seed's number is noisier than the estimate
            continue
        values = column.to_numpy(dtype=float)
        values = values[np.isfinite(values)]
        mean, sd = (float(values.mean()), float(values.std())) if values.size else (math.nan, math.nan)
        columns[str(name)] = {"mean": mean, "sd": sd, "n": int(values.size)}
        if name in ("estimate", "low", "high") and math.isfinite(width):
            columns[str(name)]["width"] = width
    return {"rows": len(table), "columns": columns}


def expectation(summary: dict, rtol: float = 0.05, sd_share: float = 0.25) -> dict:
    """A summary as it is committed: with the tolerances that later runs are compared under."""
    return {**summary, "rtol": rtol, "sd_share": sd_share}


def compare(
    summary: dict, expected: dict | None, rtol: float | None = None, sd_share: float | None = None
) -> tuple[str, list[str]]:
    """Whether a figure's table came out as committed, and which columns did not.

    A column is reproduced when its mean and its sd lie within max(rtol |mean|, sd_share sd, sd_share width, 1e-9) of the expected
    ones: the sd too, because a scrambled column can keep its mean. Another number of rows counts as the column "rows".

    Args:
        summary: of `summarise_table`.
        expected: of `expectation`, read from the committed file; None when the figure has none yet.
        rtol: tolerance relative to the mean; the one in `expected` by default.
        sd_share: tolerance relative to the spread; the one in `expected` by default.

    Returns:
        (status, columns): status "reproduced", "differs" or "new".
    """
    if expected is None:
        return "new", []
    rtol = expected["rtol"] if rtol is None else rtol
    sd_share = expected["sd_share"] if sd_share is None else sd_share
    differing = ["rows"] if summary["rows"] != expected["rows"] else []
    for name in sorted(set(summary["columns"]) | set(expected["columns"])):
        now, then = summary["columns"].get(name), expected["columns"].get(name)
        if now is None or then is None or bool(now["n"]) != bool(then["n"]):
            differing.append(name)
        elif then["n"]:
            tolerance = max(rtol * abs(then["mean"]), sd_share * then["sd"], sd_share * then.get("width", 0.0), 1e-9)
            if max(abs(now["mean"] - then["mean"]), abs(now["sd"] - then["sd"])) > tolerance:
                differing.append(name)
    return ("differs" if differing else "reproduced"), differing
