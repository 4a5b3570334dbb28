"""Breaks things, runs again, and counts what came of it.

    python tests/benchmarks/faults.py [--short] [--seed N] [--only KIND…] [--readme]

Each fault ends in one of four ways. *Survived*: the same bytes, or the right result, in the end. *Refused*: one line, before any
work, that names the value and what to do. *Lost*: a traceback, a run that cannot go on, or work gone that was finished. *Wrong*:
another result, and nobody said so. Exit code 1 where anything is lost or wrong. Faults are drawn from a seed, so that one that
is found can be found again.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import errno
import io
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}

from tqdm import tqdm  # noqa: E402

from influence_kit.errors import UserError  # noqa: E402
from influence_kit.runner.stages import Stage, ensure  # noqa: E402
from tests.runner import tiny_stages  # noqa: E402

tqdm.monitor_interval = 0  # no thread and no lock that a fork would share with one that is killed
tqdm.set_lock(threading.RLock())

SURVIVED, REFUSED, LOST, WRONG = "survived", "refused", "lost", "wrong"
SLOWEST = 5.0  # seconds that a refusal may take
REMEDY = re.compile(
    r"\b(give|choose|use|mend|save|must|known|there are|delete|move|free|run again|take|takes|lower|write|add|set|copy|"
    r"bring|begin|leave|install|shorten|look|see)\b"
)
Fault = Callable[[random.Random, Path], "Outcome"]


@dataclass(frozen=True)
class Outcome:
    """How a fault ended; what was said of it, and how long a refusal took."""

    how: str
    told: str = ""
    seconds: float = 0.0


@dataclass
class Kind:
    """Faults of one kind: how many are injected (in short), and what became of them."""

    name: str
    fault: Fault
    full: int
    short: int
    outcomes: list[tuple[str, Outcome]] = field(default_factory=list)


KINDS: list[Kind] = []


def kind(name: str, full: int, short: int) -> Callable[[Fault], Fault]:
    def keep(fault: Fault) -> Fault:
        KINDS.append(Kind(name, fault, full, short))
        return fault

    return keep


def attempt(
    work: Callable[[], object], names: str = "", right: Callable[[object], bool] = lambda result: True
) -> Outcome:
    """Do something with bad input. It may be refused, in one line that has the value (`names`) and a remedy, or give what is right."""
    began = time.monotonic()
    try:
        result = work()
    except UserError as error:
        return judged(str(error), names, time.monotonic() - began)
    except Exception:
        return Outcome(LOST, traceback.format_exc(limit=-3))
    return Outcome(SURVIVED) if right(result) else Outcome(WRONG, f"accepted: {short(result)}")


def judged(message: str, names: str, seconds: float) -> Outcome:
    """A refusal, if it is one: a line that names the value and what to do."""
    if "\n" in message.strip() or names not in message or not REMEDY.search(message):
        return Outcome(LOST, f"unclear, should name {names!r} and a remedy: {message}")
    if seconds > SLOWEST:
        return Outcome(LOST, f"clear, but after {seconds:.1f} s: {message}")
    return Outcome(REFUSED, message, seconds)


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 300 else f"{text[:300]}…"


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but those that tell when and where it was made."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in ("stage.json", "provenance.json", "run.json")
    }


# --- processes that are harmed


def in_a_process(work: Callable[[], object], harm: Callable[[], object] = lambda: None) -> tuple[int, Callable]:
    """Do something in a process forked from this one, harmed first. Returns its id, and what waits for (how, text, seconds)."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)

        def wait() -> tuple[str, str, float]:
            with os.fdopen(read, "rb") as pipe:
                data = pipe.read()
            os.waitpid(child, 0)
            return pickle.loads(data) if data else ("killed", "", 0.0)

        return child, wait
    told, began = ("done", "", 0.0), time.monotonic()
    try:
        os.close(read)
        quiet = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(quiet, stream)
        sys.__stderr__ = sys.stderr = sys.stdout = open(os.devnull, "w")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        harm()
        work()
    except UserError as error:
        told = ("refused", str(error), time.monotonic() - began)
    except KeyboardInterrupt:
        told = ("interrupted", "", 0.0)
    except BaseException:
        told = ("failed", traceback.format_exc(limit=-3), 0.0)
    with contextlib.suppress(BaseException):
        os.write(write, pickle.dumps(told))
    os._exit(0)


def at_operation(number: int, below: Path, do: Callable[[str], None]) -> Callable[[], None]:
    """A harm: `do` at a process's n-th change of files below a folder (opened for writing, made, renamed, removed)."""

    def harm() -> None:
        left, place = number, str(below)

        def watch(event: str, arguments: tuple) -> None:
            nonlocal left
            if event == "open":
                if not arguments[2] or not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    return
            elif event not in ("os.rename", "os.mkdir", "os.remove", "os.rmdir"):
                return
            path = arguments[0] if isinstance(arguments[0], str | os.PathLike) else ""
            if str(path).startswith(place):
                left -= 1
                if left == 0:
                    do(str(path))

        sys.addaudithook(watch)

    return harm


