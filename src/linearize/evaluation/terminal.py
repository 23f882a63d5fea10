"""A report on the terminal: the verdict, then each section's sentence, findings and tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from linearize.evaluation.context import Finding, Table
from linearize.evaluation.report.parts import cell_text
from linearize.evaluation.sections import SECTIONS

MARKS = {"good": "[green]ok[/]   ", "note": "[yellow]note[/] ", "bad": "[bold red]FAULT[/]"}


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
