"""Claims as a reader sees them: the verdict table, and what referees say, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from influence_kit.measures.intervals import Estimate

if TYPE_CHECKING:
    from influence_kit.measures.claims import Claim, Referee


def verdict_table_markdown(claims: Iterable[Claim]) -> str:
    """The verdict table as GitHub Markdown, one line a claim, by chapter and id."""

    def cell(text) -> str:
        return " ".join(str(text).replace("|", "\\|").split())

    header = ("chapter", "claim", "paper", "measured [95 % interval]", "seeds", "verdict", "referee")
    rows = [header, ("---",) * len(header)]
    for claim in sorted(claims, key=lambda claim: (claim.chapter, claim.id)):
        paper = f"{claim.paper:g}" if isinstance(claim.paper, (int, float)) else claim.paper
        verdict = f"*{claim.status}*" + (
            f" ({claim.reason})" if claim.reason else " (fragile)" if claim.fragile else ""
        )
        sentence = claim.claim if claim.kind == "claim" else f"{claim.kind}: {claim.claim}"
        rows.append((claim.chapter, sentence, paper, _number(claim), str(len(claim.seeds)), verdict, _asked(claim)))
    return "".join(f"| {' | '.join(map(cell, row))} |\n" for row in rows)


def referees_markdown(claims: Iterable[Claim]) -> str:
    """The claims that have a referee, a sentence each: what either says, and whether the two agree."""
    words = {"agrees": "the two agree", "disagrees": "**the two disagree**"}
    lines = []
    for claim in claims:
        if (by := claim.referee) is None:
            continue
        sides = f"{'the same side' if by.same_side else '**different sides**'} of what was asked"
        agreement = words.get(by.agreement, f"whether the two agree is undecided, their numbers lie on {sides}")
        lines.append(
            f"- “{claim.claim}”: **{claim.status}** by influence ({_number(claim)}), "
            f"**{by.status}** by {by.method} ({_number(by)}); {agreement}."
        )
    return "\n".join(lines)


def _number(said: Claim | Referee) -> str:
    return f"{Estimate(said.measured, *said.interval, 0)} {said.unit}".strip()


def _asked(claim: Claim) -> str:
    """The referee's cell of a table: its number, and whether it agrees."""
    if (asked := claim.referee) is None:
        return "–"
    words = {"agrees": "agrees", "disagrees": "**EK-FAC and it disagree**", "undecided": "undecided"}[asked.agreement]
    if asked.agreement == "undecided":
        words += ", same side" if asked.same_side else ", **other side**"
    return f"{asked.method}: {_number(asked)}; {words}"
