# mypy: disable-error-code="no-untyped-def"
"""Mamba between its projections in one launch: convolution and SiLU, step sizes, selective scan, gate.

    h = exp(-exp(A_log) dt) h + dt B x,  dt = softplus(step + dt_bias),  y = (C . h + D x) silu(z)

Letters: B batch, H query heads, G key/value heads, D head dimension, T tokens, U of them (the last) with an output,
E = H D channels, N state size (a head has D / N sub-heads of N channels), R columns of the projection, C channels of
the convolution, P past inputs of the convolution (W = P + 1 taps).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.recurrent.layer_steps import MOST_TAPS
from linearize.ops.triton import MOST_TOKENS
from linearize.ops.triton.channels import CHANNEL_WARPS, channel_block
from linearize.ops.triton.launch import Span, positions, read_state, rows_of, state_memory
from linearize.ops.triton.parts import begin, convolve, first_slots, place, push, save_taps, silu, softplus


@triton.jit(do_not_specialize=["tokens", "first", "commit"])
def mamba_kernel(
    x,
    step,
    position,
    taps,
    taps_out,
    weight,
    bias,
    step_bias,
    A_log,
    skip,
    state,
    state_out,
    y,
    x_strides,  # of batch and token, as the next
    step_strides,
    tokens,
    first,
    commit,
    SIZES: tl.constexpr,  # H, G, D, N, C, P
    BEFORE: tl.constexpr,  # key/value heads are repeated before the convolution
    BLOCK_E: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_POSITION: tl.constexpr,
):
    """One program: BLOCK_E channels of one row."""
    H: tl.constexpr = SIZES[0]
    G: tl.constexpr = SIZES[1]
    D: tl.constexpr = SIZES[2]
    N: tl.constexpr = SIZES[3]
    C: tl.constexpr = SIZES[4]
    P: tl.constexpr = SIZES[5]
    E: tl.constexpr = H * D
    b = tl.program_id(0).to(tl.int64)
    e, n = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_N)
    x, taps, taps_out = x + b * x_strides[0], taps + b * P * C, taps_out + b * P * C
    inside = (e < E)[:, None] & (n < N)[None, :]
    own = e[:, None] * N + n[None, :]
    cell = b * E * N + own
    shared = e // D // (H // G) * D + e % D  # where key/value heads have this channel
    column, channel = E + shared, e if BEFORE else shared
    sub = (shared // N * N)[:, None] + n[None, :]  # columns of B: of this channel's sub-head
    rate = -tl.exp(tl.load(A_log + own, mask=inside, other=0.0).to(tl.float32))
    shift = tl.load(step_bias + e, mask=e < E, other=0.0).to(tl.float32)
    skip_e = tl.load(skip + e, mask=e < E, other=0.0).to(tl.float32)
    h = begin(state, state_out, cell, inside, commit, HAS_STATE)
    slots = first_slots(P, HAS_STATE)
    kept, last = slots, tl.full((), -1, tl.int64)
    for t in range(0, tokens):
        live, opens, last = place(position + b * tokens, t, last, HAS_POSITION)
        slots = push(slots, t, live, opens, P)
        kept = tl.where(t + 1 == commit, slots, kept)
        now = x + t * x_strides[1]
        v = convolve(slots, x, x_strides[1], column, taps, channel, weight, bias, e, E, P, C, HAS_STATE, True)
        dt = tl.load(step + b * step_strides[0] + t * step_strides[1] + e, mask=e < E, other=0.0)
        dt = softplus(dt.to(tl.float32) + shift)
        B_t = tl.load(now + E + G * D + sub, mask=inside, other=0.0).to(tl.float32)
        before = tl.exp(dt[:, None] * rate) * tl.where(opens, 0.0, h)
        h = tl.where(live, before + B_t * (dt * v)[:, None], h)
        if t + 1 == commit:
            tl.store(state_out + cell, h, mask=inside)
        if t >= first:
            C_t = tl.load(now + E + 2 * G * D + (e // N * N)[:, None] + n[None, :], mask=inside, other=0.0)
            z = tl.load(now + e, mask=e < E, other=0.0).to(tl.float32)
            out = (tl.sum(C_t.to(tl.float32) * h, 1) + skip_e * v) * silu(z)
            tl.store(y + (b * (tokens - first) + t - first) * E + e, out, mask=e < E)
    own_taps = tl.where((e // D % (H // G) == 0) | BEFORE, e, E)
    save_taps(kept, taps_out, x, x_strides[1], column, taps, channel, own_taps, E, P, C, HAS_STATE)


@dataclass(frozen=True, kw_only=True)
class ChannelSizes:
    """`groups` key/value heads are repeated for `heads` query heads; x `before` the convolution or `after` it."""

    heads: int
    groups: int
    head_dim: int
    state_dim: int
    repeat: str


def mamba_steps(
    projected_BTR: Tensor,
    step_BTE: Tensor,
    *,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor,
    dt_bias_E: Tensor,
    A_log_EN: Tensor,
    D_E: Tensor,
    sizes: ChannelSizes,
    layout: Layout,
    memory: Tensor | None = None,
    taps_BPC: Tensor | None = None,
    outputs: int | None = None,
    commit: int | None = None,
    memory_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y: [B, U, E]` before the output projection, and after `commit` tokens `h: [B, E, N]` and taps `[B, P, C]`.

    Columns of `projected_BTR`: z [E], x [G D], B [G D], C [E]. `step_BTE`: dt before its bias. `memory`, `taps_BPC`:
    the state before (None: none, both). `memory_out`: where h is written, `memory` itself for in place (None: new
    memory); the taps are always new memory.
    """
    (batch, tokens, _), (channels, width) = projected_BTR.shape, conv_weight_CW.shape
    assert tokens <= MOST_TOKENS and width <= MOST_TAPS, f"{tokens} tokens, {width} taps"
    total, size = sizes.heads * sizes.head_dim, sizes.state_dim
    span, (block_e, block_n) = Span.of(tokens, outputs, commit), channel_block(total, size)
    x, step, position = rows_of(projected_BTR), rows_of(step_BTE), positions(layout, batch)
    after = state_memory(x, (batch, total, size), memory_out)
    taps_out = torch.empty(batch, width - 1, channels, dtype=x.dtype, device=x.device)
    y = torch.empty(batch, span.outputs, total, dtype=x.dtype, device=x.device)
    memory = read_state(memory)
    mamba_kernel[(batch, -(-total // block_e))](
        x,
        step,
        x if position is None else position,
        taps_out if taps_BPC is None else taps_BPC.to(x.dtype).contiguous(),
        taps_out,
        *(w.contiguous() for w in (conv_weight_CW, conv_bias_C, dt_bias_E, A_log_EN, D_E)),
        after if memory is None else memory,
        after,
        y,
        x.stride()[:2],
        step.stride()[:2],
        span.tokens,
        span.first,
        span.commit,
        SIZES=(sizes.heads, sizes.groups, sizes.head_dim, size, channels, width - 1),
        BEFORE=sizes.repeat == "before",
        BLOCK_E=block_e,
        BLOCK_N=block_n,
        HAS_STATE=memory is not None,
        HAS_POSITION=position is not None,
        num_warps=CHANNEL_WARPS,
    )
    return y, after, taps_out
