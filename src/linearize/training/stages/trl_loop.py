"""A stage whose loss is trl's: its own copies of what trains, the project's loop around it, and no trace left on the
model."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from linearize.errors import InputError
from linearize.modeling.io.adapters import kept_adapters
from linearize.modeling.parallel import gather_while_running, is_unit, plain_copy
from linearize.training.config import Batch, LossSum, ParameterGroup
from linearize.training.data.chat import template_text
from linearize.training.dataset_stage import DEFAULT_LENGTH, OwnLoopConfig, StageJob
from linearize.training.distributed import current
from linearize.training.loop import Rows, StageResult, run_stage
from linearize.training.progress import LineProgress
from linearize.training.stages.trainable import recompute_blocks, unshare
from linearize.training.stages.trl_scores import scoring
from linearize.training.stages.trl_trainer import metrics_of, stage_trainer


@dataclass(frozen=True, kw_only=True)
class TrlTask:
    """What differs between the stages.

    `rows`: one row of tokens per example. `lengths`: its tokens, padding not counted. `digest`: of the rows. `collate`:
    rows to a batch, padded on the right, whose tensors have one entry per row. `inputs`: such a batch as trl takes it.
    `count`: what the loss of such a batch is the mean over, and each of its metrics. `trainer`, `arguments`,
    `settings`: names of trl's classes, and what the second gets besides the common. `metrics`: names in trl's log that
    the result keeps. `needs_reference`: whether a frozen copy of the student as the stage finds it goes with it.
    """

    rows: Sequence[Mapping[str, Any]]
    lengths: Sequence[int]
    digest: str
    collate: Callable[[Sequence[Any]], Batch]
    inputs: Callable[[Batch], Batch]
    count: Callable[[Batch], int]
    trainer: str
    arguments: str
    settings: Mapping[str, Any]
    metrics: tuple[str, ...]
    needs_reference: bool


class TrlRun:
    """A stage over a student and a loss of trl's, ready for the loop. No text is held out."""

    def __init__(self, task: TrlTask, student: Any, trained: Mapping[str, nn.Parameter], trainer: Any) -> None:
        self.task, self.student, self.trained, self.trainer = task, student, trained, trainer

    def parameter_groups(self) -> list[ParameterGroup]:
        """All that trains."""
        return [ParameterGroup(dict(self.trained))]

    def calibrate(self, batch: Batch) -> None:
        """Nothing to measure."""

    def loss(self, batch: Batch) -> LossSum:
        """trl's mean over the tokens or pairs of a micro-batch, and its metrics, as sums."""
        rows = cropped(batch)
        count = self.task.count(rows)
        mean = self.trainer.compute_loss(self.student, self.task.inputs(rows))
        found = metrics_of(self.trainer)
        return LossSum(mean * count, count, {name: found[name] * count for name in self.task.metrics})

    heldout_loss = loss

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in the backward pass."""
        recompute_blocks(self.student, True)

    def finish(self) -> None:
        """Everything frozen again."""
        self.student.eval().requires_grad_(False)


def require_trl(stage: str) -> None:
    """Raises InputError if trl is not installed."""
    if importlib.util.find_spec("trl") is None:
        raise InputError(f"stage {stage!r} needs trl, which is not installed: run `pip install linearize[align]`")


def row_length(config: OwnLoopConfig, context: int | None) -> int:
    """Tokens that a row may have. Raises InputError for a length beyond the context."""
    if config.length is None:
        return min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)
    if context is not None and config.length > context:
        raise InputError(
            f"stage {config.name!r}: length {config.length} is beyond the teacher's context {context}: lower it"
        )
    return config.length


def pad_token(tokenizer: Any) -> int:
    """What rows are filled up with; no loss and no attention goes there."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def count_steps(config: OwnLoopConfig, num_rows: int, num_tokens: int) -> int:
    """Optimiser steps: the least that `epochs`, `max_steps` and `tokens` allow, as far as they are given."""
    counts = [math.ceil(config.epochs * num_rows / config.batch)]
    if config.max_steps is not None:
        counts.append(config.max_steps)
    if config.tokens is not None:
        counts.append(math.ceil(config.tokens * num_rows / (num_tokens * config.batch)))
    return min(counts)


