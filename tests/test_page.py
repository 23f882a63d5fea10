"""The page of a report: complete, escaped, self-contained, the same bytes each time."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from report_samples import SECTIONS, eval_models, losses, report_on

from linearize.evaluation.context import Table, cell_text
from linearize.evaluation.report.page import render_page, write_report_page
from linearize.evaluation.report.schema import EvalReport
from linearize.evaluation.verdict import present_sections
from linearize.metrics.theme import STUDENTS, TEACHER

VOID = {"meta", "link", "br", "hr", "img", "input"}
STUDENT_NAMES = ("student", '<b>&"q"\'</b>', "a$\\frac$b", "mamba2", "gla")
SVG = "data:image/svg+xml;base64,"


class Checked(HTMLParser):
    """Every element closed in turn; tags, attributes and text are kept."""

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

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def values(self, name: str) -> list[str]:
        return [value or "" for _, key, value in self.attributes if key == name]


def parsed(html: str) -> Checked:
    page = Checked()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def sample(students: int = 1, **changes: Any) -> EvalReport:
    names = ("teacher", *STUDENT_NAMES[:students])
    return report_on(names, {"language": losses(names, kept=0.9), "recall": {"models": {}}}).model_copy(update=changes)


def page_of(report: EvalReport, plots: Path | None = None) -> str:
    return render_page(report, present_sections(report.sections, SECTIONS), plots=plots)


def table_page(table: Table) -> Checked:
    """A page whose only section holds the table."""
    report = sample(sections={"recall": {}})
    (section,) = present_sections(report.sections, SECTIONS).values()
    view = type(section.view)(summary="", tables=[table])
    return parsed(render_page(report, {"recall": type(section)(title="t", numbers={}, view=view, stats={})}))


@pytest.mark.parametrize("students", [0, 1, 5])
def test_page_is_well_formed_and_holds_everything(students: int) -> None:
    page = parsed(page_of(sample(students)))
    text = " ".join(page.texts)
    for name in ("teacher", *STUDENT_NAMES[:students]):
        assert name in text
    for part in (
        "Loss & co", "By position", "23 rows", "Nothing", "Facts in text.", "linearize eval <x>", "12.3",
        'Loss "over" tokens <fig>', "few <documents>",
    ):  # fmt: skip
        assert part in text, part
    assert page.tags.count("h1") == 1
    assert page.tags.count("figure") == page.tags.count("figcaption") == page.tags.count("img") == 3
    assert 'Loss "over" tokens <fig>' in page.values("alt") and all(page.values("alt"))
    assert page.tags.count("table") == page.tags.count("caption") >= 4
    assert page.tags.count("dl") == (2 if students == 1 else 1)  # the stats of one student, and the provenance
    assert set(page.values("scope")) == {"col", "row"}
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    references = [value[1:] for value in page.values("href") if value.startswith("#")]
    assert references and set(references) <= set(ids)


def test_page_fetches_and_runs_nothing() -> None:
    html = page_of(sample(2))
    page = parsed(html)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    sources = page.values("src")
    assert sources and all(source.startswith(SVG) for source in sources)
    for source in sources:
        root = ElementTree.fromstring(base64.b64decode(source.removeprefix(SVG)))
        assert not [element for element in root.iter() if element.tag.endswith(("script", "foreignObject"))]
        links = [value for element in root.iter() for key, value in element.attrib.items() if key.endswith("href")]
        assert all(link.startswith(("#", "data:image/png")) for link in links)
        html = html.replace(source, "")
    assert "http" not in html.lower()
    assert not re.search(r"@import|url\(|javascript:", html)
    assert not [key for _, key, _ in page.attributes if key.startswith("on")]
    assert all(value.startswith("#") for value in page.values("href"))


def test_names_are_text_never_markup() -> None:
    page = parsed(page_of(sample(2, suite="<i>A & B</i>")))
    assert {"b", "i", "fig", "documents", "x", "modelling"}.isdisjoint(page.tags)
    assert STUDENT_NAMES[1] in page.texts
    assert any("<i>A & B</i>" in text for text in page.texts)


def test_same_report_same_bytes(tmp_path: Path) -> None:
    report = sample(2)
    first = page_of(report)
    report.write(tmp_path)
    again = EvalReport.read(tmp_path)
    assert again == report
    path = write_report_page(again, tmp_path, present_sections(again.sections, SECTIONS))
    assert path == tmp_path / "report.html"
    assert path.read_text("utf-8") == first
    other = json.loads(json.dumps(report.to_json()))
    other["sections"]["language"]["models"]["student"]["loss"] = 1.75
    assert page_of(EvalReport.model_validate(other)) != first


def test_faults_are_in_a_box_before_any_section() -> None:
    assert 'class="faults"' not in page_of(sample(1))
    numbers = losses(("teacher", "student"), kept=0.9)
    numbers["models"]["student"]["loss"] = 2.5
    html = page_of(report_on(("teacher", "student"), {"language": numbers}))
    box, stats = html.index('class="faults"'), html.index('class="stats"')
    assert html.index('id="verdict"') < box < stats < html.index('<section id="language"')
    assert "student: loss 2.5" in html[box:stats]
    assert '<a href="#language">' in html[box:stats]


def test_sections_that_are_missing_or_unknown() -> None:
    html = page_of(sample(1, sections={"old section": {}, "recall": {}}))
    parsed(html)
    assert "cannot show the section &#39;old section&#39;" in html
    assert 'id="language"' not in html
    bare = page_of(report_on(("teacher",), {}))
    parsed(bare)
    assert "measured alone" in bare


def test_plots_are_the_files_next_to_the_page(tmp_path: Path) -> None:
    page = parsed(page_of(sample(5), tmp_path / "plots"))
    drawn = [base64.b64decode(source.removeprefix(SVG)) for source in page.values("src")]
    line = (tmp_path / "plots" / "line.svg").read_bytes()
    assert drawn[2] == line and ElementTree.fromstring(line).get("width")
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"loss.svg", "loss.png", "line.svg", "line.png"}
    assert (tmp_path / "plots" / "line.png").read_bytes().startswith(b"\x89PNG")
    assert len(set(drawn)) == 3


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


@pytest.mark.parametrize(("cell", "numeric"), [("0.123 ± 0.004", True), ("4 lolcats, 2 softmax", False)])
def test_columns_of_numbers_are_aligned_to_the_right(cell: str, numeric: bool) -> None:
    page = table_page(Table(title="t", rows=[{"a": "x", "b": cell}, {"a": "y", "b": None}]))
    kinds = [value for tag, key, value in page.attributes if (tag, key) == ("td", "class")]
    assert kinds[-4:-2] == ["number" if numeric else "text"] * 2  # the last two are the seconds


def test_rows_may_lack_a_column() -> None:
    page = table_page(Table(title="t", rows=[{"a": "x"}, {"a": "y", "b": 2}], note="n & m"))
    assert "n & m" in page.texts
    assert page.texts[page.texts.index("x") :][:3] == ["x", "\n", "-"]


def test_the_models_are_listed_with_their_layers() -> None:
    report = sample(1)
    page = parsed(page_of(report))
    assert "2 lolcats, 1 softmax" in page.texts and "260,033" in page.texts
    assert report.contestants == eval_models(("teacher", "student"))


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_colours_can_be_read_on_their_ground() -> None:
    schemes = re.findall(r":root\{([^}]*)\}", page_of(sample(0)))
    assert ["color-scheme:dark" in scheme for scheme in schemes] == [False, True]
    for scheme in schemes:
        colour = dict(re.findall(r"--([a-z0-9-]+):(#[0-9a-f]{6})", scheme))
        for name in ("ink", "muted", "link", "bad", "good", "note"):
            for ground in ("paper", "box"):
                assert contrast(colour[name], colour[ground]) >= 4.5, (name, ground)
        assert contrast(colour["bad"], colour["bad-box"]) >= 4.5
        assert contrast(colour["ink"], colour["bad-box"]) >= 4.5
    for colour_of_plot in (TEACHER, *STUDENTS):
        assert contrast(colour_of_plot, "#ffffff") >= 3, colour_of_plot
