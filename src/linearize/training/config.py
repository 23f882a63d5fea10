"""What a stage of training is: its settings, its learning-rate schedule as pure functions of the step, and what the
loop asks of a running one. Free of heavy imports."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator

from linearize.numbers import Count

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter
    from transformers import PreTrainedModel

    from linearize.modeling import LinearizedForCausalLM

Batch: TypeAlias = "dict[str, Tensor]"
NOTHING: Mapping[str, float] = MappingProxyType({})
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# Relative improvement that ends a plateau: the default of torch's ReduceLROnPlateau, which LoLCATs trains with.
PLATEAU_THRESHOLD = 1e-4


class StageConfig(BaseModel):
    """Settings that every stage shares. Frozen; unknown keys are refused; the stage's own config derives from it.

    `by_layer`: whether the stage compares each layer with the attention that it replaced; its teacher has the student's
    layers then, also where the student is a draft with fewer than its target. `places`: the fields that name a file or
    a model.
    """

    by_layer: ClassVar[bool] = False
    places: ClassVar[tuple[str, ...]] = ()
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    tokens: Count = Field(description="training tokens; 0 skips the stage")
    lr: float = Field(gt=0, description="peak learning rate, times each group's lr_scale")
    batch: int = Field(8, ge=1, description="sequences per optimiser step, over all ranks")
    micro_batch: int | None = Field(None, ge=1, description="at most so many sequences per forward; None: all at once")
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    warmup: float = Field(0.0, ge=0, description="fraction of the steps if below 1, else steps")
    min_lr_ratio: Fraction = Field(0.0, description="the schedule never goes below this times lr")
    plateau_factor: float = Field(0.1, gt=0, lt=1, description="lr is multiplied by it at a plateau")
    plateau_patience: int = Field(10, ge=0, description="evaluations without improvement that a plateau may last")
    clip: float | None = Field(1.0, gt=0, description="largest gradient norm; None: no clipping")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    evaluate_every: int | float = Field(0.1, gt=0, description="fraction of the stage if below 1, else steps")
    patience: int | None = Field(None, ge=1, description="evaluations without improvement before stopping; None: never")
    keep_best: bool = Field(True, description="end with the best weights on held-out text, the starting ones included")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: forward under autocast, weights unchanged")
    gradient_checkpointing: bool = False
    seed: int = Field(0, ge=0)
    length: Annotated[Count, Field(ge=2)] | None = Field(None, description="tokens per sequence; None: data.length")
    at: Literal["each", "last"] = Field("each", description="steps of the plan's schedule that the stage runs at")

    @field_validator("warmup", "evaluate_every")
    @classmethod
    def _whole_steps(cls, value: float) -> float:
        if value >= 1 and value != int(value):
            raise ValueError(f"{value} is neither a fraction below 1 nor a whole number of steps")
        return value

    @property
    def changes_teacher_weights(self) -> bool:
        """Whether the stage trains weights of the teacher themselves, beyond LoRA and mixers."""
        return False

    def settings(self) -> dict[str, Any]:
        """What distinguishes this stage from others, as JSON. Paths are left out, since they have many spellings: their
        contents are part of the stage's `identity`, or of a digest of its data."""
        return self.model_dump(mode="json", exclude=set(self.places))

    def check(self, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> None:
        """Raise `InputError` for what cannot work with these models; called before any work, changes nothing."""

    def build(self, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> StageRun:
        """The stage over these models (`LinearizedForCausalLM` and the teacher's class), ready for the loop."""
        raise NotImplementedError(f"{type(self).__name__} has no build")


class BlockwiseConfig(StageConfig):
    """A stage that trains each layer by itself, so that blocks of `block` layers can train one after the other on
    saved hidden states of the teacher (2410.10254, section 3.3); None: all layers at once, nothing is saved."""

    block: int | Literal["auto"] | None = Field(None, description="layers a block; auto: as memory and disk allow")

    @field_validator("block")
    @classmethod
    def _at_least_one(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{value} given; allowed: 1 layer or more, or auto")
        return value


class LossSum(NamedTuple):
    """A loss before division: `sum / count` over any set of batches is their mean loss."""

    sum: Tensor  # scalar, with its graph
    count: Tensor | float  # type: ignore[assignment]  # hides tuple.count; what it is divided by, usually the tokens that count
    also: Mapping[str, float] = NOTHING  # further sums over the same count, for the log; the same names in every batch


class ParameterGroup(NamedTuple):
    """Parameters by name, and the factor of their learning rate."""

    parameters: dict[str, Parameter]
    lr_scale: float = 1.0


class StageRun:
    """A stage over a student and a teacher: the parameters that it trains, and its loss.

    Random numbers, if any, come from torch's global generator, which the loop seeds anew for every step.
    """

    checkpoints_gradients: ClassVar[bool] = False
    """Whether `enable_gradient_checkpointing` does anything; a config that asks for it is refused otherwise."""
    progress: float = 0.0
    """Share of the stage's steps that are done; the loop sets it before each step."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """The parameters that the stage trains; names unique over all groups, every parameter with `requires_grad`."""
        raise NotImplementedError

    def loss(self, batch: Batch) -> LossSum:
        """The training loss of one micro-batch (tensors [B, T] on the parameters' device)."""
        raise NotImplementedError

    def heldout_loss(self, batch: Batch) -> LossSum:
        """What early stopping watches, by default the training loss; the loop calls it without gradients."""
        return self.loss(batch)

    def calibrate(self, batch: Batch) -> None:
        """Measure scales that the loss needs; called once before the loop with the first training batch."""

    def enable_gradient_checkpointing(self) -> None:
        """Called once before the first step if the config asks for it."""

    def identity(self) -> dict[str, str]:
        """What checkpoints depend on besides the config and the student's start, as JSON."""
        return {}

    def finish(self) -> None:
        """Called once at the end, with the final weights in place (merge adapters, drop hooks)."""


def count_steps(config: StageConfig, length: int) -> int:
    """Optimiser steps that use at least `config.tokens` tokens in sequences of `length`; 0 skips the stage."""
    return math.ceil(config.tokens / (config.batch * length))


def as_steps(value: float, steps: int) -> int:
    """A setting that is a fraction of `steps` if below 1 (rounded, half up), else a number of steps."""
    return math.floor(value * steps + 0.5) if value < 1 else int(value)


@dataclass(frozen=True)
class Plateau:
    """Reduce on plateau: the scale so far, the best held-out loss, and evaluations since it improved."""

    scale: float = 1.0
    best: float | None = None
    bad: int = 0

    def after(self, loss: float, config: StageConfig) -> Plateau:
        """The rule after one more evaluation. Source: torch.optim.lr_scheduler.ReduceLROnPlateau, mode min, rel."""
        if self.best is None or loss < self.best * (1 - PLATEAU_THRESHOLD):
            return replace(self, best=loss, bad=0)
        if self.bad < config.plateau_patience:
            return replace(self, bad=self.bad + 1)
        return replace(self, scale=max(self.scale * config.plateau_factor, config.min_lr_ratio), bad=0)


def lr_factor(config: StageConfig, step: int, steps: int, plateau: Plateau) -> float:
    """What the peak learning rate is multiplied by in optimiser step `step` (from 0) of `steps`.

    Linear warm-up from `1 / warmup` to 1, then: constant, the plateau's scale, or half a cosine from 1 that would reach
    `min_lr_ratio` one step after the last.
    """
    warmup = as_steps(config.warmup, steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "plateau":
        return plateau.scale
    done = (step - warmup) / (steps - warmup)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))
