"""The file of claims: every chapter has some, few are primary, and a chapter concludes its own alone."""

from collections import Counter

import pytest

from influence_kit.errors import UserError
from influence_kit.findings import fixed
from influence_kit.runner.machine import repository


def test_claims_are_few_of_known_chapters_and_said_without_jargon():
    rules = fixed.fixed_claims().values()
    primary = [rule for rule in rules if rule.tier == "primary"]
    assert 18 <= len(primary) <= 28
    chapters = {path.stem for path in (repository() / "notebooks").glob("*.ipynb")}
    assert {rule.chapter for rule in rules} <= chapters
    assert max(Counter(rule.chapter for rule in primary).values()) <= 5
    for rule in rules:
        assert rule.id.startswith(rule.chapter[:2] + "-") and (rule.confirm_above is None) != (
            rule.confirm_below is None
        )
        assert "_" not in rule.claim and len(rule.claim) < 130 and (rule.tier == "check" or rule.paper)


def test_a_claim_is_concluded_in_its_own_chapter_alone():
    assert fixed.rule_of("04-grows", "04_abstraction_vs_size").side == "above"
    with pytest.raises(UserError, match="belongs to chapter 04_abstraction_vs_size, not to 05_cross_lingual"):
        fixed.rule_of("04-grows", "05_cross_lingual")
    with pytest.raises(UserError, match="'04-shrinks' is not in claims.yaml"):
        fixed.rule_of("04-shrinks", "04_abstraction_vs_size")


def test_the_file_says_since_when_it_stands(tmp_path, monkeypatch):
    path = tmp_path / "claims.yaml"
    path.write_text("{}")
    monkeypatch.setattr(fixed, "PATH", path)
    assert fixed.fixed_since() == "not committed"
