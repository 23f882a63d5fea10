"""Rows with padding and several documents as one row of whole sequences: what kernels with `cu_seqlens` take.

Dead tokens are left out, and each document is a sequence by itself; that a row begins with carries on the row's state.

Letters: B batch, T tokens, H heads, L live tokens of all rows, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.ops.layout import Layout


@dataclass(frozen=True, eq=False)
class Packed:
    """`live_L`: where the live tokens are among all of all rows. `bounds`: `cu_seqlens`, `[S + 1]` int64.

    `row_S`: the row of each sequence. `carries_S`: whether it goes on from the row's state. `last_B`: the sequence that
    ends each row; `any_B`: whether there is one.
    """

    rows: int
    tokens: int
    live_L: Tensor
    bounds: Tensor
    row_S: Tensor
    carries_S: Tensor
    last_B: Tensor
    any_B: Tensor

    def take(self, x_BHT: Tensor) -> Tensor:
        """`[B, H, T, ...] -> [1, L, H, ...]`."""
        return x_BHT.transpose(1, 2).flatten(0, 1)[self.live_L][None]

    def put(self, y_1LH: Tensor) -> Tensor:
        """`[1, L, H, ...] -> [B, H, T, ...]`, 0 at dead tokens."""
        y = y_1LH.new_zeros(self.rows * self.tokens, *y_1LH.shape[2:]).index_copy(0, self.live_L, y_1LH[0])
        return y.unflatten(0, (self.rows, self.tokens)).transpose(1, 2)

    def first_states(self, state_B: Tensor | None) -> Tensor | None:
        """The state before each sequence, `[S, ...]`; None: zeros."""
        if state_B is None:
            return None
        return state_B[self.row_S] * self.carries_S.view(-1, *(1,) * (state_B.dim() - 1)).to(state_B.dtype)

    def last_states(self, after_S: Tensor, state_B: Tensor | None) -> Tensor:
        """The state after each row, `[B, ...]`: that before it where no token is alive."""
        last = after_S[self.last_B]
        before = torch.zeros_like(last) if state_B is None else state_B
        return last.where(self.any_B.view(-1, *(1,) * (last.dim() - 1)), before)


def packed(layout: Layout, rows: int, tokens: int, device: torch.device) -> Packed:
    """The sequences of a ragged layout, at least one token alive; once for all layers that share it. Waits for the
    device."""
    key = ("packed", rows, tokens)
    if key not in layout.memo:
        layout.memo[key] = _packed(layout, rows, tokens, device)
    sequences: Packed = layout.memo[key]
    return sequences


def _packed(layout: Layout, rows: int, tokens: int, device: torch.device) -> Packed:
    everywhere = torch.ones(1, 1, dtype=torch.bool, device=device)
    live, opens = layout.live(), layout.starts(tokens, device)
    live_BT = (everywhere if live is None else live).expand(rows, tokens)
    opens_BT = (~everywhere if opens is None else opens).expand(rows, tokens)
    live_L = live_BT.flatten().nonzero()[:, 0]
    row_L, opens_L = live_L // tokens, opens_BT.flatten()[live_L]
    first_L = torch.ones_like(opens_L)
    first_L[1:] = opens_L[1:] | (row_L[1:] != row_L[:-1])
    begin_S = first_L.nonzero()[:, 0]
    row_S = row_L[begin_S]
    bounds = torch.cat([begin_S, begin_S.new_tensor([len(live_L)])])
    count_B = torch.bincount(row_S, minlength=rows)
    return Packed(
        rows=rows,
        tokens=tokens,
        live_L=live_L,
        bounds=bounds,
        row_S=row_S,
        carries_S=~opens_L[begin_S],
        last_B=(count_B.cumsum(0) - 1).clamp(min=0),
        any_B=count_B > 0,
    )


def in_sequences(
    call: Callable[[tuple[Tensor, ...], Tensor | None, Tensor | None], tuple[Tensor, Tensor]],
    inputs_BHT: tuple[Tensor, ...],
    layout: Layout,
    state_B: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A kernel's `y: [B, H, T, V]` and state after each row.

    `call(inputs [B, T, H, ...] contiguous, states before, cu_seqlens or None) -> (y: [B, T, H, V], states after)`: all
    rows as they are where the layout is plain, otherwise one row of all sequences.
    """
    if layout.is_plain:
        y, after = call(tuple(x.transpose(1, 2).contiguous() for x in inputs_BHT), state_B, None)
        return y.transpose(1, 2), after
    (rows, _, tokens), value = inputs_BHT[0].shape[:3], inputs_BHT[2]
    where = packed(layout, rows, tokens, value.device)
    if len(where.live_L) == 0:
        sizes, wide = (
            (*value.shape[:2], inputs_BHT[0].shape[3], value.shape[3]),
            torch.promote_types(value.dtype, torch.float32),
        )
        return torch.zeros_like(value), value.new_zeros(sizes, dtype=wide) if state_B is None else state_B
    sequences = tuple(where.take(x) for x in inputs_BHT)
    y, after = call(sequences, where.first_states(state_B), where.bounds)
    return where.put(y), where.last_states(after, state_B)
