"""The layers section as people read it: a table per model, and plots of error, entropy and far attention by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from linearize.evaluation.context import Cell, Finding, Plot, SectionView, Table
from linearize.evaluation.sections.layers.numbers import LayersNumbers, Measure, ModelLayers
from linearize.metrics.theme import colours, legend_below, plain_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def present(numbers: LayersNumbers) -> SectionView:
    """Return the section as people read it."""
    lengths = numbers.tokens
    summary = (
        f"Each converted layer on what the teacher's own layer is given: {len(lengths)} texts of {min(lengths)} to "
        f"{max(lengths)} tokens, queries of their second half. Signed mixing matrices (recurrent mixers) count by "
        f"the absolute value of their entries, normalised."
    )
    return SectionView(
        summary=summary,
        findings=[finding for name, model in numbers.models.items() for finding in _findings(name, model)],
        tables=[_table(name, numbers) for name, model in numbers.models.items() if model.layers],
        plots=_plots(numbers),
    )


def _findings(name: str, model: ModelLayers) -> list[Finding]:
    if model.error is not None:
        return [Finding(level="note", text=f"{name}: its attention cannot be looked at: {model.error}")]
    errors = {layer.layer: layer.error.value for layer in model.layers if layer.error}
    if not errors:
        return []
    worst = max(errors, key=errors.__getitem__)
    mean = math.fsum(errors.values()) / len(errors)
    text = (
        f"{name}: output error {mean:.3f} of the teacher's power on average over {len(errors)} layers, worst in layer "
        f"{worst}: {errors[worst]:.3f} (0 exact, 1 as bad as no output)"
    )
    return [Finding(level="note", text=text, student=name)]


def _table(name: str, numbers: LayersNumbers) -> Table:
    """Return student and teacher by layer; a teacher alone where it has no student."""
    has_teacher = "teacher" in numbers.models and name != "teacher"
    teacher = {layer.layer: layer for layer in numbers.models["teacher"].layers} if has_teacher else {}
    rows = []
    for layer in numbers.models[name].layers:
        row: dict[str, Cell] = {"layer": layer.layer, "mixer": layer.mixer}
        other = teacher.get(layer.layer)
        if layer.error:
            row["output error"] = layer.error.text
        for measure, word in _words(numbers.far).items():
            mean, theirs = layer.mean(measure), other.mean(measure) if other else None
            assert mean is not None
            row[word] = mean.text + (f" (teacher {theirs.value:.3g})" if theirs else "")
        rows.append(row)
    note = (
        "Means over texts ± standard error. Entropy of the rows of weights in nats; tokens attended to: its "
        "exponential; distance: tokens looked back on average; output error: squared, over the teacher's power."
    )
    return Table(title=f"Layers of {name}", rows=rows, note=note)


def _words(far: int) -> dict[Measure, str]:
    return {
        "entropy": "entropy",
        "effective": "tokens attended to",
        "distance": "distance",
        "far": f"weight {far} or more back",
    }


def _plots(numbers: LayersNumbers) -> list[Plot]:
    models = {name: model for name, model in numbers.models.items() if model.layers}
    if not models:
        return []
    plots = []
    if any(layer.error for model in models.values() for layer in model.layers):
        caption = "Squared error of each layer's output over the teacher's power, on the teacher's own hidden states."
        plots.append(_plot("layer_error", "Output error by layer", "error / power", caption, models, "error"))
    caption = "Entropy of the rows of attention weights: higher means attention spread over more tokens."
    plots.append(_plot("attention_entropy", "Attention entropy by layer", "nats", caption, models, "entropy"))
    far = numbers.far
    caption = f"Share of the attention weight on tokens {far} or more back, where a window no longer sees."
    plots.append(_plot("attention_far", f"Weight {far}+ tokens back", "share", caption, models, "far"))
    return plots


def _plot(name: str, title: str, unit: str, caption: str, models: Mapping[str, ModelLayers], measure: Measure) -> Plot:
    points = {
        who: [(layer.layer, mean) for layer in model.layers if (mean := layer.mean(measure))]
        for who, model in models.items()
    }

    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axis: Axes = figure.subplots()
        palette = colours(models)
        for who, means in points.items():
            if means:
                heights, errors = [mean.value for _, mean in means], [mean.error or 0 for _, mean in means]
                places = [layer for layer, _ in means]
                axis.errorbar(places, heights, yerr=errors, fmt="o-", markersize=4, color=palette[who], label=who)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_formatter(plain_label)
        if measure == "error":
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set(title=title, xlabel="layer", ylabel=unit)
        legend_below(figure)

    values = "; ".join(
        f"{who}: {', '.join(f'{mean.value:.3g}' for _, mean in means) or 'not measured'}"
        for who, means in points.items()
    )
    return Plot(name=name, caption=f"{caption} {values}.", draw=draw, height=3.2)
