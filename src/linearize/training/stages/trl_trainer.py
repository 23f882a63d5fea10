"""trl's trainers as the source of a loss and of its metrics; the loop is the project's own. trl is imported when a
trainer is made.

A trainer believes that it is alone, on a CPU: it then computes where the model is and moves, shards, gathers nothing.
Sums over processes are made by the loop.
"""

from __future__ import annotations

import contextlib
import copy
import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from linearize.training.dataset_stage import OwnLoopConfig

if TYPE_CHECKING:
    from linearize.training.stages.trl_loop import TrlTask

LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""What tells accelerate of other processes."""


@contextlib.contextmanager
def stage_trainer(
    config: OwnLoopConfig, task: TrlTask, student: Any, tokenizer: Any, folder: Path, *, reference: Any
) -> Iterator[Any]:
    """The trainer of a task, whose `compute_loss` is to be called. It trains nothing, and writes nothing to its
    folder; the caller's generators and accelerate's state are as before."""
    from accelerate.state import AcceleratorState

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecations between trl and transformers
        try:
            with _alone(), _own_randomness(student.device):
                trainer = _made(config, task, student, tokenizer, folder, reference)
            yield trainer
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)  # the next trainer looks around anew


def metrics_of(trainer: Any) -> dict[str, float]:
    """What the trainer measured since it was last asked, each the mean over the rows or tokens of its loss."""
    found: dict[str, float] = {}
    trainer.log(found)
    trainer.state.log_history.clear()
    return found


def _made(config: OwnLoopConfig, task: TrlTask, student: Any, tokenizer: Any, folder: Path, reference: Any) -> Any:
    import trl  # type: ignore[import-not-found, unused-ignore]
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback

    arguments = getattr(trl, task.arguments)(
        output_dir=str(folder), save_strategy="no", use_cpu=True, bf16=False, gradient_checkpointing=False,
        gradient_checkpointing_kwargs={"use_reentrant": False}, remove_unused_columns=False, report_to="none",
        disable_tqdm=True, log_level="error", push_to_hub=False, max_length=None, max_steps=1,
        learning_rate=config.lr, seed=config.seed, **task.settings,
    )  # fmt: skip
    made = _still(getattr(trl, task.trainer))(
        model=student,
        args=arguments,
        data_collator=task.collate,
        train_dataset=Dataset.from_list([dict(task.rows[0])]),  # looked at, never trained on
        processing_class=copy.deepcopy(tokenizer),
        **({"ref_model": reference} if task.needs_reference else {}),
    )
    made.remove_callback(PrinterCallback)
    made.aux_loss_enabled = False  # routers of experts are held to nothing, as in every other stage
    return made


def _still(base: type) -> Callable[..., Any]:
    """A trainer of trl that takes rows as they come, moves no model, and tells nobody."""

    class StageTrainer(base):
        """Overrides by name what transformers' and trl's trainers call."""

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.accelerator.device_placement = False

        def _move_model_to_device(self, *args: Any, **kwargs: Any) -> None:
            pass

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _send_telemetry(self) -> None:
            pass

    return StageTrainer


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Inside, the environment knows of no other processes."""
    hidden = {key: os.environ.pop(key) for key in LAUNCHERS if key in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


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
