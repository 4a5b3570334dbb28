"""The claims of the kit as they were fixed: `claims.yaml`, and since when it stands."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from influence_kit.errors import UserError
from influence_kit.measures.claims import Rule

PATH = Path(__file__).with_name("claims.yaml")


@cache
def fixed_claims() -> dict[str, Rule]:
    """The rule of every claim by its id.

    Raises:
        UserError: the file is no YAML; an entry has parts that a rule does not have, or lacks those that it needs.
    """
    import yaml

    found = {}
    try:
        entries = yaml.safe_load(PATH.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{PATH} is not YAML that can be read: {' '.join(str(error).split())}") from error
    for id, entry in entries.items():
        try:
            found[id] = Rule(id, **entry)
        except TypeError as error:
            raise UserError(f"{PATH.name}, claim {id!r}: {error}") from error
    return found


def rule_of(id: str, chapter: str) -> Rule:
    """The rule of a claim. Raises UserError for one that is not in the file, or belongs to another chapter."""
    if id not in (known := fixed_claims()):
        raise UserError(
            f"claim {id!r} is not in {PATH.name}: write it there, with its rule, before its number is known"
        )
    if known[id].chapter != chapter:
        raise UserError(f"claim {id!r} belongs to chapter {known[id].chapter}, not to {chapter}")
    return known[id]


def fixed_since() -> str:
    """Date and hash of the commit in which `claims.yaml` became what it is, or why there is none."""

    def git(*words: str) -> str:
        asked = ["git", *words, "--", PATH.name]
        return subprocess.run(asked, cwd=PATH.parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if git("status", "--porcelain"):
            return "not committed"
        return git("log", "-1", "--format=%cs %h") or "not committed"
    except (OSError, subprocess.CalledProcessError):
        return "not committed"
