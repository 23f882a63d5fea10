"""Tables for people: drawn by rich on a terminal, and plain aligned text of any width where stdout is not one."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

NOTHING = "-"
_PLAIN_WIDTH = 1_000_000  # characters: no line is wrapped and no cell is cut where a program may read the output
_NUMBER = re.compile(
    r"[<>~]?\s*[-+\u2212\u00b1]?(\d[\d,]*\.?\d*|\.\d+)(e[-+]?\d+)?\s?([%(\[/\-\u00b1\u00d7]|[^\W\d]{1,3}\b|$)"
)


def stdout_console() -> Console:
    """A console on stdout that prints text as it is (no markup). Without a terminal: no colours, no wrapping."""
    terminal = sys.stdout.isatty()
    return Console(
        markup=False, emoji=False, highlight=False, force_terminal=terminal, width=None if terminal else _PLAIN_WIDTH
    )


def is_numeric(cells: Sequence[str]) -> bool:
    """Whether a column holds numbers, also such as `0.12 ± 0.01`, `3 KiB`, `41%`; empty cells do not count."""
    known = [cell for cell in cells if cell not in ("", NOTHING)]
    return bool(known) and all(_NUMBER.match(cell) for cell in known)


def columns_of(rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Every key of the rows, in the order in which they first appear."""
    return list(dict.fromkeys(key for row in rows for key in row))


def print_table(console: Console, rows: Sequence[Mapping[str, str]], *, title: str = "", note: str = "") -> None:
    """Print rows with a column per key, numbers to the right, between a title and a note.

    Texts wrap in their column where the terminal is too narrow; numbers and the first column are never broken.
    """
    table = Table(
        box=box.SIMPLE_HEAD if console.is_terminal else None,
        pad_edge=False,
        show_edge=False,
        header_style="bold" if console.is_terminal else "",
    )
    names = columns_of(rows)
    for i, name in enumerate(names):
        cells = [row.get(name, "") for row in rows]
        numeric = is_numeric(cells)
        least = max(map(cell_len, cells)) if numeric or i == 0 else None
        table.add_column(name, justify="right" if numeric else "left", overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*(row.get(name, "") for name in names))
    if title:
        console.print(title, style="bold")
    _print_rows(console, table)
    if note:
        console.print(note, style="dim")


def print_pairs(console: Console, pairs: Mapping[str, str]) -> None:
    """Print names and values, one pair a line, the values below each other."""
    table = Table.grid(padding=(0, 2), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(name, value)
    _print_rows(console, table)


def _print_rows(console: Console, table: Table) -> None:
    """The table; plain text without the spaces that fill the last column."""
    if console.is_terminal:
        width, unlimited = console.width, console.options.update(max_width=_PLAIN_WIDTH)
        console.width = max(width, Measurement.get(console, unlimited, table).minimum)
        console.print(table)
        console.width = width
        return
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        console.print(line.rstrip())
