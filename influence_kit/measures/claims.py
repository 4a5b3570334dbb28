"""Claims: a sentence, the rule that was fixed for it beforehand, a number with its interval, and the verdict.

A primary claim is *confirmed* where its whole interval lies beyond the threshold, *refuted* where it lies on the other side, *no effect
larger than δ* where it lies within ± δ of the threshold (which is said first: an effect too small to speak of is none), else
*undecided*. A check is *passed* or *failed*. Everything else is exploratory and no claim. What is written holds no clock and no path, so
equal results give equal bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from influence_kit.errors import UserError
from influence_kit.files import write_whole
from influence_kit.measures.intervals import UNITS, Estimate, recomputed

NO_EFFECT = "no effect larger than δ"
STATUSES = {
    "primary": ("confirmed", "refuted", NO_EFFECT, "undecided"),
    "check": ("passed", "failed"),
    "exploratory": ("confirmed", "refuted", NO_EFFECT, "undecided"),
}
FIGURE_STATUSES = ("reproduced", "differs", "new")
FEWEST_SEEDS = 3
OVER = "the interval reaches over the threshold"


@dataclass(frozen=True)
class Rule:
    """How a claim is judged, fixed before its number is known.

    Attributes:
        id: Unique name.
        chapter: Stem of the notebook that may conclude it.
        tier: "primary" or "check" ("exploratory" has no rule in the file).
        claim: The sentence that is tested.
        short: What a line of a table calls it; of primary claims alone.
        unit: What its number is in.
        paper: The paper's number or words.
        confirm_above: The whole interval must lie above this; or below `confirm_below`.
        delta: The smallest effect worth speaking of; of primary claims alone.
        referee: What another method is asked: `method`, `unit`, `confirm_above` or `confirm_below`, and `delta` if it has one.

    Raises:
        UserError: an unknown tier, no threshold, or a primary claim without its δ.
    """

    id: str
    chapter: str
    tier: str
    claim: str
    unit: str = ""
    paper: str = ""
    short: str = ""
    confirm_above: float | None = None
    confirm_below: float | None = None
    delta: float | None = None
    referee: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tier not in STATUSES:
            raise UserError(f"Claim {self.id!r} has tier {self.tier!r}; use one of {', '.join(STATUSES)}.")
        if self.confirm_above is None and self.confirm_below is None:
            raise UserError(f"Claim {self.id!r} needs confirm_above or confirm_below.")
        if self.tier != "exploratory" and (self.tier == "primary") != bool(self.delta):
            raise UserError(
                f"Claim {self.id!r} is {self.tier} and has delta {self.delta}; primary claims have one, checks none."
            )

    @property
    def threshold(self) -> float | None:
        """Where confirmation starts."""
        return self.confirm_below if self.confirm_above is None else self.confirm_above

    @property
    def side(self) -> str:
        """On which side of the threshold the claim holds: "above" or "below"."""
        return "below" if self.confirm_above is None else "above"


@dataclass(frozen=True)
class Referee:
    """What another method says of a claim.

    Attributes:
        method: The method in words ("retraining").
        measured: Its number, in `unit`.
        interval: The ends of its interval.
        unit: What both are in.
        status: What becomes of the claim by its number.
        agreement: "agrees" where both are confirmed or neither is, "disagrees" where one of them is, "undecided" where either is.
        per_seed: Its value within each seed.
    """

    method: str
    measured: float
    interval: tuple[float, float]
    unit: str
    status: str
    agreement: str
    per_seed: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A claim of a chapter, judged.

    Attributes:
        id, chapter, claim, tier, paper, unit, delta, short: Of its `Rule`.
        measured: Our number, in `unit`.
        interval: Its ends.
        seeds: Labels of the seeds used.
        per_seed: The number within each seed.
        threshold: Of its rule; `side` says on which side of it the claim holds.
        status: One of `STATUSES` of its tier.
        reason: Why it is undecided or failed; else empty.
        p: The smallest significance level at which the verdict stands; nan where there is none.
        holm: `p` under Holm's correction over all primary claims of a run; nan until a run is published.
        referee: What another method, retraining above all, says of the same sentence; None where nothing was asked.

    Raises:
        UserError: a status that its tier does not have.
    """

    id: str
    chapter: str
    claim: str
    tier: str
    paper: str
    measured: float
    interval: tuple[float, float]
    unit: str
    seeds: tuple
    per_seed: dict
    threshold: float
    side: str
    delta: float | None
    status: str
    short: str = ""
    reason: str = ""
    p: float = math.nan
    holm: float = math.nan
    referee: Referee | None = None

    def __post_init__(self) -> None:
        if self.status not in (allowed := STATUSES.get(self.tier, ())):
            raise UserError(
                f"Claim {self.id!r} is {self.tier} and has status {self.status!r}; use one of {', '.join(allowed)}."
            )

    @property
    def verdict(self) -> str:
        """The status as it is read, δ with its value."""
        return self.status.replace("δ", f"{self.delta:g}") if self.delta else self.status

    @property
    def sentence(self) -> str:
        """The verdict in one sentence with its number."""
        about = f"{Estimate(self.measured, *self.interval, 0)} {self.unit}".strip()
        why = f" ({self.reason})" if self.reason else ""
        asked = f"; {self.referee.method} {self.referee.agreement}" if self.referee else ""
        return f"{self.claim}: {self.verdict}{why}. Measured: {about}, {len(self.seeds)} seeds{asked}."


