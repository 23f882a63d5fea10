# mypy: disable-error-code="no-untyped-def"
"""The backward pass for keys, values and the features of keys (see `gradients.py`).

Letters: C chunk, D head dimension, V value dimension, F columns of the feature map, R query heads per key/value head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops.triton.window_chunks.attend import masks, places_of
from linearize.ops.triton.window_chunks.carry import add_queries, query_gradient, read_sums
from linearize.ops.triton.window_chunks.gradients import (
    less_top,
    on_one_scale,
    query_outputs,
    score_gradient,
    through_weight,
    weights_of,
    write_weight,
)
from linearize.ops.triton.window_chunks.tiles import (
    chunk_slots,
    features,
    features_backward,
    flag,
    narrow,
    of_head,
    provided,
    rows,
    weight_of,
    write_rows,
)


@triton.jit
def recalled_later(
    held, o, u, value, folds, HALVES: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """What queries that see a chunk through the sum give its values and both halves of its phi_k."""
    G_a, g_a, G_b, g_b = held
    d_a = tl.where(folds[:, None], tl.dot(value, tl.trans(G_a), input_precision=DOT) + g_a[None, :], 0.0)
    d_v = tl.dot(tl.where(folds[:, None], o, 0.0), G_a, input_precision=DOT)
    d_b = d_a
    if HALVES == 2:
        d_b = tl.where(folds[:, None], tl.dot(value, tl.trans(G_b), input_precision=DOT) + g_b[None, :], 0.0)
        d_v += tl.dot(tl.where(folds[:, None], u, 0.0), G_b, input_precision=DOT)
    return d_v, d_a, d_b


@triton.jit
def seen_beyond(
    d_a, d_b, x_v, phi, far, queries, d_num, d_den, scale, HALVES: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """What a tile's queries that see keys beyond the window give the keys' values; and both halves of phi_k so far."""
    o, u = phi
    a, b = queries
    a, b = scale * a, scale * b
    r = tl.dot(a, tl.trans(o), input_precision=DOT)
    if HALVES == 2:
        r += tl.dot(b, tl.trans(u), input_precision=DOT)
    d_v = tl.dot(tl.trans(tl.where(far, r, 0.0)), d_num, input_precision=DOT)
    d_r = tl.trans(score_gradient(tl.where(far, 1.0, 0.0), x_v, d_num, d_den, DOT))
    d_a += tl.dot(d_r, a, input_precision=DOT)
    d_b = d_b + tl.dot(d_r, b, input_precision=DOT) if HALVES == 2 else d_a
    return d_v, d_a, d_b


@triton.jit
def seen_near(
    query, keys, near, memory, numbers, CAP: tl.constexpr, SHARED: tl.constexpr, DOT: tl.constexpr
):  # fmt: skip
    """What a tile's queries that see keys inside the window give the keys and their values."""
    x_q, index, asks, d_num, d_den, m = query
    (x_k, x_v, slots), (top, row_sum), (g, scaling, softcap) = keys, memory, numbers
    p, slope = weights_of(x_q, x_k, near, m, g, scaling, softcap, CAP, DOT)
    d_s = score_gradient(p, x_v, d_num, d_den, DOT)
    if SHARED == 0:
        most = tl.load(top + index, mask=asks, other=-1)
        d_s = less_top(d_s, slots, most, near, tl.load(row_sum + index, mask=asks, other=0.0))
    d_x = tl.dot(tl.trans(narrow(d_s * slope, x_q)), narrow(x_q, x_q), input_precision=DOT) * scaling
    return d_x, tl.dot(tl.trans(narrow(p, x_q)), narrow(d_num, x_q), input_precision=DOT)


