"""Plots as SVG and PNG, and those of a conversion. matplotlib is imported when the first one is drawn."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.metrics.theme import COLOURS, count_label, legend_below, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from linearize.metrics.language_model import PositionBin
    from linearize.metrics.report import ConversionReport, Moment

MOST_NAMED = 7
LABELS = {"teacher": "teacher", "student": "student", "window": "student, window only"}


def plot_stages(report: ConversionReport, folder: Path | str, *, window_loss: float | None = None) -> list[Path]:
    """Held-out loss after the swap and after each stage, with the teacher as a line; files `stages.svg`, `stages.png`.

    `window_loss`: the loss of the window alone, a second line (default: the report's own ablation, if it has one).
    """
    if window_loss is None and report.ablation:
        window_loss = report.ablation["all_tokens"]["window"]
    moments = report.moments()
    losses, crowded = [moment.loss for moment in moments], len(moments) > MOST_NAMED
    lines = {"teacher": report.teacher_loss} | ({"window": window_loss} if window_loss is not None else {})
    width = 1.6 + 1.5 * (MOST_NAMED if crowded else max(len(moments), 3))
    with new_figure(Path(folder) / "stages", width=width) as (figure, (axis,)):
        for name, loss in lines.items():
            style = "-" if name == "teacher" else "--"
            axis.axhline(loss, color=COLOURS[name], linestyle=style, linewidth=1.4, label=f"{LABELS[name]} {loss:.3f}")
        size: dict[str, Any] = {"markersize": 4} if crowded else {}
        axis.plot(range(len(losses)), losses, marker="o", color=COLOURS["student"], label=LABELS["student"], **size)
        swaps = [at for at, moment in enumerate(moments) if moment.stage is None]
        if len(swaps) > 1:
            label = f"{len(swaps)} swaps, before training"
            axis.plot(swaps, [losses[at] for at in swaps], "o", color=COLOURS["swap"], label=label, zorder=3, **size)
        named = _named_moments(moments) if crowded else range(len(moments))
        axis.set_xticks(named, [moments[at].name.replace("_", " ").replace(" (", "\n(") for at in named])
        for at in named:
            box = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
            above = not crowded or at == 0  # after a step of a schedule the loss is lowest
            place: dict[str, Any] = {
                "xytext": (0, 9 if above else -17),
                "textcoords": "offset points",
                "ha": "center",
                "bbox": box,
            }
            axis.annotate(f"{losses[at]:.3f}", (at, losses[at]), **place)
        axis.margins(x=0.06 if crowded else 0.18, y=0.2 if crowded else 0.16)
        axis.set(title="Held-out loss through the stages", ylabel="nats per token")
        legend_below(figure)
    return figure_files(folder, "stages")


def _named_moments(moments: Sequence[Moment]) -> list[int]:
    """Of too many moments those that get a name and a number: the first, and ends of steps, spread evenly."""
    last = len(moments) - 1
    ends = [at for at in range(1, last) if moments[at + 1].stage is None] or list(range(1, last))
    evenly = [i * last / (MOST_NAMED - 1) for i in range(MOST_NAMED)]
    return sorted({min([0, *ends, last], key=lambda at: abs(at - target)) for target in evenly})


def plot_loss_by_position(bins: Sequence[PositionBin], folder: Path | str) -> list[Path]:
    """Loss, and loss above the teacher's, against the tokens seen; files `loss_by_position.svg` and `.png`."""
    compared = any(b.teacher_loss is not None and (b.student_loss, b.window_loss) != (None, None) for b in bins)
    panels = 2 if compared else 1
    with new_figure(Path(folder) / "loss_by_position", panels=panels, width=1.4 + 3.6 * panels) as (figure, axes):
        for name in ("window", "student", "teacher"):
            style: dict[str, Any] = {"marker": "o", "markersize": 4, "color": COLOURS[name]}
            known = [
                (_tokens_seen(b), loss, b.teacher_loss)
                for b in bins
                if (loss := getattr(b, f"{name}_loss")) is not None
            ]
            if known:
                axes[0].plot([x for x, _, _ in known], [loss for _, loss, _ in known], **style, label=LABELS[name])
            if known and compared:
                above = [(x, loss - teacher) for x, loss, teacher in known if teacher is not None]
                axes[1].plot(*zip(*above, strict=True), **style)
        for axis, title in zip(axes, ("Loss by position", "Above the teacher"), strict=False):
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(count_label)
            axis.set(title=title, xlabel="tokens of the document seen", ylabel="nats per token")
        legend_below(figure)
    return figure_files(folder, "loss_by_position")


def _tokens_seen(b: PositionBin) -> float:
    """The middle of a bin on a logarithmic axis; a token at position p has seen p + 1 tokens."""
    return float(((b.start + 1) * b.end) ** 0.5)


def plot_layer_error(
    errors: Mapping[str, Sequence[float]], folder: Path | str, layers: Sequence[int] | None = None
) -> list[Path]:
    """Error of each converted layer, a group of bars per moment; files `layer_error.svg` and `.png`.

    `layers`: which layers they are (None: the first ones).
    """
    count = max(len(values) for values in errors.values())
    palette = [COLOURS["swap"], COLOURS["student"], COLOURS["window"], COLOURS["teacher"]]
    with new_figure(Path(folder) / "layer_error", width=max(5.2, 1.6 + 0.35 * count * len(errors))) as (
        figure,
        (axis,),
    ):
        width = 0.8 / len(errors)
        for i, (moment, values) in enumerate(errors.items()):
            at = [layer + (i - (len(errors) - 1) / 2) * width for layer in range(len(values))]
            axis.bar(at, values, width=width * 0.94, color=palette[i % len(palette)], label=moment.replace("_", " "))
        axis.set_xticks(range(count), [str(layer) for layer in layers or range(count)])
        axis.set(title="Transfer error by layer", xlabel="layer", ylabel="error / teacher output power")
        legend_below(figure)
    return figure_files(folder, "layer_error")


@contextmanager
def new_figure(
    stem: Path, *, panels: int = 1, width: float = 5.6, height: float = 3.6
) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with its panels; saved under both suffixes when the block ends well."""
    with styled():
        figure = blank_figure(width, height)
        yield figure, list(figure.subplots(1, panels, squeeze=False)[0])
        svg, png = figure_files(stem.parent, stem.name)
        stem.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(svg, metadata={"Date": None})
        figure.savefig(png)


def draw_plot(draw: Callable[[Figure], None], *, width: float, height: float, stem: Path | None = None) -> bytes:
    """Draw a figure of `width` x `height` inches and return it as SVG on white; the same plot gives the same bytes.

    `stem`: the path, without suffix, of an SVG and a PNG file that are written as well. Names with a dollar sign are
    names, not formulas.
    """
    from matplotlib.text import Text

    with styled():
        figure = blank_figure(width, height)
        draw(figure)
        axes = [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
        ticks = {id(label) for axis in axes for label in axis.get_ticklabels(which="both")}
        for text in figure.findobj(Text):
            if isinstance(text, Text) and id(text) not in ticks:
                text.set_parse_math(False)
        drawing = io.BytesIO()
        figure.savefig(drawing, format="svg", metadata={"Date": None})
        if stem is not None:
            svg, png = figure_files(stem.parent, stem.name)
            stem.parent.mkdir(parents=True, exist_ok=True)
            svg.write_bytes(drawing.getvalue())
            figure.savefig(png)
    return drawing.getvalue()


def blank_figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches that arranges its parts by itself."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure_files(folder: Path | str, name: str) -> list[Path]:
    """The paths that `new_figure(folder / name)` writes."""
    return [Path(folder) / f"{name}{suffix}" for suffix in (".svg", ".png")]
