"""A clock for work on a device, several things timed in turn, and decode timed with it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.evaluation.speed.running import RunConfig, attending, decode


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one thing that was timed several times: median, lowest and highest, of the wall clock; and the median
    of the processor time, which other programs on the machine disturb less."""

    seconds: float
    lowest: float
    highest: float
    cpu_seconds: float

    def ms_per_token(self, tokens: int) -> tuple[float, tuple[float, float]]:
        """Return milliseconds of one of `tokens` steps: the median, and the lowest and highest."""
        scale = 1000 / tokens
        return self.seconds * scale, (self.lowest * scale, self.highest * scale)


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    warmup: int = 1,
    before: Callable[[str], Any] = lambda name: None,
) -> dict[str, Timing]:
    """Time all runs in turn, `repeats` times round after `warmup` untimed rounds, so that disturbances hit all alike.

    `before(name)` is called untimed ahead of each run.
    """
    for _ in range(warmup):
        for name, run in runs.items():
            before(name)
            run()
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            before(name)
            began, began_cpu = now(), time.process_time()
            run()
            wall[name].append(now() - began)
            cpu[name].append(time.process_time() - began_cpu)
    return {
        name: Timing(
            seconds=statistics.median(times),
            lowest=min(times),
            highest=max(times),
            cpu_seconds=statistics.median(cpu[name]),
        )
        for name, times in wall.items()
    }


@dataclass(frozen=True, kw_only=True)
class DecodeRun:
    """A model that decodes: `filled()` makes the cache of its context anew for each repeat."""

    model: PreTrainedModel
    config: RunConfig
    filled: Callable[[], Any]


def time_decode(runs: Mapping[str, DecodeRun], ids_BT: Tensor, repeats: int, *, warmup: int = 1) -> dict[str, Timing]:
    """Time the same tokens `[B, T]` one by one after each model's context, in turn; caches are filled untimed."""
    cache: Any = None

    def fill(name: str) -> None:
        nonlocal cache
        cache = None  # the one before is freed first
        cache = runs[name].filled()

    with ExitStack() as stack:
        for run in runs.values():
            stack.enter_context(attending(run.model, run.config.attention))
        steps = {name: lambda model=run.model: decode(model, cache, ids_BT) for name, run in runs.items()}
        return interleaved(steps, repeats, warmup=warmup, before=fill)


def now() -> float:
    """Return seconds on a clock, once the GPU (where there is one) has done its work."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
