"""Claims as a reader sees them: the verdict table, a line a finding, and what was checked, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from influence_kit.measures.intervals import Estimate

if TYPE_CHECKING:
    from influence_kit.measures.claims import Claim, Referee

HEADER = ("", "finding", "the paper", "here", "retraining")


def verdict_table_markdown(claims: Iterable[Claim]) -> str:
    """The verdict table as GitHub Markdown: one line a primary claim, by id; the checks as a count."""
    claims = sorted(claims, key=lambda claim: (claim.chapter, claim.id))
    primary = [claim for claim in claims if claim.tier == "primary"]
    rows = [HEADER, ("---",) * len(HEADER)] if primary else []
    for claim in primary:
        verdict = f"**{claim.verdict}**" + (f" ({claim.reason})" if claim.reason else "")
        rows.append((claim.chapter[:2], claim.claim, claim.paper, f"{verdict}: {number(claim)}", asked(claim)))
    table = "".join(f"| {' | '.join(map(_cell, row))} |\n" for row in rows)
    return "\n".join(part for part in (table, checks_in_words(claims)) if part)


def checks_in_words(claims: Iterable[Claim]) -> str:
    """How many checks passed, and each one that failed; empty where there is none."""
    checks = [claim for claim in claims if claim.tier == "check"]
    failed = [claim for claim in checks if claim.status == "failed"]
    told = "; ".join(f"{claim.id} ({claim.reason or number(claim)})" for claim in failed)
    return (
        f"Checks: {len(checks) - len(failed)} of {len(checks)} passed" + (f"; failed: {told}.\n" if told else ".\n")
        if checks
        else ""
    )


def number(said: Claim | Referee) -> str:
    """The number of a claim or of its referee, with interval and unit."""
    return f"{Estimate(said.measured, *said.interval, 0)} {said.unit}".strip()


def asked(claim: Claim) -> str:
    """The referee's cell of a table: whether it agrees, and its number."""
    if (by := claim.referee) is None:
        return "–"
    agrees = "**disagrees**" if by.agreement == "disagrees" else by.agreement
    return f"{agrees}: {by.method} {number(by)}"


def referees_markdown(claims: Iterable[Claim]) -> str:
    """The claims that have a referee, a sentence each."""
    told = [
        f"- {claim.claim}: **{claim.verdict}** by influence ({number(claim)}); {asked(claim)}."
        for claim in claims
        if claim.referee
    ]
    return "\n".join(told)


def _cell(text: object) -> str:
    return " ".join(str(text).replace("|", "\\|").split())
