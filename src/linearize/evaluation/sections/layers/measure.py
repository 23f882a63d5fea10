"""Layer by layer: how far each converted layer's output is from the teacher's, and how its attention is spread.

Each layer of a student reads what the same layer of the teacher reads, so that no error accumulates. The rows of
weights of a mixer are its outputs for one-hot values; those of a mixer in place of the whole module are its mixing
matrix, whose entries may be negative and need not sum to one: their absolute values, normalised, count.

Letters: H heads, T tokens (n of the query, i of the key), Q queries that count, R texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, EvalModel, Numbers, Section, SectionView, TooLittleTextError
from linearize.evaluation.numbers import MeanNumbers
from linearize.evaluation.sections.layers.present import LayerNumbers, LayersNumbers, ModelLayers, present
from linearize.metrics.branches import longest_reach
from linearize.metrics.intervals import ratio_over_documents
from linearize.mixers import LayerMixer
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.attention import MixerCall
from linearize.modeling.attention_capture import attention_samples
from linearize.modeling.projections import key_projection
from linearize.ops.layout import Layout
from linearize.training.config import Batch
from linearize.training.stages.hidden_alignment import ModuleCall, batch_layout, module_calls
from linearize.training.stages.matrix_alignment import attention_matrix

MEASURES = ("entropy", "effective", "distance", "far")
LEAST_TOKENS = 8


class Layers(Section):
    """Output error, attention entropy, effective length and distance of every converted layer.

    `texts`: the longest documents, each alone; `tokens`: of each, at most (T x T matrices for all heads of one layer
    exist at once).
    """

    NAME: ClassVar[str] = "layers"
    TITLE: ClassVar[str] = "Layer by layer"

    texts: int = Field(6, ge=1)
    tokens: int = Field(384, ge=16)

    def check(self, ctx: EvalContext) -> None:
        """Raises InputError where no document is long enough."""
        if max(map(len, ctx.documents), default=0) < LEAST_TOKENS:
            raise TooLittleTextError(
                f"no document has {LEAST_TOKENS} tokens: attention cannot be measured on less; give text"
            )

    def run(self, ctx: EvalContext) -> Numbers:
        """Every model, on the same texts; queries of the second half of a text count."""
        batches = self._batches(ctx)
        far = max(longest_reach(m.plan) or 0 for m in ctx.models) or batches[0]["input_ids"].shape[1] // 4
        models: dict[str, ModelLayers] = {}
        for done, eval_model in enumerate(ctx.models):
            ctx.progress(f"layers of {eval_model.name}", done, len(ctx.models))
            source = _source(eval_model, ctx.teacher)
            key = {
                "section": self.NAME,
                "config": self.model_dump(),
                "models": [(m.name, m.fingerprint) for m in (eval_model, ctx.teacher) if m is not None],
                "texts": [batch["input_ids"][0].tolist() for batch in batches],
                "far": far,
            }
            measure = partial(_measured, eval_model, source, batches, far)
            models[eval_model.name] = ctx.results.numbers(ModelLayers, key, measure)
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
        return present(LayersNumbers.model_validate(numbers))


def _source(eval_model: EvalModel, teacher: EvalModel | None) -> EvalModel | None:
    """Whose hidden states the layers read: the teacher's where it is of the student's own family and sizes."""
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


def _measured(eval_model: EvalModel, source: EvalModel | None, batches: Sequence[Batch], far: int) -> ModelLayers:
    model = eval_model.model.eval()
    name = None if source is None else source.name
    by_text: list[dict[int, AttentionShape]] = []
    for batch in batches:
        where = {"far": far, "first": batch["input_ids"].shape[1] // 2}
        if isinstance(model, LinearizedForCausalLM) and source is not None:
            by_text.append(student_shapes(model, source.model.eval(), batch, **where))
            continue
        try:
            by_text.append(teacher_shapes(model, batch, **where))
        except InputError as error:  # a family that cannot be converted has no weights to look at
            return ModelLayers(role=eval_model.role, source=name, layers=[], error=str(error))
    names = eval_model.mixer_names
    layers = [
        _layer(layer, names[layer] if names else "softmax", [shapes[layer] for shapes in by_text])
        for layer in by_text[0]
    ]
    return ModelLayers(role=eval_model.role, source=name, layers=layers)


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


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Means over heads and queries of one text.

    `entropy`: of the rows of weights, nats; `effective`: exp(entropy), the number of tokens attended to; `distance`:
    tokens looked back, on average; `far`: share of the weight on tokens so far back that a given window ends there.
    `error`, `power`: squared error of the layer's output and the teacher's squared output, summed (None: no teacher).
    """

    entropy: float
    effective: float
    distance: float
    far: float
    error: float | None = None
    power: float | None = None


