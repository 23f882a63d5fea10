"""How attention is spread, layer by layer: what a layer looks at, and how far its output is from the teacher's.

Each layer of a student is given what the same layer of the teacher is given, so that no error accumulates. The rows of
weights of a mixer are its outputs for one-hot values; those of a mixer in place of the whole module are its mixing
matrix, whose entries may be negative and need not sum to one: their absolute values, normalised, count.

Letters: H heads, T tokens (n of the query, i of the key), Q queries that count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

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
    """By converted layer, on one text. `source` gives what the layers are given: the teacher, or the student itself.

    With the student itself as the source there is no error.
    """
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
    """What stands in the place of the attention weights in a student's module, `[B, H, T, T]`, on a call's input."""
    mixer: Any = module.mixer
    if isinstance(mixer, LayerMixer):
        return mixer.matrix(call.hidden, layout=layout)
    found: list[Tensor] = []

    def attention_override(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *, layout: Layout, sliding_window: Any, **scores: Any
    ) -> Tensor:
        one_hot = torch.eye(q.shape[2], dtype=q.dtype, device=q.device).expand(*k.shape[:2], -1, -1)
        keys = (key_projection(module, call.hidden, mixer.shape),) if mixer.needs_keys else ()
        found.append(mixer(q, k, one_hot, *keys, layout=layout, need_state=False, **scores)[0])
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)

    module(*call.args, **{**call.kwargs, "mixer_call": MixerCall(layout, attention_override=attention_override)})
    return found[0]


def _with_error(shape: AttentionShape, call: ModuleCall, module: nn.Module, layout: Layout) -> AttentionShape:
    output, expected = call.repeat(module, layout).double(), call.output.double()
    found: Mapping[str, float] = {name: getattr(shape, name) for name in MEASURES}
    error, power = (output - expected).square().sum(), expected.square().sum()
    return AttentionShape(**found, error=float(error), power=float(power))


def _on(batch: Batch, model: PreTrainedModel) -> Batch:
    return {name: x.to(model.device) for name, x in batch.items()}
