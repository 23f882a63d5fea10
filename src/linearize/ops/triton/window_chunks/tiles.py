# mypy: disable-error-code="no-untyped-def"
"""Tiles of tokens, masks and feature maps of the window + linear kernels. Triton types the arguments.

Tokens are read through a table: `slot[n C + c]` is the row of k and v (ring, then new tokens) that stands in place c of
chunk n, -1 for none, so that no document shares a chunk with another and nothing is copied to get there.

Letters: C chunk, D head dimension, V value dimension, F columns of the feature map's weight (its features, or half of
them).
"""

from __future__ import annotations

import triton
import triton.language as tl

from linearize.ops.triton.window_parts import tanh

GIVEN, HEDGEHOG, T2R = 0, 1, 2  # features read from memory, or computed here


@triton.jit
def of_head(x, strides, b, h):
    """The first row of a head; strides: of batch and head."""
    return x + b * strides[0] + h * strides[1]


@triton.jit
def chunk_slots(slot, n, chunks, C: tl.constexpr):
    """The slots of chunk n, -1 where there is none."""
    exists = (n >= 0) & (n < chunks)
    slots = tl.load(slot + tl.where(exists, n, 0) * C + tl.arange(0, C))
    return tl.where(exists, slots, -1)


@triton.jit
def flag(table, n, chunks):
    """An entry of a table of chunks, 0 outside."""
    exists = (n >= 0) & (n < chunks)
    return tl.where(exists, tl.load(table + tl.where(exists, n, 0)), 0)


@triton.jit
def provided(mask, count):
    """The mask where `count` is above 0, else nothing. (The interpreter cannot join a mask and a scalar condition.)"""
    return mask & (tl.full(mask.shape, 0, tl.int32) < count)


@triton.jit
def rows(x, index, stride, lane, width, valid):
    """Rows of x by index, `[C, lanes]`; 0 where not valid."""
    at = x + index.to(tl.int64)[:, None] * stride + lane[None, :]
    return tl.load(at, mask=valid[:, None] & (lane < width)[None, :], other=0.0)


@triton.jit
def write_rows(x, index, stride, lane, width, valid, values):
    """The inverse of `rows`."""
    at = x + index.to(tl.int64)[:, None] * stride + lane[None, :]
    tl.store(at, values.to(x.dtype.element_ty), mask=valid[:, None] & (lane < width)[None, :])


@triton.jit
def add_rows(x, index, stride, lane, width, valid, values):
    """`write_rows` on top of what stands there."""
    write_rows(x, index, stride, lane, width, valid, rows(x, index, stride, lane, width, valid).to(tl.float32) + values)


@triton.jit
def narrow(x, like):
    """x as the window's products take it in the backward pass: in bf16 where the inputs are, as FlashAttention's, else
    in fp32: fp16 has no room for what a large normaliser divides."""
    return x.to(tl.bfloat16) if like.dtype == tl.bfloat16 else x.to(tl.float32)


@triton.jit
def in_window(query, key, W: tl.constexpr, TERRACED: tl.constexpr):
    """Whether positions `key: [1, K]` are in the window of `query: [C, 1]` (or turned); no key is after its query."""
    if TERRACED:
        return query // W - key // W < 2
    else:
        return query - key < W


@triton.jit
def bent(s, softcap, CAP: tl.constexpr):
    """softcap tanh(s / softcap), and its derivative."""
    slope = tl.full(s.shape, 1.0, tl.float32)
    if CAP:
        t = tanh(s / softcap)
        s, slope = softcap * t, 1 - t * t
    return s, slope


@triton.jit
def softmax_half(z, inside):
    """One half of Hedgehog's features, at least 1e-12; 0 on lanes outside."""
    z = tl.where(inside, z, -float("inf"))
    e = tl.exp(z - tl.max(z, 1)[:, None])
    return tl.where(inside, tl.maximum(e / tl.sum(e, 1)[:, None], 1e-12), 0.0)


