"""The page of a report: whole, escaped, self-contained, the same bytes each time."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from report_samples import SECTIONS, Losses, eval_models, losses

from linearize.evaluation.context import Plot, Table
from linearize.evaluation.report import inline_svg, page, save_plot, write_report_page
from linearize.evaluation.report.parts import NUMBER, cell_text, table_html
from linearize.evaluation.report.style import DARK, LIGHT
from linearize.evaluation.verdict import verdict
from linearize.metrics.theme import GRID, INK, STUDENTS, TEACHER, legend_below

VOID = {"meta", "link", "br", "hr", "img", "input"}
STUDENT_NAMES = ("student", '<b>&"q"\'</b>', "a$\\frac$b", "mamba2", "gla")


class Checked(HTMLParser):
    """Every element closed in turn; tags, ids, references and text are kept."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, name: str) -> list[str]:
        return [value or "" for _, key, value in self.attributes if key == name]


def parsed(html: str) -> Checked:
    found = Checked()
    found.feed(html)
    found.close()
    assert found.open == []
    return found


def report_of(students: int = 1, **more: Any) -> dict[str, Any]:
    names = ("teacher", *STUDENT_NAMES[:students])
    sections = {"language": losses(names, kept=0.9), "recall": {"models": {}}}
    report = {
        "format": 1,
        "suite": "quick",
        "contestants": eval_models(names),
        "sections": sections,
        "notes": ["few <documents>"],
        "seconds": {"language": 12.34, "recall": 0.5},
        "provenance": {
            "command": "linearize eval <x>",
            "seed": 3,
            "date": "2026-01-02T03:04:05",
            "libraries": {"a": "1"},
        },
    }
    return {**report, "verdict": verdict(eval_models(names), sections, SECTIONS), **more}


@pytest.mark.parametrize("students", [0, 1, 5])
def test_page_is_well_formed_and_holds_everything(students: int) -> None:
    html = page(report_of(students), SECTIONS)
    found = parsed(html)
    said = " ".join(found.texts)
    for name in ("teacher", *STUDENT_NAMES[:students]):
        assert name in said
    for piece in (
        "Loss & co",
        "By position",
        "23 rows",
        "Nothing",
        "Facts in text.",
        'Loss "over" tokens <fig>',
        "few <documents>",
    ):
        assert piece in said
    assert found.tags.count("svg") == 3
    assert found.tags.count("h1") == 1
    assert found.tags.count("figure") == found.tags.count("figcaption") == 3
    assert found.tags.count("table") == found.tags.count("caption") >= 4
    assert all(key != "scope" or value in ("col", "row") for _, key, value in found.attributes)
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    references = [value[1:] for _, key, value in found.attributes if key == "href" and value and value[0] == "#"]
    references += found.values("aria-labelledby") + re.findall(r"url\(#([^)]+)\)", html)
    assert references
    assert set(references) <= set(ids)


def test_page_fetches_and_runs_nothing() -> None:
    html = page(report_of(2), SECTIONS)
    found = parsed(html)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(found.tags)
    assert "http" not in html.lower()
    assert not re.search(r"@import|url\((?!#)|javascript:", html)
    assert not [key for _, key, _ in found.attributes if key.startswith("on")]
    for tag, key, value in found.attributes:
        if key in ("href", "src", "xlink:href"):
            assert value is not None
            assert value.startswith("#") or (tag == "image" and value.startswith("data:image/png"))


def test_names_are_text_never_markup() -> None:
    html = page(report_of(2, title="<i>A & B</i>"), SECTIONS)
    found = parsed(html)
    assert {"b", "i", "fig", "documents", "x", "modelling"}.isdisjoint(found.tags)
    assert "&lt;b&gt;&amp;&quot;q&quot;&#x27;&lt;/b&gt;" in html
    assert "&lt;i&gt;A &amp; B&lt;/i&gt;" in html


def test_same_report_same_bytes(tmp_path: Path) -> None:
    first = page(report_of(2), SECTIONS)
    path = write_report_page(json.loads(json.dumps(report_of(2))), tmp_path, SECTIONS)
    assert path == tmp_path / "report.html"
    assert path.read_text("utf-8") == first
    other = report_of(2)
    other["sections"]["language"]["models"]["student"]["loss"] = 1.75
    assert page(other, SECTIONS) != first


def test_faults_stand_in_a_box_before_any_section() -> None:
    report = report_of(1)
    assert 'class="faults"' not in page(report, SECTIONS)
    report["sections"]["language"]["models"]["student"]["loss"] = 2.5
    report["verdict"] = verdict(report["contestants"], report["sections"], SECTIONS)
    html = page(report, SECTIONS)
    at = html.index('class="faults"')
    assert html.index('id="verdict"') < at < html.index('class="tiles"') < html.index('<section id="language"')
    assert "student: loss 2.5" in html[at : html.index('class="tiles"')]
    assert '<a href="#language">' in html[at : html.index('class="tiles"')]


