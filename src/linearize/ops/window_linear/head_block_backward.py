"""The gradients of one query head in each group of a block.

Letters: as in `slab.py`; b and g are the rows and groups of a block, P = b g N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.matmul import product_into, whole_products
from linearize.ops.window_linear.head_block import Inputs, Piece, Slab
from linearize.ops.window_linear.linear_part import LinearPart
from linearize.ops.window_linear.softmax_part import SoftmaxPart
from linearize.ops.window_linear.tiles import tiles


class Gradients:
    """Of a slab's inputs, in the order of `Inputs`; None where the operation does not depend on one."""

    def __init__(self, inputs: Inputs, slab: Slab) -> None:
        seen, far = slab.bias is not None, slab.far is not None
        self.q = torch.empty_like(inputs.q, memory_format=torch.contiguous_format) if seen else None
        self.k = torch.zeros_like(inputs.k) if seen else None
        self.v = torch.zeros_like(inputs.v)
        self.sink_k, self.sink_v = (
            None if x is None else torch.zeros_like(x, memory_format=torch.contiguous_format)
            for x in (inputs.sink_k, inputs.sink_v)
        )
        self.phi_q = None if inputs.phi_q is None else torch.empty_like(inputs.phi_q)
        self.phi_k = None
        if inputs.phi_k is not None:
            self.phi_k = torch.zeros_like(inputs.phi_k) if far else torch.empty_like(inputs.phi_k)
        self.memory = None if inputs.memory is None else torch.empty_like(inputs.memory)
        self.log_g = torch.zeros_like(inputs.log_g) if seen else None

    def in_order(self) -> tuple[Tensor | None, ...]:
        """As `Inputs` has them."""
        return (
            self.q, self.k, self.v, self.sink_k, self.sink_v, self.phi_q, self.phi_k, self.memory, self.log_g
        )  # fmt: skip


def piece_backward(
    piece: Piece, d: Gradients, grads: tuple[Tensor | None, ...], shift: Tensor | None, normaliser: Tensor, y: Tensor
) -> None:
    """Add or set this head's part of `d`, given the gradients of y and of the memory after the slab."""
    d_total = _division(piece, grads[0], normaliser, y)
    softmax, linear = piece.softmax(), piece.linear()
    m = None if shift is None else piece.of(shift)
    if softmax is not None and m is not None:
        _softmax(piece, softmax, d, d_total.flatten(0, 2), m)
    if linear is not None:
        if m is not None and piece.slab.shared_shift:
            d_total.mul_(torch.exp2(-m))
        _linear(piece, linear, d, d_total.flatten(0, 2), grads[1])


def _division(piece: Piece, d_y: Tensor | None, normaliser: Tensor, y: Tensor) -> Tensor:
    """Gradient of numerator and normaliser, `[b, g, N, C, W]`, from that of y."""
    d_total = piece.memory.rows("d_total", *piece.shape, y.shape[-1] + 1, like=y)
    if d_y is None:
        return d_total.zero_()
    numerator = d_total[..., :-1]
    torch.div(piece.of(d_y), piece.of(normaliser), out=numerator)
    weighed = piece.memory("total", *numerator.shape, like=y)
    torch.sum(torch.mul(numerator, piece.of(y), out=weighed), dim=-1, out=d_total[..., -1]).neg_()
    return d_total


def _softmax(piece: Piece, softmax: SoftmaxPart, d: Gradients, d_total_PCW: Tensor, m: Tensor) -> None:
    assert d.q is not None and d.k is not None and d.log_g is not None
    keys, slab, block = piece.keys, piece.slab, piece.block
    tops = None if slab.shared_shift else softmax.tops(softmax.largest())
    p = softmax.weights((m - piece.log2_g).flatten(0, 2))
    d_s, d_log_g = softmax.d_scores(d_total_PCW, keys.value_seen(), p, tops)
    d.log_g.view(piece.inputs.groups, -1)[block.groups, piece.r] += d_log_g.view(*piece.shape, 1).sum((0, 2, 3, 4))
    with whole_products():
        product_into(piece.of(d.q), d_s, softmax.k, alpha=slab.scaling)
    sinks = 0 if keys.sink_v is None else keys.sink_v.shape[3]
    _add_tiles(block.of(d.k), d_s[..., sinks:], piece.q, slab.scaling)
    _add_tiles(block.of(d.v), p[..., sinks:], d_total_PCW[..., :-1], 1)
    if d.sink_k is not None and d.sink_v is not None:
        product_into(block.of(d.sink_k), d_s[..., :sinks].mT, piece.q, beta=1, alpha=slab.scaling)
        product_into(block.of(d.sink_v), p[..., :sinks].mT, d_total_PCW[..., :-1], beta=1)


def _linear(piece: Piece, linear: LinearPart, d: Gradients, d_total_PCW: Tensor, d_after: Tensor | None) -> None:
    inputs, slab, block, chunks = piece.inputs, piece.slab, piece.block, piece.shape[2]
    assert inputs.phi_q is not None and inputs.phi_k is not None
    assert d.phi_q is not None and d.phi_k is not None and d.memory is not None
    phi_q, d_phi_k, d_v = piece.of(inputs.phi_q).flatten(0, 2), piece.of(d.phi_k), block.of(d.v)
    d_later = None if d_after is None else piece.of(d_after)
    d_carried = linear.backward(
        d_total_PCW, phi_q, piece.of(d.phi_q), d_phi_k[:, :, :chunks], d_v[:, :, :chunks], d_later
    )
    piece.of(d.memory).copy_(d_carried)
    if slab.far is None:
        return
    tile_phi = tiles(piece.of(inputs.phi_k))
    a = piece.beyond(phi_q, tile_phi, "beyond")
    d_a = piece.beyond(d_total_PCW, tiles(piece.keys.value), "d_beyond")
    product_into(piece.of(d.phi_q), d_a, tile_phi, beta=1)
    _add_tiles(d_phi_k, d_a, phi_q, 1)
    _add_tiles(d_v, a, d_total_PCW[..., :-1], 1)


def _add_tiles(d_x_bgMCD: Tensor, weights_PCK: Tensor, rows_PCD: Tensor, alpha: float) -> None:
    """weights^T rows, added to the chunks n - 1 and n that the tiles are made of."""
    chunk = d_x_bgMCD.shape[3]
    product_into(d_x_bgMCD[:, :, 1:-1], weights_PCK[..., :chunk].mT, rows_PCD, beta=1, alpha=alpha)
    product_into(d_x_bgMCD[:, :, 2:], weights_PCK[..., chunk:].mT, rows_PCD, beta=1, alpha=alpha)