def shape_of(weights_HTT: Tensor, *, far: int, first: int) -> AttentionShape:
    """The shape of causal rows of weights, for queries from position `first` on; far begins `far` tokens back."""
    tokens = weights_HTT.shape[-1]
    weights_HQT = weights_HTT[:, first:].double().abs()
    p_HQT = weights_HQT / weights_HQT.sum(-1, keepdim=True).clamp(min=1e-300)
    entropy_HQ = -torch.special.xlogy(p_HQT, p_HQT).sum(-1)
    slot = torch.arange(tokens, device=weights_HTT.device)
    back_QT = (slot[first:, None] - slot).clamp(min=0)
    return AttentionShape(
        entropy=float(entropy_HQ.mean()),
        effective=float(entropy_HQ.exp().mean()),
        distance=float((p_HQT * back_QT).sum(-1).mean()),
        far=float((p_HQT * (back_QT >= far)).sum(-1).mean()),
    )


@torch.no_grad()
def teacher_shapes(teacher: PreTrainedModel, batch: Batch, *, far: int, first: int) -> dict[int, AttentionShape]:
    """By layer, on one text (`input_ids`, `position_ids: [1, T]`).

    Raises:
        InputError: a family whose attention does not go through transformers' attention interface.
    """
    layers = range(teacher.config.get_text_config().num_hidden_layers)
    samples = attention_samples(teacher, [_on(batch, teacher)], layers)
    return {i: shape_of(attention_matrix(samples[i][0])[0], far=far, first=first) for i in layers}


@torch.no_grad()
def student_shapes(
    student: LinearizedForCausalLM, source: PreTrainedModel, batch: Batch, *, far: int, first: int
) -> dict[int, AttentionShape]:
    """By converted layer, on one text. `source`: whose hidden states the layers read, the teacher's or the student's
    own; with the student's own there is no error."""
    batch, own = _on(batch, source), source is student
    names = {layer: student.config.attention[layer] for layer in student.mixers()}
    prefix = "lm." if own else ""
    calls = module_calls(source, batch, [prefix + name for name in names.values()])
    layout, shapes = batch_layout(batch), {}
    for layer, name in names.items():
        call, module = calls[prefix + name], student.lm.get_submodule(name)
        weights_HTT = implied_weights(module, call, layout)[0]
        shape = shape_of(weights_HTT, far=far, first=first)
        shapes[layer] = shape if own else _with_error(shape, call, module, layout)
    return shapes


def implied_weights(module: nn.Module, call: ModuleCall, layout: Layout) -> Tensor:
    """What takes the place of attention weights in a student's module, `[B, H, T, T]`, on a call's input."""
    mixer: Any = module.mixer
    if isinstance(mixer, LayerMixer):
        return mixer.matrix(call.hidden, layout=layout)
    weights: list[Tensor] = []

    def attention_override(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *, layout: Layout, sliding_window: Any, **scores: Any
    ) -> Tensor:
        one_hot = torch.eye(q.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        keys = (key_projection(module, call.hidden, mixer.shape),) if mixer.needs_keys else ()
        weights.append(mixer(q, k, one_hot, *keys, layout=layout, need_state=False, **scores)[0])
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

    module(*call.args, **{**call.kwargs, "mixer_call": MixerCall(layout, attention_override=attention_override)})
    return weights[0]


def _with_error(shape: AttentionShape, call: ModuleCall, module: nn.Module, layout: Layout) -> AttentionShape:
    output, expected = call.repeat(module, layout).double(), call.output.double()
    error, power = (output - expected).square().sum(), expected.square().sum()
    return replace(shape, error=float(error), power=float(power))


def _on(batch: Batch, model: PreTrainedModel) -> Batch:
    return {name: x.to(model.device) for name, x in batch.items()}
