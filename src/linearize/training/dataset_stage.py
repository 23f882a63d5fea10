"""Stages on rows of their own (`sft`, `dpo`): config, job, and the order of the rows."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import nn

from linearize.errors import InputError
from linearize.modeling.io.adapters import kept_adapters
from linearize.numbers import Count
from linearize.training.config import Batch, ParameterGroup, StageConfig
from linearize.training.data.chat import template_text
from linearize.training.data.documents import Document
from linearize.training.data.packing import IGNORED
from linearize.training.distributed import current
from linearize.training.loop import Rows, StageResult, run_stage
from linearize.training.progress import LineProgress, Progress
from linearize.training.student_run import unshare
from linearize.training.tracking import Tracker

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from linearize.modeling import LinearizedForCausalLM

DEFAULT_LENGTH = 1024
_NO_HELDOUT = {"schedule": "plateau", "keep_best": True}


class DatasetStageConfig(StageConfig):
    """Settings of a stage that reads its own data and has no held-out text of its own.

    The stage ends with the first of `epochs`, `max_steps` and `tokens` that is set and reached; `tokens: 0` skips it.
    `batch` counts rows of the data (a preference pair is one row); the last step of an epoch continues with the next.
    `evaluate_every`: how often a checkpoint is written (besides once a minute). Options that need a held-out loss
    (`schedule: plateau`, `patience`, `keep_best`) are errors.
    """

    places: ClassVar[tuple[str, ...]] = ("data",)

    tokens: Count | None = Field(None, ge=0, description="training tokens, padding not counted; 0 skips the stage")  # type: ignore[assignment]  # here other settings may decide
    data: str = Field(min_length=1, description="rows to train on: a file or a Hub dataset")
    epochs: float = Field(1.0, gt=0, description="times through the data")
    max_steps: Count | None = Field(None, ge=1, description="optimiser steps at most; None: as epochs and tokens say")
    length: Count | None = Field(
        None, ge=2, description="longest row in tokens, its end is cut; None: 1024, or the context"
    )
    train: Literal["mixers", "all"] = Field("all", description="the mixers alone, or every parameter")
    chat_template: str | None = Field(
        None, description="plain, a Jinja file, or a Jinja text; None: that of the tokenizer"
    )
    keep_best: bool = False

    @model_validator(mode="after")
    def _refuse_what_needs_heldout(self) -> Self:
        wrong = [f"{key}={value}" for key, value in _NO_HELDOUT.items() if getattr(self, key) == value]
        wrong += [] if self.patience is None else [f"patience={self.patience}"]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} needs a held-out loss, which stage {self.name!r} does not measure")
        return self

    @property
    def changes_teacher_weights(self) -> bool:
        """Unless only mixers train."""
        return self.train != "mixers"

    def check_data(self, tokenizer: PreTrainedTokenizerBase, context: int | None = None) -> None:
        """Read the data and raise early for what the stage cannot use; changes nothing.

        Args:
            context: the teacher's longest context in tokens, None if it has no limit.
        Raises:
            InputError: data that cannot be read, a row that does not fit, no chat template.
        """
        self.rows(tokenizer, context)

    def rows(self, tokenizer: PreTrainedTokenizerBase, context: int | None) -> Sequence[Sized]:
        """The data as tokens; the length of a row is its tokens. Raises InputError for data that cannot be used."""
        raise NotImplementedError

    def collate(self, rows: Sequence[Any], pad: int) -> Batch:
        """A batch of some of these rows, filled up with the token `pad`: each tensor has one entry per row."""
        raise NotImplementedError

    def row_length(self, context: int | None) -> int:
        """Tokens that a row may have. Raises InputError for a length beyond the context."""
        if self.length is None:
            return min(DEFAULT_LENGTH, context or DEFAULT_LENGTH)
        if context is not None and self.length > context:
            raise InputError(
                f"stage {self.name!r}: length {self.length} is beyond the teacher's context {context}: lower it"
            )
        return self.length

    def trained_parameters(self, student: LinearizedForCausalLM, teacher: PreTrainedModel) -> ParameterGroup:
        """The parameters to train, in tensors not shared with the teacher. Raises InputError if there are none."""
        names = list(student.mixer_parameters() if self.train == "mixers" else dict(student.named_parameters()))
        if not names:
            raise InputError(f"stage {self.name!r}: the mixers of this student have no parameters; set train to all")
        if self.train == "all" and kept_adapters(student) is not None:
            # their product is in the weights, and those move now
            student.adapter_state = replace(student.adapter_state, kept=None)
        return ParameterGroup(unshare(student, teacher, names))

    def run(self, job: StageJob) -> StageResult:
        """Train the student in place; continue a killed run of the same job, or only read a finished one.

        On one device in fp32 the weights are then bit-equal to those of an unbroken run. Under torch.distributed every
        rank calls this and trains on its share of each batch.

        Raises:
            InputError: nothing to train, or a folder of another run; RuntimeError: the loss is not finite.
        """
        rows: Sequence[Sized] = current().share(lambda: self.rows(job.tokenizer, job.context))
        student, name = job.student, job.name or self.name
        if self.chat_template is not None:
            job.tokenizer.chat_template = template_text(self.chat_template)
        if self.tokens == 0:
            student.eval().requires_grad_(False)
            return StageResult.skipped(name)
        sizes = [len(row) for row in rows]
        steps = count_steps(self, len(rows), sum(sizes))
        order = row_order(len(rows), steps * self.batch, job.seed + self.seed)
        pad = job.tokenizer.eos_token_id if job.tokenizer.pad_token_id is None else job.tokenizer.pad_token_id
        ends = np.cumsum([0, *(sizes[row] for row in order)])

        def batches(start: int) -> Iterator[Batch]:
            group = current()
            share = self.batch // group.ranks
            for step in itertools.count(start):
                first = step * self.batch + group.rank * share
                yield self.collate([rows[row] for row in order[first : first + share]], int(pad))

        with without_dropout(student):
            return run_stage(
                self.build(student, job.teacher),
                self,
                batches,
                (),
                length=self.row_length(job.context),
                rows=Rows(steps=steps, tokens=lambda step: int(ends[step * self.batch])),
                checkpoint_dir=job.folder,
                identity={"data": _digest(rows), "seed": job.seed, **job.identity},
                progress=job.progress or LineProgress(),
                tracker=job.tracker,
                callbacks=job.callbacks,
                name=name,
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class StageJob:
    """The inputs of a stage on rows of its own.

    `student`: trained in place. `teacher`: shares tensors with the student, and does not change. `folder`: of this
    stage alone; holds checkpoints and, at the end, the final weights. `identity`: what the start of this stage depends
    on, as JSON; a folder with another one is refused. `seed`: of the run; the stage's own is added to it. `name`: in
    progress and logs, None: the stage's. With a `chat_template` in the stage's settings, `tokenizer` gets that one.
    """

    student: LinearizedForCausalLM
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    identity: Mapping[str, object] = field(default_factory=dict)
    seed: int = 0
    progress: Progress | None = None
    tracker: Tracker | None = None
    callbacks: Sequence[object] = ()
    name: str | None = None

    @property
    def context(self) -> int | None:
        """The teacher's longest context in tokens; None: no limit is known."""
        config = self.teacher.config.get_text_config()
        longest: int | None = getattr(config, "max_position_embeddings", None)
        return longest