# Arguments as in `gradients.py`; sums: the gradient that the run after each hands on; d_k: [B, H, S, D] and d_v, per
# query head; d_phi_k like phi_k.
# fmt: off
@triton.jit
def keys_kernel(
    q, k, v, phi_q, phi_k, weight_q, bias_q, weight_k, bias_k, log_g, factor, slot, first, follows, keep, sums, d_y,
    delta, shift, normaliser, top, row_sum, d_k, d_v, d_phi_k, d_weight, d_bias, q_strides, k_strides, v_strides,
    phi_q_strides, phi_k_strides, y_strides, d_k_strides, d_v_strides, d_phi_strides, slot_stride, chunk_stride, past,
    tokens, chunks, runs, scaling, softcap,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, C: tl.constexpr, PER: tl.constexpr, W: tl.constexpr,
    TERRACED: tl.constexpr, SINKS: tl.constexpr, CAP: tl.constexpr, SHARED: tl.constexpr, WINDOW: tl.constexpr,
    LINEAR: tl.constexpr, FAR: tl.constexpr, MAP: tl.constexpr, HALVES: tl.constexpr, DOT: tl.constexpr,
):
    """One program: keys of chunks n - 2, n of one run, last first; queries from n on see them through the sum."""
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h, line = row // H, row % H, row * tokens
    dim, lane, feature = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_F)
    q, k = of_head(q, q_strides, b, h), of_head(k, k_strides, b, h // R)
    v, phi_q = of_head(v, v_strides, b, h // R), of_head(phi_q, phi_q_strides, b, h)
    phi_k, d_y = of_head(phi_k, phi_k_strides, b, h), of_head(d_y, y_strides, b, h)
    d_k, d_v = of_head(d_k, d_k_strides, b, h), of_head(d_v, d_v_strides, b, h)
    d_phi_k = of_head(d_phi_k, d_phi_strides, b, h)
    slot, first, follows, keep = places_of(slot, first, follows, keep, b, slot_stride, chunk_stride)
    g = tl.load(log_g + h)
    if LINEAR:
        scale = tl.load(factor + h)
        wq, bq = weight_of(weight_q, bias_q, h, D, F)
        wk, bk = weight_of(weight_k, bias_k, h, D, F)
        held = read_sums(sums + (row * runs + run) * HALVES * F * (V + 1), feature, lane, F, V, HALVES)
        if MAP != 0:
            w_gradient, b_gradient = tl.zeros((BLOCK_D, BLOCK_F), tl.float32), tl.zeros((BLOCK_F,), tl.float32)
    for i in range(0, PER):
        n = run * PER + PER - 1 - i
        position = flag(first, n - 2, chunks) + tl.arange(0, C)
        slots = chunk_slots(slot, n - 2, chunks, C)
        there, live = slots >= 0, (slots >= 0) & (position >= SINKS)
        x_k, x_v = rows(k, slots, k_strides[2], dim, D, there), rows(v, slots, v_strides[2], lane, V, there)
        gradient, v_gradient = tl.zeros((C, BLOCK_D), tl.float32), tl.zeros((C, BLOCK_V), tl.float32)
        if LINEAR:
            stays = flag(keep, n, chunks).to(tl.float32)
            index, asks, d_num, d_den = query_gradient(
                slot, n, chunks, past, d_y, y_strides[2], delta, normaliser, shift, line, lane, V, SHARED, C
            )
            x_q = rows(q, index, q_strides[2], dim, D, asks)
            held = add_queries(
                held, x_q, phi_q, index, phi_q_strides[2], asks, d_num, d_den, wq, bq, scale, stays, feature, D, F, MAP,
                HALVES, DOT,
            )
            folds = provided(live, flag(follows, n, chunks) * flag(follows, n - 1, chunks))
            o, u = features(x_k, phi_k, slots, phi_k_strides[2], live, wk, bk, feature, D, F, MAP, DOT)
            v_gradient, d_a, d_b = recalled_later(held, o, u, x_v.to(tl.float32), folds, HALVES, DOT)
        for ahead in range(0, 2):
            at = n - 2 + ahead
            own = chunk_slots(slot, at, chunks, C)
            asks, index = own >= past, own - past
            asks = provided(asks, tl.where(ahead == 1, flag(follows, at, chunks), 1))
            x_q = rows(q, index, q_strides[2], dim, D, asks)
            d_num, d_den, m = query_outputs(index, asks, d_y, y_strides[2], delta, normaliser, shift, line, lane, V)
            near, far = masks(flag(first, at, chunks) + tl.arange(0, C), position, live, W, TERRACED)
            near, far = near & asks[:, None], far & asks[:, None]
            if WINDOW:
                query = (x_q, index, asks, d_num, d_den, m)
                memory, numbers = (top + line, row_sum + line), (g, scaling, softcap)
                d_x, d_more = seen_near(query, (x_k, x_v, slots), near, memory, numbers, CAP, SHARED, DOT)
                gradient, v_gradient = gradient + d_x, v_gradient + d_more
            if LINEAR and FAR:
                d_num, d_den = on_one_scale(d_num, d_den, m, SHARED)
                asked = features(x_q, phi_q, index, phi_q_strides[2], asks, wq, bq, feature, D, F, MAP, DOT)
                d_more, d_a, d_b = seen_beyond(d_a, d_b, x_v, (o, u), far, asked, d_num, d_den, scale, HALVES, DOT)
                v_gradient += d_more
        if LINEAR:
            if MAP == 0:
                write_rows(d_phi_k, slots, d_phi_strides[2], feature, F, there, d_a)
            else:
                d_z = tl.where(live[:, None], features_backward(o, u, d_a, d_b, MAP), 0.0)
                d_x, d_w, d_b = through_weight(x_k, wk, d_z, feature, D, F, DOT)
                gradient, w_gradient, b_gradient = gradient + d_x, w_gradient + d_w, b_gradient + d_b
        write_rows(d_k, slots, d_k_strides[2], dim, D, there, gradient)
        write_rows(d_v, slots, d_v_strides[2], lane, V, there, v_gradient)
    if LINEAR and MAP != 0:
        write_weight(d_weight, d_bias, row * runs + run, dim, feature, w_gradient, b_gradient, D, F)
# fmt: on