def die(path: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fails(code: int) -> Callable[[str], None]:
    def do(path: str) -> None:
        raise OSError(code, os.strerror(code), path)

    return do


# --- stages


def chain() -> Stage:
    """Three small stages: one that saves itself at every step, one that does not, and their sum."""
    one = tiny_stages.stage("slow", pause=0.002)
    two = tiny_stages.stage("number", value=7)
    gathered = tiny_stages.stage("number", "three", value=3)
    both = tiny_stages.stage("total", inputs={"two": two, "three": gathered})
    return Stage("all", tiny_stages.surroundings, {"of": "all"}, {"one": one, "both": both}, libraries=())


def below(stage: Stage) -> list[Stage]:
    return [stage, *(deeper for each in stage.inputs.values() for deeper in below(each))]


@contextlib.contextmanager
def cache_at(folder: Path) -> Iterator[Path]:
    before = os.environ.get("INFLUENCE_KIT_CACHE")
    os.environ["INFLUENCE_KIT_CACHE"] = str(folder)
    try:
        yield folder
    finally:
        os.environ.pop("INFLUENCE_KIT_CACHE") if before is None else os.environ.update(INFLUENCE_KIT_CACHE=before)


def made_again(stage: Stage, before: dict[str, dict[str, bytes]], tidy: bool = True) -> Outcome:
    """Run again: every stage has the bytes of a run that nothing happened to, and (`tidy`) nothing lies beside it."""
    try:
        ensure(stage)
        after = {each.fingerprint: contents(ensure(each)) for each in below(stage)}
    except Exception:
        return Outcome(LOST, traceback.format_exc(limit=-3))
    left = [each.name for each in below(stage) if each.beside(".part").exists() or each.beside(".old").exists()]
    if after != before:
        return Outcome(WRONG, "other bytes than of an undisturbed run")
    return Outcome(LOST, f"left behind: {left}") if left and tidy else Outcome(SURVIVED)


@cache
def undisturbed(which: Callable[[], Stage]) -> tuple[dict[str, dict[str, bytes]], float]:
    """What a stage and all below it hold, made in peace, and the seconds that takes."""
    with tempfile.TemporaryDirectory() as folder, cache_at(Path(folder)):
        began = time.monotonic()
        ensure(which())
        took = time.monotonic() - began
        return {each.fingerprint: contents(each.folder) for each in below(which())}, took


def disturbed(
    rng: random.Random, place: Path, which: Callable[[], Stage], how: int, times: int, operations: int = 60
) -> Outcome:
    """Kill or interrupt a stage's making a few times, at random moments or at file operations; then make it in peace."""
    before, seconds = undisturbed(which)
    with cache_at(place / "cache") as cached:
        for _ in range(times):
            if rng.random() < 0.5 and how == signal.SIGKILL:
                _, wait = in_a_process(lambda: ensure(which()), at_operation(rng.randint(1, operations), cached, die))
            else:
                child, wait = in_a_process(lambda: ensure(which()))
                time.sleep(rng.uniform(0, 1.1 * seconds))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, how)
            ended, told, _ = wait()
            if ended in ("failed", "refused"):
                return Outcome(LOST, f"{ended} after a kill: {told}")
        return made_again(which(), before)


@kind("stages killed", 70, 12)
def killed(rng: random.Random, place: Path) -> Outcome:
    return disturbed(rng, place, chain, signal.SIGKILL, rng.randint(1, 3))


@kind("stages interrupted", 20, 4)
def interrupted(rng: random.Random, place: Path) -> Outcome:
    return disturbed(rng, place, chain, signal.SIGINT, rng.randint(1, 2))


def trained() -> Stage:
    """A world, a model trained on it and a scan, as a chapter reads them, small."""
    from influence_kit.findings.families import planted_grid
    from influence_kit.findings.profiles import PlantedGrid, load_profile

    world = {"entities": 12, "relations": 1, "values": 4, "documents": 400, "most_supporters": 200, "queries": 3}
    world |= {"canaries": 1, "repetitions": [1, 2], "noise_share": 0.1, "held_out": 20}
    family = {"sizes": [{"width": 16, "depth": 1}], "recipe": {"batch_size": 8, "warmup_steps": 2, "evaluations": 2}}
    atlas = PlantedGrid(world=world, family=family, scan={"fit": 60, "sequences": 90})
    profile = load_profile("smoke", real_text=False).model_copy(update={"atlas": atlas})
    return planted_grid(profile, "atlas")[0].influence[1.0]


@kind("training and scans killed", 12, 3)
def killed_in_training(rng: random.Random, place: Path) -> Outcome:
    return disturbed(rng, place, trained, signal.SIGKILL, rng.randint(1, 2), 40)


