"""Training by blocks of layers on saved hidden states: models larger than memory (LoLCATs, 2410.10254, section 3.3)."""

from __future__ import annotations

from linearize.training.blockwise.budget import BlockSizes, block_peak_bytes, boundary_bytes, check_block, choose_block

__all__ = ["BlockSizes", "block_peak_bytes", "boundary_bytes", "check_block", "choose_block"]
