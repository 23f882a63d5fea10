# mypy: disable-error-code="no-untyped-def"
"""The backward pass of the window; `linear_gradients.py` has that of the linear part. Scores and weights are computed
again: nothing of T x window is kept.

With y = N / Z: d_N = d_y / Z and d_Z = -(d_y . y) / Z; a window weight p_ni then has d_s = p (d_N . v_i + d_Z), and as
published the shift is the largest score itself, so that score also gets minus the sum of its row.

One kernel has the gradients of queries, sinks and factor, the other those of keys and values. The latter's tiles are
[keys, queries], so that nothing is transposed on its way to the keys, and its tiles of queries are smaller than those
of keys, whose gradients stay in registers.

Letters: C chunk, T queries at a time, D head dimension, V value dimension, R query heads per key/value head, J sinks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops.triton.window_chunks.attend import key_tile, masks, places_of, sink_tile
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
def weights_of(q, k, near, m, g, scaling, softcap, CAP: tl.constexpr, DOT: tl.constexpr):
    """p = exp(s - m + g) inside the window, and the derivative of the soft cap."""
    s, slope = bent(tl.dot(q, tl.trans(k), input_precision=DOT) * scaling, softcap, CAP)
    return tl.where(near, tl.exp(s - m[:, None] + g), 0.0), slope


@triton.jit
def score_gradient(p, v, d_num, d_den, DOT: tl.constexpr):
    """p (d_N . v + d_Z)."""
    return p * (tl.dot(narrow(d_num, v), tl.trans(narrow(v, v)), input_precision=DOT) + d_den[:, None])


@triton.jit
def query_outputs(index, asks, d_y, y_stride, delta, normaliser, shift, line, lane, V: tl.constexpr):
    """d_N, d_Z and m of queries."""
    over = 1 / tl.load(normaliser + line + index, mask=asks, other=1.0)
    d_num = rows(d_y, index, y_stride, lane, V, asks).to(tl.float32) * over[:, None]
    d_den = -tl.load(delta + line + index, mask=asks, other=0.0) * over
    return d_num, d_den, tl.load(shift + line + index, mask=asks, other=0.0)


@triton.jit
def less_top(d_s, places, most, seen, row_total):
    """Score gradients with the row's sum taken from the largest score."""
    return d_s - tl.where((places[None, :] == most[:, None]) & seen, row_total[:, None], 0.0)


@triton.jit
def times_keys(d_s, slope, k, DOT: tl.constexpr):
    """What score gradients give the queries, before the scale."""
    return tl.dot(narrow(d_s * slope, k), narrow(k, k), input_precision=DOT)


