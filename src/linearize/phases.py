"""What takes longer than two seconds says what it is and how far it has come, on stderr.

Silent unless the caller asked for it with `shown`, as the command line and `convert` do.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

QUIET_SECONDS = 2.0
SECONDS_BETWEEN_LINES = 10.0

Advance = Callable[[int], None]
"""Called with how many units more are done."""


@dataclass
class _Phase:
    """One phase that runs; its lines come from a thread, so that also one long call of a library is announced."""

    name: str
    total: int | None
    unit: str
    stream: TextIO | None
    quiet: float
    every: float
    done: int = 0
    begun: float = field(default_factory=time.monotonic)
    ended: threading.Event = field(default_factory=threading.Event)
    announced: bool = False

    def watch(self) -> None:
        """Print what it is after the quiet seconds, and then how far it is, until it ends."""
        wait = self.quiet
        while not self.ended.wait(wait):
            self._print(f"{self.name}{self._share()} ...")
            self.announced, wait = True, self.every

    def end(self) -> None:
        """Print how long it took, if it was announced."""
        self.ended.set()
        if self.announced:
            self._print(f"{self.name}: {time.monotonic() - self.begun:.0f} s")

    def _share(self) -> str:
        if not self.total:
            return ""
        seconds = time.monotonic() - self.begun
        left = f", {seconds / self.done * (self.total - self.done):.0f} s left" if self.done else ""
        return f": {self.done:,} of {self.total:,} {self.unit}{left}"

    def _print(self, line: str) -> None:
        print(f"linearize: {line}", file=self.stream or sys.stderr, flush=True)


@dataclass
class _Shown:
    """Whether phases are shown, and the one that is running: phases inside another one are part of it."""

    on: bool = False
    stream: TextIO | None = None
    quiet: float = QUIET_SECONDS
    every: float = SECONDS_BETWEEN_LINES
    running: bool = False


_SHOWN = _Shown()


@contextmanager
def shown(
    stream: TextIO | None = None, *, quiet: float = QUIET_SECONDS, every: float = SECONDS_BETWEEN_LINES
) -> Iterator[None]:
    """Inside, phases print lines to `stream` (None: the stderr of the moment, which a progress bar may redirect) once
    they take `quiet` seconds, then each `every`."""
    global _SHOWN
    before, _SHOWN = _SHOWN, _Shown(True, stream, quiet, every)
    try:
        yield
    finally:
        _SHOWN = before


@contextmanager
def phase(name: str, total: int | None = None, unit: str = "tokens") -> Iterator[Advance]:
    """A piece of work that may take long, of `total` units where that is known; yields what counts them."""
    if not _SHOWN.on or _SHOWN.running:
        yield lambda units: None
        return
    current = _Phase(name, total, unit, _SHOWN.stream, _SHOWN.quiet, _SHOWN.every)
    thread = threading.Thread(target=current.watch, daemon=True)
    _SHOWN.running = True
    thread.start()

    def advance(units: int) -> None:
        current.done += units

    try:
        yield advance
    finally:
        _SHOWN.running = False
        current.ended.set()
        thread.join()
        current.end()