def test_sections_that_are_missing_or_unknown() -> None:
    report = report_of(1)
    report["sections"] = {"old section": {}, "recall": {}}
    html = page(report, SECTIONS)
    parsed(html)
    assert "cannot show the section &#x27;old section&#x27;" in html
    assert 'id="language"' not in html
    bare = page({"contestants": eval_models(("teacher",)), "sections": {}, "verdict": {}}, SECTIONS)
    parsed(bare)
    assert "measured alone" in bare


def test_svg_takes_the_colours_of_the_page() -> None:
    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for colour in (TEACHER, *STUDENTS):
            axis.plot([0, 1], [0, 1], color=colour, marker="o", label=colour)
        axis.text(0, 0, "on a cell", color="#ffffff")
        legend_below(figure)

    svg = inline_svg(Plot(name="all colours", caption='Lines & "more" <x>', draw=draw, width=5, height=3), "part")
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert root.findtext("title") == 'Lines & "more" <x>'
    for fixed in (INK, GRID, TEACHER, *STUDENTS):
        assert fixed not in svg
    for i in range(1, len(STUDENTS) + 1):
        assert f"var(--student-{i})" in svg
    assert all(f"var(--{name})" in svg for name in ("teacher", "grid"))
    assert "currentColor" in svg
    assert "#ffffff" in svg  # text on a cell stays as drawn
    for name in re.findall(r"var\(--([a-z0-9-]+)\)", svg):
        assert f"--{name}:" in LIGHT
        assert f"--{name}:" in DARK
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert ids
    assert all(name is not None and name.startswith("plot-part-all-colours-") for name in ids)
    assert root.get("width") is None
    assert (root.get("viewBox") or "").startswith("0 0 360")
    assert {"metadata", "style", "script"}.isdisjoint(element.tag for element in root.iter())


def test_saved_plots_stand_alone(tmp_path: Path) -> None:
    plot = Losses.present(losses(("teacher", *STUDENT_NAMES))).plots[0]
    svg, png = save_plot(plot, tmp_path / "plots")
    assert (svg.name, png.name) == ("loss.svg", "loss.png")
    assert ElementTree.parse(svg).getroot().get("width")
    assert png.read_bytes().startswith(b"\x89PNG")
    before = svg.read_bytes()
    save_plot(plot, tmp_path / "plots")
    assert svg.read_bytes() == before


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        (None, "-"), (float("nan"), "-"), (0.0, "0"), (2.0, "2.000"), (0.123456, "0.1235"), (123.456, "123.5"),
        (12345.6, "12,346"),
        (0.00001234, "1.234e-05"), (1024, "1024"), (260032, "260,032"), ("0.1 ± 0.2", "0.1 ± 0.2"), (-3, "-3"),
    ],
)  # fmt: skip
def test_cells(cell: Any, shown: str) -> None:
    assert cell_text(cell) == shown


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        ("0.123 ± 0.004", True), ("52.0% (48.1 to 55.9)", True), ("3 KiB", True), ("-0.3", True), ("1.2x", True),
        ("16-31", True),
        ("4 lolcats, 2 softmax", False), ("llama-7b", False), ("12 documents", False), ("sdpa, static", False),
    ],
)  # fmt: skip
def test_columns_of_numbers_stand_to_the_right(cell: str, number: bool) -> None:
    assert bool(NUMBER.match(cell)) is number
    html = table_html(Table(title="t", rows=[{"a": "x", "b": cell}, {"a": "y", "b": None}]))
    assert ('<td class="number">' in html) is number


def test_rows_may_lack_a_column() -> None:
    found = parsed(table_html(Table(title="t", rows=[{"a": "x"}, {"a": "y", "b": 2}], note="n & m")))
    assert found.tags.count("th") == 4
    assert found.tags.count("td") == 2
    assert "n & m" in found.texts


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_colours_can_be_told_from_the_paper(scheme: str) -> None:
    colour = dict(re.findall(r"--([a-z0-9-]+):(#[0-9a-f]{6})", scheme))
    for name in ("ink", "muted", "link", "bad", "good", "note"):
        for ground in ("paper", "box"):
            assert contrast(colour[name], colour[ground]) >= 4.5, (name, ground)
    assert contrast(colour["bad"], colour["bad-box"]) >= 4.5
    assert contrast(colour["ink"], colour["bad-box"]) >= 4.5
    for name in ("teacher", *(f"student-{i}" for i in range(1, len(STUDENTS) + 1))):
        assert contrast(colour[name], colour["paper"]) >= 3, name
