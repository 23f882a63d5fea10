"""A stage trained block by block: hidden states written once, then each block by itself with a checkpoint of its own,
in any order, by any number of processes that share the folder (LoLCATs, 2410.10254, section 3.3)."""

from __future__ import annotations

import gc
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from linearize.modeling.blocks import Block, Blocks
from linearize.training.blockwise.block_result import BlockResult, load_result, save_result
from linearize.training.blockwise.hidden_rows import HELDOUT, HIDDEN, SAMPLE, HiddenWriter, StageRows, StoredBatches
from linearize.training.blockwise.hidden_store import DamagedShardError, HiddenStore
from linearize.training.blockwise.leases import Lease, Leases, wait
from linearize.training.config import Batch, LossSum, ParameterGroup, StageConfig, StageRun
from linearize.training.loop import StageResult, run_stage
from linearize.training.progress import Progress
from linearize.training.tracking import Tracker

POLL_SECONDS = 1.0
LOG = logging.getLogger("linearize")


def block_spans(layers: int, block: int) -> list[range]:
    """Blocks of `block` layers; the last one may be shorter."""
    return [range(first, min(first + block, layers)) for first in range(0, layers, block)]


Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockJob:
    """A stage over blocks.

    `folder`: holds hidden states, checkpoints, results and leases; shared by all processes. `identity`: what the
    stage depends on besides its settings, as JSON. `only`: the blocks to train by number, None: all. `calibrate`: gives
    mixers of a block their start from batches of its teacher, where they ask for it. `between`: called before each
    block and while others train; it may raise StopTraining.
    """

    stage: StageConfig
    block: int
    source: Blocks
    rows: StageRows
    folder: Path
    identity: Mapping[str, object]
    only: Sequence[int] | None = None
    calibrate: Callable[[Block, Sequence[Batch]], None] | None = None
    progress: Progress | None = None
    tracker: Tracker | None = None
    callbacks: Sequence[object] = ()
    between: Callable[[], None] | None = None
    name: str


class BlockwiseStage:
    """A running block-wise stage."""

    def __init__(self, job: BlockJob) -> None:
        """Raises InputError: a folder of another run."""
        self.job, source = job, job.source
        self.spans = block_spans(source.layers, job.block)
        self.numbers = list(range(len(self.spans))) if job.only is None else sorted(set(job.only))
        assert not self.numbers or 0 <= self.numbers[0] <= self.numbers[-1] < len(self.spans)
        self.identity = {
            "stage": job.stage.settings(), "length": job.rows.rows.length, "block": job.block,
            **job.identity,
        }  # fmt: skip
        self.store = HiddenStore(
            job.folder / "hidden", job.rows.sizes(), boundaries=len(self.spans), model_dim=source.model_dim,
            dtype=source.dtype, identity={**job.identity, "block": job.block},
        )  # fmt: skip
        self.leases = Leases(job.folder / "leases")
        micro_batch = job.stage.micro_batch or job.stage.batch
        self.writer = HiddenWriter(self.store, source, job.rows, self.spans, micro_batch)

    def run(self) -> list[BlockResult]:
        """Train what no one has trained yet; return the results of the chosen blocks, in order.

        Raises:
            RuntimeError: training diverged; OSError: the disk is full; StopTraining: a callback asked to stop.
        """
        warned = False
        while todo := [number for number in self.numbers if self.result(number) is None]:
            if self.job.between is not None:
                self.job.between()
            if self._train_one(todo) or self._write_inputs(todo):
                continue
            if not warned:
                LOG.warning("waiting for %s", " and ".join(self._others(todo)) or "another process")
                warned = True
            wait(POLL_SECONDS)
        results = [self.result(number) for number in self.numbers]
        return [result for result in results if result is not None]

    def result(self, number: int) -> BlockResult | None:
        """Return the result of a block, None where it has not been trained."""
        return load_result(self.job.folder / "results", self.spans[number], self.identity)

    def _train_one(self, todo: Sequence[int]) -> bool:
        """Train a block whose input is there and that no one else trains."""
        for number in todo:
            if self.store.missing(number):
                continue
            with self.leases.take(f"block-{number}") as lease:
                if lease is not None and self.result(number) is None:
                    save_result(self.job.folder / "results", self._train(number, lease), self.identity)
                    release_memory()
                    return True
        return False

    def _write_inputs(self, todo: Sequence[int]) -> bool:
        """Write the hidden states at the inputs of blocks, unless another process does so."""
        if not any(self.store.missing(number) for number in todo):
            return False
        with self.leases.take("hidden") as lease:
            if lease is None:
                return False
            for boundary in range(max(todo) + 1):
                lease.check()
                if boundary in todo or self.store.missing(boundary):
                    self.writer.write(boundary)
                    release_memory()
            return True

    def _train(self, number: int, lease: Lease) -> BlockResult:
        """Train one block from its checkpoint; write damaged shards again and read them again."""
        block = self.job.source.pair(self.spans[number])
        if self.job.calibrate is not None:
            self.job.calibrate(block, StoredBatches(self.store, number, SAMPLE, self.job.rows.sample))
        start = {name: value.clone() for name, value in mixer_tensors(block).items()}
        result = None
        while result is None:
            _copy_into_mixers(block, start)
            try:
                result = self._run_stage(number, block, lease) if list(block_parameters(block)) else None
                break
            except DamagedShardError as damaged:
                self.writer.repair(damaged)
        final = mixer_tensors(block)
        return BlockResult(layers=block.span, start=_whole(block, start), final=_whole(block, final), stage=result)

    def _run_stage(self, number: int, block: Block, lease: Lease) -> StageResult:
        job, rows = self.job, self.job.rows
        assert block.student is not None
        run = BlockRun(job.stage.build(block.student, block.teacher), block, lease)
        run.calibrate(next(rows.stream(self.store, number, 0)))
        name = f"layers-{block.span[0]:03d}-{block.span[-1]:03d}"
        return run_stage(
            run, job.stage, lambda first: rows.stream(self.store, number, first),
            StoredBatches(self.store, number, HELDOUT, rows.heldout), length=rows.rows.length,
            checkpoint_dir=job.folder / "checkpoints" / name, identity={**self.identity, "layers": list(block.span)},
            name=f"{job.name}/{name}", progress=job.progress, tracker=job.tracker, callbacks=job.callbacks,
            alone=True,
        )  # fmt: skip

    def _others(self, todo: Sequence[int]) -> list[str]:
        holders = [self.leases.holder(name) for name in ("hidden", *(f"block-{number}" for number in todo))]
        return list(dict.fromkeys(holder for holder in holders if holder is not None))


