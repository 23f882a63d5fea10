"""Stages on rows of their own (`sft`, `dpo`): their settings, and what they are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from linearize.errors import InputError
from linearize.numbers import Count
from linearize.training.config import StageConfig, StageRun

if TYPE_CHECKING:
    from linearize.training.loop import StageResult
    from linearize.training.progress import Progress
    from linearize.training.tracking import Tracker

DEFAULT_LENGTH = 1024
_NO_HELDOUT = {"schedule": "plateau", "keep_best": True}


class OwnLoopConfig(StageConfig):
    """Settings of a stage that reads its own data and is run as a whole, without held-out text of its own.

    The length of the stage is the shortest of `epochs`, `max_steps` and `tokens` as far as they are given; `tokens: 0`
    skips it. `batch` counts rows of the data (a preference pair is one row); the last step of an epoch goes on with the
    next. `evaluate_every` says how often a checkpoint is written (besides once a minute). What needs a held-out loss
    (`schedule: plateau`, `patience`, `keep_best`) is refused.
    """

    places: ClassVar[tuple[str, ...]] = ("data",)

    tokens: Count | None = Field(None, ge=0, description="training tokens, padding not counted; 0 skips the stage")  # type: ignore[assignment]  # here other settings may decide
    data: str = Field(min_length=1, description="rows to train on: a file or a Hub dataset")
    epochs: float = Field(1.0, gt=0, description="times through the data")
    max_steps: Count | None = Field(None, ge=1, description="optimiser steps at most; None: as epochs and tokens say")
    length: Count | None = Field(
        None, ge=2, description="longest row in tokens, its end is cut; None: 1024, or the context"
    )
    train: Literal["mixers", "all"] = Field("all", description="the mixers alone, or every parameter")
    chat_template: str | None = Field(
        None, description="plain, a Jinja file, or a Jinja text; None: that of the tokenizer"
    )
    keep_best: bool = False

    @model_validator(mode="after")
    def _refuse_what_needs_heldout(self) -> Self:
        wrong = [f"{key}={value}" for key, value in _NO_HELDOUT.items() if getattr(self, key) == value]
        wrong += [] if self.patience is None else [f"patience={self.patience}"]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} needs a held-out loss, which stage {self.name!r} does not measure")
        return self

    def build(self, student: Any, teacher: Any) -> StageRun:
        """Not this one: a stage of this kind is run whole, by `run`."""
        raise InputError(f"stage {self.name!r} reads rows of its own: call run(job), not build")

    def check_data(self, tokenizer: Any, context: int | None = None) -> None:
        """Read the data and refuse early, and in one line, what the stage could not use; changes nothing.

        Args:
            context: the teacher's longest context in tokens, None if it has no limit.
        Raises:
            InputError: a missing package, data that cannot be read, a row that does not fit, no chat template.
        """
        raise NotImplementedError(f"{type(self).__name__} has no check_data")

    def run(self, job: StageJob) -> StageResult:
        """Train the student in place; continue where a killed run of the same job stopped; do nothing twice."""
        raise NotImplementedError(f"{type(self).__name__} has no run")


@dataclass(frozen=True, kw_only=True, eq=False)
class StageJob:
    """What a stage on rows of its own works on.

    `student`: trained in place. `teacher`: shares tensors with the student, and does not change. `folder`: of this
    stage alone; holds checkpoints and, at the end, the final weights. `identity`: what the start of this stage depends
    on, as JSON; a folder with another one is refused. `seed`: of the run; the stage's own is added to it. `name`: in
    progress and logs, None: the stage's. With a `chat_template` in the stage's settings, `tokenizer` gets that one.
    """

    student: Any
    teacher: Any
    tokenizer: Any
    folder: Path
    identity: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    progress: Progress | None = None
    tracker: Tracker | None = None
    name: str | None = None

    @property
    def context(self) -> int | None:
        """The teacher's longest context in tokens; None: no limit is known."""
        config = self.teacher.config.get_text_config()
        found: int | None = getattr(config, "max_position_embeddings", None)
        return found
