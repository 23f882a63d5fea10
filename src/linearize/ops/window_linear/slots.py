"""The ring and the new tokens of a call side by side, and the same put on chunk boundaries.

`gather_slots` says where each slot stands in which document. `align` moves every document to a chunk boundary, so that
a chunk never holds two documents and blocks of a window are whole chunks: padding, packing and a carried ring all
become one index, and what follows needs no per-token masks.

Letters: B batch, G key/value heads, H query heads, D head dimension, T new tokens, S slots (ring, then new), N chunks,
C chunk size, A = N C aligned slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.window_linear.spec import (
    WindowLinear,
    fold_boundary,
)
from linearize.ops.window_linear.state import WindowLinearState, take_slots


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


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where the aligned slots come from.

    `source_BA`: slot of each aligned slot (-1: none); None when the slots are already aligned and only the end is
    padded.
    `target_BT`: aligned slot of each new token (0 on padding, masked by `live_BT`); None likewise.
    `follows_BN`: chunk n - 1 holds the same document. `first_BN`: position of the chunk's first slot. `origin_BN`:
    slot at which the chunk's document has position 0 (may be negative); `begin_BN`: the document's first position
    (None: 0 in all of them). `carried_B1`: chunk 0 goes on with the document that the state belongs to.
    `whole`: every aligned slot between a document's first and last token holds a token.
    """

    num_chunks: int
    num_past: int
    source_BA: Tensor | None
    target_BT: Tensor | None
    live_BT: Tensor | None
    follows_BN: Tensor
    first_BN: Tensor
    origin_BN: Tensor
    carried_B1: Tensor
    whole: bool
    begin_BN: Tensor | None = None

    def gather(self, x_BGSD: Tensor, chunk: int) -> Tensor:
        """Ring and new slots into aligned chunks: [B, G, S, D] -> [B, G, N, C, D]; slots of no token are 0."""
        size = self.num_chunks * chunk
        if self.source_BA is None:
            missing = size - x_BGSD.shape[2]
            aligned = torch.nn.functional.pad(x_BGSD, (0, 0, 0, missing)) if missing else x_BGSD
        else:
            aligned = take_slots(x_BGSD, self.source_BA) * (self.source_BA >= 0)[:, None, :, None]
        return aligned.unflatten(2, (self.num_chunks, chunk))

    def gather_queries(self, q_BHTD: Tensor, chunk: int) -> Tensor:
        """New tokens only, `[B, H, T, D] -> [B, H, N, C, D]`."""
        return self.gather(
            torch.nn.functional.pad(q_BHTD, (0, 0, self.num_past, 0)) if self.num_past else q_BHTD, chunk
        )

    def scatter(self, y_BHAD: Tensor, num_new: int) -> Tensor:
        """Aligned outputs back to the new tokens, `[B, H, T, D]`; 0 on padding."""
        if self.target_BT is None or self.live_BT is None:
            return y_BHAD[:, :, self.num_past : self.num_past + num_new]
        return take_slots(y_BHAD, self.target_BT) * self.live_BT[:, None, :, None]


def align(slots: Slots, layout: Layout, chunk: int, spec: WindowLinear) -> Alignment:
    """The alignment of these slots on chunks of `chunk` tokens; computed once for all layers that share layout and
    window."""
    key = ("align", chunk, spec.window, spec.shape, slots.num_past)
    stateless = slots.num_past == 0
    if stateless and key in layout.memo:
        alignment = layout.memo[key]
        assert isinstance(alignment, Alignment)
        return alignment
    made = _align_plain(slots, layout, chunk) if slots.goes_on else _align_ragged(slots, chunk, spec)
    if stateless:
        layout.memo[key] = made
    return made


