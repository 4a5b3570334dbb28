"""Claims in Markdown: the table, and referees in words."""

import pytest

from influence_kit.measures.claims import Claim
from influence_kit.measures.intervals import Estimate
from influence_kit.reading.verdicts import referees_markdown, verdict_table_markdown


def claim(id: str = "lift-large", low: float = 2.0, high: float = 3.0, **changes) -> Claim:
    given = {"chapter": "04_abstraction", "claim": "meaning beats words", "paper": "theme at 52B", "unit": "ratio"}
    given |= {"confirm_above": 1.0} | changes
    return Claim.from_estimate(Estimate((low + high) / 2, low, high, 100, (0, 1, 2)), id=id, **given)


def test_markdown_table():
    table = verdict_table_markdown(
        [claim(paper=0.38, claim="a | b"), claim("gate", low=0.2, high=0.4, kind="gate", confirm_above=0.3)]
    )
    lines = table.splitlines()
    assert lines[2] == (
        "| 04_abstraction | gate: meaning beats words | theme at 52B | 0.30 [0.20, 0.40] ratio | 3 "
        "| *undecided* (the interval reaches over the threshold) | – |"
    )
    assert lines[3] == "| 04_abstraction | a \\| b | 0.38 | 2.5 [2.0, 3.0] ratio | 3 | *confirmed* | – |"


def test_fragile_claims_are_called_so():
    assert "(fragile)" in verdict_table_markdown([claim(low=1.1, high=3.9)])


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1.2, 3.8, "agrees"),
        (-3.8, -1.2, "**EK-FAC and it disagree**"),
        (-1, 6, ", same side"),
        (-6, 1, "**other side**"),
    ],
)
def test_the_table_says_whether_a_referee_agrees(low, high, words):
    by = claim("retraining", low=low, high=high, confirm_above=0)
    assert words in verdict_table_markdown([claim("a").refereed("retraining", by)])


def test_referees_in_words_say_both_numbers_and_whether_they_agree():
    made = claim(id="lift", low=2, high=3)
    agreed, denied = (
        made.refereed("retraining", claim(id="by", low=low, high=low + 1, unit="nats")) for low in (5, -3)
    )
    unsure = made.refereed("one step", claim(id="by", low=0.9, high=3))
    found = referees_markdown([agreed, claim(id="alone"), denied, unsure]).splitlines()
    assert len(found) == 3 and all("“meaning beats words”: **confirmed** by influence (2.5" in line for line in found)
    assert "**confirmed** by retraining (5.5" in found[0] and "nats); the two agree." in found[0]
    assert "**refuted** by retraining" in found[1] and found[1].endswith("**the two disagree**.")
    assert "undecided, their numbers lie on the same side" in found[2] and "by one step" in found[2]
    assert referees_markdown([claim()]) == ""
