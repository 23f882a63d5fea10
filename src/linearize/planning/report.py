"""What a plan says, as values: JSON-able, sizes in bytes, times in seconds."""

from __future__ import annotations

from dataclasses import dataclass


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
