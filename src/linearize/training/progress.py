"""Progress of a stage on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as RichProgress

SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """Follows one stage after the other: `begin`, any number of `step` and `heldout`, `end`."""

    def begin(self, name: str, step: int, steps: int) -> None:
        """A stage of `steps` steps starts, or resumes after `step` of them."""
        ...

    def step(self, step: int, *, loss: float | None, tokens_per_second: float, seconds_left: float) -> None:
        """`step` steps are done; `loss` is None if no token of the step counted."""
        ...

    def heldout(self, step: int, loss: float, best: float) -> None:
        """The held-out loss after `step` steps, and the best one so far."""
        ...

    def end(self) -> None:
        """The stage is over, finished or not."""
        ...


def make_progress() -> Progress:
    """A bar if stdout and stderr are terminals, else lines."""
    return BarProgress() if sys.stdout.isatty() and sys.stderr.isatty() else LineProgress()


class LineProgress:
    """One line at every evaluation, and else at most one in ten seconds."""

    def __init__(self, *, stream: TextIO | None = None, every: float = SECONDS_BETWEEN_LINES) -> None:
        """Writes to `stream` (default stderr), at least `every` seconds between lines about steps."""
        self._stream = stream
        self._every = every
        self._last = 0.0
        self._prefix = ""
        self._steps = 0

    def begin(self, name: str, step: int, steps: int) -> None:
        """Print the start of the stage."""
        self._prefix, self._steps, self._last = name, steps, time.monotonic()
        self._write(f"resumes after step {step} of {steps}" if step else f"{steps} steps")

    def step(self, step: int, *, loss: float | None, tokens_per_second: float, seconds_left: float) -> None:
        """Print the progress if the last such line is old, or the stage is done."""
        if time.monotonic() - self._last < self._every and step < self._steps:
            return
        self._last = time.monotonic()
        self._write(f"step {step}/{self._steps}, {describe(loss, tokens_per_second, seconds_left)}")

    def heldout(self, step: int, loss: float, best: float) -> None:
        """Print the held-out loss."""
        self._write(f"step {step}/{self._steps}, held-out loss {loss:.4f} (best {best:.4f})")

    def end(self) -> None:
        """Do nothing."""

    def _write(self, text: str) -> None:
        print(f"{self._prefix}: {text}", file=self._stream or sys.stderr, flush=True)


class BarProgress:
    """One bar per stage."""

    def __init__(self, *, console: Console | None = None) -> None:
        """Draws on `console` (default stderr)."""
        self._console = console or Console(stderr=True)
        self._bar: RichProgress | None = None
        self._task = TaskID(0)
        self._steps_text = self._heldout_text = ""

    def begin(self, name: str, step: int, steps: int) -> None:
        """Draw the bar."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._steps_text = self._heldout_text = ""
        self._bar = RichProgress(*columns, console=self._console)
        self._task = self._bar.add_task(name, total=steps, completed=step, text="")
        self._bar.start()

    def step(self, step: int, *, loss: float | None, tokens_per_second: float, seconds_left: float) -> None:
        """Advance the bar."""
        self._steps_text = describe(loss, tokens_per_second, seconds_left)
        self._update(completed=step)

    def heldout(self, step: int, loss: float, best: float) -> None:
        """Show the held-out loss next to the bar."""
        self._heldout_text = f"held-out {loss:.4f} (best {best:.4f})"
        self._update(completed=step)

    def end(self) -> None:
        """Stop the bar where it is."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _update(self, *, completed: int) -> None:
        if self._bar is not None:
            text = ", ".join(part for part in (self._steps_text, self._heldout_text) if part)
            self._bar.update(self._task, completed=completed, text=text)


def describe(loss: float | None, tokens_per_second: float, seconds_left: float) -> str:
    """Loss, speed and time left in one phrase."""
    shown = "-" if loss is None else f"{loss:.4f}"
    return f"loss {shown}, {tokens_per_second:,.0f} tokens/s, {timedelta(seconds=round(seconds_left))} left"
