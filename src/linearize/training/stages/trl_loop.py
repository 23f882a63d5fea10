"""A stage run by a trainer of trl: its own copies of what trains, exact resumption, and no trace left on the model.

trl brings the loss and transformers' Trainer the loop; data order, optimiser, learning rate and checkpoints of the
weights are the project's own, so that a stage means the same as any other. In the run's folder the optimiser's and the
generators' states are torch files of the trainer's making; weights are safetensors.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import math
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from linearize.errors import InputError
from linearize.files import read_json
from linearize.training.chat import template_text
from linearize.training.checkpoint import PARAMETER, Checkpoint, load_checkpoint, save_checkpoint
from linearize.training.loop import StageResult
from linearize.training.own_loop import DEFAULT_LENGTH, OwnLoopConfig, StageJob
from linearize.training.progress import LineProgress
from linearize.training.schedule import Plateau, as_steps, lr_factor
from linearize.training.stages.trainable import own, recompute_blocks
from linearize.training.stages.trl_scores import scoring
from linearize.training.stages.trl_trainer import COMPLETE, Watch, checksums, stage_trainer

WORK = "trl"
LOG = logging.getLogger("linearize")


@dataclass(frozen=True, kw_only=True)
class TrlTask:
    """What differs between the stages.

    `rows`: one row of tokens per example. `tokens`: of all rows, padding not counted. `digest`: of the rows. `collate`:
    rows to a padded batch. `trainer`, `arguments`, `settings`: names of trl's classes, and what the second gets besides
    the common. `metrics`: names in trl's log that the result keeps. `needs_reference`: whether a frozen copy of the
    student as the stage finds it goes with it.
    """

    rows: Sequence[Mapping[str, Any]]
    tokens: int
    digest: str
    collate: Callable[[list[Any]], dict[str, Tensor]]
    trainer: str
    arguments: str
    settings: Mapping[str, Any]
    metrics: tuple[str, ...]
    needs_reference: bool


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

    On one device in fp32 the weights are then bit-equal to those of an unbroken run.

    Raises:
        InputError: nothing to train, or a folder of another run; RuntimeError: the loss is not finite.
    """
    require_trl(config.name)
    torch.set_flush_denormal(True)
    identity = {"stage": config.model_dump(mode="json"), "data": task.digest, "seed": job.seed, **job.identity}
    trained = _trained(config, job)
    if config.chat_template is not None:
        job.tokenizer.chat_template = template_text(config.chat_template)
    done = load_checkpoint(job.folder, identity=identity, shapes=_shapes(trained))
    if config.tokens == 0:
        result = _skipped(config, job)
    elif done is not None:
        _restore(trained, done)
        result = _result_from(done.scalars)
    else:
        steps = count_steps(config, len(task.rows), task.tokens)
        with _guarded(job.student), _own_randomness(job.student.device):
            result = _train(config, job, task, trained, identity, steps)
        tensors: dict[str, Tensor] = {f"{PARAMETER}{name}": value for name, value in trained.items()}
        save_checkpoint(job.folder, Checkpoint(tensors=tensors, scalars=asdict(result), identity=identity))
    shutil.rmtree(job.folder / WORK, ignore_errors=True)
    job.student.eval().requires_grad_(False)
    return result


def _train(
    config: OwnLoopConfig, job: StageJob, task: TrlTask, trained: dict[str, nn.Parameter], identity: Any, steps: int
) -> StageResult:
    """What is left of the stage."""
    student, work = job.student, job.folder / WORK
    name = job.name or config.name
    reference = frozen_copy(student, trained) if task.needs_reference else None
    latest = _latest_checkpoint(work)
    watch = Watch(
        name,
        steps,
        every=max(1, as_steps(config.evaluate_every, steps)),
        progress=job.progress or LineProgress(),
        tracker=job.tracker,
    )
    bf16 = config.precision == "bf16"
    if config.gradient_checkpointing:
        recompute_blocks(student, True)
    try:
        with contextlib.ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecations between trl and transformers
            trainer = stage_trainer(
                config, task, student, job.tokenizer, work,
                seed=job.seed + config.seed,
                order=row_order(len(task.rows), steps * config.batch, job.seed + config.seed),
                reference=reference,
                optimizers=_optimizers(config, trained, steps),
                trained=trained,
                identity=identity,
                watch=watch,
            )  # fmt: skip
            for model in (student, reference):
                if model is not None:
                    stack.enter_context(scoring(model, bf16=bf16))
            stack.callback(watch.close)
            trainer.train(resume_from_checkpoint=str(latest) if latest is not None else None)
    finally:
        if config.gradient_checkpointing:
            recompute_blocks(student, False)
    return StageResult(
        name=name,
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=watch.seconds(),
        trainable_parameters=sum(value.numel() for value in trained.values()),
        losses=_history(trainer.state.log_history, "loss"),
        heldout=(),
        best_step=trainer.state.global_step,
        stopped_early=False,
        metrics={key: _history(trainer.state.log_history, key) for key in task.metrics},
    )


