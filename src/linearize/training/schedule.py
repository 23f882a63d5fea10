"""Learning-rate schedules as pure functions of the step, and the plateau rule as a value."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from linearize.training.config import StageConfig

# Relative improvement that ends a plateau: the default of torch's ReduceLROnPlateau, which LoLCATs trains with.
PLATEAU_THRESHOLD = 1e-4


def count_steps(config: StageConfig, length: int) -> int:
    """Optimiser steps that use at least `config.tokens` tokens in sequences of `length`; 0 skips the stage."""
    return math.ceil(config.tokens / (config.batch * length))


def as_steps(value: float, steps: int) -> int:
    """A setting that is a fraction of `steps` if below 1 (rounded, half up), else a number of steps."""
    return math.floor(value * steps + 0.5) if value < 1 else int(value)


@dataclass(frozen=True)
class Plateau:
    """Reduce on plateau: the scale so far, the best held-out loss, and evaluations since it improved."""

    scale: float = 1.0
    best: float | None = None
    bad: int = 0

    def after(self, loss: float, config: StageConfig) -> Plateau:
        """The rule after one more evaluation. Source: torch.optim.lr_scheduler.ReduceLROnPlateau, mode min, rel."""
        if self.best is None or loss < self.best * (1 - PLATEAU_THRESHOLD):
            return replace(self, best=loss, bad=0)
        if self.bad < config.plateau_patience:
            return replace(self, bad=self.bad + 1)
        return replace(self, scale=max(self.scale * config.plateau_factor, config.min_lr_ratio), bad=0)


def lr_factor(config: StageConfig, step: int, steps: int, plateau: Plateau) -> float:
    """What the peak learning rate is multiplied by in optimiser step `step` (from 0) of `steps`.

    Linear warm-up from `1 / warmup` to 1, then: constant, the plateau's scale, or half a cosine from 1 that would reach
    `min_lr_ratio` one step after the last.
    """
    warmup = as_steps(config.warmup, steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "plateau":
        return plateau.scale
    done = (step - warmup) / (steps - warmup)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))
