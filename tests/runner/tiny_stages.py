"""Stages small enough to watch: what they did is told in the file that TINY_CALLS names."""

import hashlib
import json
import os
import signal
import time
from pathlib import Path

from influence_kit.errors import UserError
from influence_kit.runner.scheduler import make_all, needed
from influence_kit.runner.stages import Cost, Stage

STEPS = 40


def tell(text: str) -> None:
    with open(os.environ["TINY_CALLS"], "a") as file:
        file.write(f"{text} {os.getpid()} {time.monotonic():.3f}\n")


def number(parameters, inputs, out, progress):
    tell(f"number {parameters['value']}")
    time.sleep(parameters.get("seconds", 0))
    (out / "value.json").write_text(json.dumps(parameters["value"]))
    (out / "more").mkdir(exist_ok=True)
    (out / "more" / "text.txt").write_text("x" * 1000)
    tell(f"end {parameters['value']}")


def total(parameters, inputs, out, progress):
    tell("total")
    values = [json.loads((folder / "value.json").read_text()) for folder in inputs.values()]
    (out / "value.json").write_text(json.dumps(sum(values)))


def slow(parameters, inputs, out, progress):
    """A chain of hashes, one link a step; every link is kept, so that a kill costs no more than one."""
    resume = out / "resume"
    resume.mkdir(exist_ok=True)
    saved = resume / "link.json"
    step, link = json.loads(saved.read_text()) if saved.exists() else (0, "")
    tell(f"slow from {step}")
    while step < STEPS:
        time.sleep(parameters.get("pause", 0.05))
        link, step = hashlib.sha256(f"{link}{step}".encode()).hexdigest(), step + 1
        part = resume / "link.part"
        part.write_text(json.dumps([step, link]))
        part.replace(saved)
        progress(step, STEPS, "links")
    (out / "value.json").write_text(json.dumps(link))


def fail(parameters, inputs, out, progress):
    tell("fail")
    print("what was printed before")
    raise ValueError("first line\nthe reason")


def refuse(parameters, inputs, out, progress):
    raise UserError("give a smaller number than 7")


def fill_disk(parameters, inputs, out, progress):
    (out / "large.bin").symlink_to("/dev/full")  # the system's own "no space left on device"
    (out / "large.bin").write_bytes(b"x" * 100_000)


def die(parameters, inputs, out, progress):
    os.kill(os.getpid(), signal.SIGKILL)


def starve(parameters, inputs, out, progress):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")


def surroundings(parameters, inputs, out, progress):
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    (out / "value.json").write_text(json.dumps({name: os.environ.get(name) for name in names}))


COSTS: dict[str, Cost] = {}


def cost_of(stage: Stage) -> Cost:
    return COSTS.get(stage.fingerprint, Cost())


def run_stages(stages, jobs=None, force_kinds=(), verify=False, stream=None) -> list[Stage]:
    """Make the stages that are not there yet."""
    todo = needed(stages, force_kinds, verify)
    return make_all(todo, {key: cost_of(stage) for key, stage in todo.items()}, jobs, force_kinds, stream)


def stage(name: str, label: str = "", inputs: dict | None = None, cost: Cost | None = None, **parameters) -> Stage:
    """A stage of this module; no library counts, so that nothing heavy is loaded."""
    made = Stage(
        kind=name, function=globals()[name], parameters=parameters, inputs=inputs or {}, label=label, libraries=(),
    )  # fmt: skip
    COSTS[made.fingerprint] = cost or Cost()
    return made


def calls() -> list[str]:
    """What the stages told so far, without process and time."""
    path = Path(os.environ["TINY_CALLS"])
    return [" ".join(line.split()[:-2]) for line in path.read_text().splitlines()] if path.exists() else []