def frozen_copy(student: nn.Module, trained: Mapping[str, nn.Parameter]) -> Any:
    """The student as it stands, in eval mode: own tensors for what trains, the others shared."""
    moving = {id(value) for value in trained.values()}
    shared = [tensor for tensor in (*student.parameters(), *student.buffers()) if id(tensor) not in moving]
    kept = getattr(student, "kept_adapters", None)
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared} | ({} if kept is None else {id(kept): kept})
    copied = copy.deepcopy(student, memo)
    for module, original in zip(copied.modules(), student.modules(), strict=True):
        for name, parameter in original.named_parameters(recurse=False):
            if id(parameter) in moving:
                getattr(module, name).requires_grad_(False)
    return copied.eval()


def _trained(config: OwnLoopConfig, job: StageJob) -> dict[str, nn.Parameter]:
    """The parameters to train by name, in tensors of their own; all others frozen."""
    student = job.student
    names = list(student.mixer_parameters() if config.train == "mixers" else dict(student.named_parameters()))
    if not names:
        raise InputError(f"stage {config.name!r}: the mixers of this student have no parameters; set train to all")
    if config.train == "all":
        student.kept_adapters = None  # their product is in the weights, and those move now
    student.eval().requires_grad_(False)
    trained = own(student, job.teacher, names)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def _optimizers(config: OwnLoopConfig, trained: Mapping[str, nn.Parameter], steps: int) -> tuple[Any, Any]:
    """AdamW and the learning rate by step, as in every other stage."""
    optimizer = torch.optim.AdamW(
        list(trained.values()), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(config, min(step, steps - 1), steps, Plateau())
    )
    return optimizer, schedule


def _latest_checkpoint(work: Path) -> Path | None:
    """The newest checkpoint that was written to its end and is whole; those that are not are removed.

    A kill leaves one without its mark; one whose files are not those that were written is damaged, which is said.
    """
    found = sorted(work.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    marked = [path for path in found if (path / COMPLETE).is_file()]
    whole = [path for path in marked if _is_whole(path)]
    for path in found:
        if path not in whole:
            shutil.rmtree(path)
    if damaged := [path for path in marked if path not in whole]:
        left = "the stage goes on from the checkpoint before it" if whole else "the stage starts anew"
        LOG.warning("%s is damaged and was removed: %s", damaged[-1], left)
    return whole[-1] if whole else None


def _is_whole(checkpoint: Path) -> bool:
    try:
        return bool(read_json(checkpoint / COMPLETE) == checksums(checkpoint))
    except InputError:
        return False


@contextlib.contextmanager
def _guarded(student: Any) -> Iterator[None]:
    """Puts back what trl and the trainer change on a model besides its weights; no dropout inside."""
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
        student.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """The caller's generators (torch, numpy, Python) are as before afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@torch.no_grad()
def _restore(trained: Mapping[str, nn.Parameter], checkpoint: Checkpoint) -> None:
    for name, parameter in trained.items():
        parameter.copy_(checkpoint.tensors[f"{PARAMETER}{name}"])


def _shapes(trained: Mapping[str, nn.Parameter]) -> dict[str, tuple[int, ...]]:
    return {f"{PARAMETER}{name}": tuple(value.shape) for name, value in trained.items()}


def _skipped(config: OwnLoopConfig, job: StageJob) -> StageResult:
    return StageResult(
        name=job.name or config.name, steps=0, tokens=0, seconds=0.0, trainable_parameters=0, losses=(), heldout=(),
        best_step=0, stopped_early=False,
    )  # fmt: skip


def _history(log: Sequence[Mapping[str, Any]], key: str) -> tuple[tuple[int, float], ...]:
    return tuple((int(entry["step"]), float(entry[key])) for entry in log if key in entry)


def _result_from(scalars: Mapping[str, Any]) -> StageResult:
    def pairs(values: Any) -> tuple[tuple[int, float], ...]:
        return tuple((step, value) for step, value in values)

    metrics = {key: pairs(values) for key, values in scalars["metrics"].items()}
    losses, heldout = pairs(scalars["losses"]), pairs(scalars["heldout"])
    return StageResult(**{**scalars, "losses": losses, "heldout": heldout, "metrics": metrics})
