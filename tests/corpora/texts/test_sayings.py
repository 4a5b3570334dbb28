"""Sayings and dictionary entries from packages written in the test."""

import gzip

import pytest

from influence_kit.corpora.texts import sayings as short
from influence_kit.errors import UserError
from tests.test_packages import make_deb

LONG = "A kettle that is watched by two people takes no longer than one that is watched by nobody at all."
OTHER = "There are days when the map is right and the mountain is wrong, but nobody has ever met one of them."
ENTRIES = f"""
                    The File

   :blorp: /blorp/, n.

   {LONG.replace("kettle", "program")}

   1. Short.

   :zonk: [from the sound] {OTHER.replace("map", "manual").replace("days", "nights")}
"""


@pytest.fixture
def folder(tmp_path):
    files = {"wisdom": f"{LONG}\n%\nToo short.\n%\n{LONG}\n%\nA_\bA{OTHER[1:]}\n%\n{'1 + ' * 40}2\n", "zippy": OTHER}
    fortunes = {f"usr/share/games/fortunes/{name}": text.encode() for name, text in files.items()}
    make_deb(tmp_path / "fortunes_1_all.deb", "fortunes", "1", fortunes)
    make_deb(
        tmp_path / "jargon-text_1_all.deb",
        "jargon-text",
        "1",
        {"usr/share/doc/jargon-text/jargon.txt.gz": gzip.compress(ENTRIES.encode())},
    )
    return tmp_path


def test_prose_of_some_length_comes_once_from_files_that_hold_it(folder):
    rows = short.sayings(folder).to_pylist()
    assert [row["source"] for row in rows] == ["sayings", "sayings", "jargon", "jargon"]
    assert [row["text"] for row in rows[:2]] == [LONG, f"AA{OTHER[1:]}"]
    assert rows[2]["text"] == LONG.replace("kettle", "program")
    assert rows[3]["text"].startswith("zonk: [from the sound] There are nights")
    assert len({row["pair_id"] for row in rows}) == 4 and {row["language"] for row in rows} == {"en"}


def test_no_text_of_such_a_length_is_said(folder):
    with pytest.raises(UserError, match="widen least and most"):
        short.sayings(folder, least=5_000, most=6_000)
