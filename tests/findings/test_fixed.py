"""The file of claims: every chapter has some, few are primary, and a chapter concludes its own alone."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest

from influence_kit.errors import UserError
from influence_kit.findings import fixed
from influence_kit.findings.chapter import Chapter
from influence_kit.measures.claims import Rule, judged
from influence_kit.measures.intervals import Estimate, over_seeds
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


SEEDS = range(11, 19)
PRIMARY = [rule for rule in fixed.fixed_claims().values() if rule.tier == "primary"]


def held(rule: Rule, scale: float = 4.0) -> dict[int, float]:
    """Values within seeds that lie `scale` times δ on the side where the claim holds."""
    sign = 1 if rule.side == "above" else -1
    return {seed: rule.threshold + sign * rule.delta * (scale + 0.1 * (-1) ** seed) for seed in SEEDS}


def faults(rule: Rule) -> dict[str, Estimate]:
    """What becomes of the number when a run is fed nonsense: its small model taken for the large one, kinds dealt anew, scores shuffled so
    that nothing is left, the sequences in question deleted, seeds lost, an estimate that is not that of its seeds."""
    good, edge = held(rule), rule.threshold
    dealt = {seed: edge + (-1) ** (seed // 2) * (value - edge) for seed, value in good.items()}
    nothing = {seed: edge + 0.01 * (-1) ** seed * rule.delta for seed in good}
    return {
        "sizes swapped": over_seeds({seed: 2 * edge - value for seed, value in good.items()}),
        "labels permuted": over_seeds(dealt),
        "scores shuffled": over_seeds(nothing),
        "evidence deleted": over_seeds(dict.fromkeys(good, math.nan)),
        "seeds lost": over_seeds({seed: good[seed] for seed in (11, 12)}),
        "one seed in all": over_seeds(dict.fromkeys(good, good[11])),
        "estimate of other seeds": replace(over_seeds(good), per_seed=dealt),
    }


@pytest.mark.parametrize("rule", PRIMARY, ids=[rule.id for rule in PRIMARY])
def test_no_primary_claim_survives_nonsense(rule):
    assert judged(rule, over_seeds(held(rule))).status == "confirmed"
    for fault, estimate in faults(rule).items():
        try:
            status = judged(rule, estimate).status
        except UserError:
            status = "refused"
        assert status != "confirmed", fault


def test_a_chapter_keeps_what_it_concludes_with_its_seeds(tmp_path, monkeypatch):
    monkeypatch.setenv("INFLUENCE_KIT_FIGURES", str(tmp_path))
    chapter = Chapter("04_abstraction_vs_size", "smoke")
    gate = chapter.conclude("04-largest-generalises", over_seeds({11: 0.95, 12: 0.97, 13: 0.96}))
    made = chapter.conclude("04-grows", over_seeds({11: 0.2, 12: 0.17, 13: 0.18}), gates=[gate])
    rows = json.loads((tmp_path / "claims" / "04_abstraction_vs_size.json").read_text())
    assert [(row["id"], row["status"]) for row in rows] == [
        ("04-largest-generalises", "passed"),
        ("04-grows", made.status),
    ]
    assert made.status == "confirmed" and rows[1]["per_seed"] == {"11": 0.2, "12": 0.17, "13": 0.18}
    with pytest.raises(UserError, match="belongs to chapter"):
        chapter.conclude("05-grows", over_seeds({11: 1.0}))
    first, second = chapter.verdicts().data.splitlines()[2:]
    assert (
        "| above 0; within ± 0.03 of it: no effect | 0.183 [0.145, 0.221]" in first
        and ", 3 seeds | **confirmed** | – |" in first
    )
    assert "| above 0.9 | 0.960 [" in second and "**passed**" in second