def _align_plain(slots: Slots, layout: Layout, chunk: int) -> Alignment:
    """One unbroken run that starts at the ring's first token, which is a fold boundary."""
    num_slots, device = slots.k_BGSD.shape[2], slots.k_BGSD.device
    first = layout.start - slots.num_past
    chunks = -(-num_slots // chunk)
    index = torch.arange(chunks, device=device)[None]
    origin = torch.full_like(index, -first)
    carried = torch.ones(1, 1, dtype=torch.bool, device=device)
    return Alignment(chunks, slots.num_past, None, None, None, index > 0, first + index * chunk, origin, carried, True)


def _align_ragged(slots: Slots, chunk: int, spec: WindowLinear) -> Alignment:
    batch, num_slots = slots.k_BGSD.shape[0], slots.k_BGSD.shape[2]
    device = slots.position.device
    position = slots.position.expand(batch, -1)
    origin = slots.origin.expand(batch, -1)
    carried = slots.carried_origin.expand(batch, 1)
    live = position >= 0
    starts = _first_live(live, origin)
    document = (starts.cumsum(-1) - 1).clamp(min=0)
    first, base = _bases(position, origin, document, live, slots, chunk, spec)
    offset = position - base.gather(1, document)
    length = torch.zeros(batch, num_slots, dtype=torch.long, device=device)
    length.scatter_reduce_(1, document, torch.where(live, offset + 1, 0), "amax")
    chunks = -(-length // chunk)
    first_chunk = chunks.cumsum(-1) - chunks
    total = max(int(chunks.sum(-1).max()), 1)
    target = torch.where(live, first_chunk.gather(1, document) * chunk + offset, total * chunk)
    slot = torch.arange(num_slots, device=device).expand(batch, -1)
    source = torch.full((batch, total * chunk + 1), -1, dtype=torch.long, device=device).scatter_(1, target, slot)[
        :, :-1
    ]

    index = torch.arange(total, device=device).expand(batch, -1)
    owner = (torch.searchsorted(first_chunk.contiguous(), index.contiguous(), right=True) - 1).clamp(min=0)
    owner = torch.minimum(owner, document.amax(-1, keepdim=True))
    within = index - first_chunk.gather(1, owner)
    nowhere = torch.iinfo(torch.long).min
    origin_of = torch.full_like(length, nowhere).scatter_reduce(1, document, torch.where(live, origin, nowhere), "amax")
    chunk_origin = origin_of.gather(1, owner)
    is_carried = chunk_origin == carried
    first_position = within * chunk + base.gather(1, owner)
    new = slice(slots.num_past, None)
    target = target[:, new].clamp(max=total * chunk - 1)
    whole = bool((length.sum(-1) == live.sum(-1)).all())
    begin = first.gather(1, owner) if bool((first > 0).any()) else None
    return Alignment(
        total, slots.num_past, source, target, live[:, new], within > 0, first_position, chunk_origin,
        is_carried[:, :1], whole, begin,
    )  # fmt: skip


def _bases(
    position: Tensor, origin: Tensor, document: Tensor, live: Tensor, slots: Slots, chunk: int, spec: WindowLinear
) -> tuple[Tensor, Tensor]:
    """Of each document, `[B, S]`: the position of its first token, and that of its first chunk's first slot, from
    which blocks of the window are whole."""
    beyond = torch.iinfo(torch.long).max
    first = torch.full_like(position, beyond).scatter_reduce(1, document, torch.where(live, position, beyond), "amin")
    first = first.masked_fill(first == beyond, 0)
    base = first // chunk * chunk
    begin = torch.zeros_like(slots.follow) if slots.begin is None else slots.begin
    old = live & (origin == slots.carried_origin) & (slots.follow > begin)
    carried = torch.zeros_like(document).scatter_reduce(1, document, old.long(), "amax") > 0
    edge = torch.maximum(fold_boundary(slots.follow, spec.window, spec.shape), begin // chunk * chunk)
    return torch.where(carried, begin, first), torch.where(carried, edge, base)


def _first_live(live: Tensor, origin: Tensor) -> Tensor:
    """The first token of each document that has any here (a document may be carried, or start at a position above
    0)."""
    before = torch.nn.functional.pad(origin[:, :-1], (1, 0), value=torch.iinfo(torch.long).min)
    was_live = torch.nn.functional.pad(live[:, :-1], (1, 0), value=False)
    return live & (~was_live | (before != origin))
