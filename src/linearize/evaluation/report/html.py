"""The page: verdict first, then each section, then how it came about. Drawn from a report's JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linearize.evaluation.context import Section, Table
from linearize.evaluation.report.parts import NOTHING, capital, facts_html, shown_html, table_html, text, tiles_html
from linearize.evaluation.report.style import STYLE_SHEET
from linearize.evaluation.verdict import known_sections
from linearize.storage.atomic import atomic_write_text

FILE_NAME = "report.html"
MOST_NOTES = 5
HOW_TO_READ = (
    "All models were measured on the same items: the same documents, tasks, facts and prompts, drawn with one seed.",
    "Losses are in nats per token: lower is better. A gap is the student's loss less the teacher's on the same tokens.",
    "“a ± b”: b is the standard error, the spread that another draw of documents or items would bring; twice "
    "that on both sides is about a 95% interval. “x (a to b)”: a and b are the ends of a 95% interval.",
    "A fault is a finding beyond that noise which makes other numbers hard to believe, such as a memory that does "
    "nothing or a cache that does not do what the full forward pass does. A note is worth knowing. What is marked as "
    "checked was looked for and found right.",
    "Scores at chance say nothing about either model. Times hold for the machine named below, all else for any.",
)


def write_report_page(
    report: Mapping[str, Any], out: Path | str, sections: Mapping[str, type[Section]] | None = None
) -> Path:
    """Write `report.html` into a folder; returns its path."""
    path = Path(out) / FILE_NAME
    atomic_write_text(path, page(report, sections))
    return path


def page(report: Mapping[str, Any], sections: Mapping[str, type[Section]] | None = None) -> str:
    """The page of a report as one string: nothing in it is fetched or run, and the same report gives the same bytes.

    `sections`: what knows how to show the report's sections (default: SECTIONS). A section that this version does not
    know is named as left out.
    """
    known = known_sections(sections)
    available = [name for name in report["sections"] if name in known]
    unknown = [name for name in report["sections"] if name not in known]
    notes = [*report.get("notes", ()), *(f"this version cannot show the section {name!r}" for name in unknown)]
    headings = {"verdict": "Verdict", **{name: known[name].TITLE for name in available}}
    headings |= {"reading": "How to read this", "provenance": "How this came about"}
    body = [
        _header(report),
        _contents(headings),
        "<main>",
        _section("verdict", "Verdict", _verdict(report, notes, headings)),
        *(
            _section(name, known[name].TITLE, shown_html(known[name].present(report["sections"][name]), name))
            for name in available
        ),
        _section("reading", headings["reading"], "".join(f"<p>{text(line)}</p>" for line in HOW_TO_READ)),
        _section("provenance", headings["provenance"], _provenance(report, headings)),
        "</main>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n<title>{text(_title(report))}</title>\n'
        f"<style>{STYLE_SHEET}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _title(report: Mapping[str, Any]) -> str:
    """The report's own title, or who stands beside whom."""
    if report.get("title"):
        return str(report["title"])
    names = [str(one["name"]) for one in report["contestants"]]
    students = [str(one["name"]) for one in report["contestants"] if one["role"] == "student"]
    if len(names) == len(students) or not students:
        return f"{', '.join(names)}: an evaluation"
    return f"{', '.join(students)} beside the teacher"


def _header(report: Mapping[str, Any]) -> str:
    told = [f"suite {report['suite']}"] if report.get("suite") else []
    date = str(report.get("provenance", {}).get("date", ""))[:10]
    told += [date] if date else []
    return f'<header><h1>{text(_title(report))}</h1><p class="muted">{text(" · ".join(told))}</p></header>'


def _contents(headings: Mapping[str, str]) -> str:
    items = "".join(f'<li><a href="#{_anchor(name)}">{text(title)}</a></li>' for name, title in headings.items())
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def _section(name: str, title: str, inner: str) -> str:
    return f'<section id="{_anchor(name)}"><h2>{text(title)}</h2>\n{inner}\n</section>'


def _anchor(name: str) -> str:
    return text(name.replace(" ", "-"))


def _verdict(report: Mapping[str, Any], notes: Sequence[str], headings: Mapping[str, str]) -> str:
    """Faults, then what each student keeps, then who took part."""
    told = report.get("verdict") or {}
    students: Mapping[str, Any] = told.get("students", {})
    many = len(students) > 1
    pieces = [_headline(name, one, named=many) for name, one in students.items()]
    if not students:
        pieces.append('<p class="headline">A model measured alone: there is nothing to compare it with.</p>')
    pieces.append(_faults(told, many, headings))
    pieces.append(
        _tile_table(students) if many else "".join(tiles_html(one.get("tiles", ())) for one in students.values())
    )
    definitions = {share["measure"]: share["definition"] for one in students.values() for share in one.get("kept", ())}
    pieces += [f'<p class="under">{text(told_of)}</p>' for told_of in definitions.values()]
    pieces.append(_notes(told, notes, headings))
    pieces.append(table_html(_models_table(report)))
    return "\n".join(filter(None, pieces))


