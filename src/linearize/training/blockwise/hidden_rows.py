"""The rows whose hidden states a block-wise stage needs: one pass of the teacher writes them, training reads them.

Letters: B rows of a batch, N rows, T tokens, M model width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import overload

import torch
from torch import Tensor

from linearize.modeling.blocks import Blocks
from linearize.training.blockwise.hidden_store import DamagedShardError, HiddenStore, Shard, in_parts
from linearize.training.config import Batch, StageConfig, count_steps
from linearize.training.data.packing import BatchSource, epoch_order, step_rows

HIDDEN = "hidden"  # the key of a batch's hidden states at the block's input, [B, T, M]
TRAIN, HELDOUT, SAMPLE = "train", "heldout", "sample"
MAX_REPAIRS = 3  # of one shard, before the disk is blamed
LOG = logging.getLogger("linearize")


class StageRows:
    """Training rows, held-out rows, and rows that calibrate mixers.

    Training rows are in the order of their first use, so that the first epoch reads the store in sequence.
    """

    def __init__(
        self, stage: StageConfig, rows: BatchSource, heldout: Sequence[Batch], sample: Sequence[Batch] = ()
    ) -> None:
        self.stage, self.rows, self.heldout, self.sample = stage, rows, list(heldout), list(sample)
        used = min(len(rows), count_steps(stage, rows.length) * stage.batch)
        self.order = [int(row) for row in epoch_order(len(rows), stage.seed, 0)[:used]]
        self._place = {row: place for place, row in enumerate(self.order)}

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return the number of rows and the tokens of a row, by name."""
        sizes = {TRAIN: (len(self.order), self.rows.length)}
        for name, batches in ((HELDOUT, self.heldout), (SAMPLE, self.sample)):
            if batches:
                sizes[name] = (sum(len(b["input_ids"]) for b in batches), batches[0]["input_ids"].shape[1])
        return sizes

    @property
    def tokens(self) -> int:
        """All tokens that are stored at a boundary."""
        return sum(rows * length for rows, length in self.sizes().values())

    def inputs(self, name: str, rows: range) -> Batch:
        """Return the tokens of stored rows, by their number in the store."""
        if name == TRAIN:
            return self.rows.take([self.order[row] for row in rows])
        batches = self.heldout if name == HELDOUT else self.sample
        joined = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        return {key: value[rows.start : rows.stop] for key, value in joined.items()}

    def stream(self, store: HiddenStore, boundary: int, first_step: int) -> Iterator[Batch]:
        """Yield the batches of the joint loop from a step on, with the hidden states at a boundary.

        The hidden states are valid until the next batch but one is read.
        """
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


class HiddenWriter:
    """Writes the hidden states at the inputs of blocks, one block of the teacher in memory at a time.

    `spans`: the blocks. `micro_batch`: rows that pass at a time.
    """

    def __init__(
        self, store: HiddenStore, source: Blocks, rows: StageRows, spans: Sequence[range], micro_batch: int
    ) -> None:
        self.store, self.source, self.rows, self.spans, self.micro_batch = store, source, rows, spans, micro_batch
        self._repairs: dict[Shard, int] = {}

    def write(self, boundary: int) -> None:
        """Write the shards that are missing at a boundary, and those before it that they depend on.

        Raises:
            OSError: the disk is full, or gives back other bytes than were written to it.
        """
        while missing := self.store.missing(boundary):
            if boundary > 0:
                self.write(boundary - 1)
            try:
                self._write(missing, boundary)
            except DamagedShardError as damaged:
                self.repair(damaged)

    def repair(self, damaged: DamagedShardError) -> None:
        """Remove a damaged shard and write it again. Raises OSError after several attempts."""
        LOG.warning("%s: it is written again", damaged)
        count = self._repairs[damaged.shard] = self._repairs.get(damaged.shard, 0) + 1
        if count > MAX_REPAIRS:
            raise OSError(f"{damaged}, for the {count}th time: the disk does not keep what is written to it")
        self.store.discard(damaged.shard)
        self.write(damaged.shard.boundary)

    def _write(self, shards: Sequence[Shard], boundary: int) -> None:
        step = self._step(boundary)
        self.store.write((shard, self._shard(step, shard)) for shard in shards)

    def _shard(self, step: Callable[[str, range], Tensor], shard: Shard) -> Iterator[Tensor]:
        for part in in_parts(range(shard.first, shard.end), self.micro_batch):
            yield step(shard.name, part)

    def _step(self, boundary: int) -> Callable[[str, range], Tensor]:
        """Return what computes the hidden states of rows at a boundary: the model's entry, or the block before it."""
        if boundary == 0:
            enter = self.source.enter()
            return lambda name, rows: enter(self._placed(name, rows))
        block = self.source.teacher(self.spans[boundary - 1])

        def step(name: str, rows: range) -> Tensor:
            return block.outputs(self._placed(name, rows), self.store.read(boundary - 1, name, rows))

        return step

    def _placed(self, name: str, rows: range) -> Batch:
        batch: Mapping[str, torch.Tensor] = self.rows.inputs(name, rows)
        return {key: value.to(self.source.device) for key, value in batch.items()}
