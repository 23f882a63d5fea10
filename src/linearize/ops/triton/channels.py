# mypy: disable-error-code="no-untyped-def"
"""The selective scan of Mamba-1 over given x, dt, A, B and C.

    h = exp(dt A) h + dt B x,  y = C . h        for every channel by itself

Letters: B batch, T tokens, U of them (the last) with an output, E channels, N state size, G groups of channels that
share B and C.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.triton.launch import Span, positions, power_of_two, read_state, rows_of, state_memory
from linearize.ops.triton.parts import begin, place

CHANNEL_TILE = 1024  # numbers of the state in one program
CHANNEL_WARPS = 4


def channel_block(channels: int, state_dim: int) -> tuple[int, int]:
    """Channels and state numbers of one program, powers of two."""
    state = power_of_two(state_dim)
    return max(1, min(power_of_two(channels), CHANNEL_TILE // state)), state


@triton.jit(do_not_specialize=["tokens", "first", "commit"])
def scan_kernel(
    x,
    dt,
    A,
    B,
    C,
    position,
    state,
    state_out,
    y,
    x_strides,  # of batch and token, as the next
    dt_strides,
    B_strides,  # of batch, token and group, as the next
    C_strides,
    tokens,
    first,
    commit,
    E: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_POSITION: tl.constexpr,
):
    """One program: BLOCK_E channels of one row."""
    b = tl.program_id(0).to(tl.int64)
    e, n = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    inside = (e < E)[:, None] & (n < N)[None, :]
    own = e[:, None] * N + n[None, :]
    cell = b * E * N + own
    group = (e // (E // G))[:, None]
    rate = tl.load(A + own, mask=inside, other=0.0).to(tl.float32)
    h = begin(state, state_out, cell, inside, commit, HAS_STATE)
    B += b * B_strides[0] + group * B_strides[2] + n[None, :]
    C += b * C_strides[0] + group * C_strides[2] + n[None, :]
    last = tl.full((), -1, tl.int64)
    for t in range(0, tokens):
        live, opens, last = place(position + b * tokens, t, last, HAS_POSITION)
        x_t = tl.load(x + b * x_strides[0] + t * x_strides[1] + e, mask=e < E, other=0.0).to(tl.float32)
        dt_t = tl.load(dt + b * dt_strides[0] + t * dt_strides[1] + e, mask=e < E, other=0.0).to(tl.float32)
        B_t = tl.load(B + t * B_strides[1], mask=inside, other=0.0).to(tl.float32)
        before = tl.exp(dt_t[:, None] * rate) * tl.where(opens, 0.0, h)
        h = tl.where(live, before + B_t * (dt_t * x_t)[:, None], h)
        if t + 1 == commit:
            tl.store(state_out + cell, h, mask=inside)
        if t >= first:
            C_t = tl.load(C + (t - first) * C_strides[1], mask=inside, other=0.0).to(tl.float32)
            tl.store(y + (b * (tokens - first) + t - first) * E + e, tl.sum(C_t * h, 1), mask=e < E)


def selective_scan_steps(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTGN: Tensor,
    C_BUGN: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    commit: int | None = None,
    state_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan`'s backend: `y: [B, U, E]` in the dtype of x, and `h: [B, E, N]` after `commit` tokens.

    `state_out`: where h is written, `state` itself for in place (None: new memory). Dead tokens are told by the layout.
    """
    (batch, tokens, channels), (outputs, groups, size) = x_BTE.shape, C_BUGN.shape[1:]
    span, (block_e, block_n) = Span.of(tokens, outputs, commit), channel_block(channels, size)
    x, dt, B, C = rows_of(x_BTE), rows_of(dt_BTE), rows_of(B_BTGN), rows_of(C_BUGN)
    state, position = read_state(state), positions(layout, batch)
    after = state_memory(x, (batch, channels, size), state_out)
    y = torch.empty(batch, outputs, channels, dtype=x.dtype, device=x.device)
    scan_kernel[(batch, -(-channels // block_e))](
        x,
        dt,
        A_EN.contiguous(),
        B,
        C,
        x if position is None else position,
        after if state is None else state,
        after,
        y,
        x.stride()[:2],
        dt.stride()[:2],
        B.stride()[:3],
        C.stride()[:3],
        span.tokens,
        span.first,
        span.commit,
        E=channels,
        N=size,
        G=groups,
        BLOCK_E=block_e,
        BLOCK_N=block_n,
        HAS_STATE=state is not None,
        HAS_POSITION=position is not None,
        num_warps=CHANNEL_WARPS,
    )
    return y, after
