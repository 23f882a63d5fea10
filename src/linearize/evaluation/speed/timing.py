"""A clock for things that run on a device, and several things timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one thing that was timed several times: median, lowest and highest, of the wall clock; and the median
    of the processor time, which other programs on the machine disturb less."""

    seconds: float
    lowest: float
    highest: float
    cpu_seconds: float


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    warmup: int = 1,
    before: Callable[[str], Any] = lambda name: None,
) -> dict[str, Timing]:
    """Time all runs in turn, `repeats` times round after `warmup` untimed rounds, so that disturbances hit all alike.

    `before(name)` goes untimed ahead of each run.
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


def now() -> float:
    """Seconds on a clock, once the GPU (where there is one) has done what it was given."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
