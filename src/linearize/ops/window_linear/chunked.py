"""Window + linear attention in linear time and memory: chunks of queries against two chunks of keys and one folded sum.

After `align`, chunk n attends to chunks n - 1 and n of its document directly (inside the window by softmax, beyond it
by features) and to everything before them through the sum. With terraced windows and chunks of one block nothing in the
tile lies beyond the window. It goes chunk group by chunk group: window part, linear part and division in one go, a few
heads at a time (`head_block.py`), so that what is large stays in the cache. The backward pass computes weights and
memories again; nothing quadratic and no memory per chunk is kept. Inputs of 16 bits are widened group by group.

Letters: B batch, G key/value heads, R query heads for each, H = G R, T new tokens, N chunks (of the group), M = N + 2
(with the two before it), C chunk size, J sinks, D head dimension, V value dimension, W = V + 1 (values and a one), F
features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from linearize.ops.blocking import alike, head_blocks
from linearize.ops.layout import Layout
from linearize.ops.matmul import bf16_products
from linearize.ops.window_linear.head_block import Gradients, Inputs, Keys, QueryHeads, query_heads_backward
from linearize.ops.window_linear.masks import GroupMasks, Masks, masks_of
from linearize.ops.window_linear.slots import Alignment, Slots, align, gather_slots
from linearize.ops.window_linear.spec import FeatureMap, WindowLinear, state_dtype
from linearize.ops.window_linear.state import WindowLinearState, pad_slots, take_slots
from linearize.ops.window_linear.update import next_plain_state, next_state, plain_sinks

SMALLEST_CHUNK = 16
FEATURES = 128  # of a map, where chunk groups are measured out before there is one
ONE_HEAD = 1 << 19  # numbers of a chunk group's scores or features per head: fewer cost more in calls than caches save
GROUP_NUMBERS = 1 << 23  # of all heads' features: a processor's last-level cache


def chunk_size(spec: WindowLinear) -> int:
    """Tokens per chunk: whole blocks of a terraced window, at least the reach of a sliding one."""
    if spec.window == 0:
        return 64
    return spec.window * -(-SMALLEST_CHUNK // spec.window)


def chunked(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    *,
    spec: WindowLinear,
    layout: Layout,
    state: WindowLinearState | None = None,
    need_state: bool = True,
) -> tuple[Tensor, WindowLinearState | None]:
    """Attend; same arguments, outputs and values as `reference`, time and memory linear in T."""
    slots = gather_slots(k_BGTD, v_BGTV, layout, state, spec)
    chunk = chunk_size(spec)
    alignment = align(slots, layout, chunk, spec)
    q = alignment.gather_queries(q_BHTD, chunk)  # [B, H, N, C, D]
    k, v = (alignment.gather(x, chunk) for x in (slots.k_BGSD, slots.v_BGSV))
    sinks: tuple[Tensor, ...] = ()
    if spec.num_sinks and spec.has_window:
        sinks = sinks_by_group(slots, alignment, state, spec)
    memory = None if state is None else state.memory_BHFV
    step = _chunks_per_group(q)
    masks = masks_of(alignment, slots, layout, chunk, step, spec, state_dtype(q_BHTD))
    y_BHNCV, sums = _attend(q, k, v, sinks, memory, masks, step, spec)
    y = alignment.scatter(y_BHNCV.flatten(2, 3), q_BHTD.shape[2])
    return y, _after(slots, alignment, layout, state, spec, sums, chunk) if need_state else None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: tuple[Tensor, ...],
    memory_BHFV: Tensor | None,
    masks: Masks,
    step: int,
    spec: WindowLinear,
) -> tuple[Tensor, Tensor | None]:
    """Group after group, each with the two chunks before it and the memory of all others; and the memory that the last
    chunk sees, `[B, H, V + 1, F]`."""
    wide = state_dtype(q)
    log_g = q.new_zeros(q.shape[1], dtype=wide)
    if spec.log_window_factor_H is not None:
        log_g = spec.log_window_factor_H.to(wide)
    memory = None if memory_BHFV is None or not spec.has_linear else memory_BHFV.to(wide).mT
    k_before, v_before = (x.new_zeros(*x.shape[:2], 2, *x.shape[3:]) for x in (k, v))
    groups = list(enumerate(zip(*(x.split(step, dim=2) for x in (q, k, v, *sinks)), strict=True)))
    ys: list[Tensor] = []
    whole = None if torch.is_grad_enabled() or len(groups) == 1 else q.new_empty(*q.shape[:4], v.shape[-1])
    for i, parts in groups if whole is None else alike(groups):
        q_part, k_part, v_part, *sink_parts = parts
        k_part, v_part = torch.cat([k_before, k_part], dim=2), torch.cat([v_before, v_part], dim=2)
        k_before, v_before = k_part[:, :, -2:], v_part[:, :, -2:]
        q_part, k_part, v_part, *sink_parts = (x.to(wide) for x in (q_part, k_part, v_part, *sink_parts))
        group_masks, phi = masks.part(i * step, i * step + q_part.shape[2]), None
        if spec.has_linear:
            mapped = k_part if group_masks.far is not None else k_part[:, :, :-2]
            phi = _by_chunk(spec.features_q, q_part), _by_chunk(spec.features_k, mapped)
            if memory is None:
                memory = q_part.new_zeros(*q.shape[:2], v.shape[-1] + 1, phi[0].shape[-1])
        y, memory = attend_chunk_group(q_part, k_part, v_part, sink_parts, phi, memory, log_g, group_masks, q.dtype)
        if whole is None:
            ys.append(y.to(q.dtype))
        else:
            whole[:, :, i * step : i * step + y.shape[2]] = y
    if whole is not None:
        return whole, memory
    return ys[0] if len(ys) == 1 else torch.cat(ys, dim=2), memory


def _by_chunk(feature_map: FeatureMap, x: Tensor) -> Tensor:
    """Features of `[B, H, N, C, D]`, contiguous."""
    return feature_map(x.flatten(2, 3)).contiguous().unflatten(2, x.shape[2:4])


def _chunks_per_group(q_BHNCD: Tensor) -> int:
    """Chunks per chunk group: a matrix of scores or features of one head has about `ONE_HEAD` numbers."""
    batch, heads, _, chunk = q_BHNCD.shape[:4]
    one_head = ONE_HEAD // (chunk * max(2 * chunk, FEATURES))
    return max(1, min(one_head, GROUP_NUMBERS // (batch * heads * chunk * FEATURES)))


def _after(
    slots: Slots,
    alignment: Alignment,
    layout: Layout,
    state: WindowLinearState | None,
    spec: WindowLinear,
    sums_BHWF: Tensor | None,
    chunk: int,
) -> WindowLinearState:
    """The state after the last token; what the chunk groups have folded is not folded again."""
    if sums_BHWF is None or not slots.goes_on:
        return next_state(slots, layout, state, spec)
    folded = max(0, alignment.num_chunks - 2) * chunk
    memory = sums_BHWF.mT.contiguous()
    return next_plain_state(
        slots.k_BGSD, slots.v_BGSV, slots.num_past, layout.start, state, spec, folded_before=(folded, memory)
    )


def sinks_by_group(
    slots: Slots, alignment: Alignment, state: WindowLinearState | None, spec: WindowLinear
) -> tuple[Tensor, ...]:
    """Keys and values of the first tokens of each chunk's document, `[B, G, N, J, D]` and `[B, G, N, J, V]`."""
    if alignment.source_BA is not None:
        return tuple(x.transpose(1, 2) for x in sinks_of(slots, alignment, state, spec))
    sinks = plain_sinks(slots.k_BGSD, slots.v_BGSV, slots.num_past, state, spec)
    chunks = alignment.num_chunks
    return tuple(pad_slots(x, spec)[:, :, None].expand(-1, -1, chunks, -1, -1) for x in sinks if x is not None)


