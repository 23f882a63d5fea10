"""The training loop: a schedule by steps or by wall clock, and the best averaged weights kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import Value
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from transformers import LlamaForCausalLM

from demo_teacher.batches import RecallAndStories, Rows
from demo_teacher.measure import weighted_loss
from demo_teacher.model import AveragedModel, parameter_groups

Measure = Callable[[LlamaForCausalLM], tuple[float, float]]
"""Held-out loss (nats per token) and recall accuracy of a model."""

RECALL_GOAL = 0.98
RECALL_PENALTY = 5.0
"""Choosing weights: nats that each missing unit of recall below the goal counts as."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Peak learning rate with warm-up and cosine decay; `steps` if given, else `seconds` of wall clock."""

    lr: float
    steps: int | None
    seconds: float
    warmup: float = 0.03
    final: float = 0.02

    def rate(self, progress: float) -> float:
        """Learning rate at this share of training."""
        if progress < self.warmup:
            return self.lr * max(progress / self.warmup, 0.02)
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - self.warmup) / (1 - self.warmup)))
        return self.lr * (self.final + (1 - self.final) * cosine)


class Clock:
    """Share of training done, readable by the loader's processes."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.share: Any = Value("d", 0.0)
        self.started = time.monotonic()

    def __call__(self, step: int) -> float:
        """Exact when training goes by steps; by wall clock, the share when the loop last looked."""
        if self.schedule.steps is not None:
            return min(1.0, step / self.schedule.steps)
        return float(self.share.value)

    def look(self, step: int) -> float:
        """The loop's own progress; 1.0 ends training."""
        if self.schedule.steps is None:
            self.share.value = min(1.0, self.seconds / self.schedule.seconds)
        return self(step)

    @property
    def seconds(self) -> float:
        """Since the clock was made."""
        return time.monotonic() - self.started


@dataclass
class Run:
    """What training did: steps, tokens by kind (padding not counted), the log, and where the kept weights stood."""

    steps: int = 0
    tokens: int = 0
    best_score: float = math.inf
    best_step: int = 0
    log: list[dict[str, float]] = field(default_factory=list)


class _Counting(Sampler[int]):
    def __iter__(self) -> Any:
        step = 0
        while True:
            yield step
            step += 1


def train(
    model: LlamaForCausalLM,
    dataset: RecallAndStories,
    clock: Clock,
    measure: Measure,
    *,
    weight_decay: float,
    ema_decay: float,
    workers: int,
    evaluations: int,
    keep: dict[str, Tensor],
) -> Run:
    """Train `model`; fill `keep` with the averaged weights whose held-out loss is best among those that recall."""
    device = model.device
    averaged, run = AveragedModel(model, ema_decay), Run()
    groups = parameter_groups(model, weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=clock.schedule.lr, betas=(0.9, 0.98), fused=device.type == "cuda")
    loader = DataLoader(
        dataset, batch_size=None, sampler=_Counting(), num_workers=workers, prefetch_factor=8 if workers else None
    )
    next_evaluation = 1 / evaluations
    for rows in loader:
        progress = clock.look(run.steps)
        loss = _step(model, optimizer, rows, lr=clock.schedule.rate(progress), device=device, run=run)
        averaged.update(model)
        if progress >= next_evaluation or clock.look(run.steps) >= 1.0:
            next_evaluation = (math.floor(progress * evaluations) + 1) / evaluations
            _evaluate(averaged.model, measure, run, loss=float(loss), clock=clock, keep=keep)
        if clock.look(run.steps) >= 1.0:
            break
    return run


def _step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Rows, Rows],
    *,
    lr: float,
    device: Any,
    run: Run,
) -> Tensor:
    """One update on both kinds of rows; the loss is divided once by the weight of both."""
    model.train()
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
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    run.steps += 1
    return total


def _evaluate(
    model: LlamaForCausalLM, measure: Measure, run: Run, *, loss: float, clock: Clock, keep: dict[str, Tensor]
) -> None:
    heldout, recall = measure(model)
    score = heldout + RECALL_PENALTY * max(0.0, RECALL_GOAL - recall)
    if score < run.best_score:
        run.best_score, run.best_step = score, run.steps
        keep.update({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
    entry = {"step": run.steps, "seconds": round(clock.seconds, 1), "tokens": run.tokens, "train_loss": round(loss, 4)}
    run.log.append({**entry, "heldout_loss": round(heldout, 4), "recall": round(recall, 4)})
    print(" ".join(f"{name} {value}" for name, value in run.log[-1].items()), flush=True)