@triton.jit
def projected(x, weight, DOT: tl.constexpr):
    """x W to fp32's rounding: a W of more digits than x goes in two parts of x's own dtype."""
    if x.dtype == weight.dtype:
        return tl.dot(x, weight, input_precision=DOT)
    else:
        upper = weight.to(x.dtype)
        lower = (weight - upper.to(tl.float32)).to(x.dtype)
        return tl.dot(x, upper, input_precision=DOT) + tl.dot(x, lower, input_precision=DOT)


@triton.jit
def part_of(part, BLOCK_F: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr):
    """The columns of a part of the features, those that it has in common with other parts, and its sign.

    A part of Hedgehog's features is one of its halves, the softmax of x W or of -x W; of others BLOCK_F columns. In
    the sum a half stands after the features of those before it.
    """
    lane = tl.arange(0, BLOCK_F)
    if MAP == 1:
        columns, before, sign = lane, part * F, 1.0 - 2.0 * part
    else:
        columns, before, sign = part * BLOCK_F + lane, part * 0, 1.0 + 0.0 * part
    return columns, before, sign


@triton.jit
def features(
    x, phi_pointer, index, stride, valid, weight, bias, feature, sign,
    D: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A part of phi of a tile, `[C, BLOCK_F]` fp32; 0 where not valid.

    A head's weight is read anew for each tile: held in registers, as an operand of products, it would fill most.
    """
    if MAP == 0:
        phi = rows(phi_pointer, index, stride, feature, F, valid).to(tl.float32)
    else:
        z, inside = projected(x, read_weight(weight, x.shape[1], feature, D, F), DOT), (feature < F)[None, :]
        if MAP == 1:
            phi = softmax_half(z * sign, inside)
        else:
            z += tl.load(bias + feature, mask=feature < F, other=0.0).to(tl.float32)[None, :]
            phi = tl.where(inside, tl.maximum(z, 0.0), 0.0)
        phi = tl.where(valid[:, None], phi, 0.0)
    return phi


@triton.jit
def features_backward(phi, d_phi, sign, MAP: tl.constexpr):
    """The gradient of x W (of x W + b for T2R; of phi where it is given) from that of a part of the features."""
    if MAP == 1:
        d_z = sign * phi * (d_phi - tl.sum(phi * d_phi, 1)[:, None])
    elif MAP == 2:
        d_z = tl.where(phi > 0, d_phi, 0.0)
    else:
        d_z = d_phi
    return d_z


@triton.jit
def read_sum(x, feature, lane, F: tl.constexpr, V: tl.constexpr):
    """S `[F, V]` and z `[F]` of `x: [F, V + 1]`."""
    at = x + feature[:, None] * (V + 1) + lane[None, :]
    S = tl.load(at, mask=(feature < F)[:, None] & (lane < V)[None, :], other=0.0)
    return S, tl.load(x + feature * (V + 1) + V, mask=feature < F, other=0.0)


@triton.jit
def write_sum(x, S, z, feature, lane, F: tl.constexpr, V: tl.constexpr):
    """The inverse of `read_sum`."""
    at = x + feature[:, None] * (V + 1) + lane[None, :]
    tl.store(at, S, mask=(feature < F)[:, None] & (lane < V)[None, :])
    tl.store(x + feature * (V + 1) + V, z, mask=feature < F)


@triton.jit
def weight_of(weight, bias, head, D: tl.constexpr, F: tl.constexpr):
    """Where a head's W and b are."""
    return weight + head * D * F, bias + head * F


@triton.jit
def read_weight(weight, rows: tl.constexpr, lane, D: tl.constexpr, F: tl.constexpr):
    """A head's W, `[rows, F]`."""
    dim = tl.arange(0, rows)
    return tl.load(weight + dim[:, None] * F + lane[None, :], mask=(dim < D)[:, None] & (lane < F)[None, :], other=0.0)
