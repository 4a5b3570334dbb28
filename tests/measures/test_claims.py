"""Claims: rules, seeds and gates, nonsense that must not pass, byte-stable files, referees."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from influence_kit.errors import UserError
from influence_kit.measures import claims
from influence_kit.measures.claims import NO_EFFECT, Claim, Rule, judge, judged, with_holm
from influence_kit.measures.intervals import Estimate, over_seeds

SEEDS = range(11, 19)


def rule(id: str = "04-grows", tier: str = "primary", **changes) -> Rule:
    given = {
        "confirm_above": 0.0,
        "delta": 0.1 if tier == "primary" else None,
        "unit": "ratio",
        "paper": "theme at 52B",
    }
    return Rule(id, "04_abstraction", tier, "meaning beats words", **(given | changes))


def estimate(low: float, high: float, seeds=SEEDS) -> Estimate:
    """An estimate from seeds that has about this interval."""
    noise = np.resize([-1.0, 1.0], len(seeds))
    unit = over_seeds(dict(zip(seeds, noise, strict=True)))
    scale = (high - low) / (unit.high - unit.low) if len(seeds) > 1 else 0
    return over_seeds(dict(zip(seeds, (low + high) / 2 + scale * noise, strict=True)))


@pytest.mark.parametrize(
    ("low", "high", "given", "status"),
    [
        (2.1, 3.0, {"confirm_above": 2}, "confirmed"),
        (1.8, 3.0, {"confirm_above": 2}, "undecided"),
        (1.0, 1.9, {"confirm_above": 2}, "refuted"),
        (1.95, 2.05, {"confirm_above": 2}, NO_EFFECT),
        (2.01, 2.05, {"confirm_above": 2}, NO_EFFECT),
        (0.1, 0.2, {"confirm_below": 0.4, "confirm_above": None}, "confirmed"),
        (0.45, 0.6, {"confirm_below": 0.4, "confirm_above": None}, "refuted"),
        (0.35, 0.45, {"confirm_below": 0.4, "confirm_above": None}, NO_EFFECT),
        (math.nan, math.nan, {}, "undecided"),
    ],
)
def test_statuses_of_primary_claims(low, high, given, status):
    assert judge(rule(**given), estimate(low, high))[0] == status


@pytest.mark.parametrize(("low", "high", "status"), [(0.1, 3, "passed"), (-0.1, 3, "failed"), (math.nan, 1, "failed")])
def test_statuses_of_checks(low, high, status):
    assert judge(rule(tier="check"), estimate(low, high))[0] == status


def test_fewer_than_three_seeds_decide_checks_but_not_primary_claims():
    assert judge(rule(), estimate(2, 3, [11, 12])) == ("undecided", "fewer than 3 seeds")
    assert judge(rule(tier="check"), estimate(2, 3, [11, 12])) == ("passed", "")


def test_a_closed_gate_leaves_a_claim_undecided():
    closed, opened = (judged(rule("gate", "check"), estimate(low, 3)) for low in (-1, 1))
    made = judged(rule(), estimate(2, 3), gates=[closed])
    assert (made.status, made.reason) == ("undecided", f"check failed: {closed.claim}") and math.isnan(made.p)
    assert judged(rule(), estimate(2, 3), gates=[opened]).status == "confirmed"


def test_an_interval_without_width_decides_nothing():
    assert judge(rule(), over_seeds(dict.fromkeys(SEEDS, 2.0)))[0] == "undecided"


def nonsense(values: np.ndarray) -> dict[str, np.ndarray | None]:
    """What [seeds, 2] (small and large model) becomes under faults; None where an estimate does not follow from its seeds."""
    rng = np.random.default_rng(0)
    flipped = values * rng.choice([-1, 1], (len(values), 1))
    return {
        "sizes swapped": values[:, ::-1],
        "labels permuted": np.stack([rng.permutation(row) for row in np.r_[values[:4], values[4:, ::-1]]]),
        "scores shuffled": rng.permutation(values.ravel()).reshape(values.shape) + flipped,
        "evidence deleted": np.full_like(values, math.nan),
    }


@pytest.mark.parametrize("fault", nonsense(np.ones((8, 2))))
def test_a_verdict_does_not_survive_nonsense(fault):
    values = np.stack([np.zeros(8), np.linspace(0.8, 1.2, 8)], 1)

    def verdict(table):
        return judge(rule(), over_seeds(dict(zip(SEEDS, table[:, 1] - table[:, 0], strict=True))))[0]

    assert verdict(values) == "confirmed" and verdict(nonsense(values)[fault]) != "confirmed"


def test_an_estimate_that_does_not_follow_from_its_seeds_is_refused():
    good = estimate(1, 2)
    for bad in (
        replace(good, value=1.7),
        replace(good, low=0.1),
        replace(good, per_seed={11: 1.0}),
        replace(good, per_seed={}),
    ):
        with pytest.raises(UserError, match="04-grows"):
            judged(rule(), bad)


def test_rules_that_cannot_be():
    with pytest.raises(UserError, match="needs confirm_above"):
        rule(confirm_above=None)
    with pytest.raises(UserError, match="delta None"):
        rule(delta=None)
    with pytest.raises(UserError, match="delta 1"):
        rule(tier="check", delta=1)
    with pytest.raises(UserError, match="'headline'"):
        rule(tier="headline")
    with pytest.raises(UserError, match="'proved'"):
        replace(judged(rule(), estimate(1, 2)), status="proved")


def test_p_is_students():
    from scipy import stats

    found = estimate(0.2, 2)
    expected = stats.ttest_1samp(list(found.per_seed.values()), 0).pvalue
    assert judged(rule(), found).p == pytest.approx(expected, rel=1e-6)
    assert judged(rule(), over_seeds({11: -1.0, 12: 1.0, 13: 1.5})).p > 0.05  # undecided


def test_holm_is_over_the_primary_claims():
    ps = {"a": 0.01, "b": 0.04, "c": 0.03, "d": math.nan}
    primary = [replace(judged(rule(id), estimate(1, 2)), p=p) for id, p in ps.items()]
    check = judged(rule("e", "check"), estimate(1, 2))
    found = {claim.id: claim.holm for claim in with_holm([*primary, check])}
    assert found["a"] == pytest.approx(0.04) and found["c"] == found["b"] == pytest.approx(0.09)
    assert math.isnan(found["d"]) and math.isnan(found["e"])


@pytest.mark.parametrize(("low", "high", "word"), [(1, 2, "agrees"), (-2, -1, "disagrees"), (-2, 2, "undecided")])
def test_a_referee_agrees_disagrees_or_does_not_know(tmp_path, low, high, word):
    asked = rule(referee={"method": "retraining", "unit": "nats", "confirm_above": 0})
    made = judged(asked, estimate(2, 3), estimate(low, high))
    assert (made.referee.agreement, made.referee.method) == (word, "retraining")
    assert judged(rule(), estimate(2, 3), judged(rule("other"), estimate(low, high))).referee.agreement == word
    claims.write_verdicts(tmp_path / "v.json", [made])
    kept = claims.claim_of(json.loads((tmp_path / "v.json").read_text())["claims"][0])
    assert kept.referee.per_seed == pytest.approx(made.referee.per_seed)
    with pytest.raises(UserError, match="no rule for a referee"):
        judged(rule(), estimate(2, 3), estimate(low, high))


def test_file_is_sorted_stable_and_read_back(tmp_path):
    made, nothing = judged(rule("b"), estimate(2, 3)), judged(rule("a", "check"), estimate(math.nan, math.nan))
    shown = judged(rule("c", "exploratory", delta=None), estimate(2, 3))
    noisy = replace(made, measured=made.measured * (1 + 1e-13))
    figures = [{"name": "tails", "status": "reproduced"}, {"name": "ladder", "status": "differs", "columns": ["lift"]}]
    claims.write_verdicts(tmp_path / "one.json", [noisy, nothing, shown], figures)
    claims.write_verdicts(tmp_path / "two.json", [nothing, made], figures[::-1])
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    content = json.loads((tmp_path / "one.json").read_text())
    assert [row["id"] for row in content["claims"]] == ["a", "b"] and content["claims"][0]["measured"] is None
    assert [figure["name"] for figure in content["figures"]] == ["ladder", "tails"]
    row = content["claims"][1]
    assert {"tier", "threshold", "delta", "status", "holm", "referee", "sentence"} <= set(row)
    assert set(row["per_seed"]) == {str(seed) for seed in SEEDS} and "confirmed" in row["sentence"]
    kept = claims.claim_of(row)
    assert kept.sentence == made.sentence and kept.seeds == made.seeds


def test_small_numbers_are_kept_in_the_file(tmp_path):
    claims.write_json(tmp_path / "x.json", {"nats": 1.23456789012e-7, "n": np.int64(3), "ok": np.bool_(True)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"nats": 1.23456789e-7, "n": 3, "ok": True}


def test_merge_refuses_two_claims_of_one_id():
    made = {id: judged(rule(id), estimate(1, 2)) for id in "ab"}
    assert [claim.id for claim in claims.merge([made["b"]], [made["a"]])] == ["a", "b"]
    with pytest.raises(UserError, match="'a' is made in '03_x' and in '04_abstraction'"):
        claims.merge([made["a"]], [replace(made["a"], chapter="03_x")])


def test_unknown_figure_status_is_refused(tmp_path):
    with pytest.raises(UserError, match="'same'"):
        claims.write_verdicts(tmp_path / "x.json", [], [{"name": "tails", "status": "same"}])


def test_a_claims_seeds_are_counted_once():
    assert isinstance(judged(rule(), estimate(1, 2)), Claim)
    assert judge(rule(), replace(estimate(1, 2, [11, 12]), seeds=(11, 11, 12)))[1] == "fewer than 3 seeds"
