"""trl's trainers with the project's data order, checkpoints and progress in them; trl is imported when one is made."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback

from linearize.files import atomic_write_text
from linearize.modeling.checksums import file_crc32
from linearize.training.checkpoint import PARAMETER, Checkpoint, load_checkpoint, save_checkpoint
from linearize.training.own_loop import OwnLoopConfig
from linearize.training.progress import Progress
from linearize.training.tracking import Tracker

if TYPE_CHECKING:
    from linearize.training.stages.trl_loop import TrlTask

COMPLETE = "complete"  # the file that marks a checkpoint which was written to its end
SECONDS_BETWEEN_CHECKPOINTS = 60.0
LOGGED = ("loss", "grad_norm", "learning_rate")


class Watch(TrainerCallback):
    """Progress, log and checkpoints of one stage."""

    def __init__(self, name: str, steps: int, *, every: int, progress: Progress, tracker: Tracker | None) -> None:
        self.name, self.steps, self.every = name, steps, every
        self.progress, self.tracker = progress, tracker
        self.metrics: tuple[str, ...] = ()
        self.earlier = 0.0  # seconds of runs before this one
        self.first = self.tokens = 0
        self.begun = self.saved = time.monotonic()
        self.open = False

    def seconds(self) -> float:
        """Spent on the stage so far, without what kills threw away."""
        return self.earlier + time.monotonic() - self.begun

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says what starts."""
        self.begun = self.saved = time.monotonic()
        self.first, self.tokens, self.open = state.global_step, state.num_input_tokens_seen, True
        self.progress.begin(self.name, state.global_step, self.steps)
        if self.tracker:
            self.tracker.begin(self.name, state.global_step or None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for a checkpoint when one is due."""
        late = time.monotonic() - self.saved >= SECONDS_BETWEEN_CHECKPOINTS
        control.should_save = late or state.global_step % self.every == 0 or state.global_step >= self.steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Shows and logs a step. Raises RuntimeError if its loss is not finite."""
        if not logs or "loss" not in logs:
            return
        step, loss = state.global_step, float(logs["loss"])
        if not math.isfinite(loss) or not math.isfinite(float(logs.get("grad_norm", 0.0))):
            raise RuntimeError(
                f"the loss or the gradient at step {step} of stage {self.name!r} is not finite: lower lr"
            )
        spent = max(time.monotonic() - self.begun, 1e-9)
        each = spent / max(step - self.first, 1)
        rate = (state.num_input_tokens_seen - self.tokens) / spent
        self.progress.step(step, loss=loss, tokens_per_second=rate, seconds_left=each * (self.steps - step))
        if self.tracker:
            self.tracker.log(step, {key: float(logs[key]) for key in (*LOGGED, *self.metrics) if key in logs})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Marks the checkpoint as whole, with a checksum for each of its files."""
        self.saved = time.monotonic()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        atomic_write_text(folder / COMPLETE, json.dumps(checksums(folder)))

    def close(self) -> None:
        """The stage is over, finished or not."""
        if self.open:
            self.progress.end()
            if self.tracker:
                self.tracker.end()


def checksums(folder: Path) -> dict[str, int]:
    """CRC-32 of each file in a folder but the marker of a whole one."""
    return {
        path.name: file_crc32(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != COMPLETE
    }


def stage_trainer(
    config: OwnLoopConfig,
    task: TrlTask,
    student: Any,
    tokenizer: Any,
    work: Path,
    *,
    seed: int,
    order: Sequence[int],
    reference: Any,
    optimizers: tuple[Any, Any],
    trained: Mapping[str, nn.Parameter],
    identity: Mapping[str, Any],
    watch: Watch,
) -> Any:
    """The trainer of a task over rows in this order, ready for `train()`."""
    import copy

    import trl  # type: ignore[import-not-found, unused-ignore]
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback

    watch.metrics = task.metrics
    size = micro_batch(config)
    arguments = getattr(trl, task.arguments)(
        **_arguments(config, work, seed=seed, size=size, steps=len(order) // config.batch, device=student.device),
        **task.settings,
    )
    made = _with_hooks(getattr(trl, task.trainer))(
        hooks=(trained, identity, watch),
        model=student,
        args=arguments,
        data_collator=task.collate,
        train_dataset=Dataset.from_list([dict(row) for row in task.rows]).select(list(order)),
        processing_class=copy.deepcopy(tokenizer),
        optimizers=optimizers,
        callbacks=[watch],
        **({"ref_model": reference} if task.needs_reference else {}),
    )
    made.processing_class = None  # or the trainer would write the tokenizer's special tokens into the model's config
    made.remove_callback(PrinterCallback)
    return made


def micro_batch(config: OwnLoopConfig) -> int:
    """Rows per forward: the largest part of the batch that is not above `micro_batch`."""
    most = config.micro_batch or config.batch
    return max(size for size in range(1, config.batch + 1) if config.batch % size == 0 and size <= most)


def _arguments(
    config: OwnLoopConfig, work: Path, *, seed: int, size: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """What all trainers are told. Autocast, recomputation, learning rate and data order are not theirs."""
    return {
        "output_dir": str(work),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": config.batch // size,
        "max_steps": steps,
        "learning_rate": config.lr,
        "max_grad_norm": config.clip or 0.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "save_total_limit": 2,
        "include_num_input_tokens_seen": "non_padding",
        "seed": seed,
        "bf16": False,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "use_cpu": device.type == "cpu",
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
        "push_to_hub": False,
        "max_length": None,
    }


def _with_hooks(base: type) -> Callable[..., Any]:
    """A trainer of trl that takes rows as they come, saves only what trains, and tells nobody."""

    class StageTrainer(base):
        """Overrides by name what transformers' and trl's trainers call."""

        def __init__(self, *, hooks: tuple[Any, Any, Watch], **given: Any) -> None:
            self.trained, self.identity, self.watch = hooks
            super().__init__(**given)

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def _send_telemetry(self) -> None:
            pass

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            pass

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            tensors = {f"{PARAMETER}{name}": value for name, value in self.trained.items()}
            scalars = {"seconds": self.watch.seconds()}
            folder = Path(output_dir or self.args.output_dir)
            save_checkpoint(folder, Checkpoint(tensors=tensors, scalars=scalars, identity=dict(self.identity)))

        @torch.no_grad()
        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            shapes = {f"{PARAMETER}{name}": tuple(value.shape) for name, value in self.trained.items()}
            saved = load_checkpoint(Path(resume_from_checkpoint), identity=self.identity, shapes=shapes)
            assert saved is not None, "a checkpoint without weights"
            for name, parameter in self.trained.items():
                parameter.copy_(saved.tensors[f"{PARAMETER}{name}"])
            self.watch.earlier = float(saved.scalars["seconds"])

    return StageTrainer
