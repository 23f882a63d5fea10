# mypy: disable-error-code="no-untyped-def"
"""The backward pass of the linear part (see `gradients.py`): gradients of values, factor and of what the feature maps'
softmax or relu is taken of; `maps_kernel` takes those on to inputs and weights of the products x W + b.

Letters: C chunk, D head dimension, V value dimension, F columns of the feature map, R query heads per key/value head
(of `maps_kernel`: heads that share a head of x).
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops.triton.window_chunks.attend import key_tile, masks, places_of
from linearize.ops.triton.window_chunks.carry import add_queries, query_gradient, sum_at, take_up
from linearize.ops.triton.window_chunks.gradients import score_gradient
from linearize.ops.triton.window_chunks.tiles import (
    add_rows,
    chunk_slots,
    features,
    features_backward,
    flag,
    of_head,
    part_of,
    provided,
    read_sum,
    read_weight,
    rows,
    weight_of,
)


@triton.jit
def seen_beyond(d_phi, x_v, phi, far, query, d_num, d_den, DOT: tl.constexpr):
    """What a tile's queries that see keys beyond the window give the keys' values; and a part of phi_k so far."""
    r = tl.where(far, tl.dot(query, tl.trans(phi), input_precision=DOT), 0.0)
    d_v = tl.dot(tl.trans(r), d_num, input_precision=DOT)
    d_r = score_gradient(tl.where(far, 1.0, 0.0), x_v, d_num, d_den, DOT)
    return d_v, d_phi + tl.dot(tl.trans(d_r), query, input_precision=DOT)


# Arguments as in `attend.py` and `gradients.py`; sums: before each run; d_z: [B, H, T, F], fp32 (given features: like
# phi_q), to which the part's gradient is added; d_factor: [B H, runs], likewise.
# fmt: off
@triton.jit(do_not_specialize=["part"])
def query_features_kernel(
    q, k, v, phi_q, phi_k, weight_q, bias_q, weight_k, bias_k, factor, slot, first, follows, keep, sums, d_y, delta,
    shift, normaliser, d_factor, d_z, q_strides, k_strides, v_strides, phi_q_strides, phi_k_strides, y_strides,
    z_strides, slot_stride, chunk_stride, past, tokens, chunks, runs, part,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, C: tl.constexpr, PER: tl.constexpr, W: tl.constexpr,
    TERRACED: tl.constexpr, SINKS: tl.constexpr, SHARED: tl.constexpr, FAR: tl.constexpr, MAP: tl.constexpr,
    HALVES: tl.constexpr, DOT: tl.constexpr,
):
    """One program: the queries of one head of one row in one run of chunks, one part of the features."""
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h, line = row // H, row % H, row * tokens
    dim, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    feature, before, sign = part_of(part, BLOCK_F, F, MAP)
    q, k, v = of_head(q, q_strides, b, h), of_head(k, k_strides, b, h // R), of_head(v, v_strides, b, h // R)
    phi_q, phi_k = of_head(phi_q, phi_q_strides, b, h), of_head(phi_k, phi_k_strides, b, h)
    d_y, d_z = of_head(d_y, y_strides, b, h), of_head(d_z, z_strides, b, h)
    places = places_of(slot, first, follows, keep, b, slot_stride, chunk_stride)
    steps, scale = (k_strides[2], v_strides[2], phi_k_strides[2]), tl.load(factor + h)
    wq, bq = weight_of(weight_q, bias_q, h, D, F)
    wk, bk = weight_of(weight_k, bias_k, h, D, F)
    keys = (k, v, phi_k, wk, bk)
    memory = read_sum(sum_at(sums, row, run, runs, before, V, F, HALVES), feature, lane, F, V)
    at = d_factor + row * runs + run
    factor_gradient = tl.load(at)
    for i in range(0, PER):
        n = run * PER + i
        index, asks, d_num, d_den = query_gradient(
            places[0], n, chunks, past, d_y, y_strides[2], delta, normaliser, shift, line, lane, V, SHARED, C
        )
        x_q = rows(q, index, q_strides[2], dim, D, asks)
        phi = features(x_q, phi_q, index, phi_q_strides[2], asks, wq, bq, feature, sign, D, F, MAP, DOT)
        d_phi = tl.dot(d_num, tl.trans(memory[0]), input_precision=DOT) + d_den[:, None] * memory[1][None, :]
        if FAR:
            position = flag(places[1], n, chunks) + tl.arange(0, C)
            for back in range(0, 2):
                slots, place, live, x_k, x_v = key_tile(
                    k, v, steps[0], steps[1], places, n, chunks, dim, lane, back, D, V, SINKS, C
                )
                _, far = masks(position, place, live, W, TERRACED)
                d_r = score_gradient(tl.where(far, 1.0, 0.0), x_v, d_num, d_den, DOT)
                seen = features(x_k, phi_k, slots, steps[2], live, wk, bk, feature, sign, D, F, MAP, DOT)
                d_phi += tl.dot(d_r, seen, input_precision=DOT)
        factor_gradient += tl.sum(tl.sum(phi * d_phi, 1), 0)
        add_rows(d_z, index, z_strides[2], feature, F, asks, features_backward(phi, d_phi * scale, sign, MAP))
        memory, _ = take_up(  # after the last chunk for nothing: a branch costs registers
            memory, keys, places, steps, n + 1, chunks, dim, lane, feature, sign, D, V, F, SINKS, C, MAP, DOT
        )
    tl.store(at, factor_gradient)


# sums: the gradient that the run after each hands on; d_v: [B, H, S, V], fp32, and d_z: [B, H, S, F], to both of which
# the part is added.
@triton.jit(do_not_specialize=["part"])
def key_features_kernel(
    q, k, v, phi_q, phi_k, weight_q, bias_q, weight_k, bias_k, factor, slot, first, follows, keep, sums, d_y, delta,
    shift, normaliser, d_v, d_z, q_strides, k_strides, v_strides, phi_q_strides, phi_k_strides, y_strides, d_v_strides,
    z_strides, slot_stride, chunk_stride, past, tokens, chunks, runs, part,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, C: tl.constexpr, PER: tl.constexpr, W: tl.constexpr,
    TERRACED: tl.constexpr, SINKS: tl.constexpr, SHARED: tl.constexpr, FAR: tl.constexpr, MAP: tl.constexpr,
    HALVES: tl.constexpr, DOT: tl.constexpr,
):
    """One program: keys of chunks n - 2, n of one run, last first, one part of the features; queries from n on see
    them through the sum."""
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h, line = row // H, row % H, row * tokens
    dim, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    feature, before, sign = part_of(part, BLOCK_F, F, MAP)
    q, k, v = of_head(q, q_strides, b, h), of_head(k, k_strides, b, h // R), of_head(v, v_strides, b, h // R)
    phi_q, phi_k = of_head(phi_q, phi_q_strides, b, h), of_head(phi_k, phi_k_strides, b, h)
    d_y, d_v, d_z = of_head(d_y, y_strides, b, h), of_head(d_v, d_v_strides, b, h), of_head(d_z, z_strides, b, h)
    slot, first, follows, keep = places_of(slot, first, follows, keep, b, slot_stride, chunk_stride)
    scale = tl.load(factor + h)
    wq, bq = weight_of(weight_q, bias_q, h, D, F)
    wk, bk = weight_of(weight_k, bias_k, h, D, F)
    memory = read_sum(sum_at(sums, row, run, runs, before, V, F, HALVES), feature, lane, F, V)
    for i in range(0, PER):
        n = run * PER + PER - 1 - i
        index, asks, d_num, d_den = query_gradient(
            slot, n, chunks, past, d_y, y_strides[2], delta, normaliser, shift, line, lane, V, SHARED, C
        )
        x_q = rows(q, index, q_strides[2], dim, D, asks)
        memory = add_queries(
            memory, x_q, phi_q, index, phi_q_strides[2], asks, d_num, d_den, wq, bq, scale,
            flag(keep, n, chunks).to(tl.float32), feature, sign, D, F, MAP, DOT,
        )
        slots, position = chunk_slots(slot, n - 2, chunks, C), flag(first, n - 2, chunks) + tl.arange(0, C)
        there, live = slots >= 0, (slots >= 0) & (position >= SINKS)
        folds = provided(live, flag(follows, n, chunks) * flag(follows, n - 1, chunks))[:, None]
        x_k, x_v = rows(k, slots, k_strides[2], dim, D, there), rows(v, slots, v_strides[2], lane, V, there)
        phi = features(x_k, phi_k, slots, phi_k_strides[2], live, wk, bk, feature, sign, D, F, MAP, DOT)
        d_phi = tl.dot(x_v.to(tl.float32), tl.trans(memory[0]), input_precision=DOT) + memory[1][None, :]
        d_phi = tl.where(folds, d_phi, 0.0)
        v_gradient = tl.dot(tl.where(folds, phi, 0.0), memory[0], input_precision=DOT)
        if FAR:
            for ahead in range(0, 2):
                at = n - 2 + ahead
                index, asks, d_num, d_den = query_gradient(
                    slot, at, chunks, past, d_y, y_strides[2], delta, normaliser, shift, line, lane, V, SHARED, C
                )
                asks = provided(asks, tl.where(ahead == 1, flag(follows, at, chunks), 1))
                x_q = rows(q, index, q_strides[2], dim, D, asks)
                _, far = masks(flag(first, at, chunks) + tl.arange(0, C), position, live, W, TERRACED)
                query = scale * features(
                    x_q, phi_q, index, phi_q_strides[2], asks, wq, bq, feature, sign, D, F, MAP, DOT
                )
                d_more, d_phi = seen_beyond(d_phi, x_v, phi, far & asks[:, None], query, d_num, d_den, DOT)
                v_gradient += d_more
        add_rows(d_v, slots, d_v_strides[2], lane, V, there, v_gradient)
        add_rows(d_z, slots, z_strides[2], feature, F, live, features_backward(phi, d_phi, sign, MAP))
# fmt: on


# x: [B, H / R, S, D], slots or tokens, of which the first is slot `past`; d_z: [B, H, S, F] fp32, contiguous as the
# others; d_x: [B, H, S, D] fp32, to which the gradient of x is added; of each run: d_weight [B H, runs, D, F] and
# d_bias [B H, runs, F].
# fmt: off
@triton.jit(do_not_specialize=["part"])
def maps_kernel(
    x, weight, slot, d_z, d_x, d_weight, d_bias, x_strides, slot_stride, past, size, chunks, runs, part,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
    C: tl.constexpr, PER: tl.constexpr, DOT: tl.constexpr,
):
    """One program: one head of one row in one run of chunks, BLOCK_F columns."""
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = row // H, row % H
    x, slot = of_head(x, x_strides, b, h // R), slot + b * slot_stride
    dim, feature = tl.arange(0, BLOCK_D), part * BLOCK_F + tl.arange(0, BLOCK_F)
    w_gradient, b_gradient = tl.zeros((BLOCK_D, BLOCK_F), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
    for i in range(0, PER):
        slots = chunk_slots(slot, run * PER + i, chunks, C)
        valid, index = slots >= past, slots - past
        d_rows = rows(d_z + row * size * F, index, F, feature, F, valid)
        w = read_weight(weight + h * D * F, BLOCK_D, feature, D, F).to(tl.float32)
        add_rows(
            d_x + row * size * D, index, D, dim, D, valid, tl.dot(d_rows, tl.trans(w), input_precision=DOT)
        )
        x_rows = rows(x, index, x_strides[2], dim, D, valid).to(tl.float32)
        w_gradient += tl.dot(tl.trans(x_rows), d_rows, input_precision=DOT)
        b_gradient += tl.sum(d_rows, 0)
    at, inside = row * runs + run, feature < F
    here = d_weight + at * D * F + dim[:, None] * F + feature[None, :]
    tl.store(here, w_gradient, mask=(dim < D)[:, None] & inside[None, :])
    tl.store(d_bias + at * F + feature, b_gradient, mask=inside)
# fmt: on