def judged(
    rule: Rule, estimate: Estimate, referee: Claim | Estimate | None = None, gates: Sequence[Claim] = ()
) -> Claim:
    """The verdict on a claim.

    Args:
        rule: Its rule.
        estimate: What was measured.
        referee: What another method measured, judged by `rule.referee`, or a claim of its own that is confirmed where the
            method supports this one.
        gates: Checks that must be passed before the claim is read.

    Raises:
        UserError: an estimate that does not follow from its values within seeds, or a referee without a rule.
    """
    _follows(rule.id, estimate)
    status, reason = judge(rule, estimate, gates)
    made = Claim(
        id=rule.id,
        chapter=rule.chapter,
        claim=rule.claim,
        tier=rule.tier,
        paper=rule.paper,
        measured=estimate.value,
        interval=estimate.interval,
        unit=rule.unit,
        seeds=tuple(estimate.seeds),
        per_seed=dict(estimate.per_seed),
        threshold=rule.threshold if rule.threshold is not None else math.nan,
        side=rule.side,
        delta=rule.delta,
        status=status,
        short=rule.short,
        reason=reason,
        p=_p(rule, estimate, status) if not reason or reason == OVER else math.nan,
    )
    if referee is None:
        return made
    if isinstance(referee, Estimate):
        if not rule.referee:
            raise UserError(f"Claim {rule.id!r} has no rule for a referee; give it one in claims.yaml.")
        asked = {key: value for key, value in rule.referee.items() if key != "method"}
        other = Rule(f"{rule.id} by {rule.referee['method']}", rule.chapter, "exploratory", rule.claim, **asked)
        referee = judged(other, referee)
    said = {made.status, referee.status}
    same = (made.status == "confirmed") == (referee.status in ("confirmed", "passed"))
    agreement = "undecided" if "undecided" in said else "agrees" if same else "disagrees"
    method, per_seed = rule.referee.get("method", referee.claim), referee.per_seed
    asked_of = (referee.measured, referee.interval, referee.unit, referee.status)
    return replace(made, referee=Referee(method, *asked_of, agreement, per_seed))


def judge(rule: Rule, estimate: Estimate, gates: Sequence[Claim] = ()) -> tuple[str, str]:
    """Status of an estimate under a rule, and why it is undecided or failed if it is.

    A claim from fewer than 3 seeds stays undecided whatever its interval, because that interval knows nothing of other seeds;
    checks are judged all the same, since they speak of the run at hand.
    """
    unsettled = "failed" if rule.tier == "check" else "undecided"
    low, high = estimate.interval
    above = -math.inf if rule.confirm_above is None else rule.confirm_above
    below = math.inf if rule.confirm_below is None else rule.confirm_below
    if closed := [gate for gate in gates if gate.status not in ("passed", "confirmed")]:
        return unsettled, "; ".join(f"check {gate.status}: {gate.claim}" for gate in closed)
    if math.isnan(estimate.value):
        return unsettled, "no number"
    if rule.tier != "check" and len(set(estimate.seeds)) < FEWEST_SEEDS:
        return "undecided", f"fewer than {FEWEST_SEEDS} seeds"
    if math.isnan(low) or math.isnan(high):
        return unsettled, "no interval"
    if rule.tier == "check":
        return (
            ("passed", "") if above < low and high < below else ("failed", OVER if high > above and low < below else "")
        )
    if low == high:
        return "undecided", "an interval without width knows too few units"
    if (
        rule.delta
        and rule.threshold is not None
        and rule.threshold - rule.delta < low
        and high < rule.threshold + rule.delta
    ):
        return NO_EFFECT, ""
    if above < low and high < below:
        return "confirmed", ""
    if high <= above or low >= below:
        return "refuted", ""
    return "undecided", OVER


def _follows(id: str, estimate: Estimate) -> None:
    """Raise UserError unless an estimate is what its values within seeds give."""
    if math.isnan(estimate.value) or estimate.how == UNITS:
        return
    if set(estimate.per_seed) != set(estimate.seeds):
        raise UserError(
            f"Claim {id!r}: the estimate has seeds {estimate.seeds} and values of {tuple(estimate.per_seed)}."
        )
    again = recomputed(estimate.per_seed, estimate.how)
    if not np.allclose(again, (estimate.value, *estimate.interval), rtol=1e-6, atol=1e-9, equal_nan=True):
        raise UserError(f"Claim {id!r}: its estimate {estimate} does not follow from its seeds, which give {again}.")


