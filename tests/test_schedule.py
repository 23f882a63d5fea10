"""Schedules: values at chosen steps, against torch's own plateau rule, and the settings that are refused."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from linearize.training.config import Plateau, StageConfig, as_steps, count_steps, lr_factor


def config(**settings: Any) -> StageConfig:
    return StageConfig(**{"name": "toy", "tokens": "1k", "lr": 0.1} | settings)


def factors(stage: StageConfig, steps: int) -> list[float]:
    return [lr_factor(stage, step, steps, Plateau()) for step in range(steps)]


@pytest.mark.parametrize(("tokens", "steps"), [(0, 0), (1, 1), (105, 1), (106, 2), ("2.1k", 20)])
def test_steps_cover_the_tokens(tokens: int | str, steps: int) -> None:
    assert count_steps(config(tokens=tokens, batch=7), length=15) == steps


def test_fractions_and_steps() -> None:
    assert [as_steps(value, 50) for value in (0.0, 0.01, 0.09, 0.1, 1, 7, 70)] == [0, 1, 5, 5, 1, 7, 70]


def test_cosine_with_warmup() -> None:
    values = factors(config(warmup=4, min_lr_ratio=0.2), 14)
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[4] == 1.0
    assert values[9] == pytest.approx(0.6)  # half of the ten steps after warm-up
    assert values[13] == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 0.9)))
    assert all(a > b for a, b in pairwise(values[4:]))


def test_constant_with_fractional_warmup() -> None:
    assert factors(config(schedule="constant", warmup=0.3), 10) == [1 / 3, 2 / 3] + [1.0] * 8


def test_warmup_longer_than_the_stage_never_reaches_the_peak() -> None:
    assert factors(config(warmup=10), 3) == [0.1, 0.2, 0.3]


def test_plateau_equals_torch() -> None:
    stage = config(schedule="plateau", plateau_factor=0.3, plateau_patience=2, min_lr_ratio=0.05)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=2, min_lr=0.05)
    ours = Plateau()
    losses = [3.0, 2.0, 1.99995, 2.0, 2.1, 2.0, 1.5, 1.6, 1.5, 1.4999, 1.4998, *[1.6] * 9, 1.0]
    seen = []
    for loss in losses:
        ours = ours.after(loss, stage)
        theirs.step(loss)
        seen.append(lr_factor(stage, 9, 99, ours))
        assert seen[-1] == pytest.approx(optimizer.param_groups[0]["lr"])
    assert len(set(seen)) == 4, "the losses should lower the rate twice, and then to the minimum"


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0}, {"lr": float("nan")}, {"batch": 0}, {"micro_batch": 0}, {"clip": 0.0}, {"warmup": -1},
        {"warmup": 1.5}, {"evaluate_every": 0}, {"evaluate_every": 2.5}, {"patience": 0},
        {"betas": (0.9, 1.0)}, {"min_lr_ratio": 2}, {"plateau_factor": 1.0}, {"precision": "fp16"},
        {"schedule": "linear"}, {"tokens": -1}, {"epochs": 2},
    ],
)  # fmt: skip
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(settings))):
        config(**settings)


def test_a_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config().lr = 0.2  # type: ignore[misc]
