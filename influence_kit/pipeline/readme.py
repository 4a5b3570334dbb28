"""The parts of README.md that a run writes: verdicts, figures, times. `python -m influence_kit.pipeline.readme [--profile laptop]`."""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path

from influence_kit.errors import UserError
from influence_kit.measures.verdicts import read_verdicts, verdict_table_markdown
from influence_kit.pipeline.machine import repository
from influence_kit.pipeline.run import clock

WHAT = {
    "text": "fetch and cut real text",
    "world": "generate corpora",
    "model": "train models",
    "influence": "fit EK-FAC and score",
    "chapter": "execute chapters",
}


def verdicts(folder: Path) -> str:
    """The verdict table of a committed run, and how its figures compare with what is expected."""
    claims, figures = read_verdicts(folder / "verdicts.json")
    counts: dict[str, int] = defaultdict(int)
    for figure in figures:
        counts[figure["status"]] += 1
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return f"{verdict_table_markdown(claims)}\nFigures: {told}.\n"


def times(folder: Path) -> str:
    """Wall time and peak memory by kind of stage, from provenance.json."""
    known = json.loads((folder / "provenance.json").read_text())
    kinds: dict[str, list[dict]] = defaultdict(list)
    for entry in known.values():
        kinds[entry["kind"]].append(entry)
    rows = ["| stage | how many | seconds, summed over processes | largest memory |", "| --- | --- | --- | --- |"]
    others = [entry for kind in kinds.keys() - WHAT.keys() for entry in kinds[kind]]
    listed = [(what, kinds.get(kind, [])) for kind, what in WHAT.items()]
    for what, found in [*listed[:-1], ("what else chapters need", others), listed[-1]]:
        if found:
            seconds = sum(entry["wall_seconds"] for entry in found)
            memory = max(entry["peak_memory_bytes"] for entry in found) / 1e9
            rows.append(f"| {what} | {len(found)} | {seconds:,.0f} | {memory:.1f} GB |")
    total = sum(entry["wall_seconds"] for entry in known.values())
    return "\n".join(rows) + f"\n\nSummed over stages: {clock(total)}; two ran at a time.\n"


def fill(text: str, parts: dict[str, str]) -> str:
    """Put each part between its markers `<!-- name -->` and `<!-- /name -->`. Raises UserError where they are missing."""
    for name, content in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not pattern.search(text):
            raise UserError(f"README.md has no place for {name!r}: add the lines <!-- {name} --> and <!-- /{name} -->")
        text = pattern.sub(lambda match, content=content: match[1] + content + match[2], text)  # type: ignore[misc]
    return text


def main() -> None:
    """Rewrite README.md from `figures/<profile>/`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="laptop")
    profile = parser.parse_args().profile
    root = repository() or Path.cwd()
    folder = root / "figures" / profile
    if not (folder / "verdicts.json").is_file():
        raise SystemExit(f"error: {folder / 'verdicts.json'} is not there: run ./run_all.sh --profile {profile} first")
    path = root / "README.md"
    path.write_text(fill(path.read_text(), {"verdicts": verdicts(folder), "times": times(folder)}))


if __name__ == "__main__":
    main()
