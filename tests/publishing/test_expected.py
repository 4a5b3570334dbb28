"""A figure's table beside the committed one: what is the same, what differs, and under which tolerances."""

import json

import numpy as np
import pandas as pd

from influence_kit.measures.claims import write_json
from influence_kit.publishing import expected as reproduction


def table(scale: float = 1.0, n: int = 200) -> pd.DataFrame:
    lift = np.random.default_rng(0).gamma(2, 1, n)
    return pd.DataFrame({"lift": lift * scale, "tier": ["T2"] * n, "hit": lift > 2, "rank": np.arange(n)})


def test_summary_of_a_table():
    frame = pd.DataFrame({"x": [1.0, 3.0, np.nan, np.inf], "name": list("abcd"), "empty": [np.nan] * 4})
    summary = reproduction.summarise_table(frame)
    assert summary["rows"] == 4 and summary["columns"]["x"] == {"mean": 2.0, "sd": 1.0, "n": 2}
    assert sorted(summary["columns"]) == ["empty", "x"] and summary["columns"]["empty"]["n"] == 0


def test_figures_are_compared_under_the_committed_tolerances(tmp_path):
    expected = reproduction.expectation(reproduction.summarise_table(table()), rtol=0.05, sd_share=0.1)
    write_json(tmp_path / "expected.json", expected)
    expected = json.loads((tmp_path / "expected.json").read_text())
    assert reproduction.compare(reproduction.summarise_table(table()), expected) == ("reproduced", [])
    assert reproduction.compare(reproduction.summarise_table(table(1.02)), expected) == ("reproduced", [])
    assert reproduction.compare(reproduction.summarise_table(table(1.3)), expected) == ("differs", ["lift"])
    assert reproduction.compare(reproduction.summarise_table(table(1.3)), expected, rtol=0.5) == ("reproduced", [])
    assert reproduction.compare(reproduction.summarise_table(table()), None) == ("new", [])


def test_rows_columns_and_spread_count_as_differences():
    summary = reproduction.summarise_table(table())
    expected = reproduction.expectation(summary)
    assert reproduction.compare(summary | {"rows": 199}, expected) == ("differs", ["rows"])
    assert reproduction.compare(reproduction.summarise_table(table().drop(columns="hit")), expected) == (
        "differs",
        ["hit"],
    )
    flat = table().assign(lift=lambda t: t["lift"].mean())
    assert reproduction.compare(reproduction.summarise_table(flat), expected) == ("differs", ["lift"])
    gone = table().assign(lift=np.nan)
    assert reproduction.compare(reproduction.summarise_table(gone), expected) == ("differs", ["lift"])


def test_a_column_without_values_reproduces_itself(tmp_path):
    frame = pd.DataFrame({"empty": [np.nan] * 3})
    write_json(tmp_path / "e.json", reproduction.expectation(reproduction.summarise_table(frame)))
    expected = json.loads((tmp_path / "e.json").read_text())
    assert reproduction.compare(reproduction.summarise_table(frame), expected) == ("reproduced", [])
