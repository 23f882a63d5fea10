"""Low-rank linearizing: with the mixers in place, LoRA repairs what is left (LoLCATs, 2410.10254, section 3.2).

The loss is next-token cross-entropy (published) or KL to the teacher on the same text.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.io.student_folder import KeptAdapters
from linearize.training.config import Batch, LossSum, ParameterGroup, StageConfig, StageRun
from linearize.training.stages.chunked_logits import Readout
from linearize.training.stages.lora import add_adapters
from linearize.training.stages.losses import distillation_loss
from linearize.training.student_run import LogitsRun


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


class LowRank(LogitsRun):
    """The running stage."""

    def __init__(self, config: LowRankConfig, student: LinearizedForCausalLM, teacher: Any) -> None:
        self.config = config
        self.student_readout = Readout(student)
        self.teacher_readout = Readout(teacher) if config.loss == "kl" else None
        self.adapters = add_adapters(
            student, rank=config.rank, alpha=config.alpha, dropout=config.dropout, targets=config.targets
        )
        groups = [ParameterGroup(self.adapters.parameters())]
        if config.train_mixers and (mixers := student.mixer_parameters()):
            groups.append(ParameterGroup(mixers, config.mixer_lr_scale))
        super().__init__(student, *groups)
        self._train_adapters(True)

    def loss(self, batch: Batch) -> LossSum:
        """Next-token loss or KL, summed over the tokens that count."""
        kl = float(self.config.loss == "kl")
        return distillation_loss(self.student_readout, self.teacher_readout, batch, kl=kl, ce=1.0 - kl)

    def heldout_loss(self, batch: Batch) -> LossSum:
        """Next-token loss of the student, adapters without dropout."""
        self._train_adapters(False)
        result = distillation_loss(self.student_readout, None, batch, kl=0.0, ce=1.0)
        self._train_adapters(True)
        return result

    def finish(self) -> None:
        """Merge the adapters; those to be kept beside the weights are remembered for `save_student`."""
        state = self.adapters.state()
        before = self.adapters.remove(keep=not self.config.merge)
        if not self.config.merge:
            self.student.kept_adapters = KeptAdapters(self.adapters.config, state, before)
        super().finish()

    def _train_adapters(self, wanted: bool) -> None:
        """Whether their dropout is on."""
        for layer in self.adapters.layers.values():
            layer.train(wanted)
