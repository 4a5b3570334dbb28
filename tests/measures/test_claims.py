"""Claims: rules, seeds and gates, byte-stable files, referees."""

import json
import math

import numpy as np
import pytest

from influence_kit.errors import UserError
from influence_kit.measures import claims
from influence_kit.measures.claims import Claim, judge
from influence_kit.measures.intervals import Estimate


def estimate(low: float, high: float, seeds: int = 3) -> Estimate:
    return Estimate((low + high) / 2, low, high, 100, tuple(range(seeds)))


def claim(id: str = "lift-large", low: float = 2.0, high: float = 3.0, **changes) -> Claim:
    given = {"chapter": "04_abstraction", "claim": "meaning beats words", "paper": "theme at 52B", "unit": "ratio"}
    given |= {"confirm_above": 1.0} | changes
    return Claim.from_estimate(id=id, estimate=estimate(low, high, given.pop("seeds", 3)), **given)


@pytest.mark.parametrize(
    ("low", "high", "rule", "status"),
    [
        (2.1, 3.0, {"confirm_above": 2}, "confirmed"),
        (1.9, 3.0, {"confirm_above": 2}, "undecided"),
        (1.0, 1.9, {"confirm_above": 2}, "refuted"),
        (0.0, 0.0, {"confirm_above": 0}, "refuted"),
        (1.0, 1.9, {"confirm_above": 2, "refute_below": 1}, "undecided"),
        (0.2, 0.9, {"confirm_above": 2, "refute_below": 1}, "refuted"),
        (0.1, 0.2, {"confirm_below": 0.3}, "confirmed"),
        (0.3, 0.4, {"confirm_below": 0.3}, "refuted"),
        (0.3, 0.4, {"confirm_below": 0.3, "refute_above": 0.5}, "undecided"),
        (-0.1, 0.1, {"confirm_above": -0.2, "confirm_below": 0.2}, "confirmed"),
        (-0.3, 0.1, {"confirm_above": -0.2, "confirm_below": 0.2}, "undecided"),
        (0.3, 0.4, {"confirm_above": -0.2, "confirm_below": 0.2}, "refuted"),
        (math.nan, math.nan, {"confirm_above": 0}, "undecided"),
    ],
)
def test_rules(low, high, rule, status):
    assert judge(estimate(low, high), **rule)[0] == status


def test_fewer_than_three_seeds_decide_gates_but_not_claims():
    assert judge(estimate(2, 3, seeds=2), confirm_above=1) == ("undecided", "<3 seeds")
    for kind in ("gate", "control"):
        assert judge(estimate(2, 3, seeds=1), confirm_above=1, kind=kind) == ("confirmed", "")


def test_a_closed_gate_leaves_the_claim_undecided():
    gate = claim("gate-accuracy", 0.1, 0.2, confirm_above=0.5, kind="gate")
    judged = claim(gates=[gate])
    assert gate.status == "refuted" and judged.status == "undecided"
    assert judged.reason == "gate gate-accuracy is refuted" and "gate-accuracy" in judged.rule
    assert claim(gates=[claim("open", kind="gate")]).status == "confirmed"


def test_rule_in_words():
    assert (
        claim(refute_below=0.5).rule
        == "confirmed if the whole interval lies above 1; refuted if it lies at or below 0.5"
    )
    both = claims.describe_rule(confirm_above=-0.2, confirm_below=0.2)
    assert both.endswith("above -0.2 and below 0.2; refuted if it lies at or above 0.2 or at or below -0.2")


def test_rules_that_cannot_be():
    with pytest.raises(UserError, match="needs confirm_above"):
        judge(estimate(1, 2))
    with pytest.raises(UserError, match="refutes at 3"):
        judge(estimate(1, 2), confirm_above=2, refute_below=3)
    with pytest.raises(UserError, match="refutes at 0.1"):
        judge(estimate(1, 2), confirm_below=0.2, refute_above=0.1)
    with pytest.raises(UserError, match="'proved'"):
        Claim("a", "b", "c", "d", 1.0, (0.0, 2.0), "proved", "claim", (), "nats", "")


def test_file_is_sorted_stable_and_read_back(tmp_path):
    noisy = claim("b-noise", np.float64(2.0) * (1 + 1e-13), 3.0)
    nothing = claim("a-none", math.nan, math.nan, seeds=1)
    figures = [{"name": "tails", "status": "reproduced"}, {"name": "ladder", "status": "differs", "columns": ["lift"]}]
    claims.write_verdicts(tmp_path / "one.json", [noisy, nothing], figures)
    claims.write_verdicts(tmp_path / "two.json", [nothing, claim("b-noise")], figures[::-1])
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]
    content = json.loads((tmp_path / "one.json").read_text())
    assert [row["id"] for row in content["claims"]] == ["a-none", "b-noise"]
    assert [figure["name"] for figure in content["figures"]] == ["ladder", "tails"]
    assert content["claims"][0]["measured"] is None and content["claims"][1]["interval"] == [2.0, 3.0]
    kept, read_figures = claims.read_verdicts(tmp_path / "one.json")
    assert kept[1] == claim("b-noise") and math.isnan(kept[0].measured) and read_figures == content["figures"]


def test_small_numbers_are_kept_in_the_file(tmp_path):
    claims.write_json(tmp_path / "x.json", {"nats": 1.23456789012e-7, "n": np.int64(3), "ok": np.bool_(True)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"nats": 1.23456789e-7, "n": 3, "ok": True}


def test_merge_refuses_two_claims_of_one_id():
    assert [c.id for c in claims.merge([claim("b")], [claim("a")])] == ["a", "b"]
    with pytest.raises(UserError, match="'a' is made in '03_x' and in '04_abstraction'"):
        claims.merge([claim("a")], [claim("a", chapter="03_x")])


def test_unknown_figure_status_is_refused(tmp_path):
    with pytest.raises(UserError, match="'same'"):
        claims.write_verdicts(tmp_path / "x.json", [], [{"name": "tails", "status": "same"}])


def test_a_claim_confirmed_by_a_hair_is_fragile():
    made = [claim(low=low, high=2.5 + (2.5 - low), confirm_above=1) for low in (1.1, 1.6)]
    assert [(c.status, c.fragile) for c in made] == [("confirmed", True), ("confirmed", False)]
    assert not claim(low=0.5, high=4.5, confirm_above=1).fragile  # undecided as it is


@pytest.mark.parametrize(
    ("low", "high", "agreement", "same_side"),
    [
        (1.2, 3.8, "agrees", True),
        (-3.8, -1.2, "disagrees", False),
        (-1, 6, "undecided", True),
        (-6, 1, "undecided", False),
    ],
)
def test_a_referee_agrees_disagrees_or_does_not_know(tmp_path, low, high, agreement, same_side):
    by = claim("retraining", low=low, high=high, confirm_above=0)
    made = claim("a", low=2, high=3, confirm_above=1).refereed("retraining", by)
    assert (made.referee.agreement, made.referee.same_side, made.referee.claim) == (agreement, same_side, "retraining")
    claims.write_verdicts(tmp_path / "v.json", [made, by])
    assert claims.read_verdicts(tmp_path / "v.json")[0][0] == made
