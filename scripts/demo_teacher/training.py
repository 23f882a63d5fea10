"""The training loop: a schedule by steps or by wall clock, a curriculum, and the best averaged weights kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import Value
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import LlamaForCausalLM

from demo_teacher.batches import RecallAndStories, Rows
from demo_teacher.measure import digit_accuracy, weighted_loss
from demo_teacher.model import AveragedModel
from demo_teacher.muon import Muon

Measure = Callable[[LlamaForCausalLM], tuple[float, float]]
"""Held-out loss (nats per token) and recall accuracy of a model."""

RECALL_GOAL = 0.98
RECALL_PENALTY = 5.0
"""Choosing weights: nats that each missing unit of recall below the goal counts as."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Warm-up and cosine decay; `steps` if given, else `seconds` of wall clock."""

    steps: int | None
    seconds: float
    warmup: float = 0.03
    final: float = 0.02

    def rate(self, progress: float) -> float:
        """Learning rate at this share of training, as a share of its peak."""
        if progress < self.warmup:
            return max(progress / self.warmup, 0.02)
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - self.warmup) / (1 - self.warmup)))
        return self.final + (1 - self.final) * cosine


class Clock:
    """Share of training done; 1.0 ends training."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.started = time.monotonic()
        self.stopped = False

    def __call__(self, step: int) -> float:
        """The share after `step` steps."""
        if self.stopped:
            return 1.0
        done = step / self.schedule.steps if self.schedule.steps else self.seconds / self.schedule.seconds
        return min(1.0, done)

    def stop(self, *_signal: Any) -> None:
        """End training after the step under way; a signal handler."""
        self.stopped = True

    @property
    def seconds(self) -> float:
        """Since the clock was made."""
        return time.monotonic() - self.started


class Curriculum:
    """The level of the recall documents, readable by the loader's processes: up when answers are right, between an
    earliest and a latest share of training."""

    EARLIEST, LATEST = (0.0, 0.0, 0.0, 0.1, 0.4), (0.0, 0.04, 0.3, 0.5, 0.7)
    GOOD, MEMORY, CHECK_EVERY = 0.96, 0.8, 10

    def __init__(self, level: int) -> None:
        self.shared: Any = Value("i", level)
        self.average = 0.0

    def __call__(self) -> int:
        """The present level, counted from 0."""
        return int(self.shared.value)

    def look(self, accuracy: float, progress: float) -> None:
        """Go one level up if the share of right digits is good, on average over batches, or time has come."""
        self.average += (1 - self.MEMORY) * (accuracy - self.average)
        new = self() + 1
        if new == len(self.LATEST) or progress < self.EARLIEST[new]:
            return
        if self.average >= self.GOOD or progress >= self.LATEST[new]:
            self.shared.value, self.average = new, 0.0


@dataclass
class Run:
    """What training did: steps, tokens (padding not counted), the log, and where the kept weights stood."""

    steps: int = 0
    tokens: int = 0
    best_score: float = math.inf
    best_step: int = 0
    log: list[dict[str, float]] = field(default_factory=list)


@dataclass(kw_only=True)
class Evaluations:
    """When to measure the averaged weights, how, and what to do with those better than all before."""

    count: int
    measure: Measure
    keep: Callable[[LlamaForCausalLM, Run], None]
    done: int = 0

    def due(self, progress: float) -> bool:
        """Whether the next one's time has come."""
        due = progress * self.count >= self.done + 1
        self.done = max(self.done, math.floor(progress * self.count))
        return due


class _Counting(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        step = 0
        while True:
            yield step
            step += 1


def train(
    model: LlamaForCausalLM,
    dataset: RecallAndStories,
    clock: Clock,
    curriculum: Curriculum,
    evaluations: Evaluations,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    ema_decay: float,
    workers: int,
) -> Run:
    """Train `model`; hand on the averaged weights whenever held-out loss and recall together are best."""
    averaged, run = AveragedModel(model, ema_decay), Run()
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    prefetch = 8 if workers else None
    loader = DataLoader(dataset, batch_size=None, sampler=_Counting(), num_workers=workers, prefetch_factor=prefetch)
    for recall_rows, story_rows in loader:
        loss = _gradients(model, (recall_rows, story_rows), run)
        rate = clock.schedule.rate(clock(run.steps))
        _update(optimizers, [rate * peak for peak in peaks])
        run.steps += 1
        averaged.update(model)
        progress = clock(run.steps)
        if run.steps % Curriculum.CHECK_EVERY == 0:
            curriculum.look(_digit_accuracy(model, recall_rows, dataset.plan.answer_weight), progress)
        if evaluations.due(progress):
            _evaluate(averaged.model, evaluations, run, loss=float(loss), clock=clock, level=curriculum())
        if progress >= 1.0:
            break
    return run


def make_optimizers(
    model: LlamaForCausalLM, *, lr: float, muon_lr: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices in the layers, AdamW for the embedding and the norms (weight decay on matrices only)."""
    inside = [parameter for parameter in model.model.layers.parameters() if parameter.dim() == 2]
    norms = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    groups: list[dict[str, Any]] = [{"params": [model.model.embed_tokens.weight]}]
    groups.append({"params": norms, "weight_decay": 0.0})
    adamw = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True)
    return [adamw, Muon(inside, lr=muon_lr, weight_decay=weight_decay)]


def _gradients(model: LlamaForCausalLM, batch: tuple[Rows, Rows], run: Run) -> Tensor:
    """Clipped gradients on both kinds of rows; the loss, returned, is divided once by the weight of both."""
    model.train()
    device = model.device
    count = sum(weight[:, 1:].sum() for _, weight in batch)
    total = torch.zeros((), device=device)
    for ids, weight in batch:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss, _ = weighted_loss(model, ids.to(device, non_blocking=True), weight.to(device, non_blocking=True))
        loss = loss / count
        loss.backward()
        total += loss.detach()
        run.tokens += int((ids != 0).sum())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    return total


def _update(optimizers: Sequence[torch.optim.Optimizer], rates: Sequence[float]) -> None:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _digit_accuracy(model: LlamaForCausalLM, rows: Rows, answer_weight: float) -> float:
    model.eval()
    return digit_accuracy(model, (rows[0].to(model.device), rows[1].to(model.device)), answer_weight)


def _evaluate(
    model: LlamaForCausalLM, evaluations: Evaluations, run: Run, *, loss: float, clock: Clock, level: int
) -> None:
    heldout, recall = evaluations.measure(model)
    score = heldout + RECALL_PENALTY * max(0.0, RECALL_GOAL - recall)
    entry = {"step": run.steps, "seconds": round(clock.seconds, 1), "tokens": run.tokens, "train_loss": round(loss, 4)}
    run.log.append({**entry, "heldout_loss": round(heldout, 4), "recall": round(recall, 4), "level": level})
    print(" ".join(f"{name} {value}" for name, value in run.log[-1].items()), flush=True)
    if score < run.best_score:
        run.best_score, run.best_step = score, run.steps
        evaluations.keep(model, run)
