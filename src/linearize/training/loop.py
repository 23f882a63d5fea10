"""The one loop that runs every stage: step, evaluate, keep the best weights, survive a kill."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from linearize.errors import InputError
from linearize.phases import phase
from linearize.training.callbacks import StopTraining, Watchers
from linearize.training.checkpoint import Checkpoint
from linearize.training.config import Batch, Plateau, StageConfig, StageRun, as_steps, count_steps, lr_factor
from linearize.training.progress import Progress
from linearize.training.saved import load_stage, save_stage
from linearize.training.step import Stepper, check_finite
from linearize.training.tracking import Tracker

History = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """The result of a stage. Histories are `(steps done, loss)`; `best_step` 0 is the starting weights.

    `losses` has the mean loss of each step's batch before the step, without steps in which no token counted; `heldout`
    is empty if nothing was held out. `seconds` adds up over interruptions, without what a kill threw away. `metrics`
    has further histories by name (`rewards/margins`), where a stage's loss comes with more sums.
    """

    name: str
    steps: int
    tokens: int
    seconds: float
    trainable_parameters: int
    losses: History
    heldout: History
    best_step: int
    stopped_early: bool
    metrics: Mapping[str, History] = field(default_factory=dict)

    @classmethod
    def skipped(cls, name: str) -> StageResult:
        """The result of a stage that was skipped."""
        return cls(
            name=name, steps=0, tokens=0, seconds=0.0, trainable_parameters=0, losses=(), heldout=(), best_step=0,
            stopped_early=False,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The training rows: optimiser steps, and the tokens in the first so many of them, over all ranks."""

    steps: int
    tokens: Callable[[int], int]


@dataclass(kw_only=True)
class _State:
    """The progress of a stage apart from its tensors; JSON in the checkpoint."""

    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    heldout: list[tuple[int, float]] = field(default_factory=list)
    metrics: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    best_step: int = 0
    best_loss: float | None = None
    bad: int = 0  # evaluations since the best
    plateau: Plateau = field(default_factory=Plateau)
    done: bool = False
    seconds: float = 0.0


def run_stage(
    run: StageRun,
    config: StageConfig,
    batches: Callable[[int], Iterator[Batch]],
    heldout: Sequence[Batch],
    *,
    length: int,
    rows: Rows | None = None,
    checkpoint_dir: Path | None = None,
    identity: Mapping[str, object] | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress | None = None,
    tracker: Tracker | None = None,
    callbacks: Sequence[object] = (),
    name: str | None = None,
    alone: bool = False,
) -> StageResult:
    """Train the parameters that `run` names, restore the best weights, and call `run.finish()`.

    Continues from the checkpoint in `checkpoint_dir` if there is one; on one process in fp32 the weights and the
    history are then bit-equal to those of an unbroken run. A stage that had ended is not run again. Under
    torch.distributed every rank calls this with its own share of each batch. torch's global generator is seeded from
    `(seed, step)` and put back at the end. Denormals stay flushed to zero in this process afterwards: feature maps make
    many, and on a CPU they cost a factor of 3.

    Args:
        batches: `batches(step)` yields this rank's rows of steps `step`, `step + 1`, ... without end, always the same.
        heldout: batches never trained on; without any there is no early stopping and the last weights are kept.
        length: tokens per sequence; with `config.batch` and `config.tokens` it gives the number of steps.
        rows: how many steps there are, and the tokens in them, where rows are of unequal length.
        identity: what else this run depends on (data, student plan), as JSON; a checkpoint with another one is refused.
        checkpoint_seconds: a checkpoint is written at every evaluation and at least this often.
        callbacks: objects with `on_step(Step)`, `on_evaluate(Evaluation)` or `on_stage_end(StageResult)`; one that
            returns True stops the run. Under torch.distributed every rank has them, and the first calls them.
        name: of the stage in progress lines and logs, unique in its run; default `config.name`.
        alone: this process trains by itself, also under torch.distributed (a block of layers, say).

    Raises:
        InputError: the ranks cannot share the batch, the checkpoint belongs to another run, or nothing held out counts.
        RuntimeError: a loss or a gradient is not finite; nothing is kept as final.
        StopTraining: a callback asked to stop; a checkpoint was written.
    """
    torch.set_flush_denormal(True)
    rows = rows or Rows(steps=count_steps(config, length), tokens=lambda step: step * config.batch * length)
    loop = _Loop(run, config, heldout, rows=rows, name=name or config.name, alone=alone)
    leads, was_done = loop.stepper.rank == 0, True
    watchers = Watchers(loop.name, rows.steps, progress, tracker, callbacks, leads=leads)
    if config.tokens != 0:
        if checkpoint_dir is not None:
            loop.attach(checkpoint_dir, {"stage": config.settings(), "length": length, **(identity or {})})
        with torch.random.fork_rng(devices=[loop.device] if loop.device.type == "cuda" else []):
            was_done = loop.state.done
            loop.run(batches, checkpoint_seconds, watchers)
    run.finish()
    result = loop.result()
    if not was_done and watchers.callbacks and loop.agreed(watchers.ended(result)):
        raise StopTraining(f"at the end of {loop.name}")
    return result


