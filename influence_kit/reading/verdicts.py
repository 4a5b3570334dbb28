"""Claims as a reader sees them: a line a finding with the paper, here and what retraining says; the checks as a count."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from influence_kit.measures.claims import OVER
from influence_kit.measures.intervals import Estimate

if TYPE_CHECKING:
    from influence_kit.measures.claims import Claim, Referee

HEADER = ("", "finding", "the paper", "here", "retraining")
LEVEL = 0.05  # of Holm's correction


def verdict_table_markdown(claims: Iterable[Claim]) -> str:
    """The verdict table as GitHub Markdown, one line a primary claim, and below it what `in_sum` says."""
    claims = sorted(claims, key=lambda claim: claim.chapter)
    rows = []
    for claim in (claim for claim in claims if claim.tier == "primary"):
        finding, paper, here, asked = _parts(claim, "**")
        unit = claim.unit if claim.measured == claim.measured else ""
        told = " ".join(part for part in (here, unit, _reason(claim)) if part)
        rows.append((claim.chapter[:2], finding, paper, told, asked))
    table = [HEADER, ("---",) * len(HEADER), *rows] if rows else []
    lines = "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in table)
    return "\n".join(part for part in (lines, "".join(f"{line}\n" for line in in_sum(claims))) if part)


def chapter_table_markdown(claims: Iterable[Claim]) -> str:
    """A chapter's own table, primary claims first: the sentence, its rule, the number in its unit, the verdict, the referee."""
    head = ("claim", "the paper", "rule fixed beforehand", "here", "verdict", "referee")
    rows = [head, ("---",) * len(head)]
    for claim in sorted(claims, key=lambda claim: claim.tier != "primary"):
        rule = f"{claim.side} {claim.threshold:g}" + (
            f"; within ± {claim.delta:g} of it: no effect" if claim.delta else ""
        )
        here = f"{number(claim)}, {len(claim.seeds)} seeds"
        verdict = f"**{claim.verdict}**" + (f" ({claim.reason})" if claim.reason else "")
        by = claim.referee
        asked = "–" if by is None else f"{by.method} {by.agreement}: {number(by)}"
        rows.append((claim.claim, claim.paper or "–", rule, here, verdict, asked))
    return "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in rows)


def verdict_lines(claims: Iterable[Claim], width: int) -> list[str]:
    """The same for a terminal: each line at most `width` characters; what does not fit is the end of reasons and the paper's words."""
    rows = []
    for claim in (claim for claim in claims if claim.tier == "primary"):
        finding, paper, here, asked = _parts(claim)
        rows.append((claim.chapter[:2], finding, here, asked, f"{_reason(claim)} {paper}".strip()))
    if not rows:
        return []
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(part.ljust(room) for part, room in zip(row, wide, strict=True)).rstrip() for row in rows]
    return [line if len(line) <= width else line[: width - 1] + "…" for line in lines]


def in_sum(claims: Iterable[Claim]) -> list[str]:
    """What stands below a verdict table: how many came out how, what Holm's correction leaves, the checks with those that failed."""
    claims = list(claims)
    primary = [claim for claim in claims if claim.tier == "primary"]
    lines = []
    if primary:
        counts: dict[str, int] = {}
        for claim in primary:
            counts[claim.status] = counts.get(claim.status, 0) + 1
        told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items(), key=lambda item: -item[1]))
        decided = [claim for claim in primary if claim.status != "undecided"]
        lost = [f"“{claim.short or claim.id}” ({claim.chapter[:2]})" for claim in decided if claim.holm > LEVEL]
        kept = "all decided ones stand" if not lost else f"all decided ones but {', '.join(lost)} stand"
        corrected = any(claim.holm == claim.holm for claim in primary)  # a single chapter knows nothing of the others
        lines.append(
            f"{len(primary)} findings: {told}"
            + (f"; under Holm's correction {kept}." if corrected and decided else ".")
        )
    if checks := [claim for claim in claims if claim.tier == "check"]:
        failed = [claim for claim in checks if claim.status == "failed"]
        told = "; ".join(
            f"{claim.id} ({number(claim) if claim.measured == claim.measured else claim.reason})" for claim in failed
        )
        lines.append(
            f"Checks: {len(checks) - len(failed)} of {len(checks)} passed" + (f"; failed: {told}." if told else ".")
        )
    return lines


def number(said: Claim | Referee) -> str:
    """The number of a claim or of its referee, with interval and unit."""
    return f"{Estimate(said.measured, *said.interval, 0)} {said.unit}".strip()


def _parts(claim: Claim, strong: str = "") -> tuple[str, str, str, str]:
    """Finding, paper, here and referee of a line."""
    verdict = f"no effect > {claim.delta:g}" if claim.status.startswith("no ") else claim.status
    told = "" if claim.measured != claim.measured else f" {Estimate(claim.measured, *claim.interval, 0)}"
    here = f"{strong}{verdict}{strong}{told}"
    by = claim.referee
    asked = "–" if by is None else f"{by.method}: {by.agreement}" if by.method != "retraining" else by.agreement
    return claim.short or claim.claim, claim.paper, here, asked


def _reason(claim: Claim) -> str:
    """Why it is undecided, where the interval itself does not say so."""
    return f"({claim.reason})" if claim.reason and claim.reason != OVER else ""


def _cell(text: object) -> str:
    return " ".join(str(text).replace("|", "\\|").split())
