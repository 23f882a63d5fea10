"""The state after a call: what left the window is folded into the sum, what is still inside waits in the ring.

Shared by every backend of the operation, so that prefill, chunked prefill and decode keep one and the same state.

Letters: B batch, G key/value heads, H query heads, D head dimension, T new tokens, S slots (ring, then new tokens), R
ring, N sinks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.window_linear.ring_buffer import RingBuffer
from linearize.ops.window_linear.spec import WindowLinear, state_dtype, with_ones
from linearize.ops.window_linear.state import WindowLinearState
from linearize.ops.window_linear.window import fold_boundary, most_leaving, ring_slots

Fold = Callable[[Tensor, Tensor, Tensor | None, Tensor | None, WindowLinear], Tensor]


@dataclass(frozen=True, eq=False)
class Slots:
    """The ring and the new tokens side by side, with where each slot stands in which document.

    `position`: [1 or B, S], -1 on dead tokens and dead ring slots. `origin`: [1 or B, S], slot minus position: one
    value per document. `new_position`, `new_origin`: [1 or B, T], of the new tokens, in their order. `follow`: [1 or B,
    1], the position that comes next in the document that the state belongs to; `carried_origin`: [1 or B, 1], its
    origin; `begin`: [B, 1], the position of its first token (None: 0). `goes_on`: every row is one run of tokens from
    position 0, of which the state has all before these. `num_past`: ring slots. They stand in front, unless the layout
    has gaps: then dead tokens do, so that each row's ring and tokens are side by side.
    """

    k_BGSD: Tensor
    v_BGSV: Tensor
    position: Tensor
    origin: Tensor
    new_position: Tensor
    new_origin: Tensor
    follow: Tensor
    carried_origin: Tensor
    begin: Tensor | None
    goes_on: bool
    num_past: int

    def unfolded(self, size: int, spec: WindowLinear) -> tuple[Tensor, Tensor, Tensor]:
        """k, v `[B, G, N, .]` and positions `[1 or B, N]` of the `size` tokens of the carried document that are to be
        folded next; those that are not there yet are some other token's."""
        first = fold_boundary(self.follow, spec.window, spec.shape)
        position = first + torch.arange(min(size, self.k_BGSD.shape[2]), device=first.device)
        index = (position + self.carried_origin).expand(self.k_BGSD.shape[0], -1)
        if self.begin is not None:
            position = position.masked_fill(position < self.begin, -1)
        return take_slots(self.k_BGSD, index), take_slots(self.v_BGSV, index), position


def gather_slots(
    k_BGTD: Tensor, v_BGTV: Tensor, layout: Layout, state: WindowLinearState | None, spec: WindowLinear
) -> Slots:
    """Put the ring in front of the new keys and values."""
    device, num_new = k_BGTD.device, k_BGTD.shape[2]
    new = layout.positions(num_new, device)
    past, k, v = 0, k_BGTD, v_BGTV
    following: int | Tensor = 0
    if state is not None:
        past, following = state.k_BGRD.shape[2], state.next
        k = torch.cat([state.k_BGRD.to(k.dtype), k], dim=2)
        v = torch.cat([state.v_BGRV.to(v.dtype), v], dim=2)
    follow = following[:, None] if isinstance(following, Tensor) else torch.full((1, 1), following, device=device)
    ring = follow - past + torch.arange(past, device=device)
    ring = ring.masked_fill(ring < fold_boundary(follow, spec.window, spec.shape), -1)
    begin = None if state is None or state.begin is None else state.begin[:, None]
    if begin is not None:
        ring = ring.masked_fill(ring < begin, -1)
    rows = max(new.shape[0], ring.shape[0])
    position = torch.cat([ring.expand(rows, -1), new.expand(rows, -1)], dim=1)
    slot = torch.arange(position.shape[1], device=device)
    if layout.gaps():
        return _close_gaps(k, v, position, follow, begin, past)
    origin = slot - position
    plain = layout.is_plain and not isinstance(following, Tensor) and following == layout.start
    return Slots(
        k, v, position, origin, position[:, past:], origin[:, past:], follow, past - follow, begin, plain, past
    )


def _close_gaps(
    k_BGSD: Tensor, v_BGSV: Tensor, position_BS: Tensor, follow: Tensor, begin: Tensor | None, past: int
) -> Slots:
    """The slots with each row's dead new tokens in front of its ring."""
    batch = k_BGSD.shape[0]
    position_BS = position_BS.expand(batch, -1)
    new = position_BS[:, past:]
    order = torch.nn.functional.pad(new >= 0, (past, 0), value=True).long().argsort(dim=1, stable=True)
    k, v, position = take_slots(k_BGSD, order), take_slots(v_BGSV, order), position_BS.gather(1, order)
    slot = torch.arange(order.shape[1], device=order.device)
    dead = (new < 0).sum(-1, keepdim=True)
    new_origin = order.argsort(dim=1)[:, past:] - new
    return Slots(k, v, position, slot - position, new, new_origin, follow, past + dead - follow, begin, False, past)


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


def pad_slots(sink_BGNX: Tensor, spec: WindowLinear) -> Tensor:
    """Sinks padded to their full number (a plain state that is still short of them has fewer)."""
    return torch.nn.functional.pad(sink_BGNX, (0, 0, 0, spec.num_sinks - sink_BGNX.shape[2]))


def take_slots(x_BGSD: Tensor, index_BN: Tensor) -> Tensor:
    """x[b, :, index[b]] -> [B, G, N, D]; indices outside give some slot, which the caller masks."""
    index = index_BN.clamp(0, max(x_BGSD.shape[2] - 1, 0))[:, None, :, None]
    return x_BGSD.gather(2, index.expand(-1, x_BGSD.shape[1], -1, x_BGSD.shape[3]))
