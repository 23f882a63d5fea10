# mypy: disable-error-code="no-untyped-def"
"""The forward pass: window and linear part of a run of chunks under one normaliser (LoLCATs, 2410.10254, equation 6).

Letters: C chunk, D head dimension, V value dimension, F columns of the feature map, R query heads per key/value head, J
sinks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops.triton.window_chunks.carry import read_sums, take_up
from linearize.ops.triton.window_chunks.tiles import (
    bent,
    chunk_slots,
    features,
    flag,
    in_window,
    of_head,
    provided,
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


@triton.jit
def remember(
    x_q, held, given, index, asks, stride, w, bias, scale, feature,
    D: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, HALVES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """phi_q^T S and phi_q^T z, and the two halves of phi_q times the factor."""
    S_a, z_a, S_b, z_b = held
    a, b = features(x_q, given, index, stride, asks, w, bias, feature, D, F, MAP, DOT)
    a, b = a * scale, b * scale
    linear, beside = tl.dot(a, S_a, input_precision=DOT), tl.sum(a * z_a[None, :], 1)
    if HALVES == 2:
        linear += tl.dot(b, S_b, input_precision=DOT)
        beside += tl.sum(b * z_b[None, :], 1)
    return linear, beside, a, b


@triton.jit
def reach(
    linear, beside, a, b, tile, far, given, stride, w, bias, feature,
    D: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, HALVES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Both sums with a tile's keys that lie beyond the window."""
    slots, _, live, x_k, x_v = tile
    o, u = features(x_k, given, slots, stride, live, w, bias, feature, D, F, MAP, DOT)
    r = tl.dot(a, tl.trans(o), input_precision=DOT)
    if HALVES == 2:
        r += tl.dot(b, tl.trans(u), input_precision=DOT)
    r = tl.where(far, r, 0.0)
    most = tl.max(tl.abs(r), 1)
    most = tl.where(most > 0, most, 1.0)  # in fp16 smaller ones would be 0
    sums = tl.dot((r / most[:, None]).to(x_v.dtype), x_v, input_precision=DOT)
    return linear + sums * most[:, None], beside + tl.sum(r, 1)


# Arguments. sink_k, sink_v: [B, chunks, G, J, D or V], of each chunk's document. log_g, factor: [H], of the window and
# the linear term. begins: the first position of each chunk's document, where one is not 0 (BEGINS). sums: [B H,
# runs, halves, F, V + 1], before each run. shift, normaliser, top: [B, H, T]; top is the key with the largest score, a
# slot, or -2 - j for sink j. Strides: of batch, head and token (or slot).
# fmt: off
@triton.jit
def attend_kernel(
    q, k, v, phi_q, phi_k, sink_k, sink_v, weight_q, bias_q, weight_k, bias_k, log_g, factor, slot, first, follows,
    keep, begins, sums, y, shift, normaliser, top, q_strides, k_strides, v_strides, phi_q_strides, phi_k_strides,
    y_strides, slot_stride, chunk_stride, past, tokens, chunks, runs, scaling, softcap,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_J: tl.constexpr, C: tl.constexpr, PER: tl.constexpr,
    W: tl.constexpr, TERRACED: tl.constexpr, SINKS: tl.constexpr, CAP: tl.constexpr, SHARED: tl.constexpr,
    WINDOW: tl.constexpr, LINEAR: tl.constexpr, FAR: tl.constexpr, MAP: tl.constexpr, HALVES: tl.constexpr,
    BEGINS: tl.constexpr, DOT: tl.constexpr,
):
    """One program: the outputs of one head of one row in one run of chunks."""
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h, line = row // H, row % H, row * tokens
    dim, lane, feature = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_F)
    q, k = of_head(q, q_strides, b, h), of_head(k, k_strides, b, h // R)
    v, phi_q = of_head(v, v_strides, b, h // R), of_head(phi_q, phi_q_strides, b, h)
    phi_k, y = of_head(phi_k, phi_k_strides, b, h), of_head(y, y_strides, b, h)
    places = places_of(slot, first, follows, keep, b, slot_stride, chunk_stride)
    steps, g = (k_strides[2], v_strides[2], phi_k_strides[2]), tl.load(log_g + h)
    if LINEAR:
        scale = tl.load(factor + h)
        wq, bq = weight_of(weight_q, bias_q, h, D, F)
        wk, bk = weight_of(weight_k, bias_k, h, D, F)
        keys = (k, v, phi_k, wk, bk)
        held = read_sums(sums + (row * runs + run) * HALVES * F * (V + 1), feature, lane, F, V, HALVES)
    for i in range(0, PER):
        n = run * PER + i
        if LINEAR and i > 0:
            held, _ = take_up(
                held, keys, places, steps, n, chunks, dim, lane, feature, D, V, F, SINKS, C, MAP, HALVES, DOT
            )
        own = chunk_slots(places[0], n, chunks, C)
        asks, index = own >= past, own - past
        position = flag(places[1], n, chunks) + tl.arange(0, C)
        x_q = rows(q, index, q_strides[2], dim, D, asks)
        total, normal, m = tl.zeros((C, BLOCK_V), tl.float32), tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
        if WINDOW:
            most, highest = tl.full((C,), -float("inf"), tl.float32), tl.full((C,), -1, tl.int32)
            for back in range(0, 2):  # one tile at a time: two of them do not fit into registers
                tile = key_tile(k, v, steps[0], steps[1], places, n, chunks, dim, lane, back, D, V, SINKS, C)
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
            linear, beside, o, u = remember(
                x_q, held, phi_q, index, asks, phi_q_strides[2], wq, bq, scale, feature, D, F, MAP, HALVES, DOT
            )
            if FAR:
                for back in range(0, 2):
                    tile = key_tile(k, v, steps[0], steps[1], places, n, chunks, dim, lane, back, D, V, SINKS, C)
                    _, far = masks(position, tile[1], tile[2], W, TERRACED)
                    linear, beside = reach(
                        linear, beside, o, u, tile, far, phi_k, steps[2], wk, bk, feature, D, F, MAP, HALVES, DOT
                    )
            shared = tl.exp(-m) if SHARED else tl.full(m.shape, 1.0, tl.float32)
            total, normal = total + linear * shared[:, None], normal + beside * shared
        normal = tl.where(normal == 0.0, 1.0, normal)
        write_rows(y, index, y_strides[2], lane, V, asks, total / normal[:, None])
        tl.store(shift + line + index, m, mask=asks)
        tl.store(normaliser + line + index, normal, mask=asks)
# fmt: on
