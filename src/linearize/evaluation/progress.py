"""What a person sees while sections are measured: a bar on a terminal, plain lines elsewhere; all of it on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class SectionProgress:
    """Follows section after section: `begin`, then any number of `step`."""

    def __init__(self, sections: int) -> None:
        """`sections`: how many there will be."""
        self._sections, self._begun, self._title, self._last = sections, 0, "", 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        terminal = sys.stderr.isatty()
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True) if terminal else None
        self._task = self._bar.add_task("", total=None) if self._bar is not None else None

    def __enter__(self) -> SectionProgress:
        """Shows the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def begin(self, title: str) -> None:
        """A section starts."""
        self._begun += 1
        self._title, self._last = f"{self._begun}/{self._sections} {title}", time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, description=self._title, total=None)
        else:
            print(self._title, file=sys.stderr, flush=True)

    def step(self, what: str, done: int, total: int) -> None:
        """`done` of `total` items of one part of the section are through."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{self._title}: {what}", completed=done, total=total)
        elif time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print(f"{self._title}: {what} {done}/{total}", file=sys.stderr, flush=True)
