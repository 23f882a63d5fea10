# mypy: disable-error-code="no-untyped-def"
"""The matrix-valued recurrences over given q, k, v and decays: linear attention with decay, and the gated delta rule.

    S' = exp(g_t) S;  S = S' + k_t v_t^T,  or  S = S' + k_t (beta_t (v_t - S'^T k_t))^T;  y_t = S^T q_t

Letters: B batch, H heads, G heads of the state (H / G = R query heads read each), T tokens, U of them (the last) with
an output, K key dimension, V value dimension.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.triton.launch import Span, positions, read_state, rows_of, state_memory, tile
from linearize.ops.triton.parts import begin, log1p, place, softmax


@triton.jit(do_not_specialize=["tokens", "first", "commit"])
def recurrence_kernel(
    q,
    k,
    v,
    g,
    beta,
    position,
    state,
    state_out,
    y,
    q_strides,  # of batch, head and token, as the next four
    k_strides,
    v_strides,
    g_strides,
    beta_strides,
    tokens,
    first,
    commit,
    divisor,  # of the log gate, where GATED
    eps,  # of the norm, where NORM
    G: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KEY_DECAY: tl.constexpr,
    DELTA: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_POSITION: tl.constexpr,
):
    """One program: one state head of one row, BLOCK_V of its values."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_K)
    b, head = row // G, row % G
    value = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    cell = row * K * V + lane[:, None] * V + value[None, :]
    inside = (lane < K)[:, None] & (value < V)[None, :]
    S = begin(state, state_out, cell, inside, commit, HAS_STATE)
    k += b * k_strides[0] + head * k_strides[1]
    v += b * v_strides[0] + head * v_strides[1]
    g += b * g_strides[0] + head * g_strides[1]
    beta += b * beta_strides[0] + head * beta_strides[1]
    q += b * q_strides[0] + head * R * q_strides[1]
    y += row * R * (tokens - first) * V
    last = tl.full((), -1, tl.int64)
    for t in range(0, tokens):
        live, opens, last = place(position + b * tokens, t, last, HAS_POSITION)
        k_t = tl.load(k + t * k_strides[2] + lane, mask=lane < K, other=0.0).to(tl.float32)
        v_t = tl.load(v + t * v_strides[2] + value, mask=value < V, other=0.0).to(tl.float32)
        k_t = softmax(k_t, lane < K) if GATED else k_t
        before = tl.where(opens, 0.0, S)
        if KEY_DECAY:
            g_t = tl.load(g + t * g_strides[2] + lane, mask=lane < K, other=0.0).to(tl.float32)
            g_t = (tl.minimum(g_t, 0.0) - log1p(tl.exp(-tl.abs(g_t)))) / divisor if GATED else g_t
            before *= tl.exp(g_t)[:, None]
        else:
            before *= tl.exp(tl.load(g + t * g_strides[2]).to(tl.float32))
        if DELTA:
            strength = tl.load(beta + t * beta_strides[2]).to(tl.float32)
            v_t = strength * (v_t - tl.sum(before * k_t[:, None], 0))
        S = tl.where(live, before + k_t[:, None] * v_t[None, :], S)
        if t + 1 == commit:
            tl.store(state_out + cell, S, mask=inside)
        if t >= first:
            for r in tl.static_range(R):
                at = q + r * q_strides[1] + (t - first) * q_strides[2] + lane
                q_t = tl.load(at, mask=lane < K, other=0.0).to(tl.float32)
                q_t = softmax(q_t, lane < K) if GATED else q_t
                y_t = tl.sum(S * q_t[:, None], 0)
                if NORM:
                    y_t = tl.where(value < V, y_t - tl.sum(y_t, 0) / V, 0.0)
                    y_t *= tl.rsqrt(tl.sum(y_t * y_t, 0) / V + eps)
                tl.store(y + (r * (tokens - first) + t - first) * V + value, y_t, mask=value < V)


def decay_linear_steps(
    q_BHUK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    log_decay: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    commit: int | None = None,
    state_out: Tensor | None = None,
    gate_divisor: float | None = None,
    norm_eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`decay_linear`'s backend: `y: [B, H, U, V]` in the dtype of v, and `S: [B, G, K, V]` after `commit` tokens.

    With G < H heads of k, v and decay, H / G query heads read one state. `state_out`: where S is written, `state`
    itself for in place (None: new memory). `gate_divisor`: q and k go through a softmax, and the log decay is log
    sigmoid of what is given over the divisor (Liger's gated linear attention, 2503.01496). `norm_eps`: each output is
    brought to mean 0 and variance 1 (retention, 2307.08621).
    """
    return _run(
        q_BHUK,
        k_BGTK,
        v_BGTV,
        log_decay,
        None,
        divisor=gate_divisor,
        eps=norm_eps,
        layout=layout,
        state=state,
        commit=commit,
        state_out=state_out,
    )


def gated_delta_steps(
    q_BHUK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_decay_BHT: Tensor,
    beta_BHT: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    commit: int | None = None,
    state_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`gated_delta`'s backend: `y: [B, H, U, V]` in the dtype of v, and `S: [B, H, K, V]` after `commit` tokens."""
    return _run(
        q_BHUK,
        k_BHTK,
        v_BHTV,
        log_decay_BHT,
        beta_BHT,
        divisor=None,
        eps=None,
        layout=layout,
        state=state,
        commit=commit,
        state_out=state_out,
    )


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    *,
    divisor: float | None,
    eps: float | None,
    layout: Layout,
    state: Tensor | None,
    commit: int | None,
    state_out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (batch, groups, tokens, key), (heads, outputs), value = k.shape, q.shape[1:3], v.shape[-1]
    span, block = Span.of(tokens, outputs, commit), tile(key, value, whole=eps is not None)
    q, k, v, g = rows_of(q), rows_of(k), rows_of(v), rows_of(g) if g.dim() == 4 else g
    state, position = read_state(state), positions(layout, batch)
    after = state_memory(k, (batch, groups, key, value), state_out)
    y = torch.empty(batch, heads, outputs, value, dtype=v.dtype, device=v.device)
    beta = g if beta is None else beta
    pointers = (q, k, v, g, beta, y if position is None else position, after if state is None else state, after, y)
    flags: dict[str, bool] = {"KEY_DECAY": g.dim() == 4, "DELTA": beta is not g, "GATED": divisor is not None}
    flags |= {"NORM": eps is not None, "HAS_STATE": state is not None, "HAS_POSITION": position is not None}
    recurrence_kernel[(batch * groups, block.blocks(value))](
        *pointers,
        *(x.stride()[:3] for x in (q, k, v, g, beta)),
        span.tokens,
        span.first,
        span.commit,
        divisor or 1.0,
        eps or 0.0,
        G=groups,
        R=heads // groups,
        K=key,
        V=value,
        BLOCK_K=block.key,
        BLOCK_V=block.value,
        **flags,
        num_warps=block.warps,
    )
    return y, after