class BlockRun(StageRun):
    """A stage over a block: each batch brings the hidden states that the block starts from."""

    def __init__(self, run: StageRun, block: Block, lease: Lease | None = None) -> None:
        self.run, self.block, self.lease = run, block, lease

    def parameter_groups(self) -> list[ParameterGroup]:
        """As the stage's."""
        return self.run.parameter_groups()

    def loss(self, batch: Batch) -> LossSum:
        """As the stage's. Raises RuntimeError where another process has taken the block over."""
        if self.lease is not None:
            self.lease.check()
        return self._with_hidden(self.run.loss, batch)

    def heldout_loss(self, batch: Batch) -> LossSum:
        """As the stage's."""
        return self._with_hidden(self.run.heldout_loss, batch)

    def calibrate(self, batch: Batch) -> None:
        """As the stage's."""
        placed = {name: value.to(self.block.device) for name, value in batch.items()}
        self._with_hidden(self.run.calibrate, placed)

    def finish(self) -> None:
        """As the stage's."""
        self.run.finish()

    def _with_hidden(self, work: Callable[[Batch], Result], batch: Batch) -> Result:
        with self.block.hidden_input.holding(self.block.placed(batch[HIDDEN])):
            return work({name: value for name, value in batch.items() if name != HIDDEN})


def mixer_tensors(block: Block) -> dict[str, Tensor]:
    """Parameters and buffers of a block's mixers by their names in the block."""
    assert block.student is not None
    return {name: value for name, value in block.student.state_dict().items() if ".mixer." in name}


def block_parameters(block: Block) -> dict[str, nn.Parameter]:
    """What could train in a block."""
    assert block.student is not None
    return block.student.mixer_parameters()


def whole_name(block: Block, name: str) -> str:
    """The name in the whole student of a tensor of a block's student."""
    prefix = f"lm.{block.layers}."
    if not name.startswith(prefix):
        return name
    number, rest = re.fullmatch(r"(\d+)(\..*)", name.removeprefix(prefix)).groups()  # type: ignore[union-attr]
    return f"{prefix}{int(number) + block.span.start}{rest}"


def _whole(block: Block, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {whole_name(block, name): value for name, value in tensors.items()}


@torch.no_grad()
def _copy_into_mixers(block: Block, tensors: Mapping[str, Tensor]) -> None:
    for name, value in mixer_tensors(block).items():
        value.copy_(tensors[name])


def release_memory() -> None:
    """Return freed memory to the system, as far as the C library allows."""
    gc.collect()
    try:
        import ctypes

        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        pass
