"""Claims as a reader sees them: one line a finding, checks as a count, referees in words."""

from dataclasses import replace

from influence_kit.measures.claims import Claim, Rule, judged
from influence_kit.measures.intervals import over_seeds
from influence_kit.reading.verdicts import chapter_table_markdown, in_sum, verdict_lines, verdict_table_markdown

UP, DOWN = over_seeds({1: 2.4, 2: 2.5, 3: 2.6}), over_seeds({1: -0.4, 2: -0.5, 3: -0.6})
NEAR = over_seeds({1: 1.0, 2: 1.1, 3: 1.2})


def rule(id: str = "04-grows", tier: str = "primary", **changes) -> Rule:
    given = {"unit": "ratio", "paper": "theme at 52B", "confirm_above": 1, "delta": 0.5 if tier == "primary" else None}
    given |= {"claim": "meaning beats words", "short": "meaning | words"}
    given["referee"] = {"method": "retraining", "unit": "nats", "confirm_above": 0}
    return Rule(id, "04_abstraction", tier, **(given | changes))


def checks() -> list[Claim]:
    return [judged(rule(f"04-{n}", "check"), made) for n, made in enumerate((UP, UP, DOWN))]


def test_a_line_a_finding_and_the_checks_as_a_count():
    lines = verdict_table_markdown([*checks(), judged(rule(), UP), judged(rule("04-same"), NEAR)]).splitlines()
    assert lines[2] == r"| 04 | meaning \| words | theme at 52B | **confirmed** 2.50 [2.25, 2.75] ratio | – |"
    assert "**no effect > 0.5**" in lines[3] and "2 findings: 1 confirmed, 1 no effect larger than δ." in lines
    assert lines[-1] == "Checks: 2 of 3 passed; failed: 04-2 (-0.50 [-0.75, -0.25] ratio)."
    assert in_sum(checks()[:1]) == ["Checks: 1 of 1 passed."] and verdict_table_markdown([]) == ""


def test_a_terminal_gets_the_same_within_its_width():
    claims = [*checks(), judged(rule(), UP, DOWN), judged(rule("04-same", paper="words, then themes " * 9), NEAR)]
    first, second = verdict_lines(claims, 90)
    assert first.split() == "04 meaning | words confirmed 2.50 [2.25, 2.75] disagrees theme at 52B".split()
    assert len(second) == 90 and second.endswith("…") and second.index("words, then") == first.index("theme at")
    assert verdict_lines(checks(), 90) == []


def test_a_line_says_what_a_referee_says():
    for made, word in ((UP, "agrees"), (DOWN, "disagrees"), (over_seeds({1: -1, 2: 0, 3: 2}), "undecided")):
        claim = judged(rule(), UP, made)
        assert f"| {word} |" in verdict_table_markdown([claim])
        told = chapter_table_markdown([claim]).splitlines()[2]
        assert "**confirmed**" in told and f"retraining {word}: " in told and told.endswith("nats |")
    step = judged(rule(referee={"method": "true step", "confirm_above": 0}), UP, UP)
    assert "| true step: agrees |" in verdict_table_markdown([step])


def test_why_it_is_undecided_stands_beside_the_number():
    closed = judged(rule("gate", "check"), DOWN)
    claims = [judged(rule(), UP, gates=[closed]), judged(rule("04-none"), over_seeds({}))]
    lines, table = verdict_lines(claims, 200), verdict_table_markdown(claims)
    why = f"(check failed: {closed.claim})"
    assert f"{why} theme at 52B" in lines[0] and "(no number) theme at 52B" in lines[1]
    assert f"**undecided** 2.50 [2.25, 2.75] ratio {why} |" in table and "**undecided** (no number) |" in table


def test_holms_correction_names_what_it_does_not_leave():
    strong, weak = (replace(judged(rule(id), UP), holm=holm) for id, holm in (("a", 0.01), ("b", 0.2)))
    assert in_sum([strong])[0].endswith("all decided ones stand.")
    (said,) = in_sum([strong, replace(weak, short="It stands on sand")])
    assert said.endswith("all decided ones but “It stands on sand” (04) stand.")
