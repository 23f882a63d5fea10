"""The state after a call: what left the window is folded into the sum, what is still inside waits in the ring.

Shared by every backend of the operation, so that prefill, chunked prefill and decode keep one and the same state.

Letters: B batch, G key/value heads, H query heads, D head dimension, T new tokens, S slots (ring, then new tokens), R
ring, N sinks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.window_linear.slots import Slots
from linearize.ops.window_linear.spec import (
    WindowLinear,
    fold_boundary,
    most_leaving,
    ring_slots,
    state_dtype,
    with_ones,
)
from linearize.ops.window_linear.state import RingBuffer, WindowLinearState, pad_slots, take_slots

Fold = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, WindowLinear], Tensor]


def next_state(
    slots: Slots, layout: Layout, state: WindowLinearState | None, spec: WindowLinear, fold: Fold | None = None
) -> WindowLinearState:
    """Fold what has left the window of the token that would come next, keep the rest.

    `fold` adds up what leaves (None: in PyTorch). Sums are kept in fp32 (fp64 for fp64 inputs).
    """
    fold = fold or folded
    if slots.goes_on:
        return next_plain_state(slots.k_BGSD, slots.v_BGSV, slots.num_past, layout.start, state, spec, fold)
    return _ragged(slots, layout, state, spec, fold)


def next_plain_state(
    k_BGSD: Tensor,
    v_BGSV: Tensor,
    num_past: int,
    start: int,
    state: WindowLinearState | None,
    spec: WindowLinear,
    fold: Fold | None = None,
    ring_buffer: RingBuffer | None = None,
    folded_before: tuple[int, Tensor] | None = None,
) -> WindowLinearState:
    """`next_state` without padding or packing: `num_past` ring slots, then the tokens from position `start`.

    `ring_buffer`: where all these slots lie already, if anywhere, so that nothing is copied. `folded_before`: how many
    slots were folded already, and the sum with them in it.
    """
    following = start + k_BGSD.shape[2] - num_past
    first = following - k_BGSD.shape[2]
    boundary = fold_boundary(following, spec.window, spec.shape)
    leaving = slice(min(max(spec.num_sinks - first, 0), boundary - first), boundary - first)
    memory = None if state is None else state.memory_BHFV
    if folded_before is not None:
        done, memory = folded_before
        assert done <= leaving.stop
        leaving = slice(max(done, leaving.start), leaving.stop)
    if spec.feature_k is not None and (memory is None or leaving.stop > leaving.start):
        memory = (fold or folded)(k_BGSD[:, :, leaving], v_BGSV[:, :, leaving], None, memory, spec)
    sinks = plain_sinks(k_BGSD, v_BGSV, num_past, state, spec)
    if ring_buffer is not None:
        return WindowLinearState(
            following, *ring_buffer.shown(following - boundary), memory, *sinks, ring_buffer=ring_buffer
        )
    keep = slice(boundary - first, None)
    return WindowLinearState(following, _owned(k_BGSD[:, :, keep]), _owned(v_BGSV[:, :, keep]), memory, *sinks)


def next_joined_state(
    k_BGTD: Tensor, v_BGTV: Tensor, start: int, state: WindowLinearState, spec: WindowLinear
) -> WindowLinearState:
    """`next_plain_state` of a ring and new keys and values that are not side by side yet: one copy at most."""
    following, ring = start + k_BGTD.shape[2], state.k_BGRD.shape[2]
    first, boundary = start - ring, fold_boundary(following, spec.window, spec.shape)
    leaving = slice(min(max(spec.num_sinks - first, 0), boundary - first), boundary - first)
    memory, past = state.memory_BHFV, (state.k_BGRD.to(k_BGTD.dtype), state.v_BGRV.to(v_BGTV.dtype))
    if spec.feature_k is not None and (memory is None or leaving.stop > leaving.start):
        gone = [between(*pair, leaving) for pair in zip(past, (k_BGTD, v_BGTV), strict=True)]
        memory = folded(gone[0], gone[1], None, memory, spec)
    keep = slice(boundary - first, ring + k_BGTD.shape[2])
    k, v = (between(*pair, keep) for pair in zip(past, (k_BGTD, v_BGTV), strict=True))
    sinks = plain_sinks(k_BGTD, v_BGTV, 0, state, spec)
    return WindowLinearState(following, _owned(k), _owned(v), memory, *sinks)


def between(past: Tensor, new: Tensor, slots: slice) -> Tensor:
    """Some slots of two tensors that stand one after the other in time."""
    ring = past.shape[2]
    if slots.start >= ring:
        return new[:, :, slots.start - ring : slots.stop - ring]
    if slots.stop <= ring:
        return past[:, :, slots]
    return torch.cat([past[:, :, slots.start :], new[:, :, : slots.stop - ring]], dim=2)


def _owned(x: Tensor) -> Tensor:
    """x in memory of its own: a view, contiguous or not, would keep the whole text's keys alive."""
    whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def plain_sinks(
    k_BGSD: Tensor, v_BGSV: Tensor, num_past: int, state: WindowLinearState | None, spec: WindowLinear
) -> tuple[Tensor | None, Tensor | None]:
    """Keys and values of the text's first tokens, as many as there were so far (None without sinks)."""
    if spec.num_sinks == 0:
        return None, None
    old_k = None if state is None else state.sink_k_BGND
    old_v = None if state is None else state.sink_v_BGNV
    have = 0 if old_k is None else old_k.shape[2]
    if have == spec.num_sinks:
        return old_k, old_v
    new = slice(num_past, num_past + spec.num_sinks - have)
    k, v = k_BGSD[:, :, new], v_BGSV[:, :, new]
    if old_k is None or old_v is None:
        return _owned(k), _owned(v)
    return torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)


