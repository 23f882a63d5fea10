"""In which order the layers of a plan are converted: fractions at a time, or one by one (2408.15237, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from linearize.errors import InputError
from linearize.training.config import StageConfig
from linearize.training.dataset_stage import DatasetStageConfig


class Progressive(BaseModel):
    """`{kind: progressive, replaced: [0.25, 0.5, ...]}`: fractions of all layers that are converted after each step."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["progressive"] = "progressive"
    replaced: tuple[float, ...] = Field((0.25, 0.5, 0.75, 0.875), min_length=1)

    @field_validator("replaced")
    @classmethod
    def _growing(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(after <= before for before, after in pairwise((0.0, *value))) or value[-1] > 1:
            raise ValueError(f"{list(value)} given; allowed: increasing fractions above 0 and up to 1")
        return value

    def steps(self, converted: Sequence[int], num_layers: int) -> list[list[int]]:
        """The layers converted after each step, each step's among the next one's; equal steps are one.

        The layers of a step are spread evenly over those of the next one.

        Raises:
            InputError: fractions that do not end with the layers of the plan.
        """
        counts = [num_layers - rounded((1 - fraction) * num_layers) for fraction in self.replaced]
        if counts[-1] != len(converted):
            raise InputError(
                f"plan.schedule.replaced ends with {self.replaced[-1]}, {counts[-1]} of {num_layers} layers, but "
                f"plan.layers converts {len(converted)}: end it with {len(converted) / num_layers:.4g} or change "
                "plan.layers"
            )
        steps = [sorted(converted)]
        for count in sorted({count for count in counts if 0 < count < len(converted)}, reverse=True):
            later = steps[0]
            steps.insert(0, [later[(2 * i + 1) * len(later) // (2 * count)] for i in range(count)])
        return steps


class Stepwise(BaseModel):
    """`{kind: stepwise, order: first_to_last | last_to_first}`: one layer at a time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["stepwise"] = "stepwise"
    order: Literal["first_to_last", "last_to_first"] = "first_to_last"

    def steps(self, converted: Sequence[int], num_layers: int) -> list[list[int]]:
        """The layers converted after each step, each step's among the next one's."""
        order = sorted(converted, reverse=self.order == "last_to_first")
        return [sorted(order[: count + 1]) for count in range(len(order))]


SCHEDULES: dict[str, type[BaseModel]] = {"progressive": Progressive, "stepwise": Stepwise}
ScheduleChoice = Annotated[Progressive | Stepwise, Field(discriminator="kind")]


def rounded(count: float) -> int:
    """A number of kept layers as a whole number, halves down: of 5 layers, a half keeps 2."""
    return max(0, math.ceil(count - 0.5 - 1e-9))


def share_of(stage: StageConfig, step: int, steps: int) -> tuple[StageConfig, tuple[int, int]]:
    """A stage as it runs at one step of a schedule, and its part of the rows: tokens and rows are shared out evenly."""
    if stage.at == "last" or steps == 1 or isinstance(stage, DatasetStageConfig):
        return stage, (0, 1)
    tokens = stage.tokens * (step + 1) // steps - stage.tokens * step // steps
    return stage.model_copy(update={"tokens": max(1, tokens)}), (step, steps)
