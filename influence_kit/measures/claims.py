"""Claims: a sentence, a number with its interval, and what a rule fixed beforehand makes of the two.

A claim is confirmed when its whole interval satisfies the rule, refuted when the whole interval violates it, and
undecided otherwise. What is written holds no clock and no path, so equal results give equal bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from influence_kit.errors import UserError
from influence_kit.files import write_whole
from influence_kit.measures.intervals import Estimate

STATUSES = ("confirmed", "refuted", "undecided")
KINDS = ("claim", "gate", "control")
FIGURE_STATUSES = ("reproduced", "differs", "new")
FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Claim:
    """One claim of a chapter, judged.

    Attributes:
        id: Unique name.
        chapter: Stem of the notebook that makes it.
        claim: The sentence that is tested.
        paper: The paper's number or words.
        measured: Our number, in `unit`.
        interval: Its ends.
        status: One of `STATUSES`.
        kind: "claim"; "gate" (must pass before a claim is read) or "control" (its answer is known beforehand).
        seeds: Labels of the seeds used.
        unit: What `measured` and `interval` are in.
        rule: The criterion, in words.
        reason: Why it is undecided, or what other seeds say of a confirmed claim that they do not confirm; else empty.
        fragile: Confirmed by so little that an interval half as wide again would not confirm it.
        supported: The measured number itself, whatever its interval, satisfies the rule.
        referee: What another method, retraining above all, says of the same sentence; None where nothing was asked.

    Raises:
        UserError: an unknown status or kind.
    """

    id: str
    chapter: str
    claim: str
    paper: str | float
    measured: float
    interval: tuple[float, float]
    status: str
    kind: str
    seeds: tuple
    unit: str
    rule: str
    reason: str = ""
    fragile: bool = False
    supported: bool = False
    referee: Referee | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("status", STATUSES), ("kind", KINDS)):
            if (given := getattr(self, name)) not in allowed:
                raise UserError(f"Claim {self.id!r} has {name} {given!r}; use one of {', '.join(allowed)}.")

    @classmethod
    def from_estimate(
        cls,
        estimate: Estimate,
        *,
        id: str,
        chapter: str,
        claim: str,
        paper: str | float,
        unit: str,
        kind: str = "claim",
        gates: Sequence[Claim] = (),
        **thresholds: float | None,
    ) -> Claim:
        """A claim judged from its estimate; `thresholds` are those of `judge`, the rest as the attributes say."""
        status, reason = judge(estimate, kind=kind, gates=gates, **thresholds)
        half_as_wide_again, point = widened(estimate, 1.5), widened(estimate, 0)
        rule = describe_rule(**thresholds)
        if gates:
            rule += f"; read only if {', '.join(gate.id for gate in gates)} passed"
        return cls(
            id=id,
            chapter=chapter,
            claim=claim,
            paper=paper,
            measured=estimate.value,
            interval=estimate.interval,
            status=status,
            kind=kind,
            seeds=estimate.seeds,
            unit=unit,
            rule=rule,
            reason=reason,
            fragile=status == "confirmed"
            and judge(half_as_wide_again, kind=kind, gates=gates, **thresholds)[0] != status,
            supported=judge(point, kind="control", gates=(), **thresholds)[0] == "confirmed",
        )

    def refereed(self, method: str, by: Claim) -> Claim:
        """The claim with what a referee says of it.

        Args:
            method: The referee in words ("retraining").
            by: A claim of its own, confirmed where the method supports this one and refuted where it contradicts it.
        """
        both = {self.status, by.status}
        agreement = "undecided" if "undecided" in both else "agrees" if len(both) == 1 else "disagrees"
        same = self.supported == by.supported
        return replace(
            self, referee=Referee(method, by.id, by.measured, by.interval, by.unit, by.status, agreement, same)
        )


@dataclass(frozen=True)
class Referee:
    """What another method says of a claim.

    Attributes:
        method: The method in words.
        claim: The id of the referee's own claim.
        measured: Its number, in `unit`.
        interval: The ends of its interval.
        unit: What both are in.
        status: What became of the referee's own claim.
        agreement: "agrees" where both are confirmed or both refuted, "disagrees" where one is each, else "undecided".
        same_side: The two measured numbers, whatever their intervals, speak for the same answer.
    """

    method: str
    claim: str
    measured: float
    interval: tuple[float, float]
    unit: str
    status: str
    agreement: str
    same_side: bool


def widened(estimate: Estimate, by: float) -> Estimate:
    """The estimate with both arms of its interval `by` times as long."""
    low, high = (estimate.value + by * (end - estimate.value) for end in estimate.interval)
    return replace(estimate, low=low, high=high)


def _thresholds(confirm_above, confirm_below, refute_below, refute_above) -> tuple[float | None, float | None]:
    """Where refutation starts below and above, after checking that the rule makes sense."""
    if confirm_above is None and confirm_below is None:
        raise UserError("A rule needs confirm_above, confirm_below or both.")
    refute_below = confirm_above if refute_below is None else refute_below
    refute_above = confirm_below if refute_above is None else refute_above
    for refute, confirm, contradicts in (
        (refute_below, confirm_above, np.greater),
        (refute_above, confirm_below, np.less),
    ):
        if refute is not None and confirm is not None and contradicts(refute, confirm):
            raise UserError(f"The rule refutes at {refute:g} what it confirms from {confirm:g}; mend the thresholds.")
    return refute_below, refute_above


def describe_rule(
    confirm_above: float | None = None,
    confirm_below: float | None = None,
    refute_below: float | None = None,
    refute_above: float | None = None,
) -> str:
    """The criterion of `judge` in words.

    Raises:
        UserError: no threshold, or thresholds that contradict each other.
    """
    refute_below, refute_above = _thresholds(confirm_above, confirm_below, refute_below, refute_above)

    def words(below: float | None, above: float | None, joint: str, at: str = "") -> str:
        return joint.join(f"{at}{side} {x:g}" for side, x in (("above", above), ("below", below)) if x is not None)

    confirmed = words(confirm_below, confirm_above, " and ")
    refuted = words(refute_below, refute_above, " or ", "at or ")
    return f"confirmed if the whole interval lies {confirmed}; refuted if it lies {refuted}"


def judge(
    estimate: Estimate,
    confirm_above: float | None = None,
    confirm_below: float | None = None,
    refute_below: float | None = None,
    refute_above: float | None = None,
    kind: str = "claim",
    gates: Sequence[Claim] = (),
) -> tuple[str, str]:
    """Status of an estimate under a rule, and why it is undecided if it is.

    A claim from fewer than 3 seeds stays undecided whatever its interval, because that interval knows nothing of other
    seeds; gates and controls are judged all the same, since they speak of the run at hand.

    Args:
        estimate: What was measured.
        confirm_above: Confirmed only if low > this.
        confirm_below: Confirmed only if high < this.
        refute_below: Refuted if high <= this; by default `confirm_above`, a lower one leaves a band undecided.
        refute_above: Refuted if low >= this; by default `confirm_below`, a higher one leaves a band undecided.
        kind: One of `KINDS`.
        gates: Claims that must be confirmed before this one is read.

    Returns:
        (status, reason); the reason is empty unless the status is "undecided".

    Raises:
        UserError: no threshold, or thresholds that contradict each other.
    """
    refute_below, refute_above = _thresholds(confirm_above, confirm_below, refute_below, refute_above)
    low, high = estimate.interval
    if any(math.isnan(x) for x in (estimate.value, low, high)):
        return "undecided", "no number"
    closed = [gate for gate in gates if gate.status != "confirmed"]
    if closed:
        return "undecided", "; ".join(f"gate {gate.id} is {gate.status}" for gate in closed)
    if kind == "claim" and len(estimate.seeds) < FEWEST_SEEDS:
        return "undecided", f"<{FEWEST_SEEDS} seeds"
    if (confirm_above is None or low > confirm_above) and (confirm_below is None or high < confirm_below):
        return "confirmed", ""
    if (refute_below is not None and high <= refute_below) or (refute_above is not None and low >= refute_above):
        return "refuted", ""
    return "undecided", "the interval reaches over the threshold"


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
    write_json(path, {"claims": [asdict(claim) for claim in merge(claims)], "figures": figures, **about})


def read_verdicts(path: Path | str) -> tuple[list[Claim], list[dict]]:
    """Claims and figures of a file that `write_verdicts` wrote."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return [claim_of(row) for row in content["claims"]], content["figures"]


def claim_of(row: dict) -> Claim:
    """A claim from its row of JSON; null numbers come back as nan.

    Raises:
        KeyError, TypeError, IndexError: the row is not that of a claim.
    """

    def numbers(part: dict) -> dict:
        value, low, high = (math.nan if x is None else x for x in (part["measured"], *part["interval"]))
        return {**part, "measured": value, "interval": (low, high)}

    asked = row.get("referee")
    referee = None if asked is None else Referee(**numbers(asked))
    return Claim(**{**numbers(row), "seeds": tuple(row["seeds"]), "referee": referee})
