"""One pass of the teacher that writes the hidden states at the inputs of blocks, a block in memory at a time; the same
pass mends what is missing or damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from linearize.modeling.blocks import Blocks
from linearize.training.blockwise.hidden_store import DamagedShardError, HiddenStore, Shard, in_parts
from linearize.training.blockwise.rows import StageRows
from linearize.training.config import Batch

MENDINGS = 3  # of one shard, before the disk is blamed
LOG = logging.getLogger("linearize")


class Filler:
    """Fills a store, boundary by boundary; `spans` are the blocks, `micro_batch` rows pass at a time."""

    def __init__(
        self, store: HiddenStore, source: Blocks, rows: StageRows, spans: Sequence[range], micro_batch: int
    ) -> None:
        self.store, self.source, self.rows, self.spans, self.micro_batch = store, source, rows, spans, micro_batch
        self._mended: dict[Shard, int] = {}

    def fill(self, boundary: int) -> None:
        """Write what is missing at a boundary, and before it where that needs it.

        Raises:
            OSError: the disk is full, or gives back other bytes than were written to it.
        """
        while missing := self.store.missing(boundary):
            if boundary > 0:
                self.fill(boundary - 1)
            try:
                self._write(missing, boundary)
            except DamagedShardError as damaged:
                self.mend(damaged)

    def mend(self, damaged: DamagedShardError) -> None:
        """Remove a damaged shard and write it anew. Raises OSError when that has been in vain before."""
        LOG.warning("%s: it is written anew", damaged)
        count = self._mended[damaged.shard] = self._mended.get(damaged.shard, 0) + 1
        if count > MENDINGS:
            raise OSError(f"{damaged}, for the {count}th time: the disk does not keep what is written to it")
        self.store.discard(damaged.shard)
        self.fill(damaged.shard.boundary)

    def _write(self, shards: Sequence[Shard], boundary: int) -> None:
        step = self._step(boundary)
        self.store.write((shard, self._shard(step, shard)) for shard in shards)

    def _shard(self, step: Callable[[str, range], Tensor], shard: Shard) -> Iterator[Tensor]:
        for part in in_parts(range(shard.first, shard.end), self.micro_batch):
            yield step(shard.name, part)

    def _step(self, boundary: int) -> Callable[[str, range], Tensor]:
        """What gives the hidden states of rows at a boundary: the model's entry, or the block before it."""
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