def _p(rule: Rule, estimate: Estimate, status: str) -> float:
    """The smallest significance level at which the interval still says what it says (of an undecided one: leaves the threshold out)."""
    if rule.tier != "primary" or estimate.how == UNITS or math.isnan(estimate.value):
        return math.nan
    centre, delta = rule.threshold, rule.delta
    assert centre is not None and delta is not None

    def stands(alpha: float) -> bool:
        _, low, high = recomputed(estimate.per_seed, estimate.how, 1 - alpha)
        return centre - delta < low and high < centre + delta if status == NO_EFFECT else low > centre or high < centre

    smallest, largest = 1e-12, 1 - 1e-9
    if not stands(largest):
        return 1.0
    for _ in range(60):
        middle = math.sqrt(smallest * largest)
        smallest, largest = (smallest, middle) if stands(middle) else (middle, largest)
    return largest


def with_holm(claims: Iterable[Claim]) -> list[Claim]:
    """The claims, the primary ones with Holm's correction over all primary ones; one without `p` counts and has none."""
    claims = list(claims)
    primary = sorted(
        (claim for claim in claims if claim.tier == "primary"), key=lambda claim: (math.isnan(claim.p), claim.p)
    )
    adjusted, so_far = {}, 0.0
    for rank, claim in enumerate(primary):
        so_far = max(so_far, min(1.0, (len(primary) - rank) * claim.p)) if not math.isnan(claim.p) else math.nan
        adjusted[claim.id] = so_far
    return [replace(claim, holm=adjusted.get(claim.id, math.nan)) for claim in claims]


def merge(*chapters: Iterable[Claim]) -> list[Claim]:
    """Claims of several chapters in one list, by chapter and id.

    Raises:
        UserError: two claims share an id.
    """
    claims = sorted((claim for chapter in chapters for claim in chapter), key=lambda claim: (claim.chapter, claim.id))
    seen: dict[str, str] = {}
    for claim in claims:
        if claim.id in seen:
            raise UserError(f"Claim {claim.id!r} is made in {seen[claim.id]!r} and in {claim.chapter!r}; rename one.")
        seen[claim.id] = claim.chapter
    return claims


def _plain(value: Any) -> Any:
    """JSON without nan, and floats to 9 significant digits, so that rounding noise changes no byte."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


def write_json(path: Path | str, content: Any) -> None:
    """Write JSON with sorted keys, floats at 9 significant digits and nan as null; equal content gives equal bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(content), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    write_whole(path, text + "\n")


def write_verdicts(path: Path | str, claims: Iterable[Claim], figures: Iterable[dict] = (), **about: Any) -> None:
    """Write `{"claims": [...], "figures": [{"name", "status", ...}]}`, sorted by chapter and id, and by name, and what is given
    `about` the run beside them.

    Raises:
        UserError: two claims share an id, or a figure's status is unknown.
    """
    figures = sorted(figures, key=lambda figure: figure["name"])
    for figure in figures:
        if (status := figure["status"]) not in FIGURE_STATUSES:
            raise UserError(
                f"Figure {figure['name']!r} has status {status!r}; use one of {', '.join(FIGURE_STATUSES)}."
            )
    rows = [row_of(claim) for claim in merge(claims) if claim.tier != "exploratory"]
    write_json(path, {"claims": rows, "figures": figures, **about})


def row_of(claim: Claim) -> dict:
    """A claim as JSON keeps it, with its sentence; seeds as text, since JSON's names are."""
    return {**asdict(claim), "sentence": claim.sentence}


def claim_of(row: dict) -> Claim:
    """A claim from its row of JSON; null numbers come back as nan.

    Raises:
        KeyError, TypeError, IndexError: the row is not that of a claim.
    """

    def back(part: dict, kind: type) -> dict:
        known = {one.name for one in fields(kind)}
        given = {key: value for key, value in part.items() if key in known}
        value, low, high = (math.nan if x is None else x for x in (part["measured"], *part["interval"]))
        labels = {int(key) if key.lstrip("-").isdigit() else key: value for key, value in part["per_seed"].items()}
        return given | {"measured": value, "interval": (low, high), "per_seed": labels}

    asked = row.get("referee")
    referee = None if asked is None else Referee(**back(asked, Referee))
    p, holm = (math.nan if row.get(name) is None else row[name] for name in ("p", "holm"))
    threshold = math.nan if row["threshold"] is None else row["threshold"]
    numbers = {"seeds": tuple(row["seeds"]), "referee": referee, "p": p, "holm": holm, "threshold": threshold}
    return Claim(**{**back(row, Claim), **numbers})
