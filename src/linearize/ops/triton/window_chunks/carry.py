# mypy: disable-error-code="no-untyped-def"
"""What one run of chunks adds to the folded sum, what it adds to the sum's gradient, and the sums before each run.

Before chunk n the sum is S_n = keep_n (S_{n-1} + fold_n); fold_n takes up chunk n - 2 of the same document, since
chunks n - 1 and n are attended to directly. A run is PER chunks; runs are summed in parallel and then joined in order.

A program has one part of the features (`tiles.part_of`): parts of the sum do not depend on each other.

Letters: C chunk, D head dimension, V value dimension, F columns of the feature map, R query heads per key/value head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops.triton.window_chunks.tiles import (
    chunk_slots,
    features,
    flag,
    part_of,
    provided,
    rows,
    weight_of,
    write_sum,
)


@triton.jit
def taken_up(slot, first, follows, n, chunks, SINKS: tl.constexpr, C: tl.constexpr):
    """The slots of chunk n - 2 and which of them enter the sum before chunk n."""
    slots = chunk_slots(slot, n - 2, chunks, C)
    position = flag(first, n - 2, chunks) + tl.arange(0, C)
    same = flag(follows, n, chunks) * flag(follows, n - 1, chunks)
    return slots, provided((slots >= 0) & (position >= SINKS), same)


@triton.jit
def take_up(
    memory, keys, places, strides, n, chunks, dim, lane, feature, sign,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, SINKS: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """(S, z) before chunk n, from those before chunk n - 1; and whether anything stays.

    keys: k, v, phi_k, W and b; places: slot, first, follows, keep; strides: of k's, v's and phi_k's tokens.
    """
    S, z = memory
    k, v, phi_k, w, bias = keys
    slot, first, follows, keep = places
    stays = flag(keep, n, chunks).to(tl.float32)
    index, folds = taken_up(slot, first, follows, n, chunks, SINKS, C)
    x = rows(k, index, strides[0], dim, D, folds)
    phi = features(x, phi_k, index, strides[2], folds, w, bias, feature, sign, D, F, MAP, DOT)
    value = rows(v, index, strides[1], lane, V, folds).to(tl.float32)
    S = stays * (S + tl.dot(tl.trans(phi), value, input_precision=DOT))
    return (S, stays * (z + tl.sum(phi, 0))), stays


@triton.jit
def add_queries(
    memory, x, phi_pointer, index, stride, asks, d_num, d_den, weight, bias, scale, stays, feature, sign,
    D: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The gradient of (S, z) before a chunk, from that after it and the chunk's queries."""
    S, z = memory
    phi = scale * features(x, phi_pointer, index, stride, asks, weight, bias, feature, sign, D, F, MAP, DOT)
    S = stays * (S + tl.dot(tl.trans(phi), d_num, input_precision=DOT))
    return S, stays * (z + tl.sum(phi * d_den[:, None], 0))


@triton.jit
def sum_at(sums, row, run, runs, before, V: tl.constexpr, F: tl.constexpr, HALVES: tl.constexpr):
    """Where a part of the sum of a run is, `[F, V + 1]`."""
    return sums + ((row * runs + run) * HALVES * F + before) * (V + 1)


