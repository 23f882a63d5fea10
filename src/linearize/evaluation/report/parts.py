"""The pieces of the page as HTML text. Everything that comes from outside passes `text` on its way in."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from linearize.evaluation.context import Cell, Finding, Plot, SectionView, Table
from linearize.evaluation.report.svg import PIXELS_PER_INCH, inline_svg

LEVELS = {"bad": "Fault", "note": "Note", "good": "Checked"}
LONG_TABLE = 16
NOTHING = "-"
NUMBER = re.compile(
    r"[<>~]?\s*[-+\u2212\u00b1]?(\d[\d,]*\.?\d*|\.\d+)(e[-+]?\d+)?\s?([%(\[/\-\u00b1\u00d7]|[^\W\d]{1,3}\b|$)"
)


def text(value: Any) -> str:
    """Any value as escaped text."""
    return html.escape(str(value), quote=True)


def capital(label: str) -> str:
    """The label with a capital at its beginning, as sections write them either way."""
    return label[:1].upper() + label[1:]


def cell_text(cell: Cell) -> str:
    """A table's cell as people read it: four digits of a float, thousands of a large integer, a dash for nothing."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return NOTHING
    if isinstance(cell, (bool, str)):
        return str(cell)
    if isinstance(cell, int):
        return f"{cell:,}" if abs(cell) >= 10_000 else str(cell)
    if cell and (abs(cell) >= 1e6 or abs(cell) < 1e-4):
        return f"{cell:.3e}"
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:#.4g}" if cell else "0"


def table_html(table: Table, *, fold: bool = False) -> str:
    """A table in a box that scrolls by itself; a long one is folded away, and any with `fold`."""
    columns = list(dict.fromkeys(key for row in table.rows for key in row))
    numeric = {column for column in columns if _is_numeric([row.get(column) for row in table.rows])}
    head = "".join(f'<th scope="col"{_number(column in numeric)}>{text(column)}</th>' for column in columns)
    body = "".join(f"<tr>{_row_html(row, columns, numeric)}</tr>" for row in table.rows)
    note = f'<p class="under">{text(table.note)}</p>' if table.note else ""
    empty = "" if table.rows else "<tbody><tr><td>nothing was measured</td></tr></tbody>"
    inner = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(table.title)}"><table>'
        f"<caption>{text(table.title)}</caption>"
        + (empty or f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>")
        + f"</table></div>{note}"
    )
    if not fold and len(table.rows) <= LONG_TABLE:
        return inner
    rows = f'<span class="detail">{_rows(len(table.rows))}</span>'
    return f"<details><summary>{text(table.title)} {rows}</summary>{inner}</details>"


def _rows(count: int) -> str:
    return f"{count} row{'s' if count != 1 else ''}"


def _row_html(row: Mapping[str, Cell], columns: Sequence[str], numeric: set[str]) -> str:
    """One row; its first cell is its heading."""
    cells = []
    for i, column in enumerate(columns):
        value = text(cell_text(row.get(column)))
        if i == 0:
            cells.append(f'<th scope="row"{_number(column in numeric)}>{value}</th>')
        else:
            cells.append(f'<td class="{"number" if column in numeric else "text"}">{value}</td>')
    return "".join(cells)


def _number(yes: bool) -> str:
    return ' class="number"' if yes else ""


def _is_numeric(cells: Sequence[Cell]) -> bool:
    """Whether a column holds numbers, also such as `0.12 ± 0.01`, `3 KiB`, `41%`; empty cells do not count."""
    known = [cell for cell in cells if cell_text(cell) not in ("", NOTHING)]
    return bool(known) and all(
        not isinstance(cell, bool) and (isinstance(cell, (int, float)) or NUMBER.match(str(cell))) for cell in known
    )


def finding_html(finding: Finding, where: str = "") -> str:
    """One finding as a list item that names its level in words. `where`: a link to its section, as HTML."""
    level = f'<span class="level">{LEVELS[finding.level]}</span>'
    return f'<li class="{finding.level}">{level} {text(finding.text)}{where}</li>'


def findings_html(findings: Sequence[Finding]) -> str:
    """Findings, faults first."""
    if not findings:
        return ""
    ordered = sorted(findings, key=lambda finding: list(LEVELS).index(finding.level))
    return f'<ul class="findings">{"".join(finding_html(finding) for finding in ordered)}</ul>'


def figure_html(plot: Plot, prefix: str) -> str:
    """A plot with its caption."""
    width = f"--width:{plot.width * PIXELS_PER_INCH:.0f}px"
    return (
        f'<figure style="{width}"><div class="scroll">{inline_svg(plot, prefix)}</div>'
        f"<figcaption>{text(plot.caption)}</figcaption></figure>"
    )


def shown_html(view: SectionView, prefix: str) -> str:
    """The whole of a section below its heading; of its tables the first one lies open."""
    plots = "".join(figure_html(plot, prefix) for plot in view.plots)
    return (
        f"<p>{text(view.summary)}</p>"
        + findings_html(view.findings)
        + (f'<div class="plots">{plots}</div>' if plots else "")
        + "".join(table_html(table, fold=i > 0) for i, table in enumerate(view.tables))
    )


def tiles_html(stats: Sequence[Mapping[str, str]]) -> str:
    """The numbers of a verdict as boxes."""
    boxes = "".join(
        f'<div class="tile"><dt>{text(capital(stat["label"]))}</dt><dd class="value">{text(stat["value"])}</dd>'
        + (f'<dd class="detail">{text(stat["detail"])}</dd>' if stat.get("detail") else "")
        + "</div>"
        for stat in stats
    )
    return f'<dl class="tiles">{boxes}</dl>' if boxes else ""


def facts_html(facts: Mapping[str, Any]) -> str:
    """A mapping as a list of names and values; mappings inside are written on one line."""
    rows = "".join(
        f"<dt>{text(str(key).replace('_', ' '))}</dt><dd>{_fact(value)}</dd>" for key, value in facts.items()
    )
    return f'<dl class="facts">{rows}</dl>'


def _fact(value: Any) -> str:
    """A value of any JSON kind on one line."""
    if isinstance(value, Mapping):
        return text(", ".join(f"{key} {_plain(inner)}" for key, inner in value.items() if inner not in (None, "")))
    if isinstance(value, (list, tuple)):
        return text(", ".join(map(_plain, value)))
    return text(_plain(value))


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items()) + ")"
    if value is None:
        return NOTHING
    return f"{value:.4g}" if isinstance(value, float) else str(value)
