"""A chunk group: window part, linear part and division in one go, a few heads at a time, so that what is
large stays in the cache.

The backward pass computes weights and memories again; nothing quadratic and no memory per chunk is kept.

Letters: B batch, N chunks of the chunk group, M = N + 2 (with the two before it), G key/value heads, R query heads for
each, H = G R, C chunk size, J sinks, K = J + 2 C keys of a tile, D head dimension, V value dimension, W = V + 1 (values
and a one), F features, b and g the rows and groups of a block, P = b g N.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize.ops.blocking import head_blocks
from linearize.ops.matmul import bf16_products
from linearize.ops.window_linear.head_block import GroupMasks, Inputs, Keys, QueryHeads
from linearize.ops.window_linear.head_block_backward import Gradients, query_heads_backward


def attend_chunk_group(
    q_BHNCD: Tensor,
    k_BGMCD: Tensor,
    v_BGMCV: Tensor,
    sinks: Sequence[Tensor],
    phi: tuple[Tensor, Tensor] | None,
    memory_BHWF: Tensor | None,
    log_g_H: Tensor,
    masks: GroupMasks,
    given: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """`y: [B, H, N, C, V]` and the memory that the chunk group's last chunk sees.

    `sinks`: k and v of the document's first tokens, `[B, G, N, J, D]` and `[B, G, N, J, V]`, or nothing. `phi`: phi_q
    `[B, H, N, C, F]`, and phi_k of the chunks n - 2, or of all M chunks where `masks.far` is given. `given`: the
    dtype that the tensors had before they were widened (see `bf16_products`). Differentiable once.
    """
    y, memory = _ChunkGroup.apply(
        q_BHNCD, k_BGMCD, v_BGMCV, *(sinks or (None, None)), *(phi or (None, None)), memory_BHWF, log_g_H, masks, given
    )
    return y, memory


class _ChunkGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        *tensors, masks, given = arguments
        inputs = Inputs(*tensors)
        q, v = inputs.q, inputs.v
        y = q.new_empty(*q.shape[:4], v.shape[-1])
        normaliser = q.new_empty(*q.shape[:4], 1)
        shift = None if masks.bias is None else torch.empty_like(normaliser)
        after = None if inputs.memory is None or inputs.phi_q is None else torch.empty_like(inputs.memory)
        with bf16_products(given):
            for block in head_blocks(q.shape[0], inputs.groups, inputs.numbers()):
                keys = Keys(inputs, block)
                for r in range(q.shape[1] // inputs.groups):
                    QueryHeads(inputs, masks, block, r, keys).forward(y, shift, normaliser, after)
        ctx.save_for_backward(*tensors, shift, normaliser, y)
        ctx.masks, ctx.given = masks, given
        ctx.set_materialize_grads(False)
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, shift, normaliser, y = ctx.saved_tensors
        inputs, masks = Inputs(*tensors), ctx.masks
        d = Gradients(inputs, masks)
        with bf16_products(ctx.given):
            for block in head_blocks(y.shape[0], inputs.groups, inputs.numbers()):
                keys = Keys(inputs, block)
                for r in range(y.shape[1] // inputs.groups):
                    query_heads_backward(QueryHeads(inputs, masks, block, r, keys), d, grads, shift, normaliser, y)
        return *d.in_order(), None, None
