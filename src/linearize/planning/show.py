"""A plan as people read it."""

from __future__ import annotations

from collections.abc import Iterator

from linearize.numbers import size_text
from linearize.planning.report import BlockPlan, ConversionPlan, StagePlan


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
    """Seconds for people."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def count_text(count: float) -> str:
    """A number of things for people: `8.03B`."""
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
