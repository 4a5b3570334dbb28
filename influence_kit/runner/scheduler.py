"""Make many stages at once: what can start starts, the longest chain first, on a few processes of one thread each."""

import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import TextIO

from influence_kit.errors import UserError
from influence_kit.runner.live import clock
from influence_kit.runner.machine import cores, free_memory, say
from influence_kit.runner.stages import Cost, Stage, is_made
from influence_kit.runner.workers import Report, work

OUT_OF_MEMORY = 137  # what a shell reports for a process killed by signal 9
# A stage's estimate is for itself; the rest of the machine needs a share too.
MEMORY_SHARE = 0.9


class RunFailed(Exception):
    """A run that ended without its results: one or two lines for people, and the exit code for the shell."""

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(eq=False)
class Worker:
    """A process, the line to it, and what it does now."""

    process: SpawnProcess
    connection: Connection
    stage: Stage | None = None
    started: float = 0.0
    fraction: float = 0.0
    note: str = ""


def is_forced(stage: Stage, kinds: Collection[str]) -> bool:
    """Whether `--force` names this stage: by kind, by label, or as "all"."""
    return not {"all", stage.kind, stage.label}.isdisjoint(kinds)


def needed(stages: Iterable[Stage], force_kinds: Collection[str] = (), verify: bool = False) -> dict[str, Stage]:
    """The stages to make, by fingerprint, inputs first: those asked for that are not there, and inputs these lack.

    `force_kinds` makes stages of these kinds or labels again ("all": every one), wherever they stand.
    """
    found: dict[str, Stage] = {}
    whole: dict[str, bool] = {}

    def visit(stage: Stage) -> None:
        key = stage.fingerprint
        if key in found or key in whole:
            return
        whole[key] = not is_forced(stage, force_kinds) and is_made(stage, verify)
        if not whole[key] or force_kinds:
            for below in stage.inputs.values():
                visit(below)
        if not whole[key]:
            found[key] = stage

    for stage in stages:
        visit(stage)
    return found


def chain_seconds(stages: Mapping[str, Stage], costs: Mapping[str, Cost]) -> dict[str, float]:
    """For each stage (given inputs first) the estimated seconds of the longest chain that begins with it."""
    longest = {key: costs[key].seconds for key in stages}
    for stage in reversed(list(stages.values())):
        for below in stage.inputs.values():
            if below.fingerprint in longest:
                candidate = costs[below.fingerprint].seconds + longest[stage.fingerprint]
                longest[below.fingerprint] = max(longest[below.fingerprint], candidate)
    return longest


def make_all(
    todo: Mapping[str, Stage],
    costs: Mapping[str, Cost] | None = None,
    jobs: int | None = None,
    force_kinds: Collection[str] = (),
    stream: TextIO | None = None,
) -> list[Stage]:
    """Make the stages of `needed`, on `jobs` processes (default: the cores), with a live line on `stream` (stderr).

    costs: estimates by fingerprint, which decide what starts first and what fits into memory together; none: nothing is known.

    When one fails, those already running finish and nothing more starts.
    Raises UserError as a stage raised it, RunFailed (exit code 1; 137 when killed or out of memory) otherwise.
    """
    if not todo:
        return []
    forced = {key for key, stage in todo.items() if is_forced(stage, force_kinds)}
    known = {key: (costs or {}).get(key, Cost()) for key in todo}
    run = _Run(dict(todo), known, forced, min(jobs or cores(), len(todo)), stream or sys.stderr)
    try:
        run.loop()
    finally:
        run.close()
    return run.made


