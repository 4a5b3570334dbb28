"""Claims in words, as a chapter's cells say them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from influence_kit.measures.intervals import Estimate

if TYPE_CHECKING:
    from influence_kit.measures.claims import Claim


def interval(claim: Claim, spec: str = ".2f") -> str:
    """What was measured: `0.38 [0.30, 0.45]`."""
    return format(Estimate(claim.measured, *claim.interval, n=len(claim.seeds)), spec)


def number_of_seeds(claim: Claim) -> str:
    """How many seeds a claim rests on: `8 seeds`."""
    return f"{len(claim.seeds)} seed{'s' * (len(claim.seeds) != 1)}"


def verdict(claim: Claim) -> str:
    """What became of a claim, and why it is undecided if it is: `**undecided** (fewer than 3 seeds)`."""
    return f"**{claim.verdict}**" + (f" ({claim.reason})" if claim.reason else "")


def by_verdict(claim: Claim, confirmed: str, refuted: str, none: str, undecided: str) -> str:
    """The words of a sentence that follow a claim's verdict; `none` where no effect is larger than δ."""
    return {"confirmed": confirmed, "refuted": refuted, "undecided": undecided}.get(claim.status, none)


def answered(claim: Claim, yes: str, no: str) -> str:
    """What a verdict answers: `yes` where it is confirmed, `no` where it is refuted or finds nothing, else that it is open."""
    if claim.status == "undecided":
        return f"Open ({claim.reason}): whether {claim.claim[0].lower()}{claim.claim[1:]}"
    return yes if claim.status == "confirmed" else no


def refereed(claim: Claim) -> str:
    """What another method says of a claim, in a sentence, with its seeds where the claim has others: `Retraining agrees: 2.1 [1.5, 2.7] nats (3 seeds).`"""
    if (by := claim.referee) is None:
        return ""
    word = {"undecided": "leaves it undecided"}.get(by.agreement, by.agreement)
    measured = Estimate(by.measured, *by.interval, n=0)
    seeds = f" ({len(by.per_seed)} seeds)" if len(by.per_seed) not in (0, len(claim.seeds)) else ""
    return f"{by.method[0].upper()}{by.method[1:]} {word}: {measured:.2g} {by.unit}{seeds}."
