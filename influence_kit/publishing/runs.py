"""Where a run's results lie, what it says of itself, and what it must not write over."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from influence_kit.errors import UserError
from influence_kit.files import sha256, write_whole
from influence_kit.runner.fingerprint import digest
from influence_kit.runner.machine import commit, cores

LONGEST = 48  # characters of a folder's name that say what was changed


@dataclass(frozen=True)
class Run:
    """One run: its profile's name, what it changes of the profiles that ship, where its results lie, and when it began.

    The plain run of a profile that ships writes figures/<profile>/, which git may track; every other run writes a folder of
    its own below figures/runs/, which git ignores.
    """

    root: Path
    profile: str
    changed: Mapping[str, object]
    began: float = field(default_factory=time.monotonic)
    commit: str | None = field(default_factory=commit)
    load: float | None = field(default_factory=lambda: _load())

    @property
    def folder(self) -> Path:
        """Where its results lie."""
        figures, own = self.root / "figures", {k: v for k, v in self.changed.items() if k != "profile"}
        if not self.changed:
            return figures / self.profile
        return figures / "runs" / "-".join([self.profile, *([_named(own)] if own else [])])

    @property
    def expected(self) -> Path:
        """The file of what its tables are compared with: that of its profile's run without the other changes."""
        plain = {name: value for name, value in self.changed.items() if name == "profile"}
        return Run(self.root, self.profile, plain, self.began, self.commit).folder / "expected.json"

    def check(self, chapters: Collection[str], update_expected: bool = False) -> None:
        """Refuse, before any work, what could not be published at its end.

        Raises:
            UserError: What is expected would come from a changed run; the folder cannot be written; a chapter that is not
                among these has claims that no run wrote.
        """
        if update_expected and self.expected.parent != self.folder:
            raise UserError(
                f"--update-expected keeps the tables of a profile's plain run: leave out what changes it ({', '.join(self.changed)})"
            )
        places = (place for place in (self.folder, *self.folder.parents) if place.exists() or place.is_symlink())
        existing = next(places)
        if not existing.is_dir():
            raise UserError(f"{existing} is a file where a folder should be: move it away, then run again")
        if not os.access(existing, os.W_OK):
            raise UserError(f"cannot write to {existing}: make it writable, then run again")
        check_claims(self.folder, chapters)

    def write(self, made: int, stages: int, chapters: Collection[str]) -> None:
        """Keep in run.json what the run took as a whole: commit, seconds, cores, the machine's load, stages made of all it needs, chapters."""
        about = {
            "commit": self.commit and self.commit.removesuffix("+changes"),
            "dirty": self.commit is None or self.commit.endswith("+changes"),
            "seconds": round(time.monotonic() - self.began, 1),
            "cores": cores(),
            "load": {"before": self.load, "after": _load()},  # processes that ran or waited, over the last minute
            "stages_made": made,
            "stages": stages,
            "chapters": sorted(chapters),
            "changed": dict(self.changed),
        }
        write_whole(self.folder / "run.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def _load() -> float | None:
    """The machine's load average of the last minute; None where it has none."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _named(changed: Mapping[str, object]) -> str:
    """What was changed as part of a folder's name: whole where that is short and plain, else its beginning and a hash."""

    def word(name: str, value: object) -> str:
        if isinstance(value, bool):
            return name if value else f"no-{name}"
        return f"{name}-{'-'.join(map(str, value)) if isinstance(value, list) else value}"

    text = "-".join(word(*item) for item in sorted(changed.items(), key=lambda item: (item[0] != "model", item[0])))
    plain = re.sub(r"[^\w.-]+", "-", text).strip("-.")
    return plain if plain == text and len(plain) <= LONGEST else f"{plain[:LONGEST]}-{digest(dict(changed))[:6]}"


def read_object(path: Path) -> dict:
    """What a JSON file holds, {} where there is none. Raises UserError for one that is cut or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, IsADirectoryError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): mend or delete it") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, not an object: mend or delete it")
    return content


def read_provenance(folder: Path) -> dict[str, dict]:
    """What a folder's provenance.json says of its stages, by fingerprint. Raises UserError for one that is cut or damaged."""
    known = read_object(folder / "provenance.json")
    for entry in known.values():
        parts = (
            isinstance(entry, dict)
            and {"kind", "label"} <= set(entry)
            and (entry["kind"] != "chapter" or "files" in entry)
        )
        if not parts:
            raise UserError(f"{folder / 'provenance.json'} holds an entry without its parts: delete it, and run again")
    return known


def check_claims(folder: Path, chapters: Collection[str] = ()) -> None:
    """Raise UserError where claims of other chapters than these are not what their run wrote, by provenance.json."""
    written: dict[str, str] = {}
    for entry in read_provenance(folder).values():
        if entry["kind"] == "chapter" and isinstance(entry["files"], dict):  # lists: from before hashes were kept
            written |= entry["files"]
    for path in sorted(folder.glob("claims/*.json")):
        name = path.relative_to(folder).as_posix()
        if path.stem not in chapters and name in written and (not path.is_file() or sha256(path) != written[name]):
            raise UserError(
                f"{path} is not what its run wrote: run that chapter again (--only {path.stem}), or bring the file back"
            )
