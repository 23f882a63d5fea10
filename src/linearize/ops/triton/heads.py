# mypy: disable-error-code="no-untyped-def"
"""Mamba-2 and Gated DeltaNet between their projections in one launch: convolution and SiLU, gates, recurrence, norm.

    S' = exp(-exp(A_log) dt) S,  dt = softplus(step + step_bias)
    Mamba-2:        S = S' + dt k v^T,                          y = norm((S^T q + D v) silu(gate)) weight
    Gated DeltaNet: S = S' + k (sigmoid(beta) (v - S'^T k))^T,  y = norm(S^T q) weight silu(gate),  |q|^2 K = |k| = 1

Letters: B batch, H heads, T tokens, U of them (the last) with an output, K key dimension, V value dimension, R columns
of the projection, C channels of the convolution, P past inputs of the convolution.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops.triton.parts import (
    begin,
    convolve,
    first_slots,
    gate_and_norm,
    place,
    push,
    save_taps,
    softplus,
)

L2_EPS = tl.constexpr(1e-6)


@triton.jit
def start(head, FIRST: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr, DIM: tl.constexpr):
    """The first column of what head `head` of H reads of a part: HEADS heads of DIM numbers, from column FIRST on."""
    return FIRST + (head // (H // HEADS)) * DIM


@triton.jit
def unit(x):
    """x over its length."""
    return x * tl.rsqrt(tl.sum(x * x, 0) + L2_EPS)


@triton.jit
def owned(head, block, DIM: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr):
    """DIM for the one program that writes the taps of a head's channels for all that read them, 0 for the others."""
    return tl.where((head % (H // HEADS) == 0) & (block == 0), DIM, 0)


@triton.jit
def next_state(S, k, v, dt, rate, beta, live, opens, DELTA: tl.constexpr):
    """The state after one token; `beta`: where its write strength before the sigmoid is (delta rule)."""
    before = tl.where(opens, 0.0, S) * tl.exp(-rate * dt)
    if DELTA:
        added = tl.sigmoid(tl.load(beta).to(tl.float32)) * (v - tl.sum(before * k[:, None], 0))
    else:
        k, added = k * dt, v
    return tl.where(live, before + k[:, None] * added[None, :], S)


@triton.jit
def finish(y, gate, norm_weight, value, V: tl.constexpr, eps, DELTA: tl.constexpr):
    """Gate and norm of one head of one token; gate, norm_weight: where the head's numbers begin."""
    z = tl.load(gate + value, mask=value < V, other=0.0).to(tl.float32)
    scale = tl.load(norm_weight + value, mask=value < V, other=0.0).to(tl.float32)
    return gate_and_norm(y, z, scale, value < V, V, eps, not DELTA)


@triton.jit(do_not_specialize=["tokens", "first", "commit"])
def heads_kernel(
    x,
    gate,
    step,
    beta,
    position,
    taps,
    taps_out,
    weight,
    bias,
    step_bias,
    A_log,
    skip,
    norm_weight,
    state,
    state_out,
    y,
    x_strides,  # of batch and token, as the next three
    gate_strides,
    step_strides,
    beta_strides,
    tokens,
    first,
    commit,
    eps,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    QUERY: tl.constexpr,  # first column, heads there, first channel, heads there; as the next two
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DELTA: tl.constexpr,
    NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_POSITION: tl.constexpr,
):
    """One program: one head of one row, BLOCK_V of its values; without NORM y is fp32 before gate and norm."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_K)
    b, h = row // H, row % H
    value = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    x, taps, taps_out = x + b * x_strides[0], taps + b * P * C, taps_out + b * P * C
    q_at, q_ch = start(h, QUERY[0], QUERY[1], H, K) + lane, start(h, QUERY[2], QUERY[3], H, K) + lane
    k_at, k_ch = start(h, KEY[0], KEY[1], H, K) + lane, start(h, KEY[2], KEY[3], H, K) + lane
    v_at, v_ch = start(h, VALUE[0], VALUE[1], H, V) + value, start(h, VALUE[2], VALUE[3], H, V) + value
    cell = row * K * V + lane[:, None] * V + value[None, :]
    inside = (lane < K)[:, None] & (value < V)[None, :]
    S = begin(state, state_out, cell, inside, commit, HAS_STATE)
    rate, shift = tl.exp(tl.load(A_log + h).to(tl.float32)), tl.load(step_bias + h).to(tl.float32)
    slots = first_slots(P, HAS_STATE)
    kept, last = slots, tl.full((), -1, tl.int64)
    for t in range(0, tokens):
        live, opens, last = place(position + b * tokens, t, last, HAS_POSITION)
        slots = push(slots, t, live, opens, P)
        kept = tl.where(t + 1 == commit, slots, kept)
        k = convolve(slots, x, x_strides[1], k_at, taps, k_ch, weight, bias, lane, K, P, C, HAS_STATE, HAS_BIAS)
        v = convolve(slots, x, x_strides[1], v_at, taps, v_ch, weight, bias, value, V, P, C, HAS_STATE, HAS_BIAS)
        dt = softplus(tl.load(step + b * step_strides[0] + t * step_strides[1] + h).to(tl.float32) + shift)
        k = unit(k) if DELTA else k
        strength = beta + b * beta_strides[0] + t * beta_strides[1] + h
        S = next_state(S, k, v, dt, rate, strength, live, opens, DELTA)
        if t + 1 == commit:
            tl.store(state_out + cell, S, mask=inside)
        if t >= first:
            q = convolve(slots, x, x_strides[1], q_at, taps, q_ch, weight, bias, lane, K, P, C, HAS_STATE, HAS_BIAS)
            q = unit(q) * tl.rsqrt(tl.full((), K, tl.float32)) if DELTA else q
            out = tl.sum(S * q[:, None], 0) + (0.0 if DELTA else tl.load(skip + h).to(tl.float32) * v)
            if NORM:
                gate_row = gate + b * gate_strides[0] + t * gate_strides[1] + h * V
                out = finish(out, gate_row, norm_weight + (0 if DELTA else h * V), value, V, eps, DELTA)
            tl.store(y + ((b * (tokens - first) + t - first) * H + h) * V + value, out, mask=value < V)
    q_own, k_own = owned(h, tl.program_id(1), K, QUERY[3], H), owned(h, tl.program_id(1), K, KEY[3], H)
    save_taps(kept, taps_out, x, x_strides[1], q_at, taps, q_ch, lane, q_own, P, C, HAS_STATE)
    save_taps(kept, taps_out, x, x_strides[1], k_at, taps, k_ch, lane, k_own, P, C, HAS_STATE)
    save_taps(kept, taps_out, x, x_strides[1], v_at, taps, v_ch, value, owned(h, 0, V, VALUE[3], H), P, C, HAS_STATE)


@triton.jit
def norm_kernel(
    y,
    gate,
    norm_weight,
    out,
    gate_strides,  # of batch and token
    tokens,
    outputs,
    eps,
    H: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    DELTA: tl.constexpr,
):
    """Gate and norm of one head of one token, where the values of a head are cut over several programs."""
    row, value = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_V)
    b, u, h = row // (outputs * H), row // H % outputs, row % H
    t = tokens - outputs + u
    y_t = tl.load(y + row * V + value, mask=value < V, other=0.0)
    gate_row = gate + b * gate_strides[0] + t * gate_strides[1] + h * V
    y_t = finish(y_t, gate_row, norm_weight + (0 if DELTA else h * V), value, V, eps, DELTA)
    tl.store(out + row * V + value, y_t, mask=value < V)
