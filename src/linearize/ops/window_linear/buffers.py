"""A window + linear state in memory that never moves, so that a captured step can be run again and again.

The ring is circular: position p is in slot p modulo its slots. It has as many more slots than wait in the window as one
call commits, so that no write meets a read of the same call.

Letters: B batch, G key/value heads, H query heads, C slots, D head dimension, V value dimension, F features, N sinks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linearize.ops.tensor_state import TensorState
from linearize.ops.window_linear.spec import WindowLinear, state_dtype
from linearize.ops.window_linear.state import WindowLinearState
from linearize.ops.window_linear.update import pad_slots, take_slots
from linearize.ops.window_linear.window import fold_boundary, ring_slots


@dataclass(frozen=True, eq=False, kw_only=True)
class WindowBuffers(TensorState):
    """What `WindowLinearState` holds: `next_B` (int64), `k_BGCD`, `v_BGCV`, `memory_BHFV` with z as its last column
    (at least fp32; None without a linear branch), sinks (N may be 0), `begin_B` (int64; the position of the document's
    first token). A step given these writes into them."""

    next_B: Tensor
    begin_B: Tensor
    k_BGCD: Tensor
    v_BGCV: Tensor
    sink_k_BGND: Tensor
    sink_v_BGNV: Tensor
    memory_BHFV: Tensor | None = None

    @staticmethod
    def of(state: WindowLinearState, spec: WindowLinear, *, most: int = 1) -> WindowBuffers:
        """Buffers that hold `state`, for calls that commit at most `most` tokens."""
        batch, device = state.k_BGRD.shape[0], state.k_BGRD.device
        held, slots = state.k_BGRD.shape[2], ring_slots(spec.window, spec.shape) + most
        following = state.next if isinstance(state.next, Tensor) else torch.full((batch,), state.next, device=device)
        position = following[:, None] - held + torch.arange(held, device=device)
        begin = torch.zeros_like(following) if state.begin is None else state.begin
        edge = torch.maximum(fold_boundary(following, spec.window, spec.shape), begin)
        live = (position >= edge[:, None])[:, None, :, None]
        place = (position % slots)[:, None, :, None]

        def ring(x: Tensor) -> Tensor:
            empty = x.new_zeros(*x.shape[:2], slots, x.shape[3])
            return empty.scatter_add_(2, place.expand_as(x), torch.where(live, x, 0))

        def sinks(x: Tensor | None, like: Tensor) -> Tensor:
            return like.new_zeros(*like.shape[:2], 0, like.shape[3]) if x is None else pad_slots(x, spec).clone()

        memory = state.memory_BHFV
        return WindowBuffers(
            next_B=following.clone(),
            begin_B=begin.clone(),
            k_BGCD=ring(state.k_BGRD),
            v_BGCV=ring(state.v_BGRV),
            sink_k_BGND=sinks(state.sink_k_BGND, state.k_BGRD),
            sink_v_BGNV=sinks(state.sink_v_BGNV, state.v_BGRV),
            memory_BHFV=None if memory is None else _owned(memory.to(state_dtype(memory))),
        )

    def widened(self, more: int) -> WindowBuffers:
        """The same tokens in rings of `more` further slots."""
        slots = self.k_BGCD.shape[2]
        last = self.next_B[:, None] - 1
        position = last - (last - torch.arange(slots, device=last.device)) % slots  # of the token in each slot
        place = (position % (slots + more))[:, None, :, None]

        def wider(x: Tensor) -> Tensor:
            empty = x.new_zeros(*x.shape[:2], slots + more, x.shape[3])
            return empty.scatter_(2, place.expand_as(x), x)

        return replace(self, k_BGCD=wider(self.k_BGCD), v_BGCV=wider(self.v_BGCV))

    def state(self, spec: WindowLinear) -> WindowLinearState:
        """The same as a state of its own memory, the ring oldest first."""
        held, slots = ring_slots(spec.window, spec.shape), self.k_BGCD.shape[2]
        place = (self.next_B[:, None] - held + torch.arange(held, device=self.next_B.device)) % slots
        has_sinks = self.sink_k_BGND.shape[2] > 0
        return WindowLinearState(
            next=self.next_B.clone(),
            k_BGRD=take_slots(self.k_BGCD, place),
            v_BGRV=take_slots(self.v_BGCV, place),
            memory_BHFV=None if self.memory_BHFV is None else self.memory_BHFV.clone(),
            sink_k_BGND=self.sink_k_BGND.clone() if has_sinks else None,
            sink_v_BGNV=self.sink_v_BGNV.clone() if has_sinks else None,
            begin=self.begin_B.clone(),
        )

    def copy_(self, state: WindowLinearState, spec: WindowLinear) -> None:
        """Take another state of the same sizes into this memory."""
        other = WindowBuffers.of(state, spec, most=self.k_BGCD.shape[2] - ring_slots(spec.window, spec.shape))
        for name in ("next_B", "begin_B", "k_BGCD", "v_BGCV", "sink_k_BGND", "sink_v_BGNV", "memory_BHFV"):
            own, new = getattr(self, name), getattr(other, name)
            assert (own is None) == (new is None)
            if own is not None:
                own.copy_(new)


def _owned(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)
