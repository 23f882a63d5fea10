"""`report.html`: one self-contained page, rendered from a report by the template next to this file."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from linearize.evaluation.context import Finding, Plot, SectionView, Table
from linearize.evaluation.report.schema import EvalReport, ModelEntry, Statement, StatEntry, Verdict
from linearize.evaluation.verdict import PresentedSection, present_sections
from linearize.metrics.plots import draw_plot
from linearize.storage.atomic import atomic_write_text
from linearize.tables import NOTHING, columns_of, is_numeric

FILE_NAME, TEMPLATE, PLOTS = "report.html", "report.html.j2", "plots"
LONG_TABLE = 16  # rows
PIXELS_PER_INCH, SMALLEST_SCALE = 92, 0.62  # of a plot on the page; how far it shrinks before it scrolls instead
LEVELS = {"bad": "Fault", "note": "Note", "good": "Checked"}


@dataclass(frozen=True, kw_only=True)
class TableView:
    """A table as text. `columns`: name, and whether it holds numbers; `folded`: closed until it is clicked."""

    title: str
    columns: list[tuple[str, bool]]
    rows: list[list[str]]
    note: str
    folded: bool


@dataclass(frozen=True, kw_only=True)
class PlotView:
    """A plot as a data URI, with the pixels that it takes and those below which it scrolls."""

    caption: str
    source: str
    width: int
    least_width: int


@dataclass(frozen=True, kw_only=True)
class SectionPart:
    """A section of the page; `findings`: level in words and finding, faults first."""

    name: str
    title: str
    summary: str
    findings: list[tuple[str, Finding]]
    plots: list[PlotView]
    tables: list[TableView]


@dataclass(frozen=True, kw_only=True)
class PageView:
    """All that the template shows. `titles`: of the sections by name; `faults`: name of a student (where it must be
    said) and statement; `stats`: of several students by label, a column each."""

    title: str
    subtitle: str
    verdict: Verdict
    titles: dict[str, str]
    faults: list[tuple[str, Statement]]
    notes: list[Statement]
    stats: list[tuple[str, list[StatEntry | None]]]
    definitions: list[str]
    models: TableView
    sections: list[SectionPart]
    command: str
    facts: dict[str, str]
    seconds: TableView


def write_report_page(
    report: EvalReport, folder: Path, presented: Mapping[str, PresentedSection] | None = None
) -> Path:
    """Write `report.html` into a folder, and each plot as `plots/NAME.svg` and `.png`; returns the page's path."""
    path = folder / FILE_NAME
    atomic_write_text(path, render_page(report, presented, plots=folder / PLOTS))
    return path


