"""How every plot looks: colours, labels of axes, legends. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID, TEACHER = "#2b2b2b", "#e6e6e6", "#444444"
STUDENTS = ("#1f6fb4", "#c2571a", "#2e8b57", "#8a4fbf", "#b8860b", "#c2185b")
COLOURS = {"teacher": TEACHER, "student": STUDENTS[0], "window": "#e08214", "linear": "#2e8b57", "swap": "#b0b0b0"}
HEAT = "viridis"
LEGEND_ROW = 0.2  # inches
STYLE: Any = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "linearize",
    "savefig.dpi": 150,
}


def colours(names: Iterable[str]) -> Mapping[str, str]:
    """A colour for each model of a report, in order: the teacher's is always the same."""
    students = iter(STUDENTS * 20)
    return {name: TEACHER if name == "teacher" else next(students) for name in names}


@contextmanager
def styled() -> Iterator[None]:
    """The style, for as long as the block lasts."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        yield


def legend_below(figure: Figure) -> None:
    """One legend for all panels, from the first one's labels, under the figure (layout `constrained`).

    The figure grows by the legend's rows after the first, so that many names take nothing from the drawing.
    """
    by_label = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    if by_label:
        columns = _columns(list(by_label), figure.get_figwidth())
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * (-(-len(by_label) // columns) - 1))
        figure.legend(list(by_label.values()), list(by_label), loc="outside lower center", ncols=columns)


def _columns(labels: Sequence[str], width: float) -> int:
    """How many columns of labels fit into `width` inches; a letter takes about 0.09, a line's sample 0.6."""
    longest = max(len(label) for label in labels)
    return max(1, min(len(labels), 4, int(width / (0.09 * longest + 0.6))))


def log_log(axis: Axes, formatter: Any) -> None:
    """Both axes logarithmic to base two; x counts tokens, y as the formatter says."""
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.grid(True, which="major", axis="both")
    axis.xaxis.set_major_formatter(count_label)
    axis.yaxis.set_major_formatter(formatter)


def count_label(value: float, position: float | None = None) -> str:
    """2048 as `2k`."""
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def plain_label(value: float, position: float | None = None) -> str:
    """A number as short as it goes."""
    return f"{value:g}"


def percent_label(value: float, position: float | None = None) -> str:
    """0.25 as `25%`."""
    return f"{value:.0%}"


def bytes_label(value: float, position: float | None = None) -> str:
    """3072 as `3 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:g} {unit}"
        value /= 1024
    raise AssertionError
