"""What the callers of the kernels share: sizes of tiles, which tokens have outputs, and memory for results.

Letters: B batch, H heads, T tokens, U of them (the last) with an output, K key dimension, V value dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.ops.layout import Layout

WHOLE_TILE = 128 * 128  # numbers of a state that one program holds without spilling; larger ones are cut along V
NUMBERS_PER_WARP = 2048


@dataclass(frozen=True, kw_only=True)
class StateTile:
    """The part of a state that one program holds, powers of two."""

    key: int
    value: int

    @property
    def warps(self) -> int:
        """Warps of a program: 64 numbers of the tile for each thread."""
        return min(8, max(1, self.key * self.value // NUMBERS_PER_WARP))

    def blocks(self, value_dim: int) -> int:
        """Programs that share one head."""
        return -(-value_dim // self.value)


@dataclass(frozen=True, kw_only=True)
class Span:
    """Which of T tokens have an output (from `first` on), and after how many the state is wanted."""

    tokens: int
    first: int
    commit: int

    @staticmethod
    def of(tokens: int, outputs: int | None, commit: int | None) -> Span:
        """`outputs`, `commit`: None is all."""
        outputs, commit = tokens if outputs is None else outputs, tokens if commit is None else commit
        assert 0 <= commit <= tokens and 0 <= outputs <= tokens, f"commit {commit}, outputs {outputs} of {tokens}"
        return Span(tokens=tokens, first=tokens - outputs, commit=commit)

    @property
    def outputs(self) -> int:
        """Tokens with an output."""
        return self.tokens - self.first


def power_of_two(size: int) -> int:
    """The next power of two, at least 1."""
    return 1 << max(0, size - 1).bit_length()


def tile(key_dim: int, value_dim: int, whole: bool = False) -> StateTile:
    """All keys, and as many values as fit; `whole`: all values, for norms over them."""
    key, value = power_of_two(key_dim), power_of_two(value_dim)
    return StateTile(key=key, value=value if whole else max(1, min(value, WHOLE_TILE // key)))


def positions(layout: Layout, rows: int) -> Tensor | None:
    """Positions as the kernels read them, `[B, T]` contiguous; None for plain layouts."""
    position_BT = layout.position_BT
    return None if position_BT is None else position_BT.expand(rows, -1).contiguous()


def state_memory(like: Tensor, size: tuple[int, ...], memory: Tensor | None) -> Tensor:
    """Where the state is written: `memory` (which may be the state itself), or new memory, fp32."""
    if memory is None:
        return torch.empty(size, dtype=torch.float32, device=like.device)
    assert memory.shape == size and memory.dtype == torch.float32 and memory.is_contiguous()
    return memory


def read_state(state: Tensor | None) -> Tensor | None:
    """The state in fp32, contiguous; the same memory where it is so already."""
    return None if state is None else state.to(torch.float32).contiguous()


def rows_of(x: Tensor) -> Tensor:
    """x with numbers of its last dimension side by side; the same memory where they are so already."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
