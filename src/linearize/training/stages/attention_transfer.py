"""Attention transfer: each mixer learns the outputs of the softmax attention that it replaces (LoLCATs,
2410.10254, section 3.1).

The hidden states passed on are always the teacher's, so no error accumulates from layer to layer, and only the
mixers' new parameters
train. One forward pass through the student's tree computes both attentions from the same q, k, v.

Letters: B batch, H query heads, G key/value heads, T tokens, V value dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from linearize.errors import InputError
from linearize.mixers import LayerMixer, Mixer
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.parallel import is_sharded
from linearize.ops.layout import Layout
from linearize.ops.softmax import softmax_attention
from linearize.training.config import Batch, BlockwiseConfig, LossSum, ParameterGroup, StageRun
from linearize.training.stages.chunked_logits import without_head
from linearize.training.stages.losses import counted
from linearize.training.student_run import StudentRun


class AttentionTransferConfig(BlockwiseConfig):
    """Settings of the stage.

    `mse`, `weights_ce`: weights of the squared error of attention outputs and of the cross-entropy between rows of
    attention weights
    (which needs T x T matrices; the 405B recipe is 1000 and 1). `normalize`: `power` divides a layer's squared error
    by the mean square
    of its teacher output (measured once, before the stage), so that late layers with large outputs do not drown the
    others; `none` is raw.
    """

    by_layer: ClassVar[bool] = True
    name: Literal["attention_transfer"] = "attention_transfer"
    mse: float = Field(1.0, ge=0)
    weights_ce: float = Field(0.0, ge=0)
    normalize: Literal["power", "none"] = "power"

    @model_validator(mode="after")
    def _some_loss(self) -> AttentionTransferConfig:
        if self.mse == 0 and self.weights_ce == 0:
            raise ValueError("mse and weights_ce are both 0: give one of them a weight")
        return self

    def build(self, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> StageRun:
        """The stage over a student; the teacher's attention is computed inside the student's own tree."""
        return AttentionTransfer(self, student)


class AttentionTransfer(StudentRun):
    """The running stage."""

    def __init__(self, config: AttentionTransferConfig, student: LinearizedForCausalLM) -> None:
        self.config = config
        self.layers = sorted(_between_projections(student))
        self.power = {layer: 1.0 for layer in self.layers}
        if not (parameters := student.mixer_parameters()):
            raise InputError(
                "attention_transfer has nothing to train: no mixer of the plan has parameters (set its tokens to 0)"
            )
        super().__init__(student, ParameterGroup(parameters))

    def calibrate(self, batch: Batch) -> None:
        """Measure each layer's teacher output power on a batch of training text."""
        if self.config.normalize == "power":
            outputs = self._pass(batch, keep=True)
            self.power = {layer: float(outputs[layer][1].square().mean()) for layer in self.layers}

    def loss(self, batch: Batch) -> LossSum:
        """Sum over layers of the transfer loss, as a sum over tokens that are not padding.

        Gradients of a layer are computed with its loss, so that the graph of one layer alone is in memory.
        """
        parameters = [p for p in self.student.mixer_parameters().values() if p.requires_grad]
        at_once = torch.is_grad_enabled() and not any(map(is_sharded, parameters))
        gradients = _Gradients(parameters) if at_once else None
        terms = self._pass(batch, gradients=gradients)
        total = sum((term for term, _ in terms.values()), torch.zeros((), device=batch["input_ids"].device))
        if gradients is not None:
            total = _WithGradients.apply(total, gradients.sums(), *parameters)
        return LossSum(total, float(counted(batch["labels"]).sum()))

    def layer_errors(self, batch: Batch) -> list[float]:
        """Per layer: squared error of the attention outputs over the teacher's power (0 exact, 1 as bad as nothing)."""
        live = counted(batch["labels"])[:, None, :, None]
        with torch.no_grad():
            outputs = self._pass(batch, keep=True)
        return [
            float(((y - target) * live).square().sum() / (target * live).square().sum())
            for y, target in (outputs[layer] for layer in self.layers)
        ]

    def _pass(
        self, batch: Batch, keep: bool = False, gradients: _Gradients | None = None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """One pass of the teacher's hidden states; per layer (loss, -), or with `keep` the two outputs."""
        by_layer: dict[int, tuple[Tensor, Tensor]] = {}
        live = counted(batch["labels"])
        grad = torch.is_grad_enabled()

        def attention_override(
            module: nn.Module,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            *,
            layout: Layout,
            sliding_window: int | None,
            **scores: Any,
        ) -> Tensor:
            target = softmax_attention(q, k, v, layout=layout, sliding_window=sliding_window, **scores)
            layer: Any = module.layer_idx
            with torch.set_grad_enabled(grad):
                y, _ = module.mixer(q, k, v, layout=layout, need_state=False, **scores)  # type: ignore[operator]
                if keep:
                    by_layer[layer] = (y, target)
                    return target
                loss = self._layer_loss(module, (q, k, v), y, target, live, layout, sliding_window, scores)
                by_layer[layer] = (loss if gradients is None else gradients.add(loss), target)
            return target

        with torch.no_grad(), without_head(self.student.lm):
            self.student(
                input_ids=batch["input_ids"],
                position_ids=batch["position_ids"],
                use_cache=False,
                logits_to_keep=1,
                attention_override=attention_override,
            )
        return by_layer

    def _layer_loss(
        self,
        module: Any,
        qkv: tuple[Tensor, Tensor, Tensor],
        y: Tensor,
        target: Tensor,
        live_BT: Tensor,
        layout: Layout,
        sliding_window: int | None,
        scores: dict[str, Any],
    ) -> Tensor:
        config, total = self.config, y.new_zeros((), dtype=torch.float32)
        if config.mse:
            error = (y.float() - target.float()).square().mean((1, 3))
            total = total + config.mse * (error * live_BT).sum() / self.power[module.layer_idx]
        if config.weights_ce:
            rows_BT = weights_cross_entropy(module.mixer, qkv, layout, scores, sliding_window=sliding_window)
            total = total + config.weights_ce * (rows_BT * live_BT).sum()
        return total


class _Gradients:
    """Gradients of parameters, added up loss by loss."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.by_parameter: dict[int, Tensor] = {}

    def add(self, loss: Tensor) -> Tensor:
        """Add the gradients of a loss; returns it without its graph."""
        if not loss.requires_grad:
            return loss
        with torch.autocast(loss.device.type, enabled=False):
            new = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for number, gradient in enumerate(new):
            if gradient is not None:
                before = self.by_parameter.get(number)
                self.by_parameter[number] = gradient if before is None else before + gradient
        return loss.detach()

    def sums(self) -> list[Tensor | None]:
        """The sum for each parameter; None where no loss depends on it."""
        return [self.by_parameter.get(number) for number in range(len(self.parameters))]


class _WithGradients(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], *parameters: nn.Parameter) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if grad is None else grad * factor.to(grad.dtype) for grad in ctx.gradients)


def _between_projections(student: LinearizedForCausalLM) -> dict[int, Mixer]:
    """The student's mixers, which must all take q, k, v."""
    mixers = student.mixers()
    if others := sorted({mixer.config.name for mixer in mixers.values() if isinstance(mixer, LayerMixer)}):  # type: ignore[attr-defined]
        raise InputError(
            f"attention_transfer needs mixers between the projections, this plan has {', '.join(others)}: "
            "use the stage hidden_alignment"
        )
    return mixers


def weights_cross_entropy(
    mixer: Any,
    qkv: tuple[Tensor, Tensor, Tensor],
    layout: Layout,
    scores: dict[str, Any],
    *,
    sliding_window: int | None = None,
) -> Tensor:
    """-sum_i a_ni log b_ni for teacher weights a and student weights b, mean over heads, `[B, T]` (Hedgehog,
    2402.04347, equation 9).

    Weights are attention outputs for one-hot values: row i of v is the i-th unit vector. `sliding_window`: of the
    teacher.
    """
    q, k, _ = qkv
    eye = torch.eye(q.shape[2], dtype=q.dtype, device=q.device).expand(k.shape[0], k.shape[1], -1, -1)
    with torch.no_grad():
        teacher = softmax_attention(q, k, eye, layout=layout, sliding_window=sliding_window, **scores)
    student, _ = mixer(q, k, eye, layout=layout, need_state=False, **scores)
    return -(teacher * student.clamp(min=1e-8).log()).sum(-1).mean(1)
