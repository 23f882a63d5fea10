"""How far each converted layer is from the attention that it replaced, on the teacher's own hidden states."""

from __future__ import annotations

from typing import Any

from linearize.mixers import LayerMixer
from linearize.modeling import LinearizedForCausalLM
from linearize.training.config import Batch
from linearize.training.stages.attention_transfer import AttentionTransfer, AttentionTransferConfig
from linearize.training.stages.hidden_alignment import HiddenAlignment, HiddenAlignmentConfig


def layer_errors(student: LinearizedForCausalLM, teacher: Any, batch: Batch) -> list[float]:
    """Per converted layer: squared error over the teacher's power (0 exact, 1 as bad as nothing).

    Of the attention outputs before the output projection; where a mixer replaces the whole module, of the module's.
    Empty where no mixer has parameters.
    """
    if not student.mixer_parameters():
        return []
    if any(isinstance(mixer, LayerMixer) for mixer in student.mixers().values()):
        probe: Any = HiddenAlignment(HiddenAlignmentConfig(tokens=0, lr=1.0), student, teacher)
    else:
        probe = AttentionTransfer(AttentionTransferConfig(tokens=0, lr=1.0), student)
    errors: list[float] = probe.layer_errors(batch)
    probe.finish()
    return errors