def _notes(told: Mapping[str, Any], own: Sequence[str], headings: Mapping[str, str]) -> str:
    """What is worth knowing, from the sections and of the report itself; many are folded away."""
    found = [note for one in told.get("students", {}).values() for note in one.get("notes", ())]
    found += told.get("notes", ())
    said = [f"{text(note['text'])}{_linked(note, headings)}" for note in found] + [text(note) for note in own]
    if not said:
        return ""
    items = "".join(f'<li class="note"><span class="level">Note</span> {one}</li>' for one in said)
    listed = f'<ul class="findings">{items}</ul>'
    return listed if len(said) <= MOST_NOTES else f"<details><summary>{len(said)} notes</summary>{listed}</details>"


def _headline(name: str, student: Mapping[str, Any], *, named: bool) -> str:
    before = f"<strong>{text(name)}.</strong> " if named else ""
    return f'<p class="headline">{before}{text(student.get("headline", ""))}</p>'


def _faults(told: Mapping[str, Any], many: bool, headings: Mapping[str, str]) -> str:
    """The box of all faults; nothing where there is none."""
    found = [(name, bad) for name, one in told.get("students", {}).items() for bad in one.get("bad", ())]
    found += [("", bad) for bad in told.get("bad", ())]
    if not found:
        return ""
    items = "".join(
        '<li class="bad">'
        + (f"<strong>{text(name)}:</strong> " if many and name and name not in bad["text"] else "")
        + f"{text(bad['text'])}{_linked(bad, headings)}</li>"
        for name, bad in found
    )
    count = f"{len(found)} faults found" if len(found) > 1 else "One fault found"
    return f'<div class="faults"><h3>{count}</h3><ul class="findings">{items}</ul></div>'


def _linked(found: Mapping[str, str], headings: Mapping[str, str]) -> str:
    """A link to the section that found it."""
    name = found.get("section", "")
    return f' <a href="#{_anchor(name)}">{text(headings[name])}</a>' if name in headings else ""


def _tile_table(students: Mapping[str, Any]) -> str:
    """The stats of several students as a table: a row for each number, a column for each student."""
    labels = list(dict.fromkeys(str(stat["label"]) for one in students.values() for stat in one.get("tiles", ())))
    if not labels:
        return ""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in students)
    rows = []
    for label in labels:
        cells = []
        for one in students.values():
            stat = next((stat for stat in one.get("tiles", ()) if stat["label"] == label), None)
            detail = f'<span class="detail">{text(stat["detail"])}</span>' if stat and stat.get("detail") else ""
            cells.append(f"<td>{text(stat['value']) if stat else NOTHING}{detail}</td>")
        rows.append(f'<tr><th scope="row">{text(capital(label))}</th>{"".join(cells)}</tr>')
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="The students side by side">'
        '<table class="verdicts"><caption>The students side by side</caption>'
        f'<thead><tr><th scope="col">measure</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _models_table(report: Mapping[str, Any]) -> Table:
    """Who took part."""
    rows = [
        {
            "model": str(one["name"]),
            "role": str(one["role"]),
            "parameters": one.get("parameters"),
            "layers": _mixers(one.get("mixers", ())),
            "folder": str(one.get("path", "")),
        }
        for one in report["contestants"]
    ]
    return Table(title="The models", rows=rows)


def _mixers(mixers: Sequence[Any]) -> str:
    """`6 lolcats, 2 softmax`, in the order in which they first appear."""
    names = [str(mixer or "softmax") for mixer in mixers]
    return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names)) or "softmax"


def _provenance(report: Mapping[str, Any], headings: Mapping[str, str]) -> str:
    facts = dict(report.get("provenance", {}))
    for key, name in (("length", "tokens in the longest row"), ("documents", "held-out documents")):
        if key in report:
            facts[name] = report[key]
    command = facts.pop("command", None)
    first = f"<p><code>{text(command)}</code></p>" if command else ""
    seconds = report.get("seconds", {})
    rows = [{"section": headings.get(name, name), "seconds": f"{value:.1f}"} for name, value in seconds.items()]
    return first + facts_html(facts) + (table_html(Table(title="Time taken", rows=rows)) if rows else "")
