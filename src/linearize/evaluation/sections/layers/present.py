"""Numbers of the layers section, by model and converted layer, and how they are presented."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from linearize.evaluation.context import Cell, Finding, Plot, SectionView, Table
from linearize.evaluation.numbers import MeanNumbers, NumbersModel, Role
from linearize.metrics.theme import colours, legend_below, plain_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Measure = Literal["entropy", "effective", "distance", "far", "error"]


class LayerNumbers(NumbersModel):
    """Means over texts: see `AttentionShape`. `error`: of the output, by the teacher's power (None: no teacher)."""

    layer: int
    mixer: str
    entropy: MeanNumbers
    effective: MeanNumbers
    distance: MeanNumbers
    far: MeanNumbers
    error: MeanNumbers | None

    def mean(self, measure: Measure) -> MeanNumbers | None:
        """One of the measures."""
        means = {"entropy": self.entropy, "effective": self.effective, "distance": self.distance, "far": self.far}
        return self.error if measure == "error" else means[measure]


class ModelLayers(NumbersModel):
    """The layers of one model. `source`: whose hidden states they read; `error`: why nothing was measured."""

    role: Role
    source: str | None
    layers: list[LayerNumbers]
    error: str | None = None


class LayersNumbers(NumbersModel):
    """`tokens`: of each text; `far`: tokens back where "far" begins."""

    tokens: list[int]
    far: int
    models: dict[str, ModelLayers]


def present(numbers: LayersNumbers) -> SectionView:
    """Return the section as people read it."""
    lengths = numbers.tokens
    summary = (
        f"Each converted layer on the input of the teacher's own layer: {len(lengths)} texts of {min(lengths)} to "
        f"{max(lengths)} tokens, queries of their second half. Signed mixing matrices (recurrent mixers) count by "
        "the absolute value of their entries, normalised."
    )
    return SectionView(
        summary=summary,
        findings=[finding for name, model in numbers.models.items() for finding in _findings(name, model)],
        tables=[_table(name, numbers) for name, model in numbers.models.items() if model.layers],
        plots=_plots(numbers),
    )


def _findings(name: str, model: ModelLayers) -> list[Finding]:
    if model.error is not None:
        return [Finding(level="note", text=f"{name}: its attention cannot be measured: {model.error}")]
    errors = {layer.layer: layer.error.value for layer in model.layers if layer.error}
    if not errors:
        return []
    worst = max(errors, key=errors.__getitem__)
    mean = math.fsum(errors.values()) / len(errors)
    text = (
        f"output error {mean:.3f} of the teacher's power on average over {len(errors)} layers, worst in layer {worst}: "
        f"{errors[worst]:.3f} (0 exact, 1 as bad as no output)"
    )
    return [Finding.on(name, "student", "note", text)]


def _table(name: str, numbers: LayersNumbers) -> Table:
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

    return Plot(name=name, caption=caption, draw=draw, height=3.2)