def sinks_of(
    slots: Slots, alignment: Alignment, state: WindowLinearState | None, spec: WindowLinear
) -> tuple[Tensor, ...]:
    """Keys and values of the first tokens of each chunk's document, `[B, N, G, J, D]` and `[B, N, G, J, V]`."""
    old = (None, None) if state is None else (state.sink_k_BGND, state.sink_v_BGNV)
    pairs = zip((slots.k_BGSD, slots.v_BGSV), old, strict=True)
    return tuple(_sinks(x, old_x, slots, alignment, spec) for x, old_x in pairs)


def _sinks(x_BGSD: Tensor, old_BGJD: Tensor | None, slots: Slots, alignment: Alignment, spec: WindowLinear) -> Tensor:
    """One of `sinks_of`: from the state where it holds them, else from the slots."""
    batch, j = x_BGSD.shape[0], torch.arange(spec.num_sinks, device=x_BGSD.device)
    index = spec.num_sinks + alignment.origin_BN[..., None] + j
    old = x_BGSD.new_zeros(*x_BGSD.shape[:2], spec.num_sinks, x_BGSD.shape[3])
    if old_BGJD is not None:
        old = pad_slots(old_BGJD, spec).to(x_BGSD.dtype)
        origin = slots.carried_origin[..., None]
        in_slots = (alignment.origin_BN[..., None] == origin) & (j < slots.follow[..., None])
        index = torch.where(in_slots, j, index)
    taken = take_slots(torch.cat([old, x_BGSD], dim=2), index.flatten(1).expand(batch, -1))
    return taken.unflatten(2, (-1, spec.num_sinks)).transpose(1, 2)


