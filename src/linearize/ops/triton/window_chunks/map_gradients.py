# mypy: disable-error-code="no-untyped-def"
"""The backward pass of the feature maps' products x W + b, from the gradient of what they give.

Letters: C chunk, D head dimension, F columns of the feature map, R heads that share a head of x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops.triton.window_chunks.tiles import add_rows, chunk_slots, of_head, read_weight, rows


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
        given = rows(d_z + row * size * F, index, F, feature, F, valid)
        w = read_weight(weight + h * D * F, BLOCK_D, feature, D, F).to(tl.float32)
        add_rows(
            d_x + row * size * D, index, D, dim, D, valid, tl.dot(given, tl.trans(w), input_precision=DOT)
        )
        found = rows(x, index, x_strides[2], dim, D, valid).to(tl.float32)
        w_gradient += tl.dot(tl.trans(found), given, input_precision=DOT)
        b_gradient += tl.sum(given, 0)
    at, inside = row * runs + run, feature < F
    here = d_weight + at * D * F + dim[:, None] * F + feature[None, :]
    tl.store(here, w_gradient, mask=(dim < D)[:, None] & inside[None, :])
    tl.store(d_bias + at * F + feature, b_gradient, mask=inside)
# fmt: on
