"""Layer by layer: how far each converted layer's output is from the teacher's, and what its attention looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, EvalModel, Numbers, Section, SectionView
from linearize.evaluation.numbers import MeanNumbers
from linearize.evaluation.sections.layers.attention_shape import (
    MEASURES,
    AttentionShape,
    student_shapes,
    teacher_shapes,
)
from linearize.evaluation.sections.layers.numbers import LayerNumbers, LayersNumbers, ModelLayers
from linearize.evaluation.sections.layers.present import present
from linearize.metrics.branches import longest_reach
from linearize.metrics.intervals import ratio_over_documents
from linearize.modeling import LinearizedForCausalLM
from linearize.training.config import Batch

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
        models: dict[str, ModelLayers] = {}
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
            measure = partial(_measured, eval_model, source, batches, far)
            models[eval_model.name] = ModelLayers.model_validate(ctx.results.result(key, measure))
        tokens = [batch["input_ids"].shape[1] for batch in batches]
        return LayersNumbers(tokens=tokens, far=far, models=models).to_json()

    def _batches(self, ctx: EvalContext) -> list[Batch]:
        """One text each, the longest first."""
        documents = sorted(ctx.documents, key=len, reverse=True)
        most = min(self.tokens, ctx.length)
        chosen = [d.tokens[:most] for d in documents[: self.texts] if len(d) >= LEAST_TOKENS]
        return [{"input_ids": torch.tensor([x]), "position_ids": torch.arange(len(x))[None]} for x in chosen]

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        """Return a table per student, and the error and the shape of attention as plots."""
        return present(LayersNumbers.model_validate(numbers))


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
    given = None if source is None else source.name
    by_text: list[dict[int, AttentionShape]] = []
    for batch in batches:
        where = {"far": far, "first": batch["input_ids"].shape[1] // 2}
        if isinstance(model, LinearizedForCausalLM) and source is not None:
            by_text.append(student_shapes(model, source.model.eval(), batch, **where))
            continue
        try:
            by_text.append(teacher_shapes(model, batch, **where))
        except InputError as error:  # a family that cannot be converted has no weights to look at
            return ModelLayers(role=eval_model.role, given=given, layers=[], error=str(error)).to_json()
    names = eval_model.mixer_names
    layers = [
        _layer(layer, names[layer] if names else "softmax", [shapes[layer] for shapes in by_text])
        for layer in by_text[0]
    ]
    return ModelLayers(role=eval_model.role, given=given, layers=layers).to_json()


def _layer(layer: int, mixer: str, shapes: Sequence[AttentionShape]) -> LayerNumbers:
    """Return means over texts with their standard errors; the output's error over all texts by the teacher's power."""
    text_R = torch.arange(len(shapes))

    def values(name: str) -> Tensor:
        return torch.tensor([asdict(shape)[name] for shape in shapes], dtype=torch.float64)

    def ratio(amount_R: Tensor, weight_R: Tensor) -> MeanNumbers:
        return MeanNumbers.model_validate(ratio_over_documents(amount_R, weight_R, text_R).to_dict())

    means = {name: ratio(values(name), torch.ones(len(shapes), dtype=torch.float64)) for name in MEASURES}
    known = all(shape.power is not None for shape in shapes)
    error = ratio(values("error"), values("power")) if known else None
    return LayerNumbers(layer=layer, mixer=mixer, **means, error=error)