def row_order(num_rows: int, needed: int, seed: int) -> list[int]:
    """The first `needed` rows of an endless stream of epochs, each in an order of its own."""
    epochs = [np.random.default_rng([seed, epoch]).permutation(num_rows) for epoch in range(-(-needed // num_rows))]
    return [int(row) for row in np.concatenate(epochs)[:needed]]


def run_with_trl(config: OwnLoopConfig, job: StageJob, task: TrlTask) -> StageResult:
    """Trains the student in place, from where a killed run of the same job stopped; a finished one is only read.

    On one device in fp32 the weights are then bit-equal to those of an unbroken run. Under torch.distributed every
    rank calls this with the same task and trains on its share of each batch.

    Raises:
        InputError: nothing to train, or a folder of another run; RuntimeError: the loss is not finite.
    """
    require_trl(config.name)
    trained = _trained(config, job)
    if config.chat_template is not None:
        job.tokenizer.chat_template = template_text(config.chat_template)
    if config.tokens == 0:
        return _skipped(config, job)
    student, seed = job.student, job.seed + config.seed
    steps = count_steps(config, len(task.rows), sum(task.lengths))
    order = row_order(len(task.rows), steps * config.batch, seed)
    reference = frozen_copy(student, trained) if task.needs_reference else None
    with contextlib.ExitStack() as stack:
        stack.enter_context(_guarded(student, recomputed=config.gradient_checkpointing))
        trainer = stack.enter_context(
            stage_trainer(config, task, student, job.tokenizer, job.folder, reference=reference)
        )
        for model in (student, reference):
            if model is not None:
                stack.enter_context(scoring(model))
        student.train()  # as trl's metrics are named by
        return run_stage(
            TrlRun(task, student, trained, trainer),
            config,
            lambda step: _batches(task, config.batch, order, step),
            (),
            length=row_length(config, job.context),
            rows=Rows(steps=steps, tokens=_tokens_in(task, config.batch, order)),
            checkpoint_dir=job.folder,
            identity={"data": task.digest, "seed": job.seed, **job.identity},
            progress=job.progress or LineProgress(),
            tracker=job.tracker,
            name=job.name,
        )


def cropped(batch: Batch) -> Batch:
    """Without the columns at the end that are padding in all rows."""
    width = int(batch["attention_mask"].flatten(0, -2).any(0).sum())
    return {name: tensor[..., :width] for name, tensor in batch.items()}


def _batches(task: TrlTask, batch: int, order: Sequence[int], start: int) -> Iterator[Batch]:
    """This rank's share of the rows of each step, from a step on."""
    group = current()
    share = batch // group.ranks
    for step in itertools.count(start):
        first = step * batch + group.rank * share
        yield task.collate([task.rows[row] for row in order[first : first + share]])


def _tokens_in(task: TrlTask, batch: int, order: Sequence[int]) -> Callable[[int], int]:
    """The tokens in the first so many steps, of all ranks."""
    sums = np.cumsum([0, *(task.lengths[row] for row in order)])
    return lambda step: int(sums[step * batch])


def frozen_copy(student: nn.Module, trained: Mapping[str, nn.Parameter]) -> Any:
    """The student as it stands, in eval mode: own tensors for what trains, the others shared.

    Sharded weights stay so: a module that had some gathers them while it runs.
    """
    moving = {id(value): value for value in trained.values()}
    memo: dict[int, Any] = {id(t): t for t in (*student.parameters(), *student.buffers()) if id(t) not in moving}
    memo |= {key: nn.Parameter(value.detach().clone(), requires_grad=False) for key, value in moving.items()}
    if (kept := kept_adapters(student)) is not None:
        memo[id(kept)] = kept
    units = [plain_copy(module, memo) for module in student.modules() if is_unit(module)]
    copied = copy.deepcopy(student, memo)
    for unit in units:
        gather_while_running(unit)
    return copied.eval()


def _trained(config: OwnLoopConfig, job: StageJob) -> dict[str, nn.Parameter]:
    """The parameters to train by name, in tensors of their own; all others frozen."""
    student = job.student
    names = list(student.mixer_parameters() if config.train == "mixers" else dict(student.named_parameters()))
    if not names:
        raise InputError(f"stage {config.name!r}: the mixers of this student have no parameters; set train to all")
    if config.train == "all" and kept_adapters(student) is not None:
        student.adapter_state.kept = None  # their product is in the weights, and those move now
    student.eval().requires_grad_(False)
    trained = unshare(student, job.teacher, names)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


@contextlib.contextmanager
def _guarded(student: Any, *, recomputed: bool) -> Iterator[None]:
    """Puts back what trl and the stage change on a model besides its weights; no dropout inside."""
    configs = [student.config, student.config.get_text_config(), student.generation_config, student.lm.config]
    before = [dict(vars(config)) for config in configs]
    own_attributes = set(vars(student))
    dropouts = [
        (module, key, value)
        for module in student.modules()
        for key in (("p",) if isinstance(module, nn.Dropout) else ("attention_dropout",))
        if isinstance(value := getattr(module, key, None), float)
    ]
    for module, key, _ in dropouts:
        setattr(module, key, 0.0)
    try:
        yield
    finally:
        for module, key, value in dropouts:
            setattr(module, key, value)
        for config, fields in zip(configs, before, strict=True):
            vars(config).clear()
            vars(config).update(fields)
        for key in set(vars(student)) - own_attributes:
            delattr(student, key)
        if recomputed:
            recompute_blocks(student, False)


def _skipped(config: OwnLoopConfig, job: StageJob) -> StageResult:
    job.student.eval().requires_grad_(False)
    return StageResult(
        name=job.name or config.name, steps=0, tokens=0, seconds=0.0, trainable_parameters=0, losses=(), heldout=(),
        best_step=0, stopped_early=False,
    )  # fmt: skip
