"""Stages: functions from (parameters, inputs) to files, kept under the hash of all they depend on.

A stage lies in `<cache>/<kind>/<fingerprint[:16]>/` beside `stage.json`, which lists every file with its sha256. Until
it is finished it lies in `<…>.part/`; a killed stage finds its own `.part` folder again and continues there. What it
keeps for that purpose alone goes into `<out>/resume/`, which is dropped at the end.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from influence_kit.errors import UserError
from influence_kit.files import sha256
from influence_kit.runner.fingerprint import digest, name_of, source_digest, versions
from influence_kit.runner.live import Progress, live
from influence_kit.runner.machine import (
    cache_root,
    circumstances,
    release_memory,
    reset_peak_memory,
    say,
    storage_problem,
    threads,
)

FORMAT = 1
RESUME = "resume"
LIBRARIES = ("numpy", "tokenizers", "torch", "transformers")


@dataclass(frozen=True)
class Cost:
    """What making a stage is estimated to take, on one process."""

    seconds: float = 0.0
    memory_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True, eq=False)
class Stage:
    """One unit of work, defined by what it depends on.

    kind: its folder in the cache ("model"); function: one at the top of a module, called as
    `function(parameters, inputs, out, progress)` with parameters as JSON gives them back, inputs as folders by name, out
    as the folder to write into; parameters: anything JSON can hold (seed, dtype and device kind among them);
    threads: how many it computes with, whatever the machine has, so that sums come out the same;
    libraries: those whose versions change its numbers; label: its name for people; early: tried before longer
    stages, because it can fail for reasons outside (a network), and should do so before minutes are spent.
    """

    kind: str
    function: Callable
    parameters: dict = field(default_factory=dict)
    inputs: dict[str, "Stage"] = field(default_factory=dict)
    threads: int = 1
    label: str = ""
    libraries: tuple[str, ...] = LIBRARIES
    early: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of source, parameters, inputs' fingerprints, threads and library versions."""
        return digest(
            {
                "kind": self.kind,
                "function": name_of(self.function),
                "source": source_digest(name_of(self.function)),
                "parameters": self.parameters,
                "inputs": {name: stage.fingerprint for name, stage in self.inputs.items()},
                "threads": self.threads,
                "versions": versions(self.libraries),
            }
        )

    @property
    def gpu(self) -> str | None:
        """The GPU that its parameters name as "device", which it has to itself: processes that share one wait for each other."""
        device = str(self.parameters.get("device", "cpu"))
        return None if device == "cpu" else device

    @property
    def folder(self) -> Path:
        """Where its files lie once made."""
        return cache_root() / self.kind / self.fingerprint[:16]

    @property
    def name(self) -> str:
        """Its label, or kind and hash where it has none."""
        return self.label or f"{self.kind} {self.fingerprint[:8]}"

    def beside(self, suffix: str) -> Path:
        """The file or folder next to its own with this suffix (".part", ".lock", ".log")."""
        return self.folder.with_name(self.folder.name + suffix)


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def damage(stage: Stage, verify: bool = False) -> str | None:
    """What is wrong with a stage's files: "" if nothing, None if it was never made.

    A file whose size and times are those of its last full check is taken as whole; with `verify` all are hashed.
    """
    folder, seen_path = stage.folder, stage.beside(".seen")
    if not folder.is_dir():
        return None
    try:
        record = json.loads((folder / "stage.json").read_bytes())
        fingerprint, check = record["fingerprint"], record.pop("check", None)
        files = {name: (listed["size"], listed["sha256"]) for name, listed in record["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "stage.json is missing or unreadable"
    if fingerprint != stage.fingerprint:
        return "stage.json belongs to another stage"
    if check not in (None, digest(record)):  # None: from before there was one
        return "stage.json is not what was written"
    try:
        seen = dict(json.loads(seen_path.read_bytes()))
    except (OSError, ValueError, TypeError):
        seen = {}
    checked = {}
    for name, (size, hashed) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        checked[name] = _stamp(path)
        if not verify and seen.get(name) == checked[name]:
            continue
        if checked[name][0] != size or sha256(path) != hashed:
            with suppress(OSError):  # whoever looks next must not trust times either
                _remove(seen_path)
            return f"{name} is not what was written"
    if checked != seen:
        _remember(seen_path, checked)
    return ""


def _remember(path: Path, stamps: dict[str, list[int]]) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(stamps))
        temporary.replace(path)
    except OSError:  # a read-only or full cache can still be read; the next check is only slower
        temporary.unlink(missing_ok=True)


def is_made(stage: Stage, verify: bool = False) -> bool:
    """Whether a stage's files are there and whole; damaged ones are reported in one line."""
    problem = damage(stage, verify)
    if problem:
        say(f"{stage.name}: {problem} in {stage.folder}; making it again")
    return problem == ""


def record(stage: Stage) -> dict:
    """The `stage.json` of a finished stage."""
    return json.loads((stage.folder / "stage.json").read_bytes())


def ensure(stage: Stage, force: bool = False, verify: bool = False) -> Path:
    """The folder of a stage, made first if need be (its inputs too), in this process.

    Shows how far it is, and prints one line to the terminal when there was work to do. `force` makes the stage (not its inputs) again.
    Raises UserError when the cache folder cannot be written or is full; whatever the stage's function raises.
    """
    if not force and is_made(stage, verify):
        return stage.folder
    for below in stage.inputs.values():
        ensure(below, verify=verify)
    started = time.monotonic()
    with live(stage.name) as progress:
        folder = make(stage, progress, force=force)
    say(f"made {stage.name} in {time.monotonic() - started:.1f} s")
    return folder


def make(stage: Stage, progress: Progress, force: bool = False) -> Path:
    """Make one stage whose inputs are made, unless another process did so in the meantime; return its folder."""
    try:
        stage.folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(stage, progress):
            if force or damage(stage) != "":
                _run(stage, progress, force)
    except UserError:
        raise
    except Exception as error:
        if remedy := storage_problem(error, stage.name):
            raise UserError(remedy) from error
        raise
    return stage.folder


def _run(stage: Stage, progress: Progress, force: bool) -> None:
    part = stage.beside(".part")
    if force or (part.exists() and not part.is_dir()):
        _remove(part)
    resumed = part.is_dir() and any(part.iterdir())
    part.mkdir(exist_ok=True)
    inputs = {key: below.folder for key, below in stage.inputs.items()}
    # As JSON gives them back, so that the function sees what the fingerprint saw (a tuple is a list).
    parameters = json.loads(json.dumps(stage.parameters))
    started = time.monotonic()
    release_memory()
    reset_peak_memory()
    with threads(stage.threads):
        try:
            stage.function(parameters, inputs, part, progress)
        except (UserError, MemoryError):
            raise
        except Exception as error:
            if not resumed or storage_problem(error, stage.name):
                raise
            # A kill can leave a half-written file that no later attempt could read: begin once more from nothing.
            say(f"{stage.name}: could not continue after an interruption ({type(error).__name__}); starting it anew")
            shutil.rmtree(part)
            part.mkdir()
            stage.function(parameters, inputs, part, progress)
    shutil.rmtree(part / RESUME, ignore_errors=True)
    _seal(stage, part, {"wall_seconds": round(time.monotonic() - started, 3), "resumed": resumed, **circumstances()})


def _seal(stage: Stage, part: Path, made: dict) -> None:
    """List the files, push them to the disk, and let the folder appear under its name in one step."""
    files = {}
    for path in sorted(part.rglob("*")):
        if path.is_file() and path != part / "stage.json":
            files[path.relative_to(part).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
    content: dict = {
        "format": FORMAT,
        "kind": stage.kind,
        "label": stage.label,
        "fingerprint": stage.fingerprint,
        "function": name_of(stage.function),
        "parameters": stage.parameters,
        "inputs": {name: below.fingerprint for name, below in stage.inputs.items()},
        "threads": stage.threads,
        "versions": versions(stage.libraries),
        "files": files,
        "made": made,
    }
    content["check"] = digest(json.loads(json.dumps(content)))
    _remove(part / "stage.json")  # of a kill at this very line, or a link that leads elsewhere
    (part / "stage.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    for path in [*part.rglob("*"), part]:
        _sync(path)
    old = stage.beside(".old")
    _remove(old)
    if stage.folder.exists():
        stage.folder.rename(old)
    part.rename(stage.folder)
    _sync(stage.folder.parent)
    _remove(old)
    _remember(stage.beside(".seen"), {name: _stamp(stage.folder / name) for name in files})


def _remove(path: Path) -> None:
    """What a killed run or somebody's hand left in a stage's place, a file or a folder."""
    shutil.rmtree(path, ignore_errors=True)
    if path.exists() or path.is_symlink():
        path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(stage: Stage, progress: Progress) -> Iterator[None]:
    """Hold the stage's lock file; the system lets go of it when the holder dies, however it dies."""
    with stage.beside(".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{stage.name}: another process is making it; waiting for that")
            progress(0, 1, "waiting for another process that makes it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
