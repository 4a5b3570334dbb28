"""From the cache to `figures/<profile>/`: files, provenance, and the verdicts over all chapters."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from influence_kit.errors import UserError, first_line
from influence_kit.files import sha256, whole
from influence_kit.findings.fixed import fixed_claims, fixed_since
from influence_kit.measures.claims import with_holm
from influence_kit.publishing.runs import check_claims, read_object, read_provenance
from influence_kit.reading.verdicts import in_sum, verdict_lines
from influence_kit.runner.stages import Stage, record

if TYPE_CHECKING:
    from influence_kit.measures.claims import Claim

OTHER_SEEDS = "other_seeds.json"  # what a run of other seeds says of the same claims


def publish(
    folder: Path,
    chapters: Sequence[Stage],
    update_expected: bool = False,
    expected: Path | None = None,
    changed: Mapping[str, object] | None = None,
) -> tuple[list["Claim"], list[dict]]:
    """Bring executed chapters into `folder` and write provenance.json and verdicts.json over all that lie there.

    Each file appears whole or not at all; files that a chapter no longer makes go; other chapters' files and claims stay.

    Args:
        folder: Where to.
        chapters: Stages that are made.
        update_expected: Make the figures' present tables what later runs are compared with.
        expected: The file of what tables are compared with; the folder's own by default.
        changed: What the run changed of its profile, kept in verdicts.json.

    Returns:
        The claims, and the figures ({name, status, differing columns if any}).

    Raises:
        UserError: Claims of other chapters are not what their run wrote; a file that is read is cut or damaged.
    """
    from influence_kit.measures.claims import write_json, write_verdicts

    check_claims(folder, [chapter.label for chapter in chapters])
    folder.mkdir(parents=True, exist_ok=True)
    known = read_provenance(folder)
    for chapter in chapters:
        _bring(chapter, folder, known)
    write_json(folder / "provenance.json", known)
    figures = _judge_figures(folder, update_expected, expected or folder / "expected.json")
    claims = [claim for made in claims_of(folder).values() for claim in made]
    about = {"changed": dict(changed)} if changed else {}
    write_verdicts(folder / "verdicts.json", claims, figures, rules_since=fixed_since(), **about)
    return claims, figures


def _bring(chapter: Stage, folder: Path, known: dict) -> None:
    content = record(chapter)
    for name, listed in content["files"].items():
        target = folder / name
        if target.is_file() and target.stat().st_size == listed["size"] and sha256(target) == listed["sha256"]:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole(target) as part:
            shutil.copyfile(chapter.folder / name, part)
    for key in [key for key, entry in known.items() if entry["kind"] == "chapter" and entry["label"] == chapter.label]:
        for name in set(known.pop(key)["files"]) - set(content["files"]):
            (folder / name).unlink(missing_ok=True)
    below = _closure(chapter)
    for stage in below.values():
        if (stage.folder / "stage.json").is_file():
            known[stage.fingerprint] = _entry(record(stage))
    known[chapter.fingerprint] = _entry(content) | {
        "files": {name: listed["sha256"] for name, listed in content["files"].items()},
        "given": content["parameters"]["given"],
        "changed": content["parameters"]["changed"],
        "stages": sorted(key for key in below if key in known),
    }
    wanted = {key for entry in known.values() for key in entry.get("stages", [])}
    for key in [key for key, entry in known.items() if entry["kind"] != "chapter" and key not in wanted]:
        del known[key]


def _closure(stage: Stage) -> dict[str, Stage]:
    found: dict[str, Stage] = {}
    for below in stage.inputs.values():
        found |= {below.fingerprint: below, **_closure(below)} if below.fingerprint not in found else {}
    return found


def _entry(content: dict) -> dict:
    return {name: content[name] for name in ("kind", "label", "versions")} | content["made"]


def _judge_figures(folder: Path, update_expected: bool, path: Path) -> list[dict]:
    """Every figure with a table behind it: reproduced, differs (with the columns), or new (no expectation yet)."""
    import pandas

    from influence_kit.measures.claims import write_json
    from influence_kit.publishing.expected import compare, expectation, summarise_table

    expected = read_object(path)
    summaries = {}
    for file in sorted(folder.glob("*.parquet")):
        try:
            summaries[file.name.removesuffix(".parquet")] = summarise_table(pandas.read_parquet(file))
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read ({first_line(error)}): delete it, run its chapter again") from error
    if update_expected:
        expected = {name: expectation(summary) for name, summary in summaries.items()}
        write_json(path, expected)
        expected = read_object(path)
    figures = []
    for name, summary in summaries.items():
        try:
            status, differing = compare(summary, expected.get(name))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} says nothing to compare {name} with ({error}): mend or delete it") from error
        figures.append({"name": name, "status": status} | ({"differing": differing} if differing else {}))
    return figures


def read_claims(path: Path) -> list["Claim"]:
    """A chapter's claims: a JSON list of rows, or an object that holds them as `claims`. Raises UserError otherwise."""
    from influence_kit.measures.claims import claim_of

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is cut or damaged ({first_line(error)}): delete it, run its chapter again") from error
    try:
        rows = content["claims"] if isinstance(content, dict) else content
        return [claim_of(row) for row in rows]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"{path} holds a claim without its parts ({error}): delete it and run its chapter again"
        ) from error