def render_page(
    report: EvalReport, presented: Mapping[str, PresentedSection] | None = None, *, plots: Path | None = None
) -> str:
    """The page of a report: nothing in it is fetched or run, and the same report gives the same bytes.

    `presented`: its sections, where they are presented already. A section that this version does not know is named in
    a note. `plots`: a folder for the plots as files.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=_unbroken,
    )  # fmt: skip
    view = _page_view(report, present_sections(report.sections) if presented is None else presented, plots)
    return environment.get_template(TEMPLATE).render(page=view)


def _unbroken(value: object) -> object:
    """Text whose `a ± b` are not broken over two lines."""
    return value.replace(" ± ", "\u00a0±\u00a0") if isinstance(value, str) else value


def _page_view(report: EvalReport, presented: Mapping[str, PresentedSection], plots: Path | None) -> PageView:
    titles = {name: section.title for name, section in presented.items()}
    students = report.verdict.students
    own = [*report.notes]
    own += [f"this version cannot show the section {name!r}" for name in report.sections if name not in presented]
    facts = {key: _fact(value) for key, value in report.provenance.items() if key != "command"}
    facts |= {"tokens in the longest row": str(report.length), "held-out documents": str(report.documents)}
    seconds = [{"section": titles.get(name, name), "seconds": f"{value:.1f}"} for name, value in report.seconds.items()]
    return PageView(
        title=_title(report),
        subtitle=" · ".join(filter(None, (f"suite {report.suite}", str(report.provenance.get("date", ""))[:10]))),
        verdict=report.verdict,
        titles=titles,
        faults=_faults(report.verdict),
        notes=[note for one in students.values() for note in one.notes]
        + [*report.verdict.notes, *(Statement(section="", text=text) for text in own)],
        stats=_stats(report.verdict),
        definitions=list(dict.fromkeys(share.definition for one in students.values() for share in one.kept)),
        models=_table_view(Table(title="The models", rows=[_model_row(model) for model in report.contestants])),
        sections=[_section_part(name, section.title, section.view, plots) for name, section in presented.items()],
        command=str(report.provenance.get("command", "")),
        facts=facts,
        seconds=_table_view(Table(title="Time taken", rows=seconds)),
    )


def _title(report: EvalReport) -> str:
    students = [model.name for model in report.contestants if model.role == "student"]
    if students and len(students) < len(report.contestants):
        return f"{', '.join(students)} compared with the teacher"
    return f"Evaluation of {', '.join(model.name for model in report.contestants)}"


def _faults(verdict: Verdict) -> list[tuple[str, Statement]]:
    many = len(verdict.students) > 1
    faults = [
        (name if many and name not in fault.text else "", fault)
        for name, student in verdict.students.items()
        for fault in student.bad
    ]
    return [*faults, *(("", fault) for fault in verdict.bad)]


def _stats(verdict: Verdict) -> list[tuple[str, list[StatEntry | None]]]:
    columns = [{stat.label: stat for stat in student.tiles} for student in verdict.students.values()]
    labels = dict.fromkeys(label for column in columns for label in column)
    return [(label, [column.get(label) for column in columns]) for label in labels]


def _model_row(model: ModelEntry) -> dict[str, str | int]:
    """Its layers as `6 lolcats, 2 softmax`, in the order in which they first appear."""
    mixers = dict.fromkeys(model.mixers)
    layers = ", ".join(f"{model.mixers.count(name)} {name}" for name in mixers) or "softmax"
    return {"model": model.name, "role": model.role, "parameters": model.parameters, "layers": layers,
            "folder": model.path}  # fmt: skip


def _section_part(name: str, title: str, view: SectionView, plots: Path | None) -> SectionPart:
    """The first table is open, the others are folded."""
    levels = list(LEVELS)
    findings = sorted(view.findings, key=lambda finding: levels.index(finding.level))
    return SectionPart(
        name=name,
        title=title,
        summary=view.summary,
        findings=[(LEVELS[finding.level], finding) for finding in findings],
        plots=[_plot_view(plot, plots) for plot in view.plots],
        tables=[_table_view(table, folded=i > 0) for i, table in enumerate(view.tables)],
    )


def _plot_view(plot: Plot, folder: Path | None) -> PlotView:
    stem = None if folder is None else folder / plot.name
    svg = draw_plot(plot.draw, width=plot.width, height=plot.height, stem=stem)
    width = round(plot.width * PIXELS_PER_INCH)
    return PlotView(
        caption=plot.caption,
        source=f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}",
        width=width,
        least_width=round(width * SMALLEST_SCALE),
    )


def _table_view(table: Table, *, folded: bool = False) -> TableView:
    rows = table.texts()
    names = columns_of(rows)
    return TableView(
        title=table.title,
        columns=[(name, is_numeric([row[name] for row in rows])) for name in names],
        rows=[[row[name] for name in names] for row in rows],
        note=table.note,
        folded=folded or len(rows) > LONG_TABLE,
    )


def _fact(value: Any) -> str:
    """A value of any JSON kind on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_fact(entry)}" for key, entry in value.items() if entry not in (None, ""))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(_fact, value))
    if value is None:
        return NOTHING
    return f"{value:.4g}" if isinstance(value, float) else str(value)
