# mypy: disable-error-code="no-untyped-def"
"""The forward pass of a run of chunks: the window part, the linear part, and both under one normaliser (LoLCATs,
2410.10254, equation 6).

The linear part is phi_q^T [S, z] and keys beyond the window that are not in the sum yet. It has kernels of its own, so
that neither part fills the registers of the other.

Letters: C chunk, D head dimension, V value dimension, F columns of the feature map, R query heads per key/value head, J
sinks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops.triton.window_chunks.carry import sum_at, take_up
from linearize.ops.triton.window_chunks.tiles import (
    add_rows,
    bent,
    chunk_slots,
    features,
    flag,
    in_window,
    of_head,
    part_of,
    provided,
    read_sum,
    rows,
    weight_of,
    write_rows,
)


@triton.jit
def places_of(slot, first, follows, keep, b, slot_stride, chunk_stride):
    """A row's tables."""
    at = b * chunk_stride
    return slot + b * slot_stride, first + at, follows + at, keep + at


@triton.jit
def key_tile(
    k, v, k_stride, v_stride, places, n, chunks, dim, lane, back,
    D: tl.constexpr, V: tl.constexpr, SINKS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Keys that the queries of chunk n attend to directly, chunk n - back, if its document is the same: slot, position,
    whether there is one, key and value."""
    slot, first, follows, _ = places
    slots = chunk_slots(slot, n - back, chunks, C)
    position = flag(first, n, chunks) - back * C + tl.arange(0, C)
    live = provided((slots >= 0) & (position >= SINKS), tl.where(back == 1, flag(follows, n, chunks), 1))
    return slots, position, live, rows(k, slots, k_stride, dim, D, live), rows(v, slots, v_stride, lane, V, live)


@triton.jit
def sink_tile(
    sink_k, sink_v, line, begin, position, asks, left, dim, lane,
    BLOCK_J: tl.constexpr, D: tl.constexpr, V: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """The document's first keys and values, and which of them each query sees; `left` chunks, 0 is none. The document
    begins at position `begin`."""
    j = tl.arange(0, BLOCK_J)
    there = provided((j < SINKS) & (j >= begin), left)
    k = rows(sink_k + line * SINKS * D, j, D, dim, D, there)
    v = rows(sink_v + line * SINKS * V, j, V, lane, V, there)
    return k, v, (j[None, :] <= position[:, None]) & there[None, :] & asks[:, None]


@triton.jit
def masks(query, key, live, W: tl.constexpr, TERRACED: tl.constexpr):
    """Which keys each query sees inside its window, and which beyond it."""
    seen = live[None, :] & (key[None, :] <= query[:, None])
    near = seen & in_window(query[:, None], key[None, :], W, TERRACED)
    return near, seen & ~near


@triton.jit
def scores(x_q, x_k, seen, scaling, softcap, CAP: tl.constexpr, DOT: tl.constexpr):
    """s_ni, minus infinity where not seen."""
    s, _ = bent(tl.dot(x_q, tl.trans(x_k), input_precision=DOT) * scaling, softcap, CAP)
    return tl.where(seen, s, -float("inf"))


@triton.jit
def place_of(slots, column):
    """The slots that stand in these columns."""
    at = tl.arange(0, slots.shape[0])
    return tl.sum(tl.where(column[:, None] == at[None, :], slots[None, :], 0), 1)


@triton.jit
def weigh(total, normal, most, highest, s, places, v, DOT: tl.constexpr):
    """Both sums with the terms of one more tile, exp(s - c) [v, 1], c the largest score so far (`most`): the largest
    term is 1, so that v's dtype can hold them; and the key that has that score."""
    top = tl.max(s, 1)
    now = tl.maximum(most, top)
    c = tl.where(now == -float("inf"), 0.0, now)  # a query that sees nothing
    p, before = tl.exp(s - c[:, None]), tl.exp(most - c)
    total = total * before[:, None] + tl.dot(p.to(v.dtype), v, input_precision=DOT)
    highest = tl.where(top > most, place_of(places, tl.argmax(s, 1)), highest)
    return total, normal * before + tl.sum(p, 1), now, highest


# Arguments. sink_k, sink_v: [B, chunks, G, J, D or V], of each chunk's document. log_g: [H], of the window. begins: the
# first position of each chunk's document, where one is not 0 (BEGINS). numerator: [B, H, T, V] and denominator:
# [B, H, T], of the linear part. shift, normaliser, top: [B, H, T]; top is the key with the largest score, a slot, or
# -2 - j for sink j. Strides: of batch, head and token (or slot).
# fmt: off
@triton.jit
def attend_kernel(
    q, k, v, sink_k, sink_v, log_g, slot, first, follows, keep, begins, numerator, denominator, y, shift, normaliser,
    top, q_strides, k_strides, v_strides, y_strides, slot_stride, chunk_stride, past, tokens, chunks, scaling, softcap,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_J: tl.constexpr, C: tl.constexpr, PER: tl.constexpr, W: tl.constexpr, TERRACED: tl.constexpr,
    SINKS: tl.constexpr, CAP: tl.constexpr, SHARED: tl.constexpr, WINDOW: tl.constexpr, LINEAR: tl.constexpr,
    BEGINS: tl.constexpr, DOT: tl.constexpr,
):
    """One program: the outputs of one head of one row in one run of chunks."""
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h, line = row // H, row % H, row * tokens
    dim, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q, k = of_head(q, q_strides, b, h), of_head(k, k_strides, b, h // R)
    v, y = of_head(v, v_strides, b, h // R), of_head(y, y_strides, b, h)
    places, g = places_of(slot, first, follows, keep, b, slot_stride, chunk_stride), tl.load(log_g + h)
    for i in range(0, PER):
        n = run * PER + i
        own = chunk_slots(places[0], n, chunks, C)
        asks, index = own >= past, own - past
        total, normal, m = tl.zeros((C, BLOCK_V), tl.float32), tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
        if WINDOW:
            position = flag(places[1], n, chunks) + tl.arange(0, C)
            x_q = rows(q, index, q_strides[2], dim, D, asks)
            most, highest = tl.full((C,), -float("inf"), tl.float32), tl.full((C,), -1, tl.int32)
            for back in range(0, 2):  # one tile at a time: two of them do not fit into registers
                tile = key_tile(k, v, k_strides[2], v_strides[2], places, n, chunks, dim, lane, back, D, V, SINKS, C)
                near, _ = masks(position, tile[1], tile[2], W, TERRACED)
                s = scores(x_q, tile[3], near, scaling, softcap, CAP, DOT)
                total, normal, most, highest = weigh(total, normal, most, highest, s, tile[0], tile[4], DOT)
            if SINKS > 0:
                early, at = (b * chunks + n) * (H // R) + h // R, begins + b * chunk_stride
                begin = flag(at, n, chunks) if BEGINS else 0
                k_s, v_s, shown = sink_tile(
                    sink_k, sink_v, early, begin, position, asks, chunks - n, dim, lane, BLOCK_J, D, V, SINKS
                )
                s_s = scores(x_q, k_s, shown, scaling, softcap, CAP, DOT)
                sunk = -2 - tl.arange(0, BLOCK_J)
                total, normal, most, highest = weigh(total, normal, most, highest, s_s, sunk, v_s, DOT)
            c = tl.where(most == -float("inf"), 0.0, most)
            m = tl.maximum(c, 0.0) if SHARED else c
            total, normal = total * tl.exp(c - m + g)[:, None], normal * tl.exp(c - m + g)
            tl.store(top + line + index, highest, mask=asks)
        if LINEAR:
            shared = tl.exp(-m) if SHARED else tl.full(m.shape, 1.0, tl.float32)
            total += rows(numerator + line * V, index, V, lane, V, asks) * shared[:, None]
            normal += tl.load(denominator + line + index, mask=asks, other=0.0) * shared
        normal = tl.where(normal == 0.0, 1.0, normal)
        write_rows(y, index, y_strides[2], lane, V, asks, total / normal[:, None])
        tl.store(shift + line + index, m, mask=asks)
        tl.store(normaliser + line + index, normal, mask=asks)
# fmt: on


@triton.jit
def reach(linear, beside, query, phi, far, x_v, DOT: tl.constexpr):
    """Both sums of a part of phi_q (`query`) with a tile's keys that lie beyond the window."""
    r = tl.where(far, tl.dot(query, tl.trans(phi), input_precision=DOT), 0.0)
    most = tl.max(tl.abs(r), 1)
    most = tl.where(most > 0, most, 1.0)  # in fp16 smaller ones would be 0
    sums = tl.dot((r / most[:, None]).to(x_v.dtype), x_v, input_precision=DOT)
    return linear + sums * most[:, None], beside + tl.sum(r, 1)


# Arguments as of `attend_kernel`; factor: [H]; part: of the features; sums: [B H, runs, halves, F, V + 1], before each
# run; numerator: [B, H, T, V] and denominator: [B, H, T], fp32, to which the part is added.
# fmt: off
@triton.jit(do_not_specialize=["part"])
def remember_kernel(
    q, k, v, phi_q, phi_k, weight_q, bias_q, weight_k, bias_k, factor, slot, first, follows, keep, sums, numerator,
    denominator, q_strides, k_strides, v_strides, phi_q_strides, phi_k_strides, slot_stride, chunk_stride, past,
    tokens, chunks, runs, part,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, C: tl.constexpr, PER: tl.constexpr, W: tl.constexpr,
    TERRACED: tl.constexpr, SINKS: tl.constexpr, FAR: tl.constexpr, MAP: tl.constexpr, HALVES: tl.constexpr,
    DOT: tl.constexpr,
):
    """One program: the queries of one head of one row in one run of chunks, one part of the features."""
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h, line = row // H, row % H, row * tokens
    dim, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    feature, before, sign = part_of(part, BLOCK_F, F, MAP)
    q, k, v = of_head(q, q_strides, b, h), of_head(k, k_strides, b, h // R), of_head(v, v_strides, b, h // R)
    phi_q, phi_k = of_head(phi_q, phi_q_strides, b, h), of_head(phi_k, phi_k_strides, b, h)
    places = places_of(slot, first, follows, keep, b, slot_stride, chunk_stride)
    steps, scale = (k_strides[2], v_strides[2], phi_k_strides[2]), tl.load(factor + h)
    wq, bq = weight_of(weight_q, bias_q, h, D, F)
    wk, bk = weight_of(weight_k, bias_k, h, D, F)
    keys = (k, v, phi_k, wk, bk)
    memory = read_sum(sum_at(sums, row, run, runs, before, V, F, HALVES), feature, lane, F, V)
    for i in range(0, PER):
        n = run * PER + i
        own = chunk_slots(places[0], n, chunks, C)
        asks, index = own >= past, own - past
        x_q = rows(q, index, q_strides[2], dim, D, asks)
        query = scale * features(x_q, phi_q, index, phi_q_strides[2], asks, wq, bq, feature, sign, D, F, MAP, DOT)
        linear, beside = tl.dot(query, memory[0], input_precision=DOT), tl.sum(query * memory[1][None, :], 1)
        if FAR:
            position = flag(places[1], n, chunks) + tl.arange(0, C)
            for back in range(0, 2):
                slots, place, live, x_k, x_v = key_tile(
                    k, v, steps[0], steps[1], places, n, chunks, dim, lane, back, D, V, SINKS, C
                )
                _, far = masks(position, place, live, W, TERRACED)
                phi = features(x_k, phi_k, slots, steps[2], live, wk, bk, feature, sign, D, F, MAP, DOT)
                linear, beside = reach(linear, beside, query, phi, far, x_v, DOT)
        add_rows(numerator + line * V, index, V, lane, V, asks, linear)
        at = denominator + line + index
        tl.store(at, tl.load(at, mask=asks, other=0.0) + beside, mask=asks)
        memory, _ = take_up(  # after the last chunk for nothing: a branch costs registers
            memory, keys, places, steps, n + 1, chunks, dim, lane, feature, sign, D, V, F, SINKS, C, MAP, DOT
        )
# fmt: on