class _Loop:
    """A running stage. The state after step k depends on nothing but the arguments and k."""

    def __init__(
        self,
        run: StageRun,
        config: StageConfig,
        heldout: Sequence[Batch],
        *,
        rows: Rows,
        name: str,
        alone: bool = False,
    ) -> None:
        self.config, self.rows, self.name = config, rows, name
        self.stepper = Stepper(run, config, alone=alone)
        self.device = self.stepper.device
        self.heldout = heldout or None
        self.steps = rows.steps
        self.interval = max(1, as_steps(config.evaluate_every, self.steps))
        self.state = _State()
        self.best: dict[str, Tensor] = {}
        self.folder: Path | None = None
        self.identity: dict[str, object] = {}
        if config.gradient_checkpointing:
            if not run.checkpoints_gradients:
                raise InputError(f"stage {name!r} cannot checkpoint gradients: set its gradient_checkpointing to false")
            run.enable_gradient_checkpointing()

    def attach(self, folder: Path, identity: Mapping[str, object]) -> None:
        """Continue from the checkpoint in this folder, if any, and save to it from now on."""
        self.folder, self.identity = folder, dict(identity)
        checkpoint = load_stage(folder, self.stepper.group, identity=self.identity, parameters=self.stepper.parameters)
        if checkpoint is not None:
            self._restore(checkpoint)
        step = self.state.step
        if self.stepper.ranks > 1:
            extremes = torch.tensor([step, -step], device=self.device)
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
            if extremes.sum() != 0:
                raise InputError(
                    f"the ranks see different checkpoints in {folder}: give a folder that all of them share"
                )

    def run(self, batches: Callable[[int], Iterator[Batch]], checkpoint_seconds: float, watchers: Watchers) -> None:
        """Run the rest of the stage, with the first rank's progress and tracker. Raises StopTraining."""
        if self.state.done:
            return
        try:
            watchers.begin(self.state.step)
            self._train(batches, checkpoint_seconds, watchers)
        finally:
            watchers.close()

    def result(self) -> StageResult:
        """The result so far."""
        state = self.state
        return StageResult(
            name=self.name,
            steps=state.step,
            tokens=self.rows.tokens(state.step),
            seconds=state.seconds,
            trainable_parameters=sum(value.numel() for value in self.stepper.parameters.values()),
            losses=tuple(state.losses),
            heldout=tuple(state.heldout),
            best_step=state.best_step if self.heldout is not None else state.step,
            stopped_early=self._stopped() and state.step < self.steps,
            metrics={name: tuple(history) for name, history in state.metrics.items()},
        )

    def _train(self, batches: Callable[[int], Iterator[Batch]], checkpoint_seconds: float, watchers: Watchers) -> None:
        """Run the remaining steps, then restore the best weights. Raises StopTraining, with a checkpoint written."""
        state, begun = self.state, time.monotonic()
        first, earlier, saved = state.step, state.seconds, begun
        stop = state.step == 0 and self._evaluate(watchers)
        if watchers.callbacks:
            stop = self.agreed(stop)
        stream = batches(state.step)
        while state.step < self.steps and not self._stopped() and not stop:
            numbers = self._step(next(stream))
            due = state.step % self.interval == 0 or state.step == self.steps
            stop = self._show(numbers, time.monotonic() - begun, first, watchers)
            if due:
                stop |= self._evaluate(watchers)
            if watchers.callbacks:
                stop = self.agreed(stop)
            now = time.monotonic()
            state.seconds = earlier + now - begun
            late = now - saved >= checkpoint_seconds
            if due or stop or (self.agreed(late) if self.stepper.sharded else late):
                self._save()
                saved = now
        if stop and state.step < self.steps:
            raise StopTraining(f"after step {state.step} of {self.name}")
        self._end()
        if stop:
            raise StopTraining(f"at the end of {self.name}")

    def _stopped(self) -> bool:
        """Whether the held-out loss has not improved for too long."""
        return self.config.patience is not None and self.state.bad >= self.config.patience

    def _step(self, batch: Batch) -> dict[str, float]:
        """Train on a batch; returns what is logged of it, nothing where no token counted."""
        state = self.state
        lr = self.config.lr * lr_factor(self.config, state.step, self.steps, state.plateau)
        self.stepper.run.progress = state.step / self.steps
        numbers = self.stepper.step(batch, number=state.step, lr=lr)
        state.step += 1
        if numbers is None:
            return {}
        state.losses.append((state.step, numbers.loss))
        for key, value in numbers.metrics.items():
            state.metrics.setdefault(key, []).append((state.step, value))
        return {**numbers.logged(), "lr": lr}

    def _evaluate(self, watchers: Watchers) -> bool:
        """Measure the held-out loss, keep the weights if they are the best so far, and update the plateau rule; returns
        whether a callback asks to stop."""
        if self.heldout is None:
            return False
        state = self.state
        with phase(f"{self.name}: measuring held-out text"):
            loss = self.stepper.heldout_loss(self.heldout)
        where = f"after step {state.step} of stage {self.config.name!r}"
        check_finite(loss, f"the held-out loss {where}", trained=state.step > 0)
        state.heldout.append((state.step, loss))
        state.plateau = state.plateau.after(loss, self.config)
        if state.best_loss is None or loss < state.best_loss:
            state.best_loss, state.best_step, state.bad = loss, state.step, 0
            if self.config.keep_best:
                self.best = {key: value.detach().clone() for key, value in self.stepper.parameters.items()}
        else:
            state.bad += 1
        return watchers.evaluated(state.step, loss, state.best_loss)

    def _show(self, numbers: Mapping[str, float], seconds: float, first: int, watchers: Watchers) -> bool:
        """Report the step, whether a callback asks to stop; `seconds` were spent on all steps since `first`."""
        step = self.state.step
        return watchers.step(
            step, numbers,
            tokens_per_second=(self.rows.tokens(step) - self.rows.tokens(first)) / max(seconds, 1e-9),
            seconds_left=seconds / (step - first) * (self.steps - step),
        )  # fmt: skip

    def _end(self) -> None:
        """Set the final weights, and save a checkpoint marked as done."""
        self.stepper.set_parameters(self.best)
        self.best = {}
        self.stepper.optimizer.state.clear()
        self.state.done = True
        self._save(last=True)

    def agreed(self, choice: bool) -> bool:
        """The choice of rank 0, whose clock counts, where all ranks must act together."""
        if self.stepper.ranks == 1:
            return choice
        decision = torch.tensor([choice], device=self.device, dtype=torch.uint8)
        dist.broadcast(decision, src=0)
        return bool(decision.item())

    def _save(self, *, last: bool = False) -> None:
        """Save everything that the next step depends on."""
        if self.folder is not None and (self.stepper.rank == 0 or self.stepper.sharded):
            tensors = self.stepper.tensors() | {f"best/{key}": value for key, value in self.best.items()}
            checkpoint = Checkpoint(tensors=tensors, scalars=asdict(self.state), identity=self.identity)
            save_stage(self.folder, checkpoint, sharded=bool(self.stepper.sharded), last=last)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """The inverse of `_save`."""
        scalars = dict(checkpoint.scalars)
        scalars |= {key: _history(scalars[key]) for key in ("losses", "heldout")}
        scalars["metrics"] = {key: _history(values) for key, values in scalars.get("metrics", {}).items()}
        self.state = _State(**scalars | {"plateau": Plateau(**scalars["plateau"])})
        self.stepper.restore(checkpoint.tensors)
        best = {key: value for key, value in checkpoint.tensors.items() if key.startswith("best/")}
        names = ((key.removeprefix("best/"), value) for key, value in best.items())
        self.best = {name: self.stepper.placed(name, value) for name, value in names}


def _history(values: Iterable[Sequence[Any]]) -> list[tuple[int, float]]:
    """Restore a value that went through JSON."""
    return [(step, value) for step, value in values]
