"""The terminal: progress while sections are measured (on stderr), then the report, section by section."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from linearize.evaluation.report.schema import EvalReport
from linearize.evaluation.verdict import present_sections
from linearize.tables import print_table, stdout_console

LEVELS = {"good": ("ok", "green"), "note": ("note", "yellow"), "bad": ("FAULT", "bold red")}
SECONDS_BETWEEN_LINES = 10.0


class SectionProgress:
    """A bar on a terminal, plain lines elsewhere: `begin` a section, then any number of `step`."""

    def __init__(self, sections: int) -> None:
        """`sections`: how many there will be."""
        self._sections, self._begun, self._title, self._last = sections, 0, "", 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        terminal = sys.stderr.isatty()
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True) if terminal else None
        self._task = self._bar.add_task("", total=None) if self._bar is not None else None

    def __enter__(self) -> SectionProgress:
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()

    def begin(self, title: str) -> None:
        """Start a section."""
        self._begun += 1
        self._title, self._last = f"{self._begun}/{self._sections} {title}", time.monotonic()
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, description=self._title, total=None)
        else:
            print(self._title, file=sys.stderr, flush=True)

    def step(self, what: str, done: int, total: int) -> None:
        """Report that `done` of `total` items of one part of the section are measured."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{self._title}: {what}", completed=done, total=total)
        elif time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print(f"{self._title}: {what} {done}/{total}", file=sys.stderr, flush=True)


def print_report(report: EvalReport, console: Console | None = None) -> None:
    """Print the verdict, then findings and tables of each section; plots are in `report.html`."""
    console = console or stdout_console()
    students = report.verdict.students
    for name, student in students.items():
        console.print(f"{name}: {student.headline}" if len(students) > 1 else student.headline, style="bold")
    for section in present_sections(report.sections).values():
        console.print(Text.assemble("\n", (section.title, "bold"), f"  {section.view.summary}"))
        for finding in section.view.findings:
            level, style = LEVELS[finding.level]
            console.print(Text.assemble((f"{level}: ", style), finding.text))
        for table in section.view.tables:
            console.print()
            print_table(console, table.texts(), title=table.title, note=table.note)
    for note in report.notes:
        console.print(f"note: {note}")
