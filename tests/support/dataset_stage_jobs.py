"""What the tests of stages with their own loop share: a small student, a job, and a progress that can kill."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import SIZE, byte_tokenizer
from models import mixer, student_of, tiny
from torch import Tensor, nn

from linearize.training.config import Plateau, lr_factor
from linearize.training.dataset_stage import DatasetStageConfig, StageJob


class Killed(Exception):  # noqa: N818 (not an error)
    """Stands for the end of the process."""


class Watcher:
    """A progress that remembers where the stage began, and kills it at a step."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at, self.begun, self.steps = kill_at, [], []

    def begin(self, name: str, step: int, steps: int) -> None:
        self.begun.append((name, step, steps))

    def step(self, step: int, *, loss: float | None, tokens_per_second: float, seconds_left: float) -> None:
        self.steps.append(step)
        if step == self.kill_at:
            raise Killed

    def heldout(self, step: int, loss: float, best: float) -> None:
        raise AssertionError("these stages measure no held-out loss")

    def end(self) -> None:
        pass


def job(
    folder: Path, *, progress: Any = None, tokenizer: Any = None, family: str = "llama", **identity: Any
) -> StageJob:
    """The same student of the same teacher each time, converted in two of three layers."""
    teacher = tiny(family, vocab_size=SIZE, max_position_embeddings=96).requires_grad_(False)
    student = student_of(teacher, [mixer(), None, mixer()][: teacher.config.num_hidden_layers])
    return StageJob(
        student=student,
        teacher=teacher,
        tokenizer=tokenizer or byte_tokenizer(),
        folder=folder,
        identity=identity,
        seed=3,
        progress=progress or Watcher(),
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Names of the weights that differ in any bit."""
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


def step_by_hand(
    parameters: list[nn.Parameter], optimizer: Any, config: DatasetStageConfig, step: int, steps: int
) -> None:
    """One optimiser step with the gradients in place: clip, learning rate, AdamW."""
    assert config.clip is not None
    torch.nn.utils.clip_grad_norm_(parameters, config.clip)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * lr_factor(config, step, steps, Plateau())
    optimizer.step()
    optimizer.zero_grad()
