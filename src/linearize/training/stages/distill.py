"""Distillation: the student learns the teacher's distribution of the next token (The Mamba in the Llama, 2408.15237,
section 3; first only what is new or all but the MLPs, then everything).

The teacher may be another, larger model over the same vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from transformers import PreTrainedModel

from linearize.errors import InputError
from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.io.adapters import kept_adapters
from linearize.modeling.io.integrity import model_fingerprint
from linearize.ops.window_linear import Branch
from linearize.training.config import Batch, LossSum, ParameterGroup, StageConfig, StageRun
from linearize.training.stages.chunked_logits import SplitModel
from linearize.training.stages.external_teacher import check_vocabulary, load_other_teacher
from linearize.training.stages.losses import Divergence, distillation_loss
from linearize.training.stages.window_dropout import (
    WindowDropout,
    check_window_dropout,
    draw_branches,
    two_branch_layers,
)
from linearize.training.student_run import LogitsRun, mlp_parameters, unshare


class DistillConfig(StageConfig):
    """Settings of the stage; the weights are the published ones.

    `kl`, `ce`: weights of the divergence and of the next token's cross-entropy, both per token. `divergence`:
    `forward` KL(teacher||student), `reverse`, or `jsd`. `temperature`: of the divergence's softmaxes, its result times
    the temperature's square. `train`: `mixers` (what the plan added), `no_mlp` (all but the MLPs; embeddings too),
    `all`. `old_lr_scale`: the teacher's parameters learn at this times `lr`, the mixers' at `lr`. `teacher`: folder or
    Hub name of another teacher (None: the one that was converted). `window_dropout`: see `stages/window_dropout.py`.
    """

    places: ClassVar[tuple[str, ...]] = ("teacher",)

    name: Literal["distill"] = "distill"
    kl: float = Field(0.1, ge=0)
    ce: float = Field(1.0, ge=0)
    divergence: Divergence = "forward"
    temperature: float = Field(1.0, gt=0)
    train: Literal["mixers", "no_mlp", "all"] = "mixers"
    old_lr_scale: float = Field(1.0, gt=0)
    teacher: str | None = Field(None, min_length=1)
    window_dropout: WindowDropout = ()

    @model_validator(mode="after")
    def _some_loss(self) -> DistillConfig:
        if self.kl == 0 and self.ce == 0:
            raise ValueError("kl and ce are both 0: give one of them a weight")
        return self

    @property
    def changes_teacher_weights(self) -> bool:
        """Unless only mixers train."""
        return self.train != "mixers"

    def check(self, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> None:
        """Raise for what cannot work, without loading another teacher's weights.

        Raises:
            InputError: another teacher with another vocabulary, no mixer with parameters where only mixers train, or
                adapters kept next to weights that this stage would change.
        """
        if self.train == "mixers" and not student.mixer_parameters():
            raise InputError("distill has nothing to train: no mixer of the plan has parameters (set train to no_mlp)")
        check_window_dropout(self.window_dropout, student)
        if kept_adapters(student) is not None:
            raise InputError("distill changes weights that unmerged adapters belong to: set merge of lowrank to true")
        if self.teacher is not None and self.kl:
            check_vocabulary(self.teacher, student)

    def build(self, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> StageRun:
        """The stage over a student and the teacher that it was made from."""
        self.check(student, teacher)
        return Distill(self, student, teacher)


class Distill(LogitsRun):
    """The running stage."""

    def __init__(self, config: DistillConfig, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> None:
        super().__init__(student, *_groups(config, student, teacher))
        self.config, self.two_branch_layers = config, two_branch_layers(student)
        self.student_split = SplitModel(student)
        self.teacher_split: SplitModel | None = None
        if config.kl:
            other = teacher if config.teacher is None else load_other_teacher(config.teacher, student)
            self.teacher_split = SplitModel(other)

    def identity(self) -> dict[str, str]:
        """A fingerprint of another teacher's weights."""
        if self.config.teacher is None or self.teacher_split is None:
            return {}
        return {"other_teacher": model_fingerprint(self.teacher_split.model)}

    def loss(self, batch: Batch) -> LossSum:
        """Weighted divergence and cross-entropy, summed over the tokens whose next token counts."""
        return self._loss(batch, draw_branches(self.config.window_dropout, self.two_branch_layers, self.progress))

    def heldout_loss(self, batch: Batch) -> LossSum:
        """The same of the whole student."""
        return self._loss(batch, {})

    def _loss(self, batch: Batch, branch: Mapping[int, Branch]) -> LossSum:
        config = self.config
        return distillation_loss(
            self.student_split,
            self.teacher_split,
            batch,
            kl=config.kl,
            ce=config.ce,
            kind=config.divergence,
            temperature=config.temperature,
            branch=branch,
        )

    def finish(self) -> None:
        """Release the other teacher too."""
        super().finish()
        self.teacher_split = None


def _groups(config: DistillConfig, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> list[ParameterGroup]:
    """What trains, in memory that the teacher has no part in."""
    new = set(student.mixer_parameters())
    old: set[str] = set()
    if config.train != "mixers":
        floating = {name for name, p in student.named_parameters() if p.is_floating_point()}
        old = floating - new - (mlp_parameters(student) if config.train == "no_mlp" else set())
    parameters = unshare(student, teacher, sorted(new | old))
    chosen = ((new, 1.0), (old, config.old_lr_scale))
    return [ParameterGroup({n: parameters[n] for n in sorted(names)}, scale) for names, scale in chosen if names]
