"""The state of window + linear attention: a folded sum, and the keys and values that are still inside the window.

`WindowLinearState` is a value. Decoding copies no ring for each token all the same: the ring is a view of a
`RingBuffer` with free slots after its newest token. What a state shows of it is never written again; a token goes into
the first free slot, which no state shows, and whoever comes second from one and the same state finds the slot taken and
copies the ring.

`WindowBuffers` is the same state in memory that never moves, so that a captured step can be run again and again. Its
ring is circular: position p is in slot p modulo its slots. It has as many more slots than wait in the window as one
call commits, so that no write meets a read of the same call.

Letters: B batch, G key/value heads, H query heads, C slots of the memory, R slots of the ring, N sinks or taken slots,
D head dimension, V value dimension, F features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linearize.ops import TensorState
from linearize.ops.window_linear.spec import (
    WindowLinear,
    WindowShape,
    fold_boundary,
    ring_slots,
    state_dtype,
)

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


@dataclass(frozen=True, eq=False)
class WindowLinearState(TensorState):
    """What a window + linear layer remembers of a sequence.

    `next`: position that the next token of the current document would have (one int for all rows, or `[B]`).
    `memory_BHFV`: sum of phi_k(k) [v, 1]^T over tokens folded so far, at least fp32; None without a linear branch.
    Its last value column
    is the normaliser z.
    `k_BGRD`, `v_BGRV`: the last R tokens, oldest first; those at positions below the fold boundary are dead.
    `sink_k_BGND`, `sink_v_BGNV`: the first tokens of the document, kept for ever; None without sinks.
    `begin`: position of the document's first token, `[B]`: slots of lower ones, in the ring or among the sinks, are
    dead; None: 0 in every row, as almost always.
    `ring_buffer`: memory with free slots that the ring may lie in (decoding).
    `store_k_BGPD`, `store_v_BGPV`: the exact store, oldest first; how many of its pairs there are follows from the
    position (`store.num_stored`). None: there is none.
    """

    next: int | Tensor
    k_BGRD: Tensor
    v_BGRV: Tensor
    memory_BHFV: Tensor | None = None
    sink_k_BGND: Tensor | None = None
    sink_v_BGNV: Tensor | None = None
    begin: Tensor | None = None
    ring_buffer: RingBuffer | None = None
    store_k_BGPD: Tensor | None = None
    store_v_BGPV: Tensor | None = None


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
    store_k_BGPD: Tensor | None = None
    store_v_BGPV: Tensor | None = None

    @staticmethod
    def of(state: WindowLinearState, spec: WindowLinear, *, most: int = 1) -> WindowBuffers:
        """Buffers that hold `state`, for calls that commit at most `most` tokens."""
        batch, device = state.k_BGRD.shape[0], state.k_BGRD.device
        size, slots = state.k_BGRD.shape[2], ring_slots(spec.window, spec.shape) + most
        following = state.next if isinstance(state.next, Tensor) else torch.full((batch,), state.next, device=device)
        position = following[:, None] - size + torch.arange(size, device=device)
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
            store_k_BGPD=None if state.store_k_BGPD is None else _owned(state.store_k_BGPD),
            store_v_BGPV=None if state.store_v_BGPV is None else _owned(state.store_v_BGPV),
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
        ring, slots = ring_slots(spec.window, spec.shape), self.k_BGCD.shape[2]
        place = (self.next_B[:, None] - ring + torch.arange(ring, device=self.next_B.device)) % slots
        has_sinks = self.sink_k_BGND.shape[2] > 0
        return WindowLinearState(
            next=self.next_B.clone(),
            k_BGRD=take_slots(self.k_BGCD, place),
            v_BGRV=take_slots(self.v_BGCV, place),
            memory_BHFV=None if self.memory_BHFV is None else self.memory_BHFV.clone(),
            sink_k_BGND=self.sink_k_BGND.clone() if has_sinks else None,
            sink_v_BGNV=self.sink_v_BGNV.clone() if has_sinks else None,
            begin=self.begin_B.clone(),
            store_k_BGPD=None if self.store_k_BGPD is None else self.store_k_BGPD.clone(),
            store_v_BGPV=None if self.store_v_BGPV is None else self.store_v_BGPV.clone(),
        )

    def plain(self, spec: WindowLinear, position: int) -> WindowLinearState:
        """The same as the state of rows that all have read `position` tokens of documents that begin at 0: the cursor
        is a number, and the ring holds what is inside the window alone."""
        state = self.state(spec)
        dead = state.k_BGRD.shape[2] - (position - fold_boundary(position, spec.window, spec.shape))
        sinks = (state.sink_k_BGND, state.sink_v_BGNV)
        sink_k, sink_v = (None if x is None else x[:, :, :position] for x in sinks)
        return replace(
            state,
            next=position,
            begin=None,
            k_BGRD=state.k_BGRD[:, :, dead:],
            v_BGRV=state.v_BGRV[:, :, dead:],
            sink_k_BGND=sink_k,
            sink_v_BGNV=sink_v,
        )

    def put_step(self, row_N: Tensor, state: WindowBuffers, spec: WindowLinear) -> None:
        """Take up in some rows what one more token changed, after which they are `state`: its slot, and the sum where
        tokens left the window (everywhere, where asking would cost a wait)."""
        following, row = state.next_B, torch.arange(len(row_N), device=row_N.device)
        slot = (following - 1) % self.k_BGCD.shape[2]
        self.next_B.index_copy_(0, row_N, following)
        for ring, new in ((self.k_BGCD, state.k_BGCD), (self.v_BGCV, state.v_BGCV)):
            ring[row_N, :, slot] = new[row, :, slot]
        for sink, new in ((self.sink_k_BGND, state.sink_k_BGND), (self.sink_v_BGNV, state.sink_v_BGNV)):
            if spec.num_sinks:
                sink.index_copy_(0, row_N, new)
        if row_N.device.type == "cpu":
            before, after = (fold_boundary(n, spec.window, spec.shape) for n in (following - 1, following))
            row = (before != after).nonzero()[:, 0]
        for name in ("memory_BHFV", "store_k_BGPD", "store_v_BGPV"):
            held: Tensor | None = getattr(self, name)
            if held is not None and len(row):
                held.index_copy_(0, row_N[row], getattr(state, name)[row])

    def copy_(self, state: WindowLinearState, spec: WindowLinear) -> None:
        """Take another state of the same sizes into this memory."""
        other = WindowBuffers.of(state, spec, most=self.k_BGCD.shape[2] - ring_slots(spec.window, spec.shape))
        names = ("next_B", "begin_B", "k_BGCD", "v_BGCV", "sink_k_BGND", "sink_v_BGNV", "memory_BHFV")
        for name in (*names, "store_k_BGPD", "store_v_BGPV"):
            own, new = getattr(self, name), getattr(other, name)
            assert (own is None) == (new is None)
            if own is not None:
                own.copy_(new)


def _owned(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def pad_slots(sink_BGNX: Tensor, spec: WindowLinear) -> Tensor:
    """Sinks padded to their full number (a plain state that is still short of them has fewer)."""
    return torch.nn.functional.pad(sink_BGNX, (0, 0, 0, spec.num_sinks - sink_BGNX.shape[2]))


def take_slots(x_BGSD: Tensor, index_BN: Tensor) -> Tensor:
    """x[b, :, index[b]] -> [B, G, N, D]; indices outside give some slot, which the caller masks."""
    index = index_BN.clamp(0, max(x_BGSD.shape[2] - 1, 0))[:, None, :, None]
    return x_BGSD.gather(2, index.expand(-1, x_BGSD.shape[1], -1, x_BGSD.shape[3]))
