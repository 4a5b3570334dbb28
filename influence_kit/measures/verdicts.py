"""Verdicts: what a claim's interval says of it, and what a referee does.

A claim is confirmed when its whole interval satisfies the rule, refuted when the whole interval violates it, and
undecided otherwise. What is written holds no clock and no path, so equal results give equal bytes.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from influence_kit.errors import UserError
from influence_kit.measures.intervals import Estimate

STATUSES = ("confirmed", "refuted", "undecided")
KINDS = ("claim", "gate", "control")
FIGURE_STATUSES = ("reproduced", "differs", "new")
FEWEST_SEEDS = 3


@dataclass(frozen=True)
class Claim:
    """One row of the verdict table.

    Attributes:
        id: unique name. chapter: stem of the notebook that makes it.
        claim: the sentence that is tested. paper: the paper's number or words.
        measured: our number in `unit`. interval: its ends.
        status: confirmed, refuted or undecided. reason: why it is undecided, or what other seeds say of a confirmed
            claim that they do not confirm; empty otherwise.
        kind: "claim"; "gate" (must pass before a claim is read) or "control" (its answer is known beforehand).
        seeds: labels of the seeds used. rule: the criterion, in words.
        fragile: confirmed, but by so little that an interval half as wide again would not confirm it: other seeds may not.
        supported: the measured number itself, whatever its interval, satisfies the rule.
        referee: what another method, retraining above all, says of the same sentence; None where nothing was asked.
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
    referee: "Referee | None" = None

    def __post_init__(self) -> None:
        for name, allowed in (("status", STATUSES), ("kind", KINDS)):
            if (given := getattr(self, name)) not in allowed:
                raise UserError(f"Claim {self.id!r} has {name} {given!r}; use one of {', '.join(allowed)}.")

    @classmethod
    def from_estimate(
        cls,
        id: str,
        chapter: str,
        claim: str,
        paper: str | float,
        estimate: Estimate,
        unit: str,
        kind: str = "claim",
        gates: Sequence["Claim"] = (),
        **thresholds: float | None,
    ) -> "Claim":
        """A claim judged from its estimate; `thresholds` are those of `judge`."""
        status, reason = judge(estimate, kind=kind, gates=gates, **thresholds)
        fragile = status == "confirmed" and judge(widened(estimate), kind=kind, gates=gates, **thresholds)[0] != status
        supported = judge(widened(estimate, 0), kind="control", gates=(), **thresholds)[0] == "confirmed"
        rule = describe_rule(**thresholds)
        if gates:
            rule += f"; read only if {', '.join(gate.id for gate in gates)} passed"
        measured = (estimate.value, estimate.interval)
        return cls(
            id, chapter, claim, paper, *measured, status, kind, estimate.seeds, unit, rule, reason, fragile, supported
        )

    def refereed(self, method: str, by: "Claim") -> "Claim":
        """The claim with what a referee says: a method in words, and a claim of its own that is confirmed where the method
        supports this one and refuted where it contradicts it."""
        return replace(self, referee=Referee.of(self, method, by))


AGREEMENTS = ("agrees", "disagrees", "undecided")


@dataclass(frozen=True)
class Referee:
    """What another method says of a claim: its own number, its interval, and whether the two agree.

    agreement: "agrees" where both are confirmed or both refuted, "disagrees" where one is each, "undecided" else. same_side: the two
    measured numbers, whatever their intervals, speak for the same answer.
    """

    method: str
    claim: str  # the id of the referee's own claim
    measured: float
    interval: tuple[float, float]
    unit: str
    status: str
    agreement: str
    same_side: bool

    @classmethod
    def of(cls, claim: Claim, method: str, by: Claim) -> "Referee":
        """What `by` says of `claim`."""
        both = {claim.status, by.status}
        agreement = "undecided" if "undecided" in both else "agrees" if len(both) == 1 else "disagrees"
        same = claim.supported == by.supported
        return cls(method, by.id, by.measured, by.interval, by.unit, by.status, agreement, same)


def widened(estimate: Estimate, by: float = 1.5) -> Estimate:
    """The estimate with both arms of its interval `by` times as long: what is still confirmed then was not confirmed by a hair."""
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
    """The criterion of `judge` in words, for the `rule` column.

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

    Confirmed: low > `confirm_above` and high < `confirm_below` (whichever are given). Refuted: high <= `refute_below`
    or low >= `refute_above`, by default the thresholds of confirmation; give wider ones to leave a band undecided. A
    claim from fewer than 3 seeds stays undecided whatever its interval, because that interval knows nothing of other
    seeds; gates and controls are judged all the same, since they speak of the run at hand.

    Args:
        gates: claims that must be confirmed before this one is read.

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


def _plain(value):
    """JSON without nan, and floats to 9 significant digits, so that rounding noise changes no byte."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.9g}") if math.isfinite(value) else None
    return value


