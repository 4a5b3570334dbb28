"""A worker: a process of its own that makes one stage after the other, and never outlives the run that started it."""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from influence_kit.errors import UserError
from influence_kit.runner.machine import THREAD_VARIABLES, keep_memory, storage_problem
from influence_kit.runner.stages import Progress, Stage, make

PR_SET_PDEATHSIG = 1
REPORT_SECONDS = 0.2


class Report(NamedTuple):
    """What a worker tells the run: "progress" with a fraction, or how a stage ended ("made", "user", "memory", "failed")."""

    what: str
    fraction: float = 0.0
    text: str = ""


def die_with(parent: int) -> None:
    """Let this process be killed when `parent` ends, even by SIGKILL, so that a rerun never meets an orphan."""
    if sys.platform.startswith("linux") and ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) == 0:
        if os.getppid() != parent:  # it ended before the request was in force
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def work(connection: Connection, parent: int) -> None:
    """Make the stages that arrive as (stage, force), reporting each; end at None or when the run is gone."""
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the run decides what ends
    for name in THREAD_VARIABLES:  # before anything loads torch or a BLAS
        os.environ[name] = "1"
    keep_memory()
    faulthandler.enable()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        if task is None:
            return
        stage, force = task
        connection.send(_attempt(stage, force, _reporter(connection)))


def _reporter(connection: Connection) -> Progress:
    last = 0.0

    def progress(done: float, total: float, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= REPORT_SECONDS:
            last = now
            connection.send(Report("progress", done / total if total else 0.0, note))

    return progress


def _attempt(stage: Stage, force: bool, progress: Progress) -> Report:
    log = stage.beside(".log")
    try:
        with _written_to(log):
            if replace(stage).fingerprint != stage.fingerprint:
                raise UserError("the package's source or libraries changed during the run: run again")
            try:
                make(stage, progress, force=force)
            except Exception:
                with suppress(OSError):  # on a full disk the log may be what cannot be written
                    traceback.print_exc()
                raise
    except UserError as error:
        return Report("user", text=str(error))
    except Exception as error:
        if remedy := storage_problem(error, stage.name):
            return Report("user", text=remedy)
        line = f"{type(error).__name__}: {([*filter(None, map(str.strip, str(error).splitlines()))] or [''])[-1]}"
        return Report("memory" if is_memory(error) else "failed", text=line)
    with suppress(OSError):
        log.unlink(missing_ok=True)
    return Report("made")


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the host or on a device."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


@contextmanager
def _written_to(log: Path) -> Iterator[None]:
    """Send all that the process and its children print into a file, so that the progress line stays one line."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("wb")
    except OSError as error:
        raise UserError(
            f"cannot write to {log.parent} ({error.strerror}): free space there, make it writable or set INFLUENCE_KIT_CACHE"
        ) from error
    with file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):
                    stream.flush()
