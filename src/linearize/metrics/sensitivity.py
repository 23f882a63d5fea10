"""How much a teacher needs each of its attention layers: the KL that replacing a layer alone costs (2512.20569)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.metrics.token_scores import View, score_batches
from linearize.mixers import MixerConfig
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.attention_capture import calibrate

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerScore:
    """What the bare swap of one layer costs: `kl`: KL(teacher||student), `loss`: next-token loss; nats per token."""

    layer: int
    kl: float
    loss: float


def layer_sensitivity(
    teacher: Any, mixer_config: MixerConfig, batches: Sequence[Batch], *, layers: Sequence[int] | None = None
) -> list[LayerScore]:
    """Each layer replaced alone, nothing trained: started as configured, calibrated on `batches` if the config says so.

    Costs two passes over the batches per layer (three with calibration). What a mixer draws at random is the same for
    every layer, and nothing that is drawn here is missing elsewhere.

    Args:
        batches: packed rows of training text (`input_ids`, `position_ids`, `labels`, each `[B, T]`), never held-out
            ones where layers are chosen by the scores.
        layers: None: all of them.

    Raises:
        InputError: a teacher that cannot be converted, or a mixer that does not fit it.
    """
    total = teacher.config.get_text_config().num_hidden_layers
    return [
        _score(teacher, mixer_config, batches, layer, total) for layer in (range(total) if layers is None else layers)
    ]


def _score(teacher: Any, mixer: MixerConfig, batches: Sequence[Batch], layer: int, total: int) -> LayerScore:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = LinearizedForCausalLM.from_teacher(teacher, [mixer if i == layer else None for i in range(total)])
        calibrate(student, teacher, batches)
        scores = score_batches(batches, {"teacher": View(model=teacher), "student": View(model=student)},
                               reference="teacher")  # fmt: skip
    kl, loss = scores.kl["student"].double().mean(), scores.loss["student"].double().mean()
    return LayerScore(layer=layer, kl=float(kl), loss=float(loss))
