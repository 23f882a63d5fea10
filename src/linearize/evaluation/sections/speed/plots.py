"""The plots of speeds: decode time, cache memory and prefill speed against context."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from linearize.evaluation.context import Numbers, Plot
from linearize.metrics.theme import bytes_label, colours, legend_below, log_log, plain_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]


def speed_plots(numbers: Numbers, points: Sequence[Row]) -> list[Plot]:
    names = list(numbers["models"])
    return [
        Plot(
            name="decode_time",
            caption="Milliseconds of one decoded token against the tokens before it: a softmax teacher's line rises, "
            "that of a linear student stays flat.",
            draw=_against_context(points, names, "ms_per_token", "ms per token", plain_label),
        ),
        Plot(
            name="cache_memory",
            caption="Bytes of the cache against the tokens read: the teacher's grows with every token.",
            draw=_against_context(points, names, "cache_bytes", "cache", bytes_label),
        ),
        Plot(
            name="prefill_speed",
            caption="Tokens read per second in the prefill against the length of the text; higher is faster.",
            draw=_against_context(points, names, "prefill_tokens_per_second", "prefill tokens/s", _short_count),
        ),
    ]


def _against_context(
    points: Sequence[Row], names: Sequence[str], key: str, label: str, formatter: Callable[..., str]
) -> Callable[[Figure], None]:
    """A line per model and batch (the smallest, and the largest dashed), both axes logarithmic."""
    batches = sorted({row["batch"] for row in points})
    styles = {batches[0]: "-", batches[-1]: "--"} if len(batches) > 1 else {batches[0]: "-"}
    contexts = sorted({row["context"] for row in points})

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import LogLocator

        axis = figure.subplots()
        for name, colour in colours(names).items():
            for batch, style in styles.items():
                found = [row for row in points if row["model"] == name and row["batch"] == batch]
                told = name if len(styles) == 1 else f"{name}, batch {batch}"
                x, y = [row["context"] for row in found], [row[key] for row in found]
                if found:
                    axis.plot(x, y, style, marker="o", color=colour, label=told)
        log_log(axis, formatter)
        if formatter is not bytes_label:
            axis.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axis.set_xticks(contexts)
        axis.minorticks_off()
        axis.set_xlabel("context (tokens)")
        axis.set_ylabel(label)
        legend_below(figure)

    return draw


def _short_count(value: float, position: float | None = None) -> str:
    """2000 as `2k`: tokens per second, decimal."""
    return f"{value / 1000:.3g}k" if value >= 1000 else f"{value:.3g}"
