"""Who watches a run: objects of the caller with `on_step`, `on_evaluate` or `on_stage_end`, progress and tracker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from linearize.errors import InputError
from linearize.training.progress import Progress
from linearize.training.tracking import Tracker

if TYPE_CHECKING:
    from linearize.training.loop import StageResult

METHODS = ("on_step", "on_evaluate", "on_stage_end")


@dataclass(frozen=True, kw_only=True)
class Step:
    """`step` of `steps` optimiser steps of a stage are done. `loss`: of the last step's batch, nats per token as a rule
    (None: no token of it counted). `numbers`: what is logged of it: `loss`, `lr`, gradient norm, further sums."""

    stage: str
    step: int
    steps: int
    loss: float | None
    tokens_per_second: float
    seconds_left: float
    numbers: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The held-out loss of a stage after `step` of `steps` steps, and the best so far; at 0 that of its start."""

    stage: str
    step: int
    steps: int
    loss: float
    best: float


class StopTraining(Exception):  # noqa: N818 (no error, as StopIteration)
    """A callback asked to stop; what was trained is in the run's folder, from which the same call continues."""


def check_callbacks(callbacks: Sequence[object]) -> None:
    """Refuse an object that would never be called. Raises InputError."""
    for callback in callbacks:
        if not any(callable(getattr(callback, method, None)) for method in METHODS):
            raise InputError(f"callback {callback!r} has no method {', '.join(METHODS[:2])} or {METHODS[2]}: add one")


def call_all(callbacks: Sequence[object], method: str, event: object) -> bool:
    """Call this method of all that have it; whether one returned True."""
    answers: list[Any] = [function(event) for each in callbacks if callable(function := getattr(each, method, None))]
    return any(answer is True for answer in answers)


class Watchers:
    """Progress, tracker and callbacks of a stage, which its first process alone calls (`leads`)."""

    def __init__(
        self,
        stage: str,
        steps: int,
        progress: Progress | None,
        tracker: Tracker | None,
        callbacks: Sequence[object],
        *,
        leads: bool = True,
    ) -> None:
        self.stage, self.steps, self.callbacks, self.leads = stage, steps, callbacks, leads
        self.progress, self.tracker = (progress, tracker) if leads else (None, None)

    def begin(self, step: int) -> None:
        """The stage starts, or resumes after `step` steps."""
        if self.progress:
            self.progress.begin(self.stage, step, self.steps)
        if self.tracker:
            self.tracker.begin(self.stage, step or None)

    def step(self, step: int, numbers: Mapping[str, float], *, tokens_per_second: float, seconds_left: float) -> bool:
        """A step is done; `numbers` is empty where no token of it counted. Whether a callback asks to stop."""
        loss = numbers.get("loss")
        if self.tracker and numbers:
            self.tracker.log(step, numbers)
        if self.progress:
            self.progress.step(step, loss=loss, tokens_per_second=tokens_per_second, seconds_left=seconds_left)
        info = Step(
            stage=self.stage, step=step, steps=self.steps, loss=loss, tokens_per_second=tokens_per_second,
            seconds_left=seconds_left, numbers=numbers,
        )  # fmt: skip
        return self._call("on_step", info)

    def evaluated(self, step: int, loss: float, best: float) -> bool:
        """The held-out loss was measured. Whether a callback asks to stop."""
        if self.tracker:
            self.tracker.log(step, {"heldout_loss": loss})
        if self.progress:
            self.progress.heldout(step, loss, best)
        return self._call(
            "on_evaluate", Evaluation(stage=self.stage, step=step, steps=self.steps, loss=loss, best=best)
        )

    def ended(self, result: StageResult) -> bool:
        """The stage is complete. Whether a callback asks to stop."""
        return self._call("on_stage_end", result)

    def close(self) -> None:
        """The stage is over, complete or not."""
        if self.progress:
            self.progress.end()
        if self.tracker:
            self.tracker.end()

    def _call(self, method: str, event: object) -> bool:
        return self.leads and call_all(self.callbacks, method, event)