def write_json(path, content) -> None:
    """Write JSON with sorted keys, floats at 9 significant digits and nan as null; equal content gives equal bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(content), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)  # a reader sees the old file or the new one, never half


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


def write_verdicts(path, claims: Iterable[Claim], figures: Iterable[dict] = ()) -> None:
    """Write `{"claims": [...], "figures": [{"name", "status", ...}]}`, sorted by chapter and id, and by name.

    Raises:
        UserError: two claims share an id, or a figure's status is unknown.
    """
    figures = sorted(figures, key=lambda figure: figure["name"])
    for figure in figures:
        if (status := figure["status"]) not in FIGURE_STATUSES:
            raise UserError(
                f"Figure {figure['name']!r} has status {status!r}; use one of {', '.join(FIGURE_STATUSES)}."
            )
    write_json(path, {"claims": [asdict(claim) for claim in merge(claims)], "figures": figures})


def claim_of(row: dict) -> Claim:
    """A claim from its row of JSON; null numbers come back as nan. Raises KeyError, TypeError or IndexError for other rows."""

    def numbers(part: dict) -> dict:
        value, low, high = (math.nan if x is None else x for x in (part["measured"], *part["interval"]))
        return {**part, "measured": value, "interval": (low, high)}

    asked = row.get("referee")
    referee = None if asked is None else Referee(**numbers(asked))
    return Claim(**{**numbers(row), "seeds": tuple(row["seeds"]), "referee": referee})


def read_verdicts(path) -> tuple[list[Claim], list[dict]]:
    """Claims and figures of a file that `write_verdicts` wrote; null numbers come back as nan."""

    content = json.loads(Path(path).read_text(encoding="utf-8"))
    claims = [claim_of(row) for row in content["claims"]]
    return claims, content["figures"]


def verdict_table_markdown(claims: Iterable[Claim]) -> str:
    """The verdict table as GitHub Markdown, one line a claim, by chapter and id."""

    def cell(text) -> str:
        return " ".join(str(text).replace("|", "\\|").split())

    header = ("chapter", "claim", "paper", "measured [95 % interval]", "seeds", "verdict", "referee")
    rows = [header, ("---",) * len(header)]
    for claim in merge(claims):
        measured = f"{Estimate(claim.measured, *claim.interval, 0)} {claim.unit}"
        paper = f"{claim.paper:g}" if isinstance(claim.paper, (int, float)) else claim.paper
        verdict = f"*{claim.status}*" + (f" ({claim.reason})" if claim.reason else " (fragile)" if claim.fragile else "")
        sentence = claim.claim if claim.kind == "claim" else f"{claim.kind}: {claim.claim}"
        rows.append((claim.chapter, sentence, paper, measured, str(len(claim.seeds)), verdict, _asked(claim)))
    return "".join(f"| {' | '.join(map(cell, row))} |\n" for row in rows)


def _asked(claim: Claim) -> str:
    """The referee's cell of a table: its number, and whether it agrees."""
    if (asked := claim.referee) is None:
        return "–"
    words = {"agrees": "agrees", "disagrees": "**EK-FAC and it disagree**", "undecided": "undecided"}[asked.agreement]
    if asked.agreement == "undecided":
        words += ", same side" if asked.same_side else ", **other side**"
    return f"{asked.method}: {Estimate(asked.measured, *asked.interval, 0)} {asked.unit}; {words}"


def referees_markdown(claims: Iterable[Claim]) -> str:
    """The claims that have a referee, as a list of sentences in Markdown: what either says, and whether the two agree."""
    words = {"agrees": "the two agree", "disagrees": "**the two disagree**"}
    lines = []
    for claim in claims:
        if (by := claim.referee) is None:
            continue
        sides = f"{'the same side' if by.same_side else '**different sides**'} of what was asked"
        agreement = words.get(by.agreement, f"whether the two agree is undecided, their numbers lie on {sides}")
        numbers = (f"{Estimate(one.measured, *one.interval, 0)} {one.unit}".strip() for one in (claim, by))
        lines.append(f"- “{claim.claim}”: **{claim.status}** by influence ({next(numbers)}), **{by.status}** by {by.method} ({next(numbers)}); {agreement}.")
    return "\n".join(lines)
