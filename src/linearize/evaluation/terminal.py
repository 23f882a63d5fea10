"""The terminal: progress while sections are measured (on stderr), then the report, section by section."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from linearize.evaluation.context import Finding, Table
from linearize.evaluation.report.parts import cell_text
from linearize.evaluation.sections import SECTIONS

MARKS = {"good": "[green]ok[/]   ", "note": "[yellow]note[/] ", "bad": "[bold red]FAULT[/]"}
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


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """Tables and findings of a report for people; plots are in its `report.html`."""
    console = console or Console(highlight=False)
    for student in report["verdict"]["students"].values():
        console.print(escape(str(student["headline"])), style="bold")
    for name, numbers in report["sections"].items():
        section = SECTIONS[name]
        view = section.present(numbers)
        console.print(f"\n[bold]{escape(section.TITLE)}[/]  {escape(view.summary)}")
        for finding in view.findings:
            console.print(_finding(finding))
        for table in view.tables:
            console.print(_table(table))
    for note in report["notes"]:
        console.print(f"note: {escape(note)}")


def _finding(finding: Finding) -> str:
    return f"{MARKS[finding.level]} {escape(finding.text)}"


def _table(table: Table) -> RichTable:
    """First column text, the others to the right."""
    columns = list(dict.fromkeys(key for row in table.rows for key in row))
    made = RichTable(title=escape(table.title), title_justify="left", caption=escape(table.note) or None)
    for number, column in enumerate(columns):
        made.add_column(escape(column), justify="left" if number == 0 else "right")
    for row in table.rows:
        made.add_row(*(escape(cell_text(row.get(column))) for column in columns))
    return made
