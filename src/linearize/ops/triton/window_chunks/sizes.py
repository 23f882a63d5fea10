"""Tiles of the kernels of window + linear attention, and the tables that say which token stands where.

Letters: B batch, N chunks, C chunk, A = N C places, S slots (ring, then new tokens), H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.triton.launch import power_of_two
from linearize.ops.window_linear.slots import Alignment, Slots, align
from linearize.ops.window_linear.spec import WindowLinear

SMALLEST_DOT = 16
CHUNKS_PER_RUN = 8


@dataclass(frozen=True)
class Sizes:
    """Tokens of a chunk, and chunks that one program goes through."""

    chunk: int
    per_run: int = CHUNKS_PER_RUN


def block(size: int) -> int:
    """A power of two that a matrix product takes."""
    return max(SMALLEST_DOT, power_of_two(size))


@dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """Where tokens stand, int32 and contiguous.

    `slot: [B or 1, A]`, -1 for none. `first`, `follows`, `keep: [B or 1, N]`: the position of the chunk's first place,
    whether chunk n - 1 holds the same document, whether the sum is carried into the chunk. `begins`: the first position
    of the chunk's document; None: 0 in all of them.
    """

    slot: Tensor
    first: Tensor
    follows: Tensor
    keep: Tensor
    chunks: int
    begins: Tensor | None = None

    @property
    def strides(self) -> tuple[int, int]:
        """From row to row of `slot` and of the others; 0 where all rows are alike."""
        return tuple(0 if len(x) == 1 else x.stride(0) for x in (self.slot, self.first))  # type: ignore[return-value]

    @staticmethod
    def of(slots: Slots, layout: Layout, chunk: int, spec: WindowLinear) -> tuple[Tables, Alignment]:
        """The tables of a call; computed once for all layers that share layout and window."""
        made = align(slots, layout, chunk, spec)
        key = ("tables", chunk, spec.window, spec.shape, slots.num_past)
        if slots.num_past == 0 and key in layout.memo:
            tables: Tables = layout.memo[key]
            return tables, made
        tables = _tables(made, slots, chunk)
        if slots.num_past == 0:
            layout.memo[key] = tables
        return tables, made

    @staticmethod
    def in_a_row(weight_BS: Tensor | None, size: int, chunk: int, device: torch.device) -> Tables:
        """All slots in order, those of weight 0 left out: for sums over slots. Whole runs, and a chunk more."""
        chunks = -(-(-(-size // chunk) + 2) // CHUNKS_PER_RUN) * CHUNKS_PER_RUN + 1
        slot = torch.arange(chunks * chunk, device=device)[None]
        slot = torch.where(slot < size, slot, -1)
        if weight_BS is not None:
            kept = torch.nn.functional.pad(weight_BS, (0, chunks * chunk - size))
            slot = torch.where(kept > 0, slot, -1)
        ones = torch.ones(len(slot), chunks, device=device)
        return Tables(
            slot=_ints(slot), first=_ints(ones - 1), follows=_ints(ones), keep=_ints(ones), chunks=chunks
        )  # fmt: skip


def _tables(made: Alignment, slots: Slots, chunk: int) -> Tables:
    source = made.source_BA
    if source is None:
        place = torch.arange(made.num_chunks * chunk, device=made.first_BN.device)[None]
        source = torch.where(place < slots.k_BGSD.shape[2], place, -1)
    rows = max(len(x) for x in (source, made.first_BN, made.follows_BN, made.carried_B1))
    keep = torch.cat([made.carried_B1, made.follows_BN[:, 1:]], dim=1)
    tables = (x.expand(rows, -1) for x in (source, made.first_BN, made.follows_BN, keep))
    slot, first, follows, kept = (_ints(x) for x in tables)
    begins = None if made.begin_BN is None else _ints(made.begin_BN.expand(rows, -1))
    return Tables(slot=slot, first=first, follows=follows, keep=kept, chunks=made.num_chunks, begins=begins)


def _ints(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()
