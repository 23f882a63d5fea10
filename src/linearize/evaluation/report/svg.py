"""A section's plot as SVG that stands in an HTML page and takes the page's colours, light or dark; or as files."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from linearize.evaluation.context import Plot
from linearize.metrics.plots import figure_files
from linearize.metrics.theme import GRID, INK, STUDENTS, TEACHER, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSS_COLOURS = {
    INK: "currentColor",
    GRID: "var(--grid)",
    TEACHER: "var(--teacher)",
    **{colour: f"var(--student-{i})" for i, colour in enumerate(STUDENTS, start=1)},
}
"""What the page decides. Other colours stay as drawn, so that black text on a light cell of a heat map stays black."""

SMALLEST_SCALE = 0.8
PIXELS_PER_INCH, POINTS_PER_INCH = 92, 72
COLOUR = re.compile("|".join(CSS_COLOURS))
BLACK_LINE = re.compile(r"(?<=stroke: )#000000")
REFERENCE = re.compile(r"url\(#([^)]+)\)")


def inline_svg(plot: Plot, prefix: str = "") -> str:
    """The plot as one `<svg>` element for a page; the same plot gives the same bytes.

    It carries no ids but its own (they start with `prefix` and the plot's name, which must be unique in a page), no
    styles, scripts, metadata or links, and shrinks with the page until its text would be too small to read.
    """
    root = ElementTree.fromstring(_drawn(plot))
    stem = _identifier(f"{prefix}-{plot.name}" if prefix else plot.name)
    _strip(root)
    _rename(root, stem)
    for element in root.iter():
        if style := element.get("style"):
            told = COLOUR.sub(lambda found: CSS_COLOURS[found.group()], style)
            element.set("style", BLACK_LINE.sub("currentColor", told))
    _frame(root, plot, stem)
    return ElementTree.tostring(root, encoding="unicode")


def save_plot(plot: Plot, folder: Path | str) -> list[Path]:
    """Write the plot as `NAME.svg` and `NAME.png`, on white; returns both paths."""
    paths = figure_files(folder, plot.name)
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    with styled():
        figure = _figure(plot)
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1])
    return paths


def _figure(plot: Plot) -> Figure:
    """The plot drawn on a new figure; names with a dollar sign are names, not formulas."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(plot.width, plot.height), layout="constrained")
    FigureCanvasAgg(figure)
    plot.draw(figure)
    axes = [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
    ticks = {id(label) for axis in axes for label in axis.get_ticklabels(which="both")}
    for text in figure.findobj(Text):
        if isinstance(text, Text) and id(text) not in ticks:
            text.set_parse_math(False)
    return figure


def _drawn(plot: Plot) -> bytes:
    """matplotlib's own SVG of the plot, without a background."""
    file = io.BytesIO()
    with styled():
        _figure(plot).savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def _strip(root: ElementTree.Element) -> None:
    """Drop namespaces (HTML knows them), metadata and styles that would reach beyond this drawing."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for key in [key for key in element.attrib if key.startswith("{")]:
            element.set(key.rpartition("}")[2], element.attrib.pop(key))


def _rename(root: ElementTree.Element, stem: str) -> None:
    """Number the ids that are referred to and drop the others: two drawings in a page never share one."""
    values = [value for element in root.iter() for key, value in element.attrib.items() if key != "id"]
    used = {value[1:] for value in values if value.startswith("#")}
    used |= {name for value in values for name in REFERENCE.findall(value)}
    names: dict[str, str] = {}
    for element in root.iter():
        old = element.attrib.pop("id", None)
        if old in used:
            names[old] = f"{stem}-{len(names)}"
            element.set("id", names[old])
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "href" and value[1:] in names:
                element.set(key, f"#{names[value[1:]]}")
            elif "url(#" in value:
                element.set(key, REFERENCE.sub(lambda found: f"url(#{names[found.group(1)]})", value))


def _frame(root: ElementTree.Element, plot: Plot, stem: str) -> None:
    """Size, role and the caption as the drawing's name."""
    box = root.get("viewBox") or f"0 0 {plot.width * POINTS_PER_INCH:g} {plot.height * POINTS_PER_INCH:g}"
    widest = plot.width * PIXELS_PER_INCH
    narrowest = plot.width * POINTS_PER_INCH * SMALLEST_SCALE
    root.attrib.clear()
    root.attrib.update(
        {
            "viewBox": box,
            "role": "img",
            "aria-labelledby": f"{stem}-title",
            "style": f"width:100%;min-width:{narrowest:.0f}px;max-width:{widest:.0f}px;height:auto",
        }
    )
    title = ElementTree.Element("title", {"id": f"{stem}-title"})
    title.text = plot.caption
    root.insert(0, title)


def _identifier(text: str) -> str:
    """The text as an id: letters, digits, hyphens, a letter first."""
    return "plot-" + (re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower() or "0")
