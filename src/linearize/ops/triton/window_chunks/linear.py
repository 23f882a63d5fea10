# mypy: disable-error-code="no-untyped-def"
"""The linear part of a run of chunks, forward: phi_q^T [S, z], and keys beyond the window that are not in the sum yet.

Kernels of its own, so that neither part fills the registers of the other: `attend.py` joins it with the window.

Letters: C chunk, D head dimension, V value dimension, F columns of the feature map, R query heads per key/value head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops.triton.window_chunks.attend import key_tile, masks, places_of
from linearize.ops.triton.window_chunks.carry import sum_at, take_up
from linearize.ops.triton.window_chunks.tiles import (
    add_rows,
    chunk_slots,
    features,
    flag,
    of_head,
    part_of,
    read_sum,
    rows,
    weight_of,
)


@triton.jit
def reach(linear, beside, asked, phi, far, x_v, DOT: tl.constexpr):
    """Both sums of a part of phi_q (`asked`) with a tile's keys that lie beyond the window."""
    r = tl.where(far, tl.dot(asked, tl.trans(phi), input_precision=DOT), 0.0)
    most = tl.max(tl.abs(r), 1)
    most = tl.where(most > 0, most, 1.0)  # in fp16 smaller ones would be 0
    sums = tl.dot((r / most[:, None]).to(x_v.dtype), x_v, input_precision=DOT)
    return linear + sums * most[:, None], beside + tl.sum(r, 1)


# Arguments as in `attend.py`; factor: [H]; part: of the features; sums: [B H, runs, halves, F, V + 1], before each run;
# numerator: [B, H, T, V] and denominator: [B, H, T], fp32, to which the part is added.
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
    held = read_sum(sum_at(sums, row, run, runs, before, V, F, HALVES), feature, lane, F, V)
    for i in range(0, PER):
        n = run * PER + i
        own = chunk_slots(places[0], n, chunks, C)
        asks, index = own >= past, own - past
        x_q = rows(q, index, q_strides[2], dim, D, asks)
        asked = scale * features(x_q, phi_q, index, phi_q_strides[2], asks, wq, bq, feature, sign, D, F, MAP, DOT)
        linear, beside = tl.dot(asked, held[0], input_precision=DOT), tl.sum(asked * held[1][None, :], 1)
        if FAR:
            position = flag(places[1], n, chunks) + tl.arange(0, C)
            for back in range(0, 2):
                slots, place, live, x_k, x_v = key_tile(
                    k, v, steps[0], steps[1], places, n, chunks, dim, lane, back, D, V, SINKS, C
                )
                _, far = masks(position, place, live, W, TERRACED)
                phi = features(x_k, phi_k, slots, steps[2], live, wk, bk, feature, sign, D, F, MAP, DOT)
                linear, beside = reach(linear, beside, asked, phi, far, x_v, DOT)
        add_rows(numerator + line * V, index, V, lane, V, asks, linear)
        at = denominator + line + index
        tl.store(at, tl.load(at, mask=asks, other=0.0) + beside, mask=asks)
        held, _ = take_up(  # after the last chunk for nothing: a branch costs registers
            held, keys, places, steps, n + 1, chunks, dim, lane, feature, sign, D, V, F, SINKS, C, MAP, DOT
        )
# fmt: on
