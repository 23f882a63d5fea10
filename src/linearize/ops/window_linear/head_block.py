"""A chunk group's outputs and gradients for some heads of some rows: one query head of each group of a block at a time.

Letters: as in `chunked.py`; b and g are the rows and groups of a block, P = b g N, K = J + 2 C keys of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from linearize.ops.blocking import HeadBlock, scratch
from linearize.ops.matmul import LOG2_E, product_into, whole_products
from linearize.ops.window_linear.head_terms import LinearPart, SoftmaxPart, tiles, value_rows, with_sinks
from linearize.ops.window_linear.masks import GroupMasks


@dataclass(frozen=True, eq=False)
class Inputs:
    """The tensors of a chunk group; what there is none of is None."""

    q: Tensor
    k: Tensor
    v: Tensor
    sink_k: Tensor | None
    sink_v: Tensor | None
    phi_q: Tensor | None
    phi_k: Tensor | None
    memory: Tensor | None
    log_g: Tensor

    @property
    def groups(self) -> int:
        """G."""
        return self.k.shape[1]

    def numbers(self) -> int:
        """Of the largest matrix of one head."""
        chunks, chunk, dim = self.q.shape[2:]
        return chunks * chunk * max(2 * chunk, dim, 0 if self.phi_q is None else self.phi_q.shape[-1])

    def head(self, x_BH: Tensor, block: HeadBlock, r: int) -> Tensor:
        """The r-th query head of each group of the block, `[b, g, ...]`."""
        return block.of(x_BH.unflatten(1, (self.groups, -1))[:, :, r])


class Keys:
    """What all query heads of a block share: tiles of keys and values."""

    def __init__(self, inputs: Inputs, block: HeadBlock) -> None:
        v = block.of(inputs.v)
        self.value, self.tile_v = value_rows(v, scratch()), tiles(v)
        self.sink_v = None if inputs.sink_v is None else block.of(inputs.sink_v)
        self.k = with_sinks(None if inputs.sink_k is None else block.of(inputs.sink_k), tiles(block.of(inputs.k)))
        self.v_seen = with_sinks(self.sink_v, self.tile_v)

    @cached_property
    def value_seen(self) -> Tensor:
        """[v, 1] of sinks and tiles, `[P, K, W]`."""
        sinks = None if self.sink_v is None else torch.nn.functional.pad(self.sink_v, (0, 1), value=1)
        return with_sinks(sinks, tiles(self.value))


class QueryHeads:
    """One query head of each group of a block."""

    def __init__(self, inputs: Inputs, masks: GroupMasks, block: HeadBlock, r: int, keys: Keys) -> None:
        self.inputs, self.masks, self.block, self.r, self.keys, self.memory = inputs, masks, block, r, keys, scratch()
        q = self.of(inputs.q)
        self.shape, self.q = q.shape[:4], q.flatten(0, 2)
        log_g = inputs.log_g.view(1, inputs.groups, -1)[:, block.groups, r]
        self.log2_g = (log_g * LOG2_E)[:, :, None, None, None]

    def of(self, x_BH: Tensor) -> Tensor:
        """This head of each group."""
        return self.inputs.head(x_BH, self.block, self.r)

    def softmax(self) -> SoftmaxPart | None:
        """The softmax part, scores computed."""
        masks = self.masks
        if masks.bias is None:
            return None
        shape = (*self.shape, self.keys.k.shape[1])
        return SoftmaxPart(
            self.q, self.keys.k, self.block.mask(masks.bias), shape, masks.scaling, masks.softcap, self.memory
        )

    def linear(self) -> LinearPart | None:
        """The linear part, memories computed."""
        inputs, masks, block, chunks = self.inputs, self.masks, self.block, self.shape[2]
        if inputs.phi_q is None or inputs.phi_k is None or inputs.memory is None:
            return None
        fold = None if masks.fold is None else block.mask(masks.fold)[..., None]
        keep = None if masks.keep is None else block.mask(masks.keep)[..., None, None]
        phi_k = self.of(inputs.phi_k)[:, :, :chunks]
        return LinearPart(self.keys.value[:, :, :chunks], phi_k, self.of(inputs.memory), fold, keep, self.memory)

    def beyond(self, left: Tensor, right: Tensor, name: str) -> Tensor:
        """left @ right^T, `[P, C, 2 C]`, where keys of the tile are seen by features, else 0."""
        assert self.masks.far is not None
        a = self.memory(name, *self.shape, right.shape[1], like=left)
        product_into(a, left, right.mT)
        return a.mul_(self.block.mask(self.masks.far)).flatten(0, 2)

    def forward(self, y: Tensor, shift: Tensor | None, normaliser: Tensor, after: Tensor | None) -> None:
        """Set the outputs of these heads (all `[B, H, ...]`): `y`, the shift m log2(e), the normaliser, the memory."""
        softmax, linear, masks = self.softmax(), self.linear(), self.masks
        total = self.memory("total", *self.shape, y.shape[-1], like=y)
        flat, sums, m = total.flatten(0, 2), None, None
        if softmax is not None:
            assert shift is not None
            c = softmax.largest()
            m = c.clamp_(min=0) if masks.shared_shift else c.masked_fill_(c == -torch.inf, 0)
            self.of(shift).copy_(m.view(*self.shape, 1))
        if linear is not None:
            assert self.inputs.phi_q is not None and self.inputs.phi_k is not None and after is not None
            phi_q = self.of(self.inputs.phi_q).flatten(0, 2)
            sums = linear.read(phi_q, flat)
            if masks.far is not None:
                a = self.beyond(phi_q, tiles(self.of(self.inputs.phi_k)), "beyond")
                product_into(flat, a, self.keys.tile_v, beta=1)
                sums += a.sum(-1, keepdim=True)
            if m is not None and masks.shared_shift:
                factor = torch.exp2(-m)
                flat.mul_(factor)
                sums.mul_(factor)
            self.of(after).copy_(linear.last)
        if softmax is not None and m is not None:
            p = softmax.weights((m.view(*self.shape, 1) - self.log2_g).view(m.shape))
            with whole_products():
                product_into(flat, p, self.keys.v_seen, beta=0 if sums is None else 1)
            own = p.sum(-1, keepdim=True)
            sums = own if sums is None else sums.add_(own)
        assert sums is not None
        sums.masked_fill_(sums == 0, 1)
        self.of(normaliser).copy_(sums.view(*self.shape, 1))
        torch.div(total, sums.view(*self.shape, 1), out=self.of(y))


class Gradients:
    """Of a chunk group's inputs, in the order of `Inputs`; None where the operation does not depend on one, or where
    its gradient is not `needed` (in attention transfer nothing but the features and log g is trained)."""

    def __init__(self, inputs: Inputs, masks: GroupMasks, needed: Sequence[bool]) -> None:
        q, k, v, sink_k, sink_v, phi_q, phi_k, memory, log_g = needed
        seen, far = masks.bias is not None, masks.far is not None
        self.q = torch.empty_like(inputs.q, memory_format=torch.contiguous_format) if seen and q else None
        self.k = torch.zeros_like(inputs.k) if seen and k else None
        self.v = torch.zeros_like(inputs.v) if v else None
        self.sink_k, self.sink_v = (
            None if x is None or not own else torch.zeros_like(x, memory_format=torch.contiguous_format)
            for x, own in ((inputs.sink_k, sink_k), (inputs.sink_v, sink_v))
        )
        self.phi_q = None if inputs.phi_q is None or not phi_q else torch.empty_like(inputs.phi_q)
        self.phi_k = None
        if inputs.phi_k is not None and phi_k:
            self.phi_k = torch.zeros_like(inputs.phi_k) if far else torch.empty_like(inputs.phi_k)
        self.memory = None if inputs.memory is None or not memory else torch.empty_like(inputs.memory)
        self.log_g = torch.zeros_like(inputs.log_g) if seen and log_g else None

    @property
    def of_scores(self) -> bool:
        """Whether something that the scores depend on has a gradient."""
        return any(x is not None for x in (self.q, self.k, self.sink_k, self.log_g))

    @property
    def of_memories(self) -> bool:
        """Whether something that the memories are made of has one."""
        return any(x is not None for x in (self.phi_k, self.v, self.memory))

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
    m = None if shift is None else head.of(shift)
    if m is not None and (d.of_scores or d.v is not None or d.sink_v is not None):
        _softmax(head, d, d_total.flatten(0, 2), m)
    if d.phi_q is None and not d.of_memories:
        return
    if (linear := head.linear()) is not None:
        if m is not None and head.masks.shared_shift:
            d_total.mul_(torch.exp2(-m))
        with whole_products():
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


def _softmax(head: QueryHeads, d: Gradients, d_total_PCW: Tensor, m: Tensor) -> None:
    softmax, keys, scaling, block = head.softmax(), head.keys, head.masks.scaling, head.block
    assert softmax is not None
    tops = None if head.masks.shared_shift else softmax.tops(softmax.largest())
    p = softmax.weights((m - head.log2_g).flatten(0, 2))
    sinks = 0 if keys.sink_v is None else keys.sink_v.shape[3]
    if d.v is not None:
        _add_tiles(block.of(d.v), p[..., sinks:], d_total_PCW[..., :-1], 1)
    if d.sink_v is not None:
        product_into(block.of(d.sink_v), p[..., :sinks].mT, d_total_PCW[..., :-1], beta=1)
    if not d.of_scores:
        return
    d_s, d_log_g = softmax.d_scores(d_total_PCW, keys.value_seen, p, tops)
    if d.log_g is not None:
        d.log_g.view(head.inputs.groups, -1)[block.groups, head.r] += d_log_g.view(*head.shape, 1).sum((0, 2, 3, 4))
    if d.q is not None:
        with whole_products():
            product_into(head.of(d.q), d_s, softmax.k, alpha=scaling)
    if d.k is not None:
        _add_tiles(block.of(d.k), d_s[..., sinks:], head.q, scaling)
    if d.sink_k is not None:
        product_into(block.of(d.sink_k), d_s[..., :sinks].mT, head.q, beta=1, alpha=scaling)


def _linear(head: QueryHeads, linear: LinearPart, d: Gradients, d_total_PCW: Tensor, d_after: Tensor | None) -> None:
    inputs, masks, block, chunks = head.inputs, head.masks, head.block, head.shape[2]
    assert inputs.phi_q is not None and inputs.phi_k is not None
    phi_q = head.of(inputs.phi_q).flatten(0, 2)
    d_phi_q, d_phi_k = (None if x is None else head.of(x) for x in (d.phi_q, d.phi_k))
    d_v = None if d.v is None else block.of(d.v)
    d_later = None if d_after is None else head.of(d_after)
    if d_phi_q is not None:
        linear.d_queries(d_total_PCW, d_phi_q)
    if d.of_memories:
        d_folded_k, d_folded_v = (None if x is None else x[:, :, :chunks] for x in (d_phi_k, d_v))
        d_carried = linear.d_memories(d_total_PCW, phi_q, d_folded_k, d_folded_v, d_later)
        if d.memory is not None:
            head.of(d.memory).copy_(d_carried)
    if masks.far is None:
        return
    tile_phi = tiles(head.of(inputs.phi_k))
    if d_phi_q is not None or d_phi_k is not None:
        d_a = head.beyond(d_total_PCW, tiles(head.keys.value), "d_beyond")
        if d_phi_q is not None:
            product_into(d_phi_q, d_a, tile_phi, beta=1)
        if d_phi_k is not None:
            _add_tiles(d_phi_k, d_a, phi_q, 1)
    if d_v is not None:
        _add_tiles(d_v, head.beyond(phi_q, tile_phi, "beyond"), d_total_PCW[..., :-1], 1)


def _add_tiles(d_x_bgMCD: Tensor, weights_PCK: Tensor, rows_PCD: Tensor, alpha: float) -> None:
    """weights^T rows, added to the chunks n - 1 and n that the tiles are made of."""
    chunk = d_x_bgMCD.shape[3]
    product_into(d_x_bgMCD[:, :, 1:-1], weights_PCK[..., :chunk].mT, rows_PCD, beta=1, alpha=alpha)
    product_into(d_x_bgMCD[:, :, 2:], weights_PCK[..., chunk:].mT, rows_PCD, beta=1, alpha=alpha)
