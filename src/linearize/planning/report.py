"""The result of `linearize plan`: values (JSON-able, sizes in bytes, times in seconds), and its lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from linearize.numbers import size_text


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at a stage's peak.

    `weights`: teacher and student, what they share once, new parameters included. `best`: the best weights so far.
    `activations`: what is kept for the backward pass and lives beside it, logits included; of the step, of the
    calibration of its loss or of the held-out text, whichever is most. `allocator`: freed
    memory that the process keeps, and what it loads besides. `reserve`: the process or the driver.
    """

    weights: int
    gradients: int
    optimizer: int
    best: int
    activations: int
    allocator: int
    reserve: int

    @property
    def peak(self) -> int:
        """All of them."""
        tensors = self.weights + self.gradients + self.optimizer + self.best + self.activations
        return tensors + self.allocator + self.reserve


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """Training by blocks of `block` layers: their number, bytes of memory at the peak, bytes of hidden states."""

    block: int
    blocks: int
    peak_bytes: int
    disk_bytes: int


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage. `seconds` with `sending_seconds`, what devices send each other, where that takes longer than the work
    beside it. `tokens` as trained on; `flops` as torch's FlopCounterMode counts; `memory` with all layers at once;
    `peak_bytes` as the stage is run (by blocks where `runs_by_block`); `checkpointed_bytes`: the peak with gradient
    checkpointing where the stage can do it and does not; `cheapest`: the fewest blocks that fit; `advice`: what to do
    where the stage does not fit."""

    stage: str
    tokens: int
    steps: int
    length: int
    batch: int
    micro_batch: int
    trained_parameters: int
    flops: float
    seconds: float
    sending_seconds: float
    memory: Memory
    peak_bytes: int
    checkpointed_bytes: int | None
    checkpoint_bytes: int
    cheapest: BlockPlan | None
    runs_by_block: BlockPlan | None
    fits: bool
    advice: str | None


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """The whole conversion. `measuring_bytes`: the peak of the measurements between and after the stages.
    `loading_bytes`: while the student is read back at the end, its file in memory beside it, and the conversion still
    there. `reserve_bytes`: of each peak what the process or the driver takes by itself. `disk_bytes`: hidden states,
    checkpoints and the student together."""

    teacher: str
    recipe: str
    device: str
    devices: int
    device_bytes: int
    parameters: int
    student_parameters: int
    stages: tuple[StagePlan, ...]
    measuring_bytes: int
    loading_bytes: int
    reserve_bytes: int
    student_bytes: int
    hidden_bytes: int
    disk_bytes: int
    peak_bytes: int
    flops: float
    seconds: float
    fits: bool
    notices: tuple[str, ...]


def plan_lines(plan: ConversionPlan) -> Iterator[str]:
    """The plan: a table of the stages, then totals, blocks, and what does not fit."""
    many = f"{plan.devices} x {plan.device}" if plan.devices > 1 else plan.device
    yield f"{plan.teacher}: {count_text(plan.parameters)} parameters, recipe {plan.recipe}, on {many} "\
          f"({size_text(plan.device_bytes)} each)"  # fmt: skip
    yield ""
    yield from _columns([_HEAD, *(_row(stage) for stage in plan.stages)])
    yield ""
    yield f"measuring     {size_text(plan.measuring_bytes)} at the peak, between the stages and at the end"
    yield f"disk          {size_text(plan.disk_bytes)}: student {size_text(plan.student_bytes)}, "\
          f"hidden states {size_text(plan.hidden_bytes)}, the rest checkpoints"  # fmt: skip
    yield f"in all        {plan.flops:.3g} FLOPs, about {time_text(plan.seconds)}, "\
          f"{size_text(plan.peak_bytes)} a device"  # fmt: skip
    for stage in plan.stages:
        if stage.cheapest is not None:
            yield f"{stage.stage} by blocks: {_blocks(stage.cheapest)} is the cheapest that fits"
        if stage.runs_by_block is not None:
            yield f"{stage.stage} runs by blocks: {_blocks(stage.runs_by_block)}"
    for stage in plan.stages:
        if stage.advice:
            yield f"does not fit: {stage.advice}"
    yield from (f"note: {notice}" for notice in plan.notices)


def time_text(seconds: float) -> str:
    """Seconds as text."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def count_text(count: float) -> str:
    """A count as text: `8.03B`."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"


_HEAD = ("stage", "tokens", "rows", "trains", "weights", "grads", "AdamW", "best", "activations", "peak",
         "checkpointed", "FLOPs", "time")  # fmt: skip


def _row(stage: StagePlan) -> tuple[str, ...]:
    memory = stage.memory
    sizes = (memory.weights, memory.gradients, memory.optimizer, memory.best, memory.activations, memory.peak)
    return (
        stage.stage,
        count_text(stage.tokens),
        f"{stage.micro_batch}x{stage.length}",
        count_text(stage.trained_parameters),
        *(size_text(size) for size in sizes),
        "-" if stage.checkpointed_bytes is None else size_text(stage.checkpointed_bytes),
        f"{stage.flops:.3g}",
        time_text(stage.seconds),
    )


def _columns(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(
            cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )


def _blocks(block: BlockPlan) -> str:
    return f"k = {block.block}, {block.blocks} blocks, {size_text(block.peak_bytes)} of memory, "\
           f"{size_text(block.disk_bytes)} of disk"  # fmt: skip
