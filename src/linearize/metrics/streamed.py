"""Measures teacher and students without any of them in memory: their hidden states on held-out rows pass through the
layers side by side, a block at a time, and through the head at the end.

Letters: B rows, T tokens a row, M model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.metrics.token_scores import View
from linearize.modeling.blocks import Block
from linearize.modeling.io.streamed_teacher import LMHead
from linearize.training.config import Batch

ROWS = "rows"  # the key of a batch's row numbers, [B]


@dataclass(frozen=True, kw_only=True)
class StreamedModel:
    """A model to run: the teacher, or a student (`mixers`: which of a block's trained tensors it has)."""

    mixers: str | None = None
    branch: str = "both"


class HiddenFile:
    """The hidden states of one model for all held-out rows, changed in place from block to block."""

    def __init__(self, path: Path, rows: int, length: int, model_dim: int, dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, (length, model_dim), dtype
        self.row_bytes = length * model_dim * dtype.itemsize
        with path.open("wb") as file:
            file.truncate(rows * self.row_bytes)

    def write(self, rows: range, hidden_BTM: Tensor) -> None:
        """Replace some rows."""
        numbers: Any = hidden_BTM.detach().to("cpu", self.dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
        with self.path.open("r+b") as file:
            file.seek(rows.start * self.row_bytes)
            file.write(memoryview(numbers))

    def read(self, rows: range) -> Tensor:
        """Some rows, `[B, T, M]`."""
        hidden = torch.empty(len(rows), *self.shape, dtype=self.dtype)
        numbers: Any = hidden.view(-1).view(torch.uint8).numpy()
        with self.path.open("rb") as file:
            file.seek(rows.start * self.row_bytes)
            assert file.readinto(memoryview(numbers)) == len(numbers), f"{self.path} has changed"
        return hidden


@dataclass(kw_only=True, eq=False)
class StreamedForward:
    """Models by name over held-out batches; `folder` holds their files until `remove`."""

    models: Mapping[str, StreamedModel]
    batches: Sequence[Batch]
    folder: Path
    files: dict[str, HiddenFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ends = torch.tensor([len(batch["input_ids"]) for batch in self.batches]).cumsum(0).tolist()
        self.rows = [range(end - len(b["input_ids"]), end) for end, b in zip(ends, self.batches, strict=True)]

    def enter(self, step: Any, model_dim: int, dtype: torch.dtype) -> None:
        """The input of all of them at the first layer: `step(batch) -> [B, T, M]`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        length = self.batches[0]["input_ids"].shape[1]
        count = self.rows[-1].stop
        self.files = {n: HiddenFile(self.folder / f"{n}.bin", count, length, model_dim, dtype) for n in self.models}
        for batch, rows in zip(self.batches, self.rows, strict=True):
            hidden = step(batch)
            for file in self.files.values():
                file.write(rows, hidden)

    def through(self, block: Block, mixers: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Run all through a block; `mixers`: tensors of the block's student by what `StreamedModel.mixers` names."""
        for name, model in self.models.items():
            if model.mixers is not None:
                put(block, mixers[model.mixers])
            for batch, rows in zip(self.batches, self.rows, strict=True):
                hidden = self.files[name].read(rows)
                if model.mixers is None:
                    after = block.outputs(batch, hidden)
                else:
                    branch = {} if model.branch == "both" or not mixers[model.mixers] else {"branch": model.branch}
                    after = block.student_outputs(batch, hidden, **branch)
                self.files[name].write(rows, after)

    def first(self, name: str) -> Tensor:
        """A model's hidden states for the first batch."""
        return self.files[name].read(self.rows[0])

    def views(self, head: LMHead, *names: str) -> dict[str, StoredView]:
        """Models that have come to the end, as what `score_batches` measures."""
        return {name: StoredView(model=head.model, file=self.files[name], head=head) for name in names}

    def numbered(self) -> list[Batch]:
        """The batches with the numbers of their rows, for views."""
        return [
            {**batch, ROWS: torch.arange(rows.start, rows.stop)}
            for batch, rows in zip(self.batches, self.rows, strict=True)
        ]

    def remove(self) -> None:
        """The files are no longer needed."""
        for file in self.files.values():
            file.path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class StoredView(View):
    """A model whose last hidden states are stored."""

    file: HiddenFile
    head: LMHead

    @property
    def vocabulary(self) -> int:
        """Number of logits per token."""
        return self.head.vocabulary

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits `[B, T, V]` of rows that are numbered one after the other."""
        first = int(batch[ROWS][0])
        return self.head.logits(batch, self.file.read(range(first, first + len(batch[ROWS]))))


@torch.no_grad()
def put(block: Block, tensors: Mapping[str, Tensor]) -> None:
    """Tensors into the mixers of a block's student, by their names in it."""
    student: nn.Module | None = block.student
    assert student is not None
    own = student.state_dict()
    for name, value in tensors.items():
        own[name].copy_(value)
