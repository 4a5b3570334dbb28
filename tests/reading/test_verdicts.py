"""Claims in Markdown: one line a finding, checks as a count, referees in words."""

from influence_kit.measures.claims import Rule, judged
from influence_kit.measures.intervals import over_seeds
from influence_kit.reading.verdicts import checks_in_words, referees_markdown, verdict_table_markdown

UP, DOWN = over_seeds({1: 2.4, 2: 2.5, 3: 2.6}), over_seeds({1: -0.4, 2: -0.5, 3: -0.6})


def rule(id: str = "04-grows", tier: str = "primary", **changes) -> Rule:
    given = {"unit": "ratio", "paper": "theme at 52B", "confirm_above": 1, "delta": 0.5 if tier == "primary" else None}
    given["referee"] = {"method": "retraining", "unit": "nats", "confirm_above": 0}
    return Rule(id, "04_abstraction", tier, **({"claim": "meaning | beats words"} | given | changes))


def test_a_line_a_finding_and_the_checks_as_a_count():
    checks = [judged(rule(f"04-{n}", "check"), made) for n, made in enumerate((UP, UP, DOWN))]
    lines = verdict_table_markdown(
        [*checks, judged(rule(), UP), judged(rule("04-same"), over_seeds({1: 1, 2: 1.1, 3: 1.2}))]
    ).splitlines()
    assert lines[2] == r"| 04 | meaning \| beats words | theme at 52B | **confirmed**: 2.50 [2.25, 2.75] ratio | – |"
    assert "**no effect larger than 0.5**" in lines[3]
    assert lines[-1] == "Checks: 2 of 3 passed; failed: 04-2 (-0.50 [-0.75, -0.25] ratio)."
    assert checks_in_words([judged(rule(), UP)]) == ""


def test_a_line_says_what_retraining_says():
    for made, word in ((UP, "agrees"), (DOWN, "**disagrees**"), (over_seeds({1: -1, 2: 0, 3: 2}), "undecided")):
        claim = judged(rule(), UP, made)
        assert f"| {word}: retraining" in verdict_table_markdown([claim])
        assert referees_markdown([claim, judged(rule(), UP)]).count("\n") == 0
    assert referees_markdown([judged(rule(), UP)]) == ""