def folded(
    k_BGTD: Tensor, v_BGTV: Tensor, weight_BT: Tensor | None, memory: Tensor | None, spec: WindowLinear
) -> Tensor:
    """memory + sum over tokens of weight phi_k(k) [v, 1]^T."""
    dtype = state_dtype(k_BGTD)
    phi = spec.features_k(k_BGTD.to(dtype))
    if weight_BT is not None:
        phi = phi * weight_BT[:, None, :, None].to(dtype)
    value = with_ones(v_BGTV.to(dtype)).repeat_interleave(phi.shape[1] // k_BGTD.shape[1], dim=1)
    added = phi.transpose(-1, -2) @ value
    return added if memory is None else memory + added


def _ragged(
    slots: Slots, layout: Layout, state: WindowLinearState | None, spec: WindowLinear, fold: Fold
) -> WindowLinearState:
    batch, num_slots = slots.k_BGSD.shape[0], slots.k_BGSD.shape[2]
    position, origin = slots.position.expand(batch, -1), slots.origin.expand(batch, -1)
    carried, old_next = slots.carried_origin.expand(batch, 1)[:, 0], slots.follow.expand(batch, 1)[:, 0]
    slot = torch.arange(num_slots, device=position.device)
    past_end = carried[:, None] + slots.follow  # the slot after the ring
    last = torch.where((position >= 0) & (slot >= past_end), slot, -1).amax(-1)
    touched = last >= 0
    last = torch.where(touched, last, past_end.expand(batch, 1)[:, 0] - 1)
    index = last.clamp(min=0)[:, None]
    current = torch.where(touched, origin.gather(1, index)[:, 0], carried)
    following = torch.where(touched, position.gather(1, index)[:, 0] + 1, old_next)
    same = current == carried
    boundary = fold_boundary(following, spec.window, spec.shape)

    begin = _begin(slots, layout, state, current, same, old_next)
    memory = None if state is None else state.memory_BHFV
    if spec.feature_k is not None:
        leaves = (origin == current[:, None]) & (position >= spec.num_sinks) & (position < boundary[:, None])
        if memory is not None:
            memory = memory * same[:, None, None, None].to(memory.dtype)
        if layout.tail is not None:
            k, v, leaving = slots.unfolded(most_leaving(slots.new_position.shape[1], spec.window, spec.shape), spec)
            memory = fold(k, v, (leaving >= spec.num_sinks) & (leaving < boundary[:, None]), memory, spec)
        elif memory is None or bool(leaves.any()):
            memory = fold(slots.k_BGSD, slots.v_BGSV, leaves, memory, spec)
    capacity = min(ring_slots(spec.window, spec.shape), num_slots)
    ring = last[:, None] - capacity + 1 + torch.arange(capacity, device=slot.device)
    k, v = take_slots(slots.k_BGSD, ring), take_slots(slots.v_BGSV, ring)
    sink_k, sink_v = _ragged_sinks(slots, state, spec, current, same, old_next)
    return WindowLinearState(following, k, v, memory, sink_k, sink_v, begin)


def _begin(
    slots: Slots,
    layout: Layout,
    state: WindowLinearState | None,
    current_B: Tensor,
    same_B: Tensor,
    old_next_B: Tensor,
) -> Tensor | None:
    """The position of the first token of each row's last document, `[B]`; None: 0 in all rows.

    A carried document that has no token yet begins with its first one.
    """
    old = None if state is None else state.begin
    if layout.tail is not None or slots.new_position.shape[1] == 0:
        return old  # no document opens
    begun = same_B & (old_next_B > (0 if old is None else old))
    if old is None and bool(begun.all()):
        return None
    inside = (slots.new_origin == current_B[:, None]) & (slots.new_position >= 0)
    beyond = torch.iinfo(torch.long).max
    first = torch.where(inside, slots.new_position, beyond).amin(-1)
    first = torch.where(first == beyond, old_next_B, first)
    if old is not None:
        return torch.where(begun, old, first)
    first = first.masked_fill(begun, 0)
    return first if bool(first.any()) else None


def _ragged_sinks(
    slots: Slots, state: WindowLinearState | None, spec: WindowLinear, current: Tensor, same: Tensor, old_next: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if spec.num_sinks == 0:
        return None, None
    j = torch.arange(spec.num_sinks, device=current.device)
    k, v = take_slots(slots.k_BGSD, current[:, None] + j), take_slots(slots.v_BGSV, current[:, None] + j)
    if state is None or state.sink_k_BGND is None or state.sink_v_BGNV is None:
        return k, v
    old = (same[:, None] & (j < old_next[:, None]))[:, None, :, None]
    return torch.where(old, pad_slots(state.sink_k_BGND, spec), k), torch.where(
        old, pad_slots(state.sink_v_BGNV, spec), v
    )