@triton.jit
def tile_gradient(
    gradient, total, query, tile, near, numbers, CAP: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """What a tile's keys give a chunk's queries, before the scale, and the sums of the rows of score gradients."""
    x_q, d_num, d_den, m = query
    g, scaling, softcap = numbers
    p, slope = weights_of(x_q, tile[3], near, m, g, scaling, softcap, CAP, DOT)
    d_s = score_gradient(p, tile[4], d_num, d_den, DOT)
    return gradient + times_keys(d_s, slope, tile[3], DOT), total + tl.sum(d_s, 1)


@triton.jit
def top_key(
    x_q, most, asks, k, k_stride, sink_k, line, dim, scaling, softcap,
    D: tl.constexpr, SINKS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """The key with each query's largest score, times the slope of the cap there: what the shift's gradient goes to."""
    key = rows(k, most, k_stride, dim, D, asks & (most >= 0)).to(tl.float32)
    if SINKS > 0:
        key += rows(sink_k + line * SINKS * D, -2 - most, D, dim, D, asks & (most <= -2)).to(tl.float32)
    _, slope = bent(tl.sum(x_q.to(tl.float32) * key, 1) * scaling, softcap, CAP)
    return key * slope[:, None]


@triton.jit
def window_gradient(
    gradient, total, query, early, memory, numbers, left, dim, lane, k, k_stride,
    BLOCK_J: tl.constexpr, D: tl.constexpr, V: tl.constexpr, SINKS: tl.constexpr, CAP: tl.constexpr,
    SHARED: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """What the window part gives a chunk's queries, after its tiles' keys gave their share (`gradient`, `total`), and
    the sums of their rows of score gradients; writes the sinks'.

    early: sinks, where their gradients go, lines of both.
    """
    x_q, index, asks, position, d_num, d_den, m = query
    sink_k, sink_v, d_sink_k, d_sink_v, line_in, line_out, begin = early
    (top, row_sum), (g, scaling, softcap), j = memory, numbers, tl.arange(0, BLOCK_J)
    if SINKS > 0:
        k_s, v_s, shown = sink_tile(
            sink_k, sink_v, line_in, begin, position, asks, left, dim, lane, BLOCK_J, D, V, SINKS
        )  # fmt: skip
        p_s, slope_s = weights_of(x_q, k_s, shown, m, g, scaling, softcap, CAP, DOT)
        d_ss = score_gradient(p_s, v_s, d_num, d_den, DOT)
        total += tl.sum(d_ss, 1)
    if SHARED == 0:
        most = tl.load(top + index, mask=asks, other=-1)
        key = top_key(x_q, most, asks, k, k_stride, sink_k, line_in, dim, scaling, softcap, D, SINKS, CAP)
        gradient -= total[:, None] * key
        tl.store(row_sum + index, total, mask=asks)
    if SINKS > 0:
        gradient += times_keys(d_ss, slope_s, k_s, DOT)
        if SHARED == 0:
            d_ss = less_top(d_ss, -2 - j, most, shown, total)
        there, at = provided(j < SINKS, left), line_out * SINKS
        d_k = times_keys(tl.trans(d_ss * slope_s), 1.0, x_q, DOT) * scaling
        write_rows(d_sink_k + at * D, j, D, dim, D, there, d_k)
        write_rows(d_sink_v + at * V, j, V, lane, V, there, tl.dot(tl.trans(p_s), d_num, input_precision=DOT))
    return gradient * scaling, total


# Arguments as of `attend_kernel`; d_y like y, delta: [B, H, T], the sum over values of d_y y; d_q: [B, H, T, D], fp32;
# d_sink_k, d_sink_v: [B, chunks, H, J, D or V]; d_log_g: [B H, runs]; row_sum: [B, H, T], what the largest scores give
# back.
# fmt: off
@triton.jit
def queries_kernel(
    q, k, v, sink_k, sink_v, log_g, slot, first, follows, keep, begins, d_y, delta, shift, normaliser, top, d_q,
    d_sink_k, d_sink_v, d_log_g, row_sum, q_strides, k_strides, v_strides, y_strides, d_q_strides, slot_stride,
    chunk_stride, past, tokens, chunks, runs, scaling, softcap,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_J: tl.constexpr, C: tl.constexpr, PER: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr,
    SINKS: tl.constexpr, CAP: tl.constexpr, SHARED: tl.constexpr, BEGINS: tl.constexpr, DOT: tl.constexpr,
):
    """One program: the queries of one head of one row in one run of chunks."""
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h, line = row // H, row % H, row * tokens
    dim, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q, k, v = of_head(q, q_strides, b, h), of_head(k, k_strides, b, h // R), of_head(v, v_strides, b, h // R)
    d_y, d_q = of_head(d_y, y_strides, b, h), of_head(d_q, d_q_strides, b, h)
    places = places_of(slot, first, follows, keep, b, slot_stride, chunk_stride)
    numbers, g_gradient = (tl.load(log_g + h), scaling, softcap), tl.full((), 0.0, tl.float32)
    for i in range(0, PER):
        n = run * PER + i
        own = chunk_slots(places[0], n, chunks, C)
        asks, index = own >= past, own - past
        position = flag(places[1], n, chunks) + tl.arange(0, C)
        x_q = rows(q, index, q_strides[2], dim, D, asks)
        d_num, d_den, m = query_outputs(index, asks, d_y, y_strides[2], delta, normaliser, shift, line, lane, V)
        gradient, total = tl.zeros((C, BLOCK_D), tl.float32), tl.zeros((C,), tl.float32)
        for back in range(0, 2):
            tile = key_tile(k, v, k_strides[2], v_strides[2], places, n, chunks, dim, lane, back, D, V, SINKS, C)
            near, _ = masks(position, tile[1], tile[2], W, TERRACED)
            gradient, total = tile_gradient(gradient, total, (x_q, d_num, d_den, m), tile, near, numbers, CAP, DOT)
        query, at = (x_q, index, asks, position, d_num, d_den, m), b * chunks + n
        begin = flag(begins + b * chunk_stride, n, chunks) if BEGINS else 0
        early = (sink_k, sink_v, d_sink_k, d_sink_v, at * (H // R) + h // R, at * H + h, begin)
        gradient, total = window_gradient(
            gradient, total, query, early, (top + line, row_sum + line), numbers, chunks - n, dim, lane, k,
            k_strides[2], BLOCK_J, D, V, SINKS, CAP, SHARED, DOT,
        )
        g_gradient += tl.sum(total, 0)
        write_rows(d_q, index, d_q_strides[2], dim, D, asks, gradient)
    tl.store(d_log_g + row * runs + run, g_gradient)
# fmt: on


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


# Arguments as of `queries_kernel`; d_k: [B, H, S, D] and d_v, per query head.
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
            query_position = flag(first, at, chunks) + ahead % (C // T) * T + tl.arange(0, T)
            near = live[:, None] & asks[None, :] & (position[:, None] <= query_position[None, :])
            near = near & in_window(query_position[None, :], position[:, None], W, TERRACED)
            query = (x_q, index, asks, d_num, d_den, m)
            d_x, d_more = seen_near(query, (x_k, x_v, slots), near, memory, numbers, CAP, SHARED, DOT)
            gradient, v_gradient = gradient + d_x, v_gradient + d_more
        write_rows(d_k, slots, d_k_strides[2], dim, D, there, gradient * scaling)
        write_rows(d_v, slots, d_v_strides[2], lane, V, there, v_gradient)
# fmt: on
