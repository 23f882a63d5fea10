"""What the device computes fast."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch

from linearize.ops.matmul import has_bf16_units
from linearize.training.config import StageConfig

Stage = TypeVar("Stage", bound=StageConfig)


def bf16_pays(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones: any accelerator, and CPUs with AVX512-BF16 or AMX."""
    if device.type != "cpu":
        return True
    return has_bf16_units()


def resident_bytes() -> int:
    """Bytes of memory that this process has now; 0 where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def computed_on(stage: Stage, device: torch.device) -> Stage:
    """The stage as it is computed on a device: in fp32 where bf16 would be slower."""
    if stage.precision == "fp32" or bf16_pays(device):
        return stage
    return stage.model_copy(update={"precision": "fp32"})
