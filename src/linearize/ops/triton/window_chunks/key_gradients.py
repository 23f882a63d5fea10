# mypy: disable-error-code="no-untyped-def"
"""The backward pass of the window for keys and values (see `gradients.py`).

Tiles stand as [keys, queries], so that nothing is transposed on its way to the keys; queries come in smaller tiles than
keys, of which gradients are held.

Letters: C chunk, T queries at a time, D head dimension, V value dimension, R query heads per key/value head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops.triton.window_chunks.attend import places_of
from linearize.ops.triton.window_chunks.gradients import query_outputs
from linearize.ops.triton.window_chunks.tiles import (
    bent,
    chunk_slots,
    flag,
    in_window,
    narrow,
    of_head,
    provided,
    rows,
    write_rows,
)


@triton.jit
def seen_near(
    query, keys, near, memory, numbers, CAP: tl.constexpr, SHARED: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """What a tile's queries that see keys inside the window (`near: [C, T]`) give the keys, before the scale, and their
    values."""
    x_q, index, asks, d_num, d_den, m = query
    (x_k, x_v, slots), (top, row_sum), (g, scaling, softcap) = keys, memory, numbers
    s, slope = bent(tl.dot(x_k, tl.trans(x_q), input_precision=DOT) * scaling, softcap, CAP)
    p, d_num = tl.where(near, tl.exp(s - m[None, :] + g), 0.0), narrow(d_num, x_q)
    d_s = p * (tl.dot(narrow(x_v, x_v), tl.trans(d_num), input_precision=DOT) + d_den[None, :])
    if SHARED == 0:
        most = tl.load(top + index, mask=asks, other=-1)
        row_total = tl.load(row_sum + index, mask=asks, other=0.0)
        d_s -= tl.where((slots[:, None] == most[None, :]) & near, row_total[None, :], 0.0)
    d_x = tl.dot(narrow(d_s * slope, x_q), narrow(x_q, x_q), input_precision=DOT)
    return d_x, tl.dot(narrow(p, x_q), d_num, input_precision=DOT)


# Arguments as in `gradients.py`; d_k: [B, H, S, D] and d_v, per query head.
# fmt: off
@triton.jit
def keys_kernel(
    q, k, v, log_g, slot, first, follows, keep, d_y, delta, shift, normaliser, top, row_sum, d_k, d_v, q_strides,
    k_strides, v_strides, y_strides, d_k_strides, d_v_strides, slot_stride, chunk_stride, past, tokens, chunks, scaling,
    softcap,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    C: tl.constexpr, T: tl.constexpr, PER: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr, SINKS: tl.constexpr,
    CAP: tl.constexpr, SHARED: tl.constexpr, DOT: tl.constexpr,
):
    """One program: the keys of one run of chunks; queries of their own chunk and the next see them."""
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h, line = row // H, row % H, row * tokens
    dim, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q, k, v = of_head(q, q_strides, b, h), of_head(k, k_strides, b, h // R), of_head(v, v_strides, b, h // R)
    d_y, d_k, d_v = of_head(d_y, y_strides, b, h), of_head(d_k, d_k_strides, b, h), of_head(d_v, d_v_strides, b, h)
    slot, first, follows, keep = places_of(slot, first, follows, keep, b, slot_stride, chunk_stride)
    memory, numbers = (top + line, row_sum + line), (tl.load(log_g + h), scaling, softcap)
    for i in range(0, PER):
        n = run * PER + i
        position = flag(first, n, chunks) + tl.arange(0, C)
        slots = chunk_slots(slot, n, chunks, C)
        there, live = slots >= 0, (slots >= 0) & (position >= SINKS)
        x_k, x_v = rows(k, slots, k_strides[2], dim, D, there), rows(v, slots, v_strides[2], lane, V, there)
        gradient, v_gradient = tl.zeros((C, BLOCK_D), tl.float32), tl.zeros((C, BLOCK_V), tl.float32)
        for ahead in range(0, 2 * (C // T)):
            tile, at = n * (C // T) + ahead, n + ahead // (C // T)
            own = chunk_slots(slot, tile, chunks * (C // T), T)
            asks, index = own >= past, own - past
            asks = provided(asks, tl.where(at > n, flag(follows, at, chunks), 1))
            x_q = rows(q, index, q_strides[2], dim, D, asks)
            d_num, d_den, m = query_outputs(index, asks, d_y, y_strides[2], delta, normaliser, shift, line, lane, V)
            asked = flag(first, at, chunks) + ahead % (C // T) * T + tl.arange(0, T)
            near = live[:, None] & asks[None, :] & (position[:, None] <= asked[None, :])
            near = near & in_window(asked[None, :], position[:, None], W, TERRACED)
            query = (x_q, index, asks, d_num, d_den, m)
            d_x, d_more = seen_near(query, (x_k, x_v, slots), near, memory, numbers, CAP, SHARED, DOT)
            gradient, v_gradient = gradient + d_x, v_gradient + d_more
        write_rows(d_k, slots, d_k_strides[2], dim, D, there, gradient * scaling)
        write_rows(d_v, slots, d_v_strides[2], lane, V, there, v_gradient)
# fmt: on
