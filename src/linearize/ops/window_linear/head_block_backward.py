"""The gradients of one query head in each group of a block.

Letters: as in `chunked.py`; b and g are the rows and groups of a block, P = b g N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.matmul import product_into, whole_products
from linearize.ops.window_linear.head_block import GroupMasks, Inputs, QueryHeads
from linearize.ops.window_linear.linear_part import LinearPart
from linearize.ops.window_linear.softmax_part import SoftmaxPart
from linearize.ops.window_linear.tiles import tiles


class Gradients:
    """Of a chunk group's inputs, in the order of `Inputs`; None where the operation does not depend on one."""

    def __init__(self, inputs: Inputs, masks: GroupMasks) -> None:
        seen, far = masks.bias is not None, masks.far is not None
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


def query_heads_backward(
    head: QueryHeads,
    d: Gradients,
    grads: tuple[Tensor | None, ...],
    shift: Tensor | None,
    normaliser: Tensor,
    y: Tensor,
) -> None:
    """Add or set this head's part of `d`, given the gradients of y and of the memory after the chunk group."""
    d_total = _division(head, grads[0], normaliser, y)
    softmax, linear = head.softmax(), head.linear()
    m = None if shift is None else head.of(shift)
    if softmax is not None and m is not None:
        _softmax(head, softmax, d, d_total.flatten(0, 2), m)
    if linear is not None:
        if m is not None and head.masks.shared_shift:
            d_total.mul_(torch.exp2(-m))
        _linear(head, linear, d, d_total.flatten(0, 2), grads[1])


def _division(head: QueryHeads, d_y: Tensor | None, normaliser: Tensor, y: Tensor) -> Tensor:
    """Gradient of numerator and normaliser, `[b, g, N, C, W]`, from that of y."""
    d_total = head.memory.rows("d_total", *head.shape, y.shape[-1] + 1, like=y)
    if d_y is None:
        return d_total.zero_()
    numerator = d_total[..., :-1]
    torch.div(head.of(d_y), head.of(normaliser), out=numerator)
    weighed = head.memory("total", *numerator.shape, like=y)
    torch.sum(torch.mul(numerator, head.of(y), out=weighed), dim=-1, out=d_total[..., -1]).neg_()
    return d_total


def _softmax(head: QueryHeads, softmax: SoftmaxPart, d: Gradients, d_total_PCW: Tensor, m: Tensor) -> None:
    assert d.q is not None and d.k is not None and d.log_g is not None
    keys, masks, block = head.keys, head.masks, head.block
    tops = None if masks.shared_shift else softmax.tops(softmax.largest())
    p = softmax.weights((m - head.log2_g).flatten(0, 2))
    d_s, d_log_g = softmax.d_scores(d_total_PCW, keys.value_seen(), p, tops)
    d.log_g.view(head.inputs.groups, -1)[block.groups, head.r] += d_log_g.view(*head.shape, 1).sum((0, 2, 3, 4))
    with whole_products():
        product_into(head.of(d.q), d_s, softmax.k, alpha=masks.scaling)
    sinks = 0 if keys.sink_v is None else keys.sink_v.shape[3]
    _add_tiles(block.of(d.k), d_s[..., sinks:], head.q, masks.scaling)
    _add_tiles(block.of(d.v), p[..., sinks:], d_total_PCW[..., :-1], 1)
    if d.sink_k is not None and d.sink_v is not None:
        product_into(block.of(d.sink_k), d_s[..., :sinks].mT, head.q, beta=1, alpha=masks.scaling)
        product_into(block.of(d.sink_v), p[..., :sinks].mT, d_total_PCW[..., :-1], beta=1)


def _linear(head: QueryHeads, linear: LinearPart, d: Gradients, d_total_PCW: Tensor, d_after: Tensor | None) -> None:
    inputs, masks, block, chunks = head.inputs, head.masks, head.block, head.shape[2]
    assert inputs.phi_q is not None and inputs.phi_k is not None
    assert d.phi_q is not None and d.phi_k is not None and d.memory is not None
    phi_q, d_phi_k, d_v = head.of(inputs.phi_q).flatten(0, 2), head.of(d.phi_k), block.of(d.v)
    d_later = None if d_after is None else head.of(d_after)
    d_carried = linear.backward(
        d_total_PCW, phi_q, head.of(d.phi_q), d_phi_k[:, :, :chunks], d_v[:, :, :chunks], d_later
    )
    head.of(d.memory).copy_(d_carried)
    if masks.far is None:
        return
    tile_phi = tiles(head.of(inputs.phi_k))
    a = head.beyond(phi_q, tile_phi, "beyond")
    d_a = head.beyond(d_total_PCW, tiles(head.keys.value), "d_beyond")
    product_into(head.of(d.phi_q), d_a, tile_phi, beta=1)
    _add_tiles(d_phi_k, d_a, phi_q, 1)
    _add_tiles(d_v, a, d_total_PCW[..., :-1], 1)


def _add_tiles(d_x_bgMCD: Tensor, weights_PCK: Tensor, rows_PCD: Tensor, alpha: float) -> None:
    """weights^T rows, added to the chunks n - 1 and n that the tiles are made of."""
    chunk = d_x_bgMCD.shape[3]
    product_into(d_x_bgMCD[:, :, 1:-1], weights_PCK[..., :chunk].mT, rows_PCD, beta=1, alpha=alpha)
    product_into(d_x_bgMCD[:, :, 2:], weights_PCK[..., chunk:].mT, rows_PCD, beta=1, alpha=alpha)
