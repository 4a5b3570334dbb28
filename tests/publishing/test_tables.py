"""Tables of a run: what they keep of an estimate, its value within each seed, gives the printed numbers again."""

from pathlib import Path

import numpy as np
import pandas
import pytest

from influence_kit.measures.intervals import SEED, UNITS, over_seeds, recomputed
from influence_kit.runner.machine import repository

COMMITTED = repository() / "figures" / "laptop"


def wrong_rows(table: pandas.DataFrame) -> list[int]:
    """Rows whose estimate and interval do not follow from their seeds; a row without `interval` states no estimate over seeds."""
    if not {"low", "high"} <= set(table.columns):
        return []
    if not {"estimate", "interval"} <= set(table.columns):
        return list(range(len(table)))
    seeds, wrong = [name for name in table.columns if str(name).startswith(SEED)], []
    for row, line in enumerate(table.to_dict("records")):
        if not isinstance(line["interval"], str) or (np.isnan(line["estimate"]) and np.isnan(line["low"])):
            continue
        values = {name: line[name] for name in seeds if not np.isnan(line[name])}
        if line["interval"] == UNITS and not values:  # of facts asked of one model, which has no seed
            continue
        again = np.array(recomputed(values, line["interval"]))
        kept = slice(0, 1) if line["interval"] == UNITS else slice(None)  # of one seed the interval is its units'
        if not np.allclose(
            again[kept],
            np.array([line["estimate"], line["low"], line["high"]])[kept],
            rtol=1e-6,
            atol=1e-9,
            equal_nan=True,
        ):
            wrong.append(row)
    return wrong


def wrong_tables(folder: Path) -> dict[str, list[int]]:
    """By table, parquet and CSV, its wrong rows; those without any are left out."""
    found = {path.name: wrong_rows(pandas.read_parquet(path)) for path in sorted(folder.glob("*.parquet"))}
    found |= {path.name: wrong_rows(pandas.read_csv(path)) for path in sorted(folder.glob("*.csv"))}
    return {name: rows for name, rows in found.items() if rows}


@pytest.mark.skipif(not (COMMITTED / "run.json").is_file(), reason="no whole run is committed")
def test_estimates_of_the_committed_run_follow_from_their_seeds():
    assert wrong_tables(COMMITTED) == {}


def test_a_row_that_does_not_follow_from_its_seeds_is_found():
    rows = [over_seeds({11: x, 12: x + 1, 13: x + 3}).row(size=x) for x in (1.0, 2.0)]
    table = pandas.DataFrame(rows)
    assert wrong_rows(table) == [] and wrong_rows(table.assign(seed_12=9.0)) == [0, 1]
    assert wrong_rows(table.assign(low=[table["low"][0], 0.0])) == [1]
    assert wrong_rows(table.drop(columns="interval")) == [0, 1] and wrong_rows(table[["size"]]) == []