@kind("two at once, one killed", 12, 3)
def killed_beside_another(rng: random.Random, place: Path) -> Outcome:
    before, seconds = undisturbed(chain)
    with cache_at(place / "cache"):
        child, wait = in_a_process(lambda: ensure(chain()))
        _, other = in_a_process(lambda: ensure(chain()))
        time.sleep(rng.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        wait()
        ended, told, _ = other()
        return made_again(chain(), before) if ended == "done" else Outcome(LOST, f"the other one {ended}: {told}")


# --- cache


def harm_file(rng: random.Random, path: Path, others: list[Path]) -> str:
    """One kind of damage to a file: cut, flipped, deleted, emptied, swapped, overwritten, another thing in its place."""
    data = path.read_bytes()
    how = rng.choice(
        ["cut", "flip", "flip, same times", "delete", "empty", "swap", "junk", "longer", "folder", "dangling"]
    )
    status = path.stat()
    if how == "cut":
        path.write_bytes(data[: rng.randrange(len(data))] if data else b"x")
    elif how.startswith("flip"):
        place = rng.randrange(len(data)) if data else 0
        path.write_bytes(
            data[:place] + bytes([(data[place] if data else 0) ^ 1 << rng.randrange(8)]) + data[place + 1 :]
        )
        if "times" in how:
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    elif how == "delete":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "swap":
        other = rng.choice(others)
        ours, theirs = data, other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(ours)
    elif how == "junk":
        path.write_bytes(rng.randbytes(rng.randint(1, 2000)))
    elif how == "longer":
        path.write_bytes(data + rng.randbytes(9))
    else:
        path.unlink()
        path.mkdir() if how == "folder" else path.symlink_to("nowhere")
    return how


@kind("cache damaged", 150, 30)
def damaged(rng: random.Random, place: Path) -> Outcome:
    before, _ = undisturbed(chain)
    with cache_at(place / "cache") as cached:
        ensure(chain())
        for _ in range(rng.randint(1, 2)):
            files = [path for path in cached.rglob("*") if path.is_file() and path.suffix != ".lock"]
            folders = [each.folder for each in below(chain()) if each.folder.is_dir()]
            if rng.random() < 0.8:
                harm_file(rng, rng.choice(files), files)
            elif rng.random() < 0.5:  # a folder
                harmed, how = rng.choice(folders), rng.choice(["gone", "file", "other's", "half"])
                other = rng.choice(folders)
                if how == "half":
                    harmed.rename(harmed.with_name(f"{harmed.name}.part"))
                elif how == "other's" and other != harmed:
                    shutil.rmtree(harmed)
                    shutil.copytree(other, harmed)
                else:
                    shutil.rmtree(harmed)
                    if how == "file":
                        harmed.write_bytes(b"in the way")
            else:  # beside one
                stage = rng.choice(below(chain()))
                junk = stage.beside(rng.choice([".part", ".old", ".seen", ".log"]))
                if not junk.exists():
                    (junk.mkdir() if rng.random() < 0.5 else junk.write_bytes(rng.randbytes(50)))
                if rng.random() < 0.7 and stage.folder.is_dir():
                    shutil.rmtree(stage.folder)
        return made_again(chain(), before, tidy=False)


# --- disk


@kind("disk: an operation fails", 90, 15)
def failing(rng: random.Random, place: Path) -> Outcome:
    """The n-th change of files fails: full, over quota, read-only, not allowed, broken. Then all is well again."""
    before, _ = undisturbed(chain)
    code = rng.choice([errno.ENOSPC, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
    with cache_at(place / "cache") as cached:
        harm = at_operation(rng.randint(1, 75), cached, fails(code))
        ended, told, seconds = in_a_process(lambda: ensure(chain()), harm)[1]()
        if ended == "failed":
            return Outcome(LOST, told)
        again = made_again(chain(), before)
        return judged(told, str(cached), seconds) if again.how == SURVIVED and ended == "refused" else again


@kind("disk: full in the middle of a file", 24, 6)
def full(rng: random.Random, place: Path) -> Outcome:
    """A file of a stage, or its log, lies on a device that is full; under a worker as under a notebook."""
    from influence_kit.runner.scheduler import make_all, needed

    before, _ = undisturbed(chain)
    with cache_at(place / "cache"):
        stage = rng.choice([each for each in below(chain()) if each.kind in ("slow", "number", "total")])
        names = ["value.json", *(["more/text.txt"] if stage.kind == "number" else [])]
        name, beside = rng.choice([("", ".log"), *((name, ".part") for name in names)])
        target = stage.beside(beside) / name if name else stage.beside(beside)
        target.parent.mkdir(parents=True)
        target.symlink_to("/dev/full")
        work = rng.choice([lambda: ensure(chain()), lambda: make_all(needed([chain()]), jobs=1)])
        ended, told, seconds = in_a_process(work)[1]()
        if ended == "failed":
            return Outcome(LOST, told)
        target.unlink(missing_ok=True)
        again = made_again(chain(), before)
        return judged(told, "no space left in", seconds) if again.how == SURVIVED and ended == "refused" else again


# --- notebooks


CELLS = (
    "profile: str = 'laptop'\nsteps: int = 5",
    "import json, os, time\nfrom pathlib import Path\nimport pyarrow, pyarrow.parquet\n"
    "figures = Path(os.environ['INFLUENCE_KIT_FIGURES'])",
    "for step in range(steps):\n    time.sleep(0.05)\n    print(step)\n"
    "pyarrow.parquet.write_table(pyarrow.table({'step': list(range(steps))}), figures / 'steps.parquet')",
    "(figures / 'claims').mkdir()\nsize = (figures / 'claims' / '01_growth.json').write_text('[]')",
)


def notebook(folder: Path, cells: tuple[str, ...] = CELLS) -> Path:
    parts = [
        {"cell_type": "code", "id": f"cell-{n}", "source": source, "outputs": [], "execution_count": None}
        | {"metadata": {"tags": ["parameters"] if n == 0 else []}}
        for n, source in enumerate(cells)
    ]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "01_growth.ipynb"
    path.write_text(json.dumps({"cells": parts, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    return path


@cache
def chapter() -> Stage:
    from influence_kit.publishing.notebooks import chapter_stage

    with tempfile.TemporaryDirectory() as folder:
        return chapter_stage(notebook(Path(folder)), {"steps": 4}, {}, [tiny_stages.stage("number", value=7)])


def in_another_process(script: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests' / 'benchmarks'}"}
    code = f"import faults\nfrom influence_kit.runner.stages import ensure\n{script}"
    quiet = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=quiet, stderr=quiet)


@kind("notebooks killed while they run", 12, 3)
def killed_chapter(rng: random.Random, place: Path) -> Outcome:
    """The process that executes a chapter, or the kernel below it, is killed; then it is executed in peace."""
    before, seconds = undisturbed(chapter)
    with cache_at(place / "cache"):
        for _ in range(rng.randint(1, 2)):
            run = in_another_process("ensure(faults.chapter())")
            time.sleep(rng.uniform(0.3, 1.2 * seconds + 1))
            kernels = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
            for victim in kernels if kernels and rng.random() < 0.5 else [run.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(victim), signal.SIGKILL)
            run.wait()
        return made_again(chapter(), before)


@kind("notebooks damaged", 40, 12)
def damaged_notebook(rng: random.Random, place: Path) -> Outcome:
    """A notebook's file is cut, flipped or holds something else: it is refused, or read as it now stands."""
    from influence_kit.publishing.notebooks import chapter_stage

    path = notebook(place)
    content = json.loads(path.read_text())
    how = rng.choice(["file", "file", "no cells", "cells of no kind", "no Python", "old", "text"])
    if how == "file":
        harm_file(rng, path, [path])
    elif how == "text":
        path.write_text(rng.choice(["", "null", "[]", "7", '"text"', "{}", "nbformat: 4"]))
    else:
        if how == "no cells":
            content["cells"] = rng.choice([None, {}, "cells", [None], [[]], [{}]])
        elif how == "cells of no kind":
            content["cells"][0]["cell_type"] = rng.choice(["poem", None, 7])
        elif how == "no Python":
            content["cells"][1]["source"] = rng.choice(["for", "%matplotlib inline\n!ls", "x = (", "\x00", "def f(:\n"])
        else:
            content["nbformat"] = rng.choice([1, 2, 3, 99, "4", None])
        path.write_text(json.dumps(content))
    given = path.read_text(errors="replace") if path.is_file() else ""

    def right(stage) -> bool:
        cells = [cell[1] for cell in stage.parameters["cells"]]
        return all(json.dumps(source)[1:-1] in given or source in given for source in cells)

    return attempt(lambda: chapter_stage(path, {}, {}, []), "01_growth", right)


# --- figures


@cache
def published() -> tuple[Stage, Path]:
    """Two chapters in a cache of their own."""
    from influence_kit.publishing.notebooks import chapter_stage

    folder = Path(tempfile.mkdtemp(prefix="faults_"))
    return chapter_stage(notebook(folder / "notebooks"), {}, {}, []), folder


@kind("figures damaged", 50, 12)
def damaged_figures(rng: random.Random, place: Path) -> Outcome:
    """A file of a run's results is harmed; the run is published again: it is mended, or named, and deleting it mends it."""
    from influence_kit.publishing.runs import Run

    stage, kept = published()
    with cache_at(kept / "cache"):
        ensure(stage)
        run = Run(place, "laptop", {})
        publish_all(run, stage)
        before = contents(run.folder) | {"provenance.json": (run.folder / "provenance.json").read_bytes()}
        files = [path for path in run.folder.rglob("*") if path.is_file()]
        victim = rng.choice(files)
        harm_file(rng, victim, files)
        began = time.monotonic()
        try:
            publish_all(run, stage)
        except UserError as error:
            outcome = judged(str(error), run.folder.name, time.monotonic() - began)
            for path in files:  # what the message says to do
                if str(path) in str(error):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            with contextlib.suppress(UserError):
                publish_all(run, stage)
        except OSError as error:
            from influence_kit.cli import _remedy

            outcome = judged(_remedy(error), run.folder.name, time.monotonic() - began)
            shutil.rmtree(victim) if victim.is_dir() else victim.unlink(missing_ok=True)
            publish_all(run, stage)
        except Exception:
            return Outcome(LOST, traceback.format_exc(limit=-3))
        else:
            outcome = Outcome(SURVIVED)
        after = contents(run.folder) | {"provenance.json": (run.folder / "provenance.json").read_bytes()}
        wrong = sorted(name for name in before | after if before.get(name) != after.get(name))
        return Outcome(WRONG, f"{victim.name}: {wrong} differ") if wrong else outcome


def publish_all(run, stage: Stage) -> None:
    from influence_kit.publishing.results import publish

    run.check([stage.label])
    publish(run.folder, [stage])


@kind("tracked results and changed runs", 40, 10)
def changed_run(rng: random.Random, place: Path) -> Outcome:
    """A run with something changed has a folder of its own, whatever the change is called; no two changes share one."""
    from influence_kit.publishing.runs import Run

    def word() -> str:
        letters = string.ascii_letters + string.digits + " /.-_éß~$:\\*'\"\u202e😀"
        return "".join(rng.choice(letters) for _ in range(rng.randint(0, 70)))

    changes: list[object] = [word(), rng.random(), [rng.randrange(10**6)], False, {"a": word()}]
    first = {rng.choice(["top", "model", "k"]): rng.choice(changes)}
    second = {next(iter(first)): rng.choice([change for change in changes if change != next(iter(first.values()))])}
    ours, theirs = (Run(place, "laptop", changed, commit="") for changed in (first, second))
    inside = [run.folder.resolve().parent == (place / "figures" / "runs").resolve() for run in (ours, theirs)]
    if not all(inside) or ours.folder == theirs.folder:
        return Outcome(WRONG, f"{first}, {second}: {ours.folder}, {theirs.folder}")
    try:
        ours.folder.mkdir(parents=True)
    except OSError as error:
        return Outcome(LOST, f"{first}: {error}")
    return attempt(lambda: ours.check(["01"], update_expected=True), next(iter(first)), lambda result: False)


# --- profiles


SMOKE = REPOSITORY / "influence_kit" / "findings" / "profiles" / "smoke.yaml"
NOT_NUMBERS = ["many", "1e-3", "", None, [], {}, [1], {"x": 1}, math.nan, math.inf, -math.inf, -1, -4, -0.5, 10**30]


@cache
def smoke() -> dict:
    import yaml

    return yaml.safe_load(SMOKE.read_text())


def leaves(value: object, path: tuple = ()) -> Iterator[tuple]:
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path


def at(content: dict, path: tuple):
    for key in path:
        content = content[key]
    return content


@kind("profiles: a value of the wrong kind", 130, 30)
def wrong_value(rng: random.Random, place: Path) -> Outcome:
    import yaml

    from influence_kit.findings.profiles import load_profile

    content = copy.deepcopy(smoke())
    path = rng.choice([path for path in leaves(content) if path[0] not in ("purpose", "name")])
    value = at(content, path)
    if isinstance(value, bool):
        bad = rng.choice(["many", None, 3, -1, [], {}, math.nan])
    elif isinstance(value, int | float):
        bad = rng.choice(NOT_NUMBERS)
    else:
        bad = rng.choice([None, 7, [], {}, -1.5, True, "no/such \x07thing"])
    at(content, path[:-1])[path[-1]] = bad
    (place / "mine.yaml").write_text(yaml.safe_dump(content))
    name = next(str(key) for key in reversed(path) if isinstance(key, str))
    return attempt(lambda: load_profile(str(place / "mine.yaml")), name, lambda profile: False)


@kind("profiles: a key that nobody knows, or one too few", 60, 15)
def wrong_key(rng: random.Random, place: Path) -> Outcome:
    import yaml

    from influence_kit.findings.profiles import load_profile

    content = copy.deepcopy(smoke())
    inner = [path[:-1] for path in leaves(content) if isinstance(path[-1], str)]
    path = rng.choice(inner)
    if rng.random() < 0.7:
        key = rng.choice(list(at(content, path) or {"x": 0})) + rng.choice(["s", "_", "x", " "])
        if path and path[-1] in ("arms", "extra"):
            path = path[:-1]
        at(content, path)[key] = 1
        (place / "mine.yaml").write_text(yaml.safe_dump(content))
        return attempt(lambda: load_profile(str(place / "mine.yaml")), key, lambda profile: False)
    key = rng.choice(list(at(content, path)))
    removed = at(content, path).pop(key)
    (place / "mine.yaml").write_text(yaml.safe_dump(content))
    return attempt(lambda: planned(str(place / "mine.yaml")), "", lambda plan: plan is not None and removed is not key)


def planned(name: str):
    """The plan of a few chapters under a profile, or the refusal of it. Raises ArithmeticError where it makes no sense."""
    from influence_kit.findings.discovery import chapter_names, stages_for
    from influence_kit.findings.profiles import load_profile
    from influence_kit.publishing.costs import cost_of

    profile, costs = load_profile(name), []
    for number in ("01", "05", "11"):
        for stage in stages_for(profile, next(each for each in chapter_names() if each.startswith(number))):
            cost = cost_of(stage)
            costs += [cost.seconds, cost.memory_bytes, cost.disk_bytes]
    if not all(0 < cost < math.inf for cost in costs):
        raise ArithmeticError("an estimate is not a number above 0")
    return costs


@kind("profiles: files", 50, 15)
def wrong_file(rng: random.Random, place: Path) -> Outcome:
    from influence_kit.findings.profiles import load_profile

    text = SMOKE.read_text()
    lines = text.splitlines()
    data = {
        "latin-1": f"# {rng.choice('éüß')}\n{text}".encode("latin-1"),
        "utf-16": text.encode("utf-16"),
        "cut": text[: rng.randrange(60, len(text) - 40)].encode(),
        "twice": f"{text}\n{rng.choice(['atlas', 'seeds', 'text'])}: {{}}\n".encode(),
        "tab": "\n".join([*lines[:20], "\t- x: 1", *lines[20:]]).encode(),
        "binary": rng.randbytes(rng.randint(1, 500)),
        "empty": b"",
        "other": rng.choice([b"[1, 2]", b"text", b"7", b"null", b"--- {}\n--- {}", b"a: *b", b"a: &x [*x]"]),
        "deep": b"a: " + rng.choice([b"[", b"{a: "]) * rng.randint(2_000, 50_000),
        "object": b"a: !!python/object/apply:os.system ['true']",
        "name": f"name: laptop\n{text}".encode(),
        "line": "\n".join(line for number, line in enumerate(lines) if number != rng.randrange(len(lines))).encode(),
        "mark": b"\xef\xbb\xbf" + text.encode(),
        "crlf": text.replace("\n", "\r\n").encode(),
    }
    how = rng.choice(list(data))
    (place / "mine.yaml").write_bytes(data[how])
    if rng.random() < 0.1:
        (place / "mine.yaml").unlink()
        (place / "mine.yaml").mkdir() if rng.random() < 0.5 else None
        how = "gone"
    harmless = how in ("mark", "crlf", "line", "cut")  # the last two by chance
    same = how in ("mark", "crlf")

    def right(profile) -> bool:
        return harmless and (not same or profile.model_copy(update={"name": "smoke"}) == load_profile("smoke"))

    return attempt(lambda: load_profile(str(place / "mine.yaml")), "mine.yaml", right)


# --- parameters and the command line


@cache
def chapters() -> dict[Path, dict[str, dict]]:
    from influence_kit.publishing.notebooks import known_parameters

    return {path: known_parameters(path) for path in sorted((REPOSITORY / "notebooks").glob("*.ipynb"))}


@kind("parameters of chapters", 60, 15)
def wrong_parameter(rng: random.Random, place: Path) -> Outcome:
    """A value of another type, or a name that no chapter knows, is refused; what is taken is of the declared type."""
    from influence_kit.publishing import notebooks

    path, known = rng.choice(list(chapters().items()))
    name = rng.choice([*known, "sede", "", "profile", "seeds", "--top", "k k"])
    text = rng.choice(
        [
            "many",
            "1e999",
            "nan",
            "[1",
            "None",
            "-7",
            "0.5",
            "true",
            "{1: 2}",
            "(" * 5000,
            "9" * 5000,
            "é",
            "",
            "[1,[2]]",
            "1_0",
        ]
    )
    declared = known.get(name, {}).get("inferred_type_name", "")
    types = {"int": int, "float": float, "str": str, "bool": bool}

    def work() -> dict:
        known_before = notebooks.known_parameters
        notebooks.known_parameters = lambda path: chapters()[path]  # read once
        try:
            return notebooks.chosen_parameters([path], {name: text}, {})[path.stem]
        finally:
            notebooks.known_parameters = known_before

    def right(chosen: dict) -> bool:
        value = chosen.get(name, types.get(declared, str)())
        sound = json.loads(json.dumps(value, allow_nan=False)) == value
        return (
            name in known and name not in notebooks.OPTIONS and sound and isinstance(value, types.get(declared, object))
        )

    return attempt(work, name, right)


@kind("the command line", 36, 10)
def wrong_words(rng: random.Random, place: Path) -> Outcome:
    """Wrong words end in exit code 2 and one line, within seconds."""
    words = rng.choice(
        [
            ["run", "--profile", rng.choice(["labtop", "../smoke", "", "mine.yaml", str(place)])],
            ["run", "--profile", "smoke", "--only", rng.choice(["99", "5", "all", "heavy"])],
            [
                "run",
                "--profile",
                "smoke",
                "--seeds",
                rng.choice(["one", "-1", "1.5", "1,1", "99999999999999999999", "[11]"]),
            ],
            ["run", "--profile", "smoke", "--jobs", rng.choice(["0", "-1", "two"])],
            [
                "run",
                "--profile",
                "smoke",
                "--only",
                "00",
                "-p",
                rng.choice(["top", "k=many", "sede=1", "profile=laptop", "seeds=1", "=3"]),
            ],
            [
                "run",
                "--profile",
                "smoke",
                "--only",
                "00",
                "-p",
                f"model={place}",
                "-p",
                "texts=/no/where",
                "-p",
                "completion= x",
            ],
            ["run", "--profile", "smoke", "--only", "00", "-p", "model=x", "-p", "completion= x"],
            ["run", "--profile", "smoke", "--only", "01", "--force", rng.choice(["modle", "99", ""])],
            ["run", "--profile", "smoke", "--seeds", "1", "--only", "00", "--update-expected"],
            ["run", "--sequences", "1e7"],
            ["scale", "--sequences", rng.choice(["0", "-1", "many", "nan"]), "--parameters", "1e6"],
            ["lab", "77"],
            ["stages", "--profile", "smoke", "--only", "99"],
            [rng.choice(["flee", "--bogus", "runn"])],
        ]
    )
    from influence_kit.cli import main

    said, began = io.StringIO(), time.monotonic()
    before, before_error = dict(os.environ), sys.__stderr__
    sys.__stderr__ = said
    try:
        with cache_at(place / "cache"), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = main([*words, "--plan"] if words[0] == "run" and "--sequences" not in words else words)
    except BaseException:
        return Outcome(LOST, f"{words}: {traceback.format_exc(limit=-3)}")
    finally:
        sys.__stderr__ = before_error
        os.environ.clear()
        os.environ.update(before)
    if code == 0:
        return Outcome(WRONG, f"{words} is taken")
    if code != 2 or not said.getvalue().startswith("error: "):
        return Outcome(LOST, f"{words}: exit code {code}: {said.getvalue()}")
    return judged(said.getvalue().removesuffix("\n"), "", time.monotonic() - began)


# --- texts and models of one's own


@cache
def reader() -> Path:
    """A model of somebody's own, tiny, with its tokenizer, and texts beside it."""
    from tests.corpora.texts.test_own import TEXTS, save_model, save_tokenizer

    folder = Path(tempfile.mkdtemp(prefix="faults_"))
    save_model(folder / "model", len(save_tokenizer(folder / "model")))
    (folder / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return folder


def text_of(model: Path, texts: Path):
    """Texts that a run of a model takes, as it reads them."""
    from influence_kit.corpora.texts.own import own_text
    from influence_kit.findings.own import check_own

    check_own({"model": str(model), "texts": str(texts)})
    return own_text(str(texts))


STRANGE = [
    "\ufeff",
    "\x00",
    "\u202e",
    "👩‍👩‍👧‍👦",
    "e\u0301" * 9,
    "שלום",
    "\t",
    "\u2028",
    "<script>",
    "$$x$$",
    "﷽",
    "\r",
    "𝕏",
    "ا",
    "\x85",
    "🇩🇪",
]


@kind("texts", 70, 20)
def strange_text(rng: random.Random, place: Path) -> Outcome:
    """Text of every kind is read as it is; what is no text is refused by its file's name."""
    words = [rng.choice(["harbour", "ferry", "Hafen", "항구", *STRANGE]) for _ in range(rng.randint(3, 40))]
    text = " ".join(["The harbour", *words, "lies"])
    file, expected = place / rng.choice(["notes.txt", "notes.jsonl"]), text
    lines = file.suffix == ".jsonl"
    data = json.dumps({"text": text}, ensure_ascii=rng.random() < 0.5).encode() if lines else text.encode()
    if not lines:  # universal newlines; a paragraph ends at a blank line
        expected = re.split(r"\n[^\S\n]*\n", text.replace("\r\n", "\n").replace("\r", "\n"))[0].strip()
    how = rng.choice(
        ["as it is", "mark", "cut", "flip", "latin-1", "utf-16", "half", "number", "deep", "empty", "long", "folder"]
    )
    fine = how in ("as it is", "mark", "long", "folder")
    if how == "mark":
        data = b"\xef\xbb\xbf" + data
    elif how == "cut":
        data = data[: rng.randrange(len(data))]
    elif how == "flip":
        spot = rng.randrange(len(data))
        data = data[:spot] + bytes([data[spot] ^ 0x80]) + data[spot + 1 :]
    elif how in ("latin-1", "utf-16"):
        data = ("Größe " * 9).encode(how)
    elif how == "half":
        file, data = place / "notes.jsonl", b'{"text": "The \\udc80 harbour"}'
    elif how == "number":
        file, data = place / "notes.jsonl", rng.choice([b'{"text": 7}', b"[1]", b'{"body": "x"}', b'"text"', b"{}"])
    elif how == "deep":
        file, data = place / "notes.jsonl", b'{"text": ' + b"[" * 60_000
    elif how == "empty":
        data = rng.choice([b"", b"\n \n", b"\xef\xbb\xbf"])
    elif how == "long":
        expected = text = "harbour " * 100_000 + "lies"
        data = json.dumps({"text": text}).encode() if lines else text.encode()
    file.write_bytes(data)
    if how == "folder":  # what lies beside it is not its concern
        (place / "more.txt").mkdir()
        (place / "picture.png").write_bytes(rng.randbytes(99))
    chance = how in ("cut", "flip")  # may by chance be text still

    def right(found) -> bool:
        read = found["text"][0].as_py()
        return chance or (fine and read == expected)

    model = reader() / "model"
    return attempt(lambda: text_of(model, place if how == "folder" else file), "", right)


@kind("models", 50, 14)
def strange_model(rng: random.Random, place: Path) -> Outcome:
    """A model's folder with a part that is cut, missing, swapped or mistyped is refused; one that is whole gives what it gave."""
    from influence_kit.findings.own import check_own
    from influence_kit.models import load_pretrained
    from tests.corpora.texts.test_own import save_model

    source, folder = reader() / "model", place / "model"
    shutil.copytree(source, folder)
    asked, names = folder, "model"
    how = rng.choice(
        ["part", "part", "mistyped", "file", "other weights", "other vocabulary", "key", "no tokenizer", "harmless"]
    )
    if how == "part":
        parts = [
            path for path in folder.iterdir() if path.name in ("config.json", "model.safetensors", "tokenizer.json")
        ]
        victim = rng.choice(parts)
        size = victim.stat().st_size
        harm = rng.choice(["cut", "delete", "junk", "empty", "json"])
        if harm == "delete":
            victim.unlink()
        else:
            junk = {
                "cut": victim.read_bytes()[: rng.randrange(size)],
                "junk": rng.randbytes(200),
                "empty": b"",
                "json": b"[]",
            }
            victim.write_bytes(junk[harm])
    elif how == "mistyped":
        asked = folder.with_name(rng.choice(["modle", "model2", "none", "Model"]))
    elif how == "file":
        asked = folder / "config.json"
    elif how == "other weights":  # of a model with other sizes
        save_model(place / "other", 300 if rng.random() < 0.5 else 391, rng.choice(["gpt_neox", "llama"]))
        shutil.copy(place / "other" / "model.safetensors", folder / "model.safetensors")
    elif how == "other vocabulary":
        save_model(folder, 100)
    elif how == "harmless":
        (folder / "notes.txt").write_bytes(rng.randbytes(50))
        (folder / "checkpoint-1").mkdir()
        (folder / "generation_config.json").unlink(missing_ok=True)
    elif how == "no tokenizer":
        for path in folder.glob("*token*"):
            path.unlink()
    else:
        config = json.loads((folder / "config.json").read_text())
        config[rng.choice(["model_type", "hidden_size", "num_hidden_layers", "vocab_size"])] = rng.choice(
            [None, "x", -1, 0, 3.5, "rwkv9"]
        )
        (folder / "config.json").write_text(json.dumps(config))

    def work() -> object:
        check_own({"model": str(asked), "texts": str(source.parent / "notes.jsonl")})
        return load_pretrained(asked)

    def right(model) -> bool:
        whole = load_pretrained(source).state_dict()
        return how == "key" or all(whole[name].equal(value) for name, value in model.state_dict().items())

    return attempt(work, names, right)


# --- the whole


def run(faults: list[Kind], brief: bool, seed: int) -> None:
    """Inject all of them, each in a folder of its own, and say what is found on the way."""
    for each in faults:
        began, count = time.monotonic(), each.short if brief else each.full
        for number in range(count):
            with tempfile.TemporaryDirectory(prefix="faults_") as folder:
                os.environ["TINY_CALLS"] = f"{folder}/calls.txt"
                rng = random.Random(f"{seed} {each.name} {number}")
                try:
                    outcome = each.fault(rng, Path(folder))
                except Exception:
                    outcome = Outcome(LOST, f"the harness itself: {traceback.format_exc(limit=-4)}")
            each.outcomes.append((f"{each.name} {number}", outcome))
            if outcome.how in (LOST, WRONG):
                print(f"{outcome.how.upper()}  {each.name} {number}: {outcome.told}", file=sys.stderr, flush=True)
        print(f"{each.name}: {count} in {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def table(faults: list[Kind]) -> str:
    """What became of each kind, as Markdown."""
    rows = [
        "| broken | injected | survived | refused clearly | lost | wrong | slowest refusal |",
        "| --- |" + " --- |" * 6,
    ]
    total: Counter[str] = Counter()
    slowest = 0.0
    for each in faults:
        counts = Counter(outcome.how for _, outcome in each.outcomes)
        total += counts
        seconds = max((outcome.seconds for _, outcome in each.outcomes if outcome.how == REFUSED), default=0.0)
        slowest = max(slowest, seconds)
        numbers = [len(each.outcomes), *(counts[how] for how in (SURVIVED, REFUSED, LOST, WRONG))]
        told = f"{seconds:.1f} s" if counts[REFUSED] else "–"
        rows.append(f"| {each.name} | " + " | ".join(map(str, numbers)) + f" | {told} |")
    numbers = [sum(total.values()), *(total[how] for how in (SURVIVED, REFUSED, LOST, WRONG))]
    rows.append("| **all** | " + " | ".join(map(str, numbers)) + f" | {slowest:.1f} s |")
    return "\n".join(rows)


def main() -> int:
    """Inject, print the table; 1 where anything is lost or wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a few of each kind, in a few minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="KIND", help="kinds whose name has one of these words")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    asked = parser.parse_args()
    faults = [each for each in KINDS if not asked.only or any(word in each.name for word in asked.only)]
    os.environ.setdefault("TINY_CALLS", os.devnull)
    if os.access("/dev/shm", os.W_OK):  # thousands of small files, each pushed to its disk
        tempfile.tempdir = "/dev/shm"
    began, terminal = time.monotonic(), sys.__stderr__
    with open(os.devnull, "w") as sys.__stderr__:  # where the kit tells what it makes
        run(faults, asked.short, asked.seed)
    sys.__stderr__ = terminal
    made = table(faults)
    print(made)
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    if asked.readme:
        from influence_kit.publishing.readme import fill

        path = REPOSITORY / "README.md"
        path.write_text(fill(path.read_text(), {"faults": made + "\n"}))
    for folder in (reader, published):
        if folder.cache_info().currsize:
            made_there = folder()
            shutil.rmtree(made_there[1] if isinstance(made_there, tuple) else made_there)
    return int(any(outcome.how in (LOST, WRONG) for each in faults for _, outcome in each.outcomes))


if __name__ == "__main__":
    sys.exit(main())