def claims_of(folder: Path) -> dict[str, list["Claim"]]:
    """The claims of a run by chapter, with Holm's correction over all of them."""
    made = {path.stem: read_claims(path) for path in sorted(folder.glob("claims/*.json"))}
    corrected = with_holm(claim for claims in made.values() for claim in claims)
    return {chapter: [claim for claim in corrected if claim.chapter == chapter] for chapter in made}


def keep_other_seeds(folder: Path, run: Path) -> tuple[int, int]:
    """Keep what another run, of other seeds, says of the claims in `folder`, in its other_seeds.json; chapters that the other run lacks keep
    what is there. Returns how many primary claims confirmed here it has, and how many of them it confirms.

    Raises UserError where the other run has no claims, or the same seeds.
    """
    from influence_kit.measures.claims import write_json

    here = {claim.id: claim for made in claims_of(folder).values() for claim in made}
    there = [claim for made in claims_of(run).values() for claim in made if claim.id in here]
    if not there:
        raise UserError(f"{run} has no claim of those in {folder}: give the figures of a run with other --seeds")
    if same := [claim.id for claim in there if claim.seeds and set(claim.seeds) & set(here[claim.id].seeds)]:
        raise UserError(
            f"{run} has seeds of {folder} ({same[0]}, seeds {here[same[0]].seeds}): run it with other --seeds"
        )
    # A claim without a number on those seeds says nothing, and JSON has no nan.
    rows = {
        claim.id: {"measured": claim.measured, "interval": claim.interval, "status": claim.status, "seeds": claim.seeds}
        for claim in there
        if math.isfinite(claim.measured)
    }
    write_json(folder / OTHER_SEEDS, read_object(folder / OTHER_SEEDS) | rows)
    both = [claim for claim in there if here[claim.id].status == "confirmed" and claim.tier == "primary"]
    return len(both), sum(claim.status == "confirmed" for claim in both)


def closing_screen(claims: Iterable["Claim"], figures: Iterable[dict], folder: Path) -> str:
    """What a run ends with in a terminal: a line a finding, the checks as a count, how figures compare, and where the rest is."""
    claims, figures = list(claims), list(figures)
    width = max(shutil.get_terminal_size((140, 24)).columns, 60)
    states = Counter(figure["status"] for figure in figures)
    told = ", ".join(f"{states[status]} {status}" for status in ("reproduced", "differs", "new") if states[status])
    differing = ", ".join(figure["name"] for figure in figures if figure["status"] == "differs")
    lines = [
        *verdict_lines(claims, width),
        *in_sum(claims),
        *unconcluded(claims, folder),
        *replicated(claims, folder),
        f"figures: {told or 'none'}" + (f" ({differing})" if differing else ""),
        f"every verdict with its interval, rule and values by seed: {folder / 'verdicts.json'}; rules fixed {fixed_since()}",
    ]
    return "\n".join(lines)


def unconcluded(claims: Iterable["Claim"], folder: Path) -> list[str]:
    """A line that names the claims that the file of rules has for the chapters of a run and the run did not conclude, if any."""
    chapters = {entry["label"] for entry in read_provenance(folder).values() if entry["kind"] == "chapter"}
    made = {claim.id for claim in claims}
    missing = [id for id, rule in fixed_claims().items() if rule.chapter in chapters and id not in made]
    return [f"Not concluded: {', '.join(missing)}."] if missing and made else []


def replicated(claims: Iterable["Claim"], folder: Path) -> list[str]:
    """A line that says what other seeds made of the primary claims that are confirmed here, if any were run."""
    other = read_object(folder / OTHER_SEEDS)
    both = [claim for claim in claims if claim.status == "confirmed" and claim.tier == "primary" and claim.id in other]
    if not both:
        return []
    seeds = sorted({seed for claim in both for seed in other[claim.id]["seeds"]})
    not_again = [
        f"{claim.id} {other[claim.id]['status']}" for claim in both if other[claim.id]["status"] != "confirmed"
    ]
    told = f"Other seeds, {', '.join(map(str, seeds))}: {len(both) - len(not_again)} of {len(both)} confirmed again"
    return [told + (f"; {', '.join(not_again)}." if not_again else ".")]
