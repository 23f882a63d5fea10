"""Which tokens a window holds, and from where on they are folded into the state."""

from __future__ import annotations

from typing import Literal, TypeVar

import torch
from torch import Tensor

WindowShape = Literal["terraced", "sliding"]
Position = TypeVar("Position", int, Tensor)


def in_window(query: Tensor, key: Tensor, window: int, shape: WindowShape) -> Tensor:
    """Whether `key` (a position, not after `query`) is inside the query's window; broadcasts.

    Sliding: the last `window` tokens. Terraced: with b = floor(n / window), blocks b - 1 and b (LoLCATs, 2410.10254,
    section 3.3).
    """
    if window == 0:
        return torch.zeros_like(query - key, dtype=torch.bool)
    if shape == "sliding":
        return query - key < window
    return query // window - key // window < 2


def fold_boundary(next_position: Position, window: int, shape: WindowShape) -> Position:
    """First position that is still in the window of a query at `next_position`; everything before it is in the
    state."""
    if window == 0:
        return next_position
    start = next_position - window + 1 if shape == "sliding" else (next_position // window - 1) * window
    return max(start, 0) if isinstance(start, int) else start.clamp(min=0)


def most_leaving(num_tokens: int, window: int, shape: WindowShape) -> int:
    """The most positions that `fold_boundary` passes while so many tokens come."""
    return window * -(-num_tokens // window) if window and shape == "terraced" else num_tokens


def ring_slots(window: int, shape: WindowShape) -> int:
    """The most tokens that can wait in the ring before they are folded."""
    if window == 0:
        return 0
    return window - 1 if shape == "sliding" else 2 * window - 1


MOST_CHUNK = 128  # tokens of a chunk that a program of a kernel holds


def chunk_of(window: int, shape: WindowShape) -> int:
    """Tokens of a kernel's chunk, a power of two: a terraced window's block, so that nothing of two chunks lies beyond
    the window, or else at least the window's reach."""
    block = 1 << max(0, window - 1).bit_length()
    if shape == "terraced" and window >= 64 and block == window:
        return window
    reach = window if shape == "sliding" else 2 * window - 1
    return max(64, 1 << max(0, reach - 1).bit_length())
