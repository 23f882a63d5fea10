"""Teacher and students measured without any of them in memory: their hidden states on held-out rows walk through the
layers side by side, a block at a time, and meet the head at the end.

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
from linearize.modeling.io.streamed_teacher import Ending
from linearize.training.config import Batch

ROWS = "rows"  # the key of a batch's row numbers, [B]


@dataclass(frozen=True, kw_only=True)
class Walker:
    """A model on its way through the layers: the teacher, or (`mixers`: which of a part's tensors) a student."""

    mixers: str | None = None
    branch: str = "both"


class WalkFile:
    """The hidden states of one walker for all held-out rows, changed in place from block to block."""

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
class Walk:
    """Walkers by name over held-out batches; `folder` holds their files until `remove`."""

    walkers: Mapping[str, Walker]
    batches: Sequence[Batch]
    folder: Path
    files: dict[str, WalkFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ends = torch.tensor([len(batch["input_ids"]) for batch in self.batches]).cumsum(0).tolist()
        self.rows = [range(end - len(b["input_ids"]), end) for end, b in zip(ends, self.batches, strict=True)]

    def enter(self, step: Any, model_dim: int, dtype: torch.dtype) -> None:
        """What all of them are given at the first layer: `step(batch) -> [B, T, M]`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        length = self.batches[0]["input_ids"].shape[1]
        count = self.rows[-1].stop
        self.files = {n: WalkFile(self.folder / f"{n}.bin", count, length, model_dim, dtype) for n in self.walkers}
        for batch, rows in zip(self.batches, self.rows, strict=True):
            hidden = step(batch)
            for file in self.files.values():
                file.write(rows, hidden)

    def through(self, block: Block, mixers: Mapping[str, Mapping[str, Tensor]]) -> None:
        """All of them through a block; `mixers`: tensors of the block's student by what `Walker.mixers` names."""
        for name, walker in self.walkers.items():
            if walker.mixers is not None:
                put(block, mixers[walker.mixers])
            for batch, rows in zip(self.batches, self.rows, strict=True):
                hidden = self.files[name].read(rows)
                if walker.mixers is None:
                    after = block.outputs(batch, hidden)
                else:
                    branch = {} if walker.branch == "both" or not mixers[walker.mixers] else {"branch": walker.branch}
                    after = block.student_outputs(batch, hidden, **branch)
                self.files[name].write(rows, after)

    def first(self, name: str) -> Tensor:
        """A walker's hidden states for the first batch."""
        return self.files[name].read(self.rows[0])

    def views(self, ending: Ending, *names: str) -> dict[str, StoredView]:
        """Walkers that have come to the end, as what `score_batches` measures."""
        return {name: StoredView(model=ending.model, file=self.files[name], ending=ending) for name in names}

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

    file: WalkFile
    ending: Ending

    @property
    def vocabulary(self) -> int:
        """Number of logits per token."""
        return self.ending.vocabulary

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits `[B, T, V]` of rows that are numbered one after the other."""
        first = int(batch[ROWS][0])
        return self.ending.logits(batch, self.file.read(range(first, first + len(batch[ROWS]))))


@torch.no_grad()
def put(block: Block, tensors: Mapping[str, Tensor]) -> None:
    """Tensors into the mixers of a block's student, by their names in it."""
    student: nn.Module | None = block.student
    assert student is not None
    own = student.state_dict()
    for name, value in tensors.items():
        own[name].copy_(value)