@triton.jit
def runs_kernel(
    k,
    v,
    phi_k,
    weight,
    bias,
    slot,
    first,
    follows,
    keep,
    sums,  # [B H, runs, halves, F, V + 1]: what each run adds
    carries,  # [B H, runs]: what stays of the sum before it
    k_strides,  # of batch, head and slot, as the next two
    v_strides,
    phi_strides,
    slot_stride,
    chunk_stride,
    chunks,
    runs,
    H: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    C: tl.constexpr,
    PER: tl.constexpr,
    SINKS: tl.constexpr,
    MAP: tl.constexpr,
    HALVES: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program: one head of one row, one run, one part of the features."""
    row, run, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    b, h = row // H, row % H
    dim, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    feature, before, sign = part_of(part, BLOCK_F, F, MAP)
    w, bias_F = weight_of(weight, bias, h, D, F)
    k += b * k_strides[0] + (h // R) * k_strides[1]
    v += b * v_strides[0] + (h // R) * v_strides[1]
    phi_k += b * phi_strides[0] + h * phi_strides[1]
    slot += b * slot_stride
    first += b * chunk_stride
    follows += b * chunk_stride
    keep += b * chunk_stride
    carry = tl.full((), 1.0, tl.float32)
    memory = (tl.zeros((BLOCK_F, BLOCK_V), tl.float32), tl.zeros((BLOCK_F,), tl.float32))
    steps = (k_strides[2], v_strides[2], phi_strides[2])
    for i in range(1, PER + 1):
        memory, stays = take_up(
            memory, (k, v, phi_k, w, bias_F), (slot, first, follows, keep), steps, run * PER + i, chunks, dim, lane,
            feature, sign, D, V, F, SINKS, C, MAP, DOT,
        )  # fmt: skip
        carry *= stays
    write_sum(sum_at(sums, row, run, runs, before, V, F, HALVES), memory[0], memory[1], feature, lane, F, V)
    tl.store(carries + row * runs + run, carry, mask=part == 0)


@triton.jit
def gradient_runs_kernel(
    q,
    phi_q,
    weight,
    bias,
    d_y,
    delta,  # [B, H, T]: sum over values of d_y y
    normaliser,  # [B, H, T]
    shift,  # [B, H, T]
    factor,  # [H]: of the linear term
    slot,
    keep,
    sums,  # [B H, runs, halves, F, V + 1]
    carries,  # [B H, runs]
    q_strides,
    phi_strides,
    y_strides,
    slot_stride,
    chunk_stride,
    past,
    tokens,
    chunks,
    runs,
    H: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    F: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_F: tl.constexpr,
    C: tl.constexpr,
    PER: tl.constexpr,
    SHARED: tl.constexpr,
    MAP: tl.constexpr,
    HALVES: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program: what the queries of one run add to the gradient of a part of the sum that the run before them hands
    on."""
    row, run, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    b, h = row // H, row % H
    dim, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    feature, before, sign = part_of(part, BLOCK_F, F, MAP)
    w, bias_F = weight_of(weight, bias, h, D, F)
    q += b * q_strides[0] + h * q_strides[1]
    phi_q += b * phi_strides[0] + h * phi_strides[1]
    d_y += b * y_strides[0] + h * y_strides[1]
    slot += b * slot_stride
    keep += b * chunk_stride
    carry = tl.full((), 1.0, tl.float32)
    memory = (tl.zeros((BLOCK_F, BLOCK_V), tl.float32), tl.zeros((BLOCK_F,), tl.float32))
    scale = tl.load(factor + h)
    for i in range(0, PER):
        n = run * PER + PER - 1 - i
        stays = flag(keep, n, chunks).to(tl.float32)
        index, asks, d_num, d_den = query_gradient(
            slot, n, chunks, past, d_y, y_strides[2], delta, normaliser, shift, row * tokens, lane, V, SHARED, C
        )
        x = rows(q, index, q_strides[2], dim, D, asks)
        memory = add_queries(
            memory, x, phi_q, index, phi_strides[2], asks, d_num, d_den, w, bias_F, scale, stays, feature, sign, D,
            F, MAP, DOT,
        )  # fmt: skip
        carry *= stays
    write_sum(sum_at(sums, row, run, runs, before, V, F, HALVES), memory[0], memory[1], feature, lane, F, V)
    tl.store(carries + row * runs + run, carry, mask=part == 0)


@triton.jit
def query_gradient(
    slot,
    n,
    chunks,
    past,
    d_y,
    y_stride,
    delta,
    normaliser,
    shift,
    line,
    lane,
    V: tl.constexpr,
    SHARED: tl.constexpr,
    C: tl.constexpr,
):
    """Of the queries of chunk n: token, whether there is one, and the gradient of the linear term's two sums."""
    slots = chunk_slots(slot, n, chunks, C)
    asks = slots >= past
    index = slots - past
    share = query_share(index, asks, normaliser, shift, line, SHARED)
    d_num = rows(d_y, index, y_stride, lane, V, asks).to(tl.float32) * share[:, None]
    d_den = -tl.load(delta + line + index, mask=asks, other=0.0) * share
    return index, asks, d_num, d_den


@triton.jit
def query_share(index, asks, normaliser, shift, line, SHARED: tl.constexpr):
    """What the linear term of each query is multiplied by in the end: over the normaliser, and exp(-m) if shared."""
    share = 1 / tl.load(normaliser + line + index, mask=asks, other=1.0)
    if SHARED:
        share *= tl.exp(-tl.load(shift + line + index, mask=asks, other=0.0))
    return share


@triton.jit
def join_kernel(sums, carries, start, size, runs, HAS_START: tl.constexpr, REVERSED: tl.constexpr, BLOCK: tl.constexpr):
    """Each run's addition becomes the sum before it (after it, if reversed), in place."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_START:
        total = tl.load(start + row * size + at, mask=inside, other=0.0)
    for i in range(0, runs):
        run = runs - 1 - i if REVERSED else i
        here = sums + (row * runs + run) * size + at
        added = tl.load(here, mask=inside, other=0.0)
        tl.store(here, total, mask=inside)
        total = tl.load(carries + row * runs + run) * total + added
