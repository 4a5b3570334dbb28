"""The parts of README.md that a run writes: verdicts, figures, times.

python -m influence_kit.publishing.readme [--profile laptop] [--other-seeds figures/of-a-run-with-other-seeds]
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

from influence_kit.errors import UserError
from influence_kit.publishing.notebooks import answer
from influence_kit.publishing.results import claims_of, keep_other_seeds, publish, replicated, unconcluded
from influence_kit.publishing.runs import read_object
from influence_kit.reading.verdicts import verdict_table_markdown
from influence_kit.runner.live import clock
from influence_kit.runner.machine import repository

WHAT = {
    "text": "fetch and cut real text",
    "world": "generate corpora",
    "model": "train models",
    "influence": "fit EK-FAC and score",
    "chapter": "execute chapters",
}


def verdicts(folder: Path) -> str:
    """A row a finding: the paper, here, retraining; below it checks, other seeds, since when rules are fixed, how figures compare."""
    claims = [claim for made in claims_of(folder).values() for claim in made]
    if not any(claim.tier == "primary" for claim in claims):
        return f"The run in figures/{folder.name} is older than the claims as they stand now; `./run_all.sh` makes one that judges them.\n"
    content = read_object(folder / "verdicts.json")
    states = Counter(figure["status"] for figure in content["figures"])
    told = ", ".join(f"{count} {status}" for status, count in sorted(states.items()))
    fixed = f"[fixed beforehand](influence_kit/findings/claims.yaml) ({content.get('rules_since', 'not committed')})"
    more = " ".join([*unconcluded(claims, folder), *replicated(claims, folder)])
    about = f"Rules, units and the smallest effect worth speaking of: {fixed}; values by seed: [verdicts.json](figures/{folder.name}/verdicts.json)."
    return f"{verdict_table_markdown(claims)}{more}\n\n{about} Figures: {told}.\n"


def times(folder: Path) -> str:
    """What the whole run took, from run.json; wall time and peak memory by kind of stage, from provenance.json."""
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
    told = f"Summed over stages: {clock(total)}, two at a time. {whole_run(read_object(folder / 'run.json'))}".strip()
    return "\n".join(rows) + f"\n\n{told}\n\n{times_alone(known)}"


def whole_run(about: dict) -> str:
    """A sentence on what a run took as a whole, on which machine, of which commit; empty where none is kept."""
    if not about:
        return ""
    load = about.get("load", {}).get("before")
    busy = "" if load is None else f" (load {load:g} when it began)"
    of = f"commit {about['commit'][:7]}{' and changes' * about['dirty']}" if about["commit"] else "no commit"
    made = f"{about['stages_made']} of {about['stages']} stages made"
    return f"The whole run: {clock(about['seconds'])} on {about['cores']} cores{busy}, {made}, {of}."


def times_alone(known: dict[str, dict]) -> str:
    """What each chapter takes by itself: from nothing, half of its stages' seconds and its own, for all seeds and for the first one alone;
    with its stages kept, its own."""
    head = "| one chapter alone | stages | from nothing: half their seconds, and its own | the same, of one seed | stages kept: its own |"
    rows = [head, "| --- | --- | --- | --- | --- |"]
    for chapter in sorted((entry for entry in known.values() if entry["kind"] == "chapter"), key=lambda c: c["label"]):
        stages, own = [known[key] for key in chapter["stages"]], chapter["wall_seconds"]
        seeds = [re.search(r"seed (\d+)", stage["label"]) for stage in stages]
        first = min((int(seed[1]) for seed in seeds if seed), default=0)
        of_one = [stage for stage, seed in zip(stages, seeds, strict=True) if not seed or int(seed[1]) == first]
        whole, one = (clock(sum(stage["wall_seconds"] for stage in some) / 2 + own) for some in (stages, of_one))
        rows.append(f"| {chapter['label']} | {len(stages)} | {whole} | {one} | {clock(own)} |")
    return "\n".join(rows) + "\n"


def real(folder: Path) -> str:
    """What chapter 12 found in a language model from elsewhere, its first figure, and what the run took."""
    (executed,) = (folder / "notebooks").glob("12_*.ipynb")
    known = json.loads((folder / "provenance.json").read_text()).values()
    memory = max(entry["peak_memory_bytes"] for entry in known) / 1e9
    place = f"figures/{folder.name}"
    return (
        f"{answer(executed)}\n\n![What is left of a fact when its sentence is changed]({place}/12_word_order.png)\n\n"
        f"[The executed chapter]({place}/notebooks/{executed.name}), with its cards, the other findings, and what the texts are. From nothing, "
        f"the model and the texts fetched: {whole_run(read_object(folder / 'run.json')).partition(': ')[2]} The largest process had {memory:.1f} GB.\n"
    )


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
    parser.add_argument(
        "--other-seeds", type=Path, metavar="FIGURES", help="keep what a run of other seeds says of the same claims"
    )
    asked = parser.parse_args()
    profile = asked.profile
    root = repository() or Path.cwd()
    folder = root / "figures" / profile
    if not (folder / "verdicts.json").is_file():
        raise SystemExit(f"error: {folder / 'verdicts.json'} is not there: run ./run_all.sh --profile {profile} first")
    if asked.other_seeds:
        confirmed, stay = keep_other_seeds(folder, asked.other_seeds)
        publish(folder, [])
        print(f"{stay} of {confirmed} confirmed findings are confirmed again on the other seeds")
    path = root / "README.md"
    parts = {"verdicts": verdicts(folder), "times": times(folder), "real": real(root / "figures" / "real")}
    path.write_text(fill(path.read_text(), parts))


if __name__ == "__main__":
    main()
