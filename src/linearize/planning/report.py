"""The result of `linearize plan`: values (JSON-able, sizes in bytes, times in seconds), and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from linearize.numbers import size_text
from linearize.tables import NOTHING, print_pairs, print_table


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at a stage's peak.

    `weights`: teacher and student, what they share once, new parameters included. `best`: the best weights so far.
    `activations`: what is kept for the backward pass and what is alive during it, logits included; of the step, of the
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
    """One stage. `seconds` includes `sending_seconds` (what devices send each other) where that takes longer than the
    work it overlaps with. `tokens` as trained on; `flops` as torch's FlopCounterMode counts; `memory` with all layers
    at once; `peak_bytes` as the stage is run (by blocks where `runs_by_block`); `checkpointed_bytes`: the peak with
    gradient checkpointing where the stage can do it and does not; `cheapest`: the fewest blocks that fit; `advice`:
    what to do where the stage does not fit."""

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
    `loading_bytes`: the peak while the student is read back at the end, with its file and the conversion in memory.
    `reserve_bytes`: the part of each peak that the process or the driver takes by itself. `disk_bytes`: hidden states,
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


def print_plan(plan: ConversionPlan, console: Console) -> None:
    """Print the plan: a table of the stages, then totals, blocks, and what does not fit."""
    device = f"{plan.devices} x {plan.device}" if plan.devices > 1 else plan.device
    console.print(
        f"{plan.teacher}: {count_text(plan.parameters)} parameters, recipe {plan.recipe}, on {device} "
        f"({size_text(plan.device_bytes)} each)\n"
    )
    print_table(console, [_row(stage) for stage in plan.stages])
    console.print()
    disk = f"student {size_text(plan.student_bytes)}, hidden states {size_text(plan.hidden_bytes)}"
    totals = {
        "measuring": f"{size_text(plan.measuring_bytes)} at the peak, between the stages and at the end",
        "disk": f"{size_text(plan.disk_bytes)}: {disk}, the rest checkpoints",
        "in all": f"{plan.flops:.3g} FLOPs, about {time_text(plan.seconds)}, {size_text(plan.peak_bytes)} a device",
    }
    print_pairs(console, totals)
    for stage in plan.stages:
        if stage.cheapest is not None:
            console.print(f"{stage.stage} by blocks: {_blocks(stage.cheapest)} is the cheapest that fits")
        if stage.runs_by_block is not None:
            console.print(f"{stage.stage} runs by blocks: {_blocks(stage.runs_by_block)}")
    for stage in plan.stages:
        if stage.advice:
            console.print(f"does not fit: {stage.advice}")
    for notice in plan.notices:
        console.print(f"note: {notice}")


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


def _row(stage: StagePlan) -> dict[str, str]:
    memory = stage.memory
    return {
        "stage": stage.stage,
        "tokens": count_text(stage.tokens),
        "rows": f"{stage.micro_batch}x{stage.length}",
        "trains": count_text(stage.trained_parameters),
        "weights": size_text(memory.weights),
        "grads": size_text(memory.gradients),
        "AdamW": size_text(memory.optimizer),
        "best": size_text(memory.best),
        "activations": size_text(memory.activations),
        "peak": size_text(memory.peak),
        "checkpointed": NOTHING if stage.checkpointed_bytes is None else size_text(stage.checkpointed_bytes),
        "FLOPs": f"{stage.flops:.3g}",
        "time": time_text(stage.seconds),
    }


def _blocks(block: BlockPlan) -> str:
    return f"k = {block.block}, {block.blocks} blocks, {size_text(block.peak_bytes)} of memory, "\
           f"{size_text(block.disk_bytes)} of disk"  # fmt: skip
