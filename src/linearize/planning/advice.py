"""What to do about a stage that does not fit, in words and with numbers."""

from __future__ import annotations

from linearize.numbers import size_text
from linearize.planning.report import BlockPlan, Memory
from linearize.training.config import StageConfig


def advice(
    number: int,
    stage: StageConfig,
    missing: str,
    memory: Memory,
    room: int,
    rows: int,
    checkpointed: int | None,
    cheapest: BlockPlan | None,
    devices: int,
) -> str:
    """One sentence: what is missing, and each way out that there is."""
    ways = []
    fixed = memory.peak - memory.activations
    fewer = rows * max(0, room - fixed) // max(1, memory.activations)
    if 1 <= fewer < rows:
        ways.append(f"--set stages.{number}.micro_batch={fewer}")
    if checkpointed is not None:
        least = checkpointed - memory.activations + memory.activations // rows
        if checkpointed <= room:
            ways.append(f"--set stages.{number}.gradient_checkpointing=true ({size_text(checkpointed)})")
        elif least <= room and not ways:
            ways.append(f"gradient_checkpointing=true and micro_batch=1 for stages.{number}")
    if cheapest is not None:
        ways.append(f"--set stages.{number}.block={cheapest.block} ({size_text(cheapest.peak_bytes)} of memory, "
                    f"{size_text(cheapest.disk_bytes)} of disk)")  # fmt: skip
    divided = memory.weights + memory.gradients + memory.optimizer + memory.best
    for more in (2**power for power in range(1, 11)):
        shared = memory.reserve + memory.allocator + divided // more + memory.activations // rows * -(-rows // more)
        if shared <= room:
            ways.append(f"--devices {devices * more} or more")
            break
    ways.append("a device with more memory")
    return f"stages.{number} ({stage.name}) {missing}: {', or '.join(ways)}"