def count_steps(config: DatasetStageConfig, num_rows: int, num_tokens: int) -> int:
    """Optimiser steps: the least that `epochs`, `max_steps` and `tokens` allow, as far as they are set."""
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


def padded(documents: Sequence[Document], pad: int) -> Batch:
    """One document per row, `[B, T]`, in the form of packed rows (`PackedRows`): padding is a document of its own."""
    ids_BT = torch.full((len(documents), max(map(len, documents))), pad)
    labels_BT = torch.full_like(ids_BT, IGNORED)
    position_BT = torch.arange(ids_BT.shape[1]).repeat(len(documents), 1)
    for row, document in enumerate(documents):
        size, tokens = len(document), torch.tensor(document.tokens)
        ids_BT[row, :size] = tokens
        labels_BT[row, :size] = tokens.masked_fill(torch.tensor(document.loss_mask) == 0, IGNORED)
        position_BT[row, size:] -= size
    return {"input_ids": ids_BT, "position_ids": position_BT, "labels": labels_BT}


def until_last_label(batch: Batch) -> Batch:
    """Drop the columns at the end that have no label in any row."""
    labelled = (batch["labels"] != IGNORED).flatten(0, -2).any(0)
    width = int(labelled.nonzero().max()) + 1
    return {name: tensor[..., :width] for name, tensor in batch.items()}


@contextlib.contextmanager
def without_dropout(student: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the `with` block, also in training mode."""
    rates = [
        (module, key, rate)
        for module in student.modules()
        for key in (("p",) if isinstance(module, nn.Dropout) else ("attention_dropout",))
        if isinstance(rate := getattr(module, key, None), float)
    ]
    for module, key, _ in rates:
        setattr(module, key, 0.0)
    try:
        yield
    finally:
        for module, key, rate in rates:
            setattr(module, key, rate)


def _digest(rows: Sequence[Sized]) -> str:
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
