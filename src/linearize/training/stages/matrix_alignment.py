"""Matrix alignment: the mixing matrix of each layer learns to be the teacher's attention matrix (MOHAWK stage 1,
2408.10189, section 4.1).

Both matrices exist in full, T x T for each head: meant for short rows.

Letters: B batch, H heads, T tokens (n of the query, i of the key), M model width.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from linearize.errors import InputError
from linearize.mixers.layer_mixer import AttentionSample, LayerMixer
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.attention_capture import attention_samples
from linearize.ops.layout import Layout
from linearize.ops.softmax import softmax_attention
from linearize.training.config import Batch, LossSum, ParameterGroup, StageConfig, StageRun
from linearize.training.stages.losses import counted
from linearize.training.student_run import StudentRun, unshare


class MatrixAlignmentConfig(StageConfig):
    """Settings of the stage: those that all stages share."""

    by_layer: ClassVar[bool] = True
    name: Literal["matrix_alignment"] = "matrix_alignment"

    def check(self, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> None:
        """Raises: InputError: a mixer without a matrix of its own."""
        mixers = student.mixers().values()
        if others := sorted({mixer.config.name for mixer in mixers if not isinstance(mixer, LayerMixer)}):  # type: ignore[attr-defined]
            raise InputError(
                f"matrix_alignment is for mixers in place of the whole attention module, not for {', '.join(others)}: "
                "use attention_transfer with weights_ce"
            )
        if not mixers:
            raise InputError("matrix_alignment has nothing to train: the plan converts no layer (set its tokens to 0)")

    def build(self, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> StageRun:
        """The stage over a student and its teacher."""
        self.check(student, teacher)
        return MatrixAlignment(self, student, teacher)


class MatrixAlignment(StudentRun):
    """The running stage."""

    def __init__(self, config: MatrixAlignmentConfig, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> None:
        super().__init__(student, ParameterGroup(unshare(student, teacher, _in_matrices(student))))
        self.config, self.teacher = config, teacher
        self.layers: list[int] = sorted(student.mixers())

    def loss(self, batch: Batch) -> LossSum:
        """Sum over layers of the squared Frobenius distance, mean over heads, as a sum over rows whose next token
        counts."""
        live = counted(batch["labels"])
        total = torch.zeros((), device=live.device)
        for error_BT in self._row_errors(batch):
            total = total + error_BT[live].sum()
        return LossSum(total, float(live.sum()))

    def _row_errors(self, batch: Batch) -> list[Tensor]:
        """By layer, `[B, T]`."""
        samples = attention_samples(self.teacher, [batch], self.layers)
        mixers: dict[int, Any] = dict(self.student.mixers())
        errors = []
        for layer in self.layers:
            sample = samples[layer][0]
            matrix_BHTT = mixers[layer].matrix(sample.hidden_BTM, layout=sample.layout)
            errors.append((matrix_BHTT.float() - attention_matrix(sample)).square().sum(-1).mean(1))
        return errors


@torch.no_grad()
def attention_matrix(sample: AttentionSample) -> Tensor:
    """The teacher's attention weights `[B, H, T, T]`, fp32: its outputs for one-hot values."""
    q, k = sample.q_BHTD.float(), sample.k_BGTD.float()
    eye = torch.eye(q.shape[2], device=q.device).expand(*k.shape[:2], -1, -1)
    return softmax_attention(
        q, k, eye, scaling=sample.scaling, layout=sample.layout, softcap=sample.softcap, sliding_window=sample.window
    )


def _in_matrices(student: LinearizedForCausalLM) -> list[str]:
    """Names of the mixers' parameters that change their matrices, determined by running three tokens."""
    names = {id(parameter): name for name, parameter in student.mixer_parameters().items()}
    moving: list[str] = []
    for mixer in student.mixers().values():
        assert isinstance(mixer, LayerMixer)
        parameters: list[nn.Parameter] = [p for p in mixer.parameters() if p.is_floating_point()]
        before = [parameter.requires_grad for parameter in parameters]
        mixer.requires_grad_(True)
        hidden = torch.ones(1, 3, mixer.shape.model_dim, device=parameters[0].device, dtype=student.dtype)
        with torch.enable_grad():
            total = mixer.matrix(hidden, layout=Layout()).sum()
            grads = torch.autograd.grad(total, parameters, allow_unused=True)
        for parameter, grad, required in zip(parameters, grads, before, strict=True):
            parameter.requires_grad_(required)
            if grad is not None:
                moving.append(names[id(parameter)])
    return moving
