"""Low-rank linearizing: with the mixers in place, LoRA repairs what is left (LoLCATs, 2410.10254, section 3.2).

The loss is next-token cross-entropy (published) or KL to the teacher on the same text.

Letters: B batch, T tokens, V vocabulary, N tokens that count.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.save import KeptAdapters
from linearize.training.config import Batch, LossSum, ParameterGroup, StageConfig, StageRun
from linearize.training.stages.lora import add_adapters

SLICE_TOKENS = 2048


class LowRankConfig(StageConfig):
    """Settings of the stage; the LoRA defaults are the published ones.

    `targets`: projections (q, k, v, o, `all`, or names of the family's own). `loss`: `ce` (next token) or `kl`
    (KL(teacher||student)).
    `train_mixers`: whether the mixers go on learning, at `mixer_lr_scale` times the learning rate. `merge`: adapters
    go into the saved
    weights; otherwise they are kept beside them (`adapter/`, peft's format) and applied on loading.
    """

    name: Literal["lowrank"] = "lowrank"
    rank: int = Field(8, ge=1)
    alpha: int = Field(16, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(("q", "k", "v", "o"), min_length=1)
    loss: Literal["ce", "kl"] = "ce"
    train_mixers: bool = False
    mixer_lr_scale: float = Field(1.0, gt=0)
    merge: bool = True

    def build(self, student: Any, teacher: Any) -> StageRun:
        """The stage over a student and its teacher."""
        return LowRank(self, student, teacher)


class LowRank:
    """The running stage."""

    def __init__(self, config: LowRankConfig, student: LinearizedForCausalLM, teacher: Any) -> None:
        self.config, self.student, self.teacher = config, student.eval(), teacher
        student.requires_grad_(False)
        self.adapters = add_adapters(
            student, rank=config.rank, alpha=config.alpha, dropout=config.dropout, targets=config.targets
        )
        for layer in self.adapters.layers.values():
            layer.train()
        self.groups = [ParameterGroup(self.adapters.parameters())]
        if config.train_mixers and (mixers := student.mixer_parameters()):
            self.groups.append(ParameterGroup(mixers, config.mixer_lr_scale))
        for group in self.groups:
            for parameter in group.parameters.values():
                parameter.requires_grad_(True)

    def calibrate(self, batch: Batch) -> None:
        """Nothing to measure."""

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass."""
        self.student.train()
        self._set_checkpointing(True)

    def parameter_groups(self) -> list[ParameterGroup]:
        """The adapters, and the mixers if they train too."""
        return self.groups

    def loss(self, batch: Batch) -> LossSum:
        """Next-token loss or KL, summed over the tokens that count."""
        logits_BTV = self._logits(self.student, batch)
        if self.config.loss == "ce":
            return next_token_loss(logits_BTV, batch["labels"])
        with torch.no_grad():
            teacher_BTV = self._logits(self.teacher, batch)
        return kl_divergence(teacher_BTV, logits_BTV, batch["labels"])

    def heldout_loss(self, batch: Batch) -> LossSum:
        """Next-token loss of the student, adapters without dropout."""
        for layer in self.adapters.layers.values():
            layer.eval()
        result = next_token_loss(self._logits(self.student, batch), batch["labels"])
        for layer in self.adapters.layers.values():
            layer.train()
        return result

    def finish(self) -> None:
        """Merge the adapters; those to be kept beside the weights are remembered for `save_student`."""
        state = self.adapters.state()
        before = self.adapters.remove()
        if not self.config.merge:
            self.student.kept_adapters = KeptAdapters(self.adapters.config, state, before)
        if self.config.gradient_checkpointing:
            self._set_checkpointing(False)
        self.student.eval().requires_grad_(False)

    def _set_checkpointing(self, wanted: bool) -> None:
        """Under the name that transformers has for it: `gradient_` until 5.22, `activation_` since."""
        lm: Any = self.student.lm
        kind = "activation" if hasattr(lm, "activation_checkpointing_enable") else "gradient"
        if wanted:
            getattr(lm, f"{kind}_checkpointing_enable")({"use_reentrant": False})
        else:
            getattr(lm, f"{kind}_checkpointing_disable")()

    @staticmethod
    def _logits(model: Any, batch: Batch) -> Tensor:
        logits: Tensor = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        return logits


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> LossSum:
    """Cross-entropy of the next token, nats, summed over labels that are not -100."""
    wanted = labels_BT[:, 1:]
    total = F.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(), wanted.flatten(), ignore_index=-100, reduction="sum"
    )
    return LossSum(total, float((wanted != -100).sum()))


def kl_divergence(teacher_BTV: Tensor, student_BTV: Tensor, labels_BT: Tensor) -> LossSum:
    """KL(teacher||student), nats, summed over the tokens whose next token counts; softmaxes exist for a slice of
    tokens at a time."""
    live = labels_BT[:, 1:] != -100
    teacher_NV, student_NV = teacher_BTV[:, :-1][live], student_BTV[:, :-1][live]
    total = student_BTV.new_zeros((), dtype=torch.float32)
    for p, q in zip(teacher_NV.split(SLICE_TOKENS), student_NV.split(SLICE_TOKENS), strict=True):
        total = total + F.kl_div(q.float().log_softmax(-1), p.float().log_softmax(-1), log_target=True, reduction="sum")
    return LossSum(total, float(live.sum()))
