"""Layer by layer: how far each converted layer's output is from the teacher's, and what its attention looks at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, EvalModel, Finding, Numbers, Plot, Section, SectionView, Table
from linearize.evaluation.sections.layers.attention_shape import (
    MEASURES,
    AttentionShape,
    student_shapes,
    teacher_shapes,
)
from linearize.metrics.branches import longest_reach
from linearize.metrics.intervals import plus_minus, ratio_over_documents
from linearize.metrics.theme import colours, legend_below, plain_label
from linearize.modeling import LinearizedForCausalLM
from linearize.training.config import Batch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_TOKENS = 8


class Layers(Section):
    """Output error, attention entropy, effective length and distance of every converted layer.

    `texts`: the longest documents, each alone; `tokens`: of each, at most (T x T matrices for all heads of one layer
    exist at once). `far`: tokens back where "far" begins (None: the longest window's reach, else a quarter of a text).
    """

    NAME: ClassVar[str] = "layers"
    TITLE: ClassVar[str] = "Layer by layer"

    texts: int = Field(6, ge=1)
    tokens: int = Field(384, ge=16)
    far: int | None = Field(None, ge=1)

    def check(self, ctx: EvalContext) -> None:
        """Raises: InputError: no document is long enough."""
        if max(map(len, ctx.documents), default=0) < LEAST_TOKENS:
            raise InputError(f"no document has {LEAST_TOKENS} tokens: attention cannot be measured on less; give text")

    def run(self, ctx: EvalContext) -> Numbers:
        """Every model, on the same texts; queries of the second half of a text count."""
        batches = self._batches(ctx)
        far = self.far or max(longest_reach(c.plan) or 0 for c in ctx.models) or batches[0]["input_ids"].shape[1] // 4
        models: Numbers = {}
        for done, eval_model in enumerate(ctx.models):
            ctx.progress(f"layers of {eval_model.name}", done, len(ctx.models))
            source = _source(eval_model, ctx.teacher)
            key = {
                "section": self.NAME,
                "config": self.model_dump(),
                "models": [(c.name, c.fingerprint) for c in (eval_model, ctx.teacher) if c is not None],
                "texts": [batch["input_ids"][0].tolist() for batch in batches],
                "far": far,
            }
            models[eval_model.name] = ctx.results.result(
                key,
                lambda c=eval_model, s=source: _measured(c, s, batches, far),  # type: ignore[misc]
            )
        return {"tokens": [batch["input_ids"].shape[1] for batch in batches], "far": far, "models": models}

    def _batches(self, ctx: EvalContext) -> list[Batch]:
        """One text each, the longest first."""
        documents = sorted(ctx.documents, key=len, reverse=True)
        most = min(self.tokens, ctx.length)
        chosen = [d.tokens[:most] for d in documents[: self.texts] if len(d) >= LEAST_TOKENS]
        return [{"input_ids": torch.tensor([x]), "position_ids": torch.arange(len(x))[None]} for x in chosen]

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        """A table per student, error and entropy as plots."""
        models: Mapping[str, Any] = numbers["models"]
        lengths = numbers["tokens"]
        summary = (
            f"Each converted layer on what the teacher's own layer is given: {len(lengths)} texts of {min(lengths)} to "
            f"{max(lengths)} tokens, queries of their second half. Signed mixing matrices (recurrent mixers) count by "
            f"the absolute value of their entries, normalised."
        )
        tables = [_table(name, numbers) for name, model in models.items() if model["layers"]]
        findings = [finding for name in models for finding in _findings(name, numbers)]
        return SectionView(summary=summary, findings=findings, tables=tables, plots=_plots(numbers))


def _source(eval_model: EvalModel, teacher: EvalModel | None) -> EvalModel | None:
    """Whose hidden states the layers are given: the teacher's where it is of the student's own family and sizes."""
    model = eval_model.model
    if not isinstance(model, LinearizedForCausalLM):
        return None
    if teacher is None or teacher.name == eval_model.name or isinstance(teacher.model, LinearizedForCausalLM):
        return eval_model
    own, other = model.config.teacher_config(), teacher.model.config
    same = own.model_type == other.model_type and all(
        getattr(own.get_text_config(), name) == getattr(other.get_text_config(), name)
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    return teacher if same else eval_model


def _measured(eval_model: EvalModel, source: EvalModel | None, batches: Sequence[Batch], far: int) -> Numbers:
    model = eval_model.model.eval()
    found: Numbers = {"role": eval_model.role, "given": None if source is None else source.name, "layers": []}
    by_text: list[dict[int, AttentionShape]] = []
    for batch in batches:
        where = {"far": far, "first": batch["input_ids"].shape[1] // 2}
        if isinstance(model, LinearizedForCausalLM) and source is not None:
            by_text.append(student_shapes(model, source.model.eval(), batch, **where))
            continue
        try:
            by_text.append(teacher_shapes(model, batch, **where))
        except InputError as error:  # a family that cannot be converted has no weights to look at
            return {**found, "error": str(error)}
    names = eval_model.mixer_names
    for layer in by_text[0]:
        name = names[layer] if names else "softmax"
        found["layers"].append({"layer": layer, "mixer": name, **_joined([shapes[layer] for shapes in by_text])})
    return found


def _joined(shapes: Sequence[AttentionShape]) -> Numbers:
    """Means over texts with their standard errors; the error of the output over all texts by the teacher's power."""
    text_R = torch.arange(len(shapes))
    joined: Numbers = {}
    for name in MEASURES:
        value_R = torch.tensor([asdict(shape)[name] for shape in shapes], dtype=torch.float64)
        joined[name] = ratio_over_documents(value_R, torch.ones_like(value_R), text_R).to_dict()
    if any(shape.power is None for shape in shapes):
        return {**joined, "error": None}
    error_R, power_R = (
        torch.tensor([asdict(s)[name] for s in shapes], dtype=torch.float64) for name in ("error", "power")
    )
    return {**joined, "error": ratio_over_documents(error_R, power_R, text_R).to_dict()}


def _findings(name: str, numbers: Numbers) -> list[Finding]:
    model = numbers["models"][name]
    if "error" in model:
        return [Finding(level="note", text=f"{name}: its attention cannot be looked at: {model['error']}")]
    errors = {layer["layer"]: layer["error"]["value"] for layer in model["layers"] if layer.get("error")}
    if not errors:
        return []
    worst = max(errors, key=errors.__getitem__)
    mean = math.fsum(errors.values()) / len(errors)
    text = (
        f"{name}: output error {mean:.3f} of the teacher's power on average over {len(errors)} layers, worst in layer "
        f"{worst}: {errors[worst]:.3f} (0 exact, 1 as bad as no output)"
    )
    return [Finding(level="note", text=text, student=name)]


def _table(name: str, numbers: Numbers) -> Table:
    """Student beside teacher; a teacher alone where it has no student."""
    models, far = numbers["models"], numbers["far"]
    teacher = (
        {layer["layer"]: layer for layer in models.get("teacher", {}).get("layers", ())} if name != "teacher" else {}
    )
    rows = []
    for layer in models[name]["layers"]:
        own, other = {"layer": layer["layer"], "mixer": layer["mixer"]}, teacher.get(layer["layer"])
        if layer.get("error"):
            own["output error"] = _value(layer["error"])
        for measure, word in _words(far).items():
            own[word] = _value(layer[measure]) + (f" (teacher {other[measure]['value']:.3g})" if other else "")
        rows.append(own)
    note = (
        "Means over texts ± standard error. Entropy of the rows of weights in nats; tokens attended to: its "
        "exponential; distance: tokens looked back on average; output error: squared, over the teacher's power."
    )
    return Table(title=f"Layers of {name}", rows=rows, note=note)


def _words(far: int) -> dict[str, str]:
    return {
        "entropy": "entropy",
        "effective": "tokens attended to",
        "distance": "distance",
        "far": f"weight {far} or more back",
    }


def _value(mean: Mapping[str, Any]) -> str:
    return plus_minus(mean["value"], mean["error"])


def _plots(numbers: Numbers) -> list[Plot]:
    models = {name: model for name, model in numbers["models"].items() if model["layers"]}
    if not models:
        return []
    plots = []
    if any(layer.get("error") for model in models.values() for layer in model["layers"]):
        caption = "Squared error of each layer's output over the teacher's power, on the teacher's own hidden states."
        plots.append(_plot("layer_error", "Output error by layer", "error / power", caption, models, "error"))
    caption = "Entropy of the rows of attention weights: higher means attention spread over more tokens."
    plots.append(_plot("attention_entropy", "Attention entropy by layer", "nats", caption, models, "entropy"))
    far = numbers["far"]
    caption = f"Share of the attention weight on tokens {far} or more back, where a window no longer sees."
    plots.append(_plot("attention_far", f"Weight {far}+ tokens back", "share", caption, models, "far"))
    return plots


def _plot(name: str, title: str, unit: str, caption: str, models: Mapping[str, Any], measure: str) -> Plot:
    def draw(figure: Figure) -> None:
        from matplotlib.ticker import MaxNLocator

        axis: Axes = figure.subplots()
        palette = colours(models)
        for who, model in models.items():
            points = [(layer["layer"], layer[measure]) for layer in model["layers"] if layer.get(measure)]
            if points:
                places, values = [x for x, _ in points], [y["value"] for _, y in points]
                errors = [y["error"] or 0 for _, y in points]
                axis.errorbar(places, values, yerr=errors, fmt="o-", markersize=4, color=palette[who], label=who)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.yaxis.set_major_formatter(plain_label)
        if measure == "error":
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        axis.set(title=title, xlabel="layer", ylabel=unit)
        legend_below(figure)

    told = "; ".join(_told(who, model, measure) for who, model in models.items())
    return Plot(name=name, caption=f"{caption} {told}.", draw=draw, height=3.2)


def _told(name: str, model: Mapping[str, Any], measure: str) -> str:
    values = [f"{layer[measure]['value']:.3g}" for layer in model["layers"] if layer.get(measure)]
    return f"{name}: {', '.join(values)}" if values else f"{name}: not measured"
