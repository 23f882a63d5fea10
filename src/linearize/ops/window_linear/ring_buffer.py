"""Memory behind a ring, with free slots after its newest token, so that decoding copies no ring for each token.

A state is a value: what it shows of such memory is never written again. A token goes into the first free slot, which no
state shows; whoever comes second from one and the same state finds the slot taken and copies the ring.

Letters: B batch, G key/value heads, C slots of the memory, R slots of the ring, S = R + 1, D, V.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linearize.ops.window_linear.window import WindowShape, ring_slots

if TYPE_CHECKING:
    from linearize.ops.window_linear.spec import WindowLinear
    from linearize.ops.window_linear.state import WindowLinearState

LEAST_SPARE = 16  # free slots behind a ring that moves on with every token: it is copied once for so many


class RingBuffer:
    """`k_BGCD`, `v_BGCV`, of which the first `filled` slots are taken."""

    def __init__(self, k_BGCD: Tensor, v_BGCV: Tensor, filled: int) -> None:
        self.k_BGCD, self.v_BGCV, self.filled = k_BGCD, v_BGCV, filled

    def shown(self, slots: int) -> tuple[Tensor, Tensor]:
        """The last `slots` slots that are taken."""
        start = self.filled - slots
        return self.k_BGCD[:, :, start : self.filled], self.v_BGCV[:, :, start : self.filled]

    def follows(self, state: WindowLinearState) -> bool:
        """Whether the next free slot is the one after this state's ring, and may be written."""
        if self.filled == self.k_BGCD.shape[2] or self.filled < state.k_BGRD.shape[2]:
            return False
        if self.k_BGCD.is_inference() and not torch.is_inference_mode_enabled():
            return False
        last = self.shown(state.k_BGRD.shape[2])
        return all(_same(x, y) for x, y in zip(last, (state.k_BGRD, state.v_BGRV), strict=True))

    def append(self, k_BG1D: Tensor, v_BG1V: Tensor) -> None:
        """Take the next slot."""
        self.k_BGCD[:, :, self.filled].copy_(k_BG1D[:, :, 0])
        self.v_BGCV[:, :, self.filled].copy_(v_BG1V[:, :, 0])
        self.filled += 1


def _same(x: Tensor, y: Tensor) -> bool:
    """Whether both show the same memory."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def ring_buffer_slots(window: int, shape: WindowShape) -> int:
    """Slots of a ring buffer: a terraced ring is let go in whole blocks and needs no spare ones."""
    ring = ring_slots(window, shape) + 1
    return ring if shape == "terraced" else ring + max(LEAST_SPARE, window // 4)


def appended(k_BG1D: Tensor, v_BG1V: Tensor, state: WindowLinearState, spec: WindowLinear) -> tuple[RingBuffer, int]:
    """A ring buffer that holds the state's ring and then the token, and how many slots these are: in the state's own
    ring buffer where that is free."""
    slots, ring_buffer = state.k_BGRD.shape[2], state.ring_buffer
    if ring_buffer is None or not ring_buffer.follows(state):
        most = max(ring_buffer_slots(spec.window, spec.shape), slots + 1)
        ring_buffer = RingBuffer(_with_spare_slots(state.k_BGRD, most), _with_spare_slots(state.v_BGRV, most), slots)
    ring_buffer.append(k_BG1D, v_BG1V)
    return ring_buffer, slots + 1


def _with_spare_slots(x_BGRD: Tensor, slots: int) -> Tensor:
    memory = x_BGRD.new_empty(*x_BGRD.shape[:2], slots, x_BGRD.shape[3])
    memory[:, :, : x_BGRD.shape[2]].copy_(x_BGRD)
    return memory
