"""One query head in each group of a block: its part of a chunk group, forward and backward.

Letters: as in `chunked.py`; b and g are the rows and groups of a block, P = b g N.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linearize.ops.blocking import HeadBlock, scratch
from linearize.ops.matmul import LOG2_E, product_into, whole_products
from linearize.ops.window_linear.linear_part import LinearPart
from linearize.ops.window_linear.softmax_part import SoftmaxPart
from linearize.ops.window_linear.tiles import tiles, value_rows, with_sinks


@dataclass(frozen=True, eq=False)
class GroupMasks:
    """What a chunk group's queries may see, and the options of the operation.

    `bias`: [B or 1, N or 1, C, K], minus infinity at keys not seen by softmax, else 0 (None: no window part). `far`: [B
    or 1, N or 1, C, 2 C], 1 at keys of the tile that are seen by features, else 0 (None: none is). `fold`: [B or 1, N,
    C], 1 for each token of chunk n - 2 that the memory takes up before chunk n, else 0 (None: all). `keep`: [B or 1,
    N], 0 where a document opens (None: nowhere).
    """

    bias: Tensor | None
    far: Tensor | None
    fold: Tensor | None
    keep: Tensor | None
    scaling: float
    softcap: float | None
    shared_shift: bool

    def part(self, chunks: slice) -> GroupMasks:
        """The masks of some of the chunks, where each has its own."""
        names = ("bias", "far", "fold", "keep")
        return replace(self, **{name: x[:, chunks] for name in names if (x := getattr(self, name)) is not None})


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