class _Run:
    def __init__(self, todo: dict[str, Stage], costs: dict[str, Cost], forced: set[str], jobs: int, stream: TextIO):
        self.todo, self.costs, self.forced, self.jobs, self.stream = todo, costs, forced, jobs, stream
        self.order = chain_seconds(todo, costs)
        self.waiting = dict(todo)
        self.unmade = set(todo)
        self.made: list[Stage] = []
        self.seconds_made = 0.0
        self.workers: list[Worker] = []
        self.failures: list[Exception] = []
        self.memory = MEMORY_SHARE * free_memory()
        self.began = time.monotonic()
        self.live = stream.isatty()
        self.shown = 0.0

    def cost(self, stage: Stage) -> Cost:
        return self.costs[stage.fingerprint]

    def busy(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.stage is not None]

    def loop(self) -> None:
        while self.busy() or (self.waiting and not self.failures):
            if not self.failures:
                self.start_ready()
            for line in wait([worker.connection for worker in self.busy()], timeout=0.25):
                self.hear(next(worker for worker in self.workers if worker.connection is line))
            self.show()
        self.clear()
        if self.failures:
            first, *others = sorted(self.failures, key=lambda failure: -getattr(failure, "exit_code", 2))
            for other in others:
                say(str(other))
            raise first

    def start_ready(self) -> None:
        ready = [
            stage
            for stage in self.waiting.values()
            if not any(below.fingerprint in self.unmade for below in stage.inputs.values())
        ]
        for stage in sorted(ready, key=lambda stage: (not stage.early, -self.order[stage.fingerprint], stage.name)):
            running = [worker.stage for worker in self.busy() if worker.stage]
            slots = sum(min(other.threads, self.jobs) for other in running) + min(stage.threads, self.jobs)
            memory = sum(self.cost(other).memory_bytes for other in (*running, stage))
            taken = stage.gpu is not None and stage.gpu in {other.gpu for other in running}
            if running and (taken or slots > self.jobs or memory > self.memory):
                continue
            worker = next((worker for worker in self.workers if worker.stage is None), None) or self.hire()
            try:
                worker.connection.send((stage, stage.fingerprint in self.forced))
            except OSError:  # it died idle (the system was short of memory, say): another one takes the stage
                self.workers.remove(worker)
                continue
            worker.stage, worker.started, worker.fraction, worker.note = stage, time.monotonic(), 0.0, ""
            del self.waiting[stage.fingerprint]

    def hire(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=work, args=(there, os.getpid()), daemon=False)
        process.start()
        there.close()
        self.workers.append(Worker(process, here))
        return self.workers[-1]

    def hear(self, worker: Worker) -> None:
        stage = worker.stage
        assert stage is not None
        try:
            report: Report = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            self.workers.remove(worker)
            self.failures.append(self.death(stage, worker.process.exitcode or 0))
            return
        if report.what == "progress":
            worker.fraction, worker.note = report.fraction, report.text
            return
        worker.stage = None
        if report.what == "made":
            self.unmade.discard(stage.fingerprint)
            self.made.append(stage)
            self.seconds_made += time.monotonic() - worker.started
            if not self.live:
                took = clock(time.monotonic() - worker.started)
                print(f"[{len(self.made)}/{len(self.todo)}] {stage.name} ({took})", file=self.stream, flush=True)
        elif report.what == "user":
            self.failures.append(UserError(report.text))
        elif report.what == "memory":
            self.failures.append(RunFailed(f"stage {stage.name}: {report.text}; {self.remedy(stage)}", OUT_OF_MEMORY))
        else:
            log = stage.beside(".log")
            self.failures.append(RunFailed(f"stage {stage.name} failed: {report.text}\n  log: {log}"))

    def death(self, stage: Stage, code: int) -> RunFailed:
        if code == -signal.SIGKILL:
            message = f"stage {stage.name} was killed (signal 9), usually out of memory; {self.remedy(stage)}"
            return RunFailed(message, OUT_OF_MEMORY)
        how = (
            f"was ended by signal {-code} ({signal.Signals(-code).name})"
            if code < 0
            else f"ended with exit code {code}"
        )
        return RunFailed(f"stage {stage.name} {how}\n  log: {stage.beside('.log')}", 128 - code if code < 0 else 1)

    def remedy(self, stage: Stage) -> str:
        needs = self.cost(stage).memory_bytes
        size = f"it needs about {needs / 1e9:.1f} GB; " if needs else ""
        alone = "free memory or choose a smaller profile, then run again"
        return f"{size}{'run again with --jobs 1' if self.jobs > 1 else alone} (finished stages are kept)"

    def remaining_seconds(self) -> float | None:
        """Estimated from the costs, corrected by how the finished stages compared with theirs."""
        estimated = sum(self.cost(stage).seconds for stage in self.made)
        left = sum(self.costs[key].seconds for key in self.unmade)
        if not estimated:
            return left / self.jobs if left else None
        left -= sum(worker.fraction * self.cost(worker.stage).seconds for worker in self.busy() if worker.stage)
        return left * self.seconds_made / estimated / self.jobs

    def show(self) -> None:
        now = time.monotonic()
        if not self.live or now - self.shown < 0.2:
            return
        self.shown = now
        parts = [f"{len(self.made)}/{len(self.todo)}"]
        for worker in self.busy():
            assert worker.stage is not None
            parts.append(" ".join(filter(None, [worker.stage.name, f"{worker.fraction:.0%}", worker.note])))
        left = self.remaining_seconds()
        about = f", about {clock(left)} left" if left is not None else ""
        line = " · ".join(parts) + f" · {clock(now - self.began)}{about}"
        self.stream.write("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1])
        self.stream.flush()

    def clear(self) -> None:
        if self.live:
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def close(self) -> None:
        """Idle workers are told to go; those still at work (after Ctrl-C) end where they are and keep what they saved."""
        for worker in self.workers:
            if worker.stage is not None:
                worker.process.terminate()
            else:
                try:
                    worker.connection.send(None)
                except OSError:
                    pass
        for worker in self.workers:
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
            worker.connection.close()
