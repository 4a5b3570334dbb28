"""How far a stage is, for the person who waits: a bar in a terminal, a line under the cell in a notebook run by hand."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

SECONDS = 0.5  # between two states of a line


class Progress(Protocol):
    """How a stage's function reports how far it is; `done` and `total` in any unit, `note` for people."""

    def __call__(self, done: float, total: float, note: str = "") -> None: ...


def clock(seconds: float) -> str:
    """0:07, 12:05, 1:02:03."""
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


@contextmanager
def live(name: str) -> Iterator[Progress]:
    """Show how far the stage of this name is while it is made here.

    A run sets INFLUENCE_KIT_QUIET for its kernels: what changes with the machine has no place in an executed copy.
    """
    if shell := _notebook():
        with _line_of(shell).stage(name) as progress:
            yield progress
        return
    from tqdm import tqdm

    with tqdm(desc=name, file=sys.__stderr__, disable=None, leave=False, unit_scale=True) as bar:

        def progress(done: float, total: float, note: str = "") -> None:
            bar.total = total
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)

        yield progress


def _notebook() -> Any:
    """IPython's shell, where this is a notebook that somebody runs by hand; else None."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell if hasattr(shell, "kernel") and os.environ.get("INFLUENCE_KIT_QUIET") != "1" else None


@dataclass
class _Line:
    """The one line under a cell, however many stages the cell makes."""

    cell: int
    began: float = field(default_factory=time.monotonic)
    made: int = 0
    shown: float = 0.0
    handle: Any = None

    def show(self, text: str) -> None:
        from IPython.display import display

        content = {"text/plain": text}
        if self.handle is None:
            self.handle = display(content, raw=True, display_id=True)
        else:
            self.handle.update(content, raw=True)
        self.shown = time.monotonic()

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        began = time.monotonic()
        before = f"{self.made} made, " if self.made else ""

        def progress(done: float, total: float, note: str = "") -> None:
            if time.monotonic() - self.shown >= SECONDS:
                share = f"{done / total:.0%}" if total else ""
                self.show(
                    before + " ".join(filter(None, ["making", name, share, note, clock(time.monotonic() - began)]))
                )

        self.show(f"{before}making {name}")
        try:
            yield progress
        except KeyboardInterrupt:
            self.show(f"{before}interrupted at {name}: run the cell again, it goes on from where it saved itself")
            raise
        self.made += 1
        count = "1 stage" if self.made == 1 else f"{self.made} stages"
        self.show(f"{count} made in {clock(time.monotonic() - self.began)}, the last one: {name}")


_lines: list[_Line] = []


def _line_of(shell: Any) -> _Line:
    """The line of the cell that runs now."""
    if not _lines or _lines[-1].cell != shell.execution_count:
        _lines[:] = [_Line(shell.execution_count)]
    return _lines[-1]
