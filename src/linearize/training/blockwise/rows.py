"""The rows whose hidden states a block-wise stage needs, and its batches with those states.

Letters: N rows, T tokens, M model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import overload

import torch
from torch import Tensor

from linearize.training.blockwise.hidden_store import HiddenStore
from linearize.training.config import Batch, StageConfig
from linearize.training.data.packing import PackedRows, epoch_order, step_rows
from linearize.training.schedule import count_steps

HIDDEN = "hidden"  # the key of a batch's hidden states at the block's input, [B, T, M]
TRAIN, HELDOUT, SAMPLE = "train", "heldout", "sample"


class StageRows:
    """Training rows in the order of their first use (so that the first epoch reads them one after the other), the
    held-out rows, and those that calibrate mixers."""

    def __init__(
        self, stage: StageConfig, rows: PackedRows, heldout: Sequence[Batch], sample: Sequence[Batch] = ()
    ) -> None:
        self.stage, self.rows, self.heldout, self.sample = stage, rows, list(heldout), list(sample)
        used = min(len(rows), count_steps(stage, rows.length) * stage.batch)
        self.order = [int(row) for row in epoch_order(len(rows), stage.seed, 0)[:used]]
        self._place = {row: place for place, row in enumerate(self.order)}

    def sizes(self) -> dict[str, tuple[int, int]]:
        """By name: number of rows, tokens a row."""
        found = {TRAIN: (len(self.order), self.rows.length)}
        for name, batches in ((HELDOUT, self.heldout), (SAMPLE, self.sample)):
            if batches:
                found[name] = (sum(len(b["input_ids"]) for b in batches), batches[0]["input_ids"].shape[1])
        return found

    @property
    def tokens(self) -> int:
        """All that are stored at a boundary."""
        return sum(rows * length for rows, length in self.sizes().values())

    def inputs(self, name: str, rows: range) -> Batch:
        """The tokens of stored rows, by their number in the store."""
        if name == TRAIN:
            return self.rows.take([self.order[row] for row in rows])
        batches = self.heldout if name == HELDOUT else self.sample
        joined = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        return {key: value[rows.start : rows.stop] for key, value in joined.items()}

    def stream(self, store: HiddenStore, boundary: int, first_step: int) -> Iterator[Batch]:
        """The batches of the joint loop from a step on, with the hidden states at a boundary, which hold until the
        next batch but one is read."""
        buffers = [store.buffer(TRAIN, self.stage.batch) for _ in range(2)]
        for step in count(first_step):
            rows = step_rows(len(self.rows), self.stage.batch, self.stage.seed, step)
            hidden = store.read(boundary, TRAIN, [self._place[row] for row in rows], buffers[step % 2])
            yield {**self.rows.take(rows), HIDDEN: hidden}


class StoredBatches(Sequence[Batch]):
    """Batches with their hidden states at a boundary, which are read when a batch is asked for."""

    def __init__(self, store: HiddenStore, boundary: int, name: str, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self._store, self._boundary, self._name = store, boundary, name
        ends = torch.tensor([len(batch["input_ids"]) for batch in batches]).cumsum(0).tolist()
        self._rows = [range(end - len(b["input_ids"]), end) for end, b in zip(ends, batches, strict=True)]
        self._batches = list(batches)

    def __len__(self) -> int:
        return len(self._batches)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...

    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        hidden = self._store.read(self._boundary, self._name, self._rows[index])
        return {**self._batches[index], HIDDEN: hidden}
