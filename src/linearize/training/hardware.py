"""What the device computes fast."""

from __future__ import annotations

import torch


def bf16_pays(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones: any accelerator, and CPUs with AVX512-BF16 or AMX."""
    if device.type != "cpu":
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