def attend_chunk_group(
    q_BHNCD: Tensor,
    k_BGMCD: Tensor,
    v_BGMCV: Tensor,
    sinks: Sequence[Tensor],
    phi: tuple[Tensor, Tensor] | None,
    memory_BHWF: Tensor | None,
    log_g_H: Tensor,
    masks: GroupMasks,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:
    """`y: [B, H, N, C, V]` and the memory that the chunk group's last chunk sees.

    `sinks`: k and v of the document's first tokens, `[B, G, N, J, D]` and `[B, G, N, J, V]`, or nothing. `phi`: phi_q
    `[B, H, N, C, F]`, and phi_k of the chunks n - 2, or of all M chunks where `masks.far` is given. `dtype`: the
    dtype that the tensors had before they were widened (see `bf16_products`). Differentiable once.
    """
    y, memory = _ChunkGroup.apply(
        q_BHNCD, k_BGMCD, v_BGMCV, *(sinks or (None, None)), *(phi or (None, None)), memory_BHWF, log_g_H, masks, dtype
    )
    return y, memory


class _ChunkGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor | None]:
        *tensors, masks, dtype = arguments
        inputs = Inputs(*tensors)
        q, v = inputs.q, inputs.v
        y = q.new_empty(*q.shape[:4], v.shape[-1])
        normaliser = q.new_empty(*q.shape[:4], 1)
        shift = None if masks.bias is None else torch.empty_like(normaliser)
        after = None if inputs.memory is None or inputs.phi_q is None else torch.empty_like(inputs.memory)
        with bf16_products(dtype):
            for block in head_blocks(q.shape[0], inputs.groups, inputs.numbers()):
                keys = Keys(inputs, block)
                for r in alike(range(q.shape[1] // inputs.groups)):
                    QueryHeads(inputs, masks, block, r, keys).forward(y, shift, normaliser, after)
        ctx.save_for_backward(*tensors, shift, normaliser, y)
        ctx.masks, ctx.dtype = masks, dtype
        ctx.set_materialize_grads(False)
        return y, after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, shift, normaliser, y = ctx.saved_tensors
        inputs, masks = Inputs(*tensors), ctx.masks
        d = Gradients(inputs, masks, ctx.needs_input_grad[: len(tensors)])
        with bf16_products(ctx.dtype):
            for block in head_blocks(y.shape[0], inputs.groups, inputs.numbers()):
                keys = Keys(inputs, block)
                for r in alike(range(y.shape[1] // inputs.groups)):
                    query_heads_backward(QueryHeads(inputs, masks, block, r, keys), d, grads, shift, normaliser, y)
        return *d.in_order(), None, None
