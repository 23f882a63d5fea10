"""Softmax attention with a state that grows with every token: what a group of heads does that keeps its attention.

A token sees every live token of its document up to itself. The state holds their keys and values; a document that opens
ends the one before it.

Letters: B batch, G key/value heads, H query heads, R = H / G, T new tokens, U of them (the last) with an output, S past
tokens, D head dimension, V value dimension, X either.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops import TensorState
from linearize.ops.layout import Layout
from linearize.ops.softmax import masked_softmax

MORE = 8  # a move makes room for one part in so many of the tokens there are
LEAST = 64  # tokens that a move makes room for at least


class GrowingBuffer:
    """Memory of `[B, G, S + room, X]`, of which the first `used` tokens are filled; it moves when its room is used up,
    an eighth more at a time."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.used = 0

    def then(self, old: Tensor, new: Tensor) -> Tensor:
        """`old` and `new` one after the other; `old` is not copied where it is the filled part of this memory."""
        past, tokens = old.shape[-2] if old.numel() else 0, new.shape[-2]
        if not self._holds(old, new, past) or past + tokens > self.memory.shape[-2]:  # type: ignore[union-attr]
            whole = past + tokens + max(LEAST, (past + tokens) // MORE)
            with torch.inference_mode(False):  # what is made inside that mode cannot be written to outside
                memory = new.new_empty(*new.shape[:-2], whole, new.shape[-1])
            if past:
                memory[..., :past, :] = old
            self.memory = memory
        assert self.memory is not None
        self.used = past + tokens
        self.memory[..., past : self.used, :] = new
        return self.memory[..., : self.used, :]

    def shorten(self, filled: Tensor | None) -> None:
        """Take note that only so much is in use, if it is this memory's."""
        if self.memory is not None and filled is not None and filled.data_ptr() == self.memory.data_ptr():
            self.used = min(self.used, filled.shape[-2])

    def _holds(self, old: Tensor, new: Tensor, past: int) -> bool:
        """Whether `old` is all that is filled here, and `new` can go behind it: a tensor with fewer tokens may be that
        of another cache, whose further tokens are here."""
        memory = self.memory
        if memory is None or past != self.used or past == 0 or old.data_ptr() != memory.data_ptr():
            return False
        shape = (*memory.shape[:-2], memory.shape[-1])
        return all((*x.shape[:-2], x.shape[-1]) == shape and x.dtype == memory.dtype for x in (old, new))


@dataclass(frozen=True, eq=False)
class SoftmaxState(TensorState):
    """Keys `[B, G, S, D]` and values `[B, G, S, V]` of the tokens so far; those at the front that no row sees any more
    are left out.

    `live_BS`: which of them the row's next token sees, `[B, S]` bool; None: all. `buffers`: memory with room for tokens
    to come, of which keys and values may be the filled part.
    """

    k_BGSD: Tensor
    v_BGSV: Tensor
    live_BS: Tensor | None = None
    buffers: tuple[GrowingBuffer, GrowingBuffer] | None = None


def growing_softmax(
    q_BHUD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    *,
    scaling: float,
    layout: Layout,
    softcap: float | None = None,
    state: SoftmaxState | None = None,
    need_state: bool = True,
    commit: int | None = None,
) -> tuple[Tensor, SoftmaxState | None]:
    """Attend; returns `y: [B, H, U, V]` and the state after the last token (None unless `need_state`).

    `q_BHUD`: of the last U of the T tokens, which get outputs; those of dead tokens are 0. `commit`: the state is that
    after the first `commit` tokens (None: after all).
    """
    tokens, queries, past = k_BGTD.shape[2], q_BHUD.shape[2], 0 if state is None else state.k_BGSD.shape[2]
    document_BT, after = _documents(layout, tokens, k_BGTD.device), None
    taken = (tokens if commit is None else commit) if need_state else 0
    k, v, buffers = _joined(k_BGTD, v_BGTV, state, taken)
    if need_state:
        live = _live_after(document_BT, state, past, taken, k.shape[0])
        after = _trimmed(SoftmaxState(k[:, :, : past + taken], v[:, :, : past + taken], live, buffers))
    plain = document_BT is None and (state is None or state.live_BS is None)
    if plain and queries == 1 and softcap is None:
        grouped = q_BHUD.reshape(q_BHUD.shape[0], k.shape[1], -1, q_BHUD.shape[3])
        y = F.scaled_dot_product_attention(grouped, k, v, scale=scaling)
        return y.reshape(*q_BHUD.shape[:3], -1), after
    if plain and queries == tokens == k.shape[2] and softcap is None:
        gqa = q_BHUD.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q_BHUD, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)
        return y, after
    seen = _visible(document_BT, state, queries, tokens, k)
    y = masked_softmax(q_BHUD, k, v, seen, scaling=scaling, softcap=softcap)
    return y.masked_fill(~seen.any(-1, keepdim=True), 0), after


def advance_softmax(
    k_BGTD: Tensor, v_BGTV: Tensor, *, layout: Layout, state: SoftmaxState | None = None
) -> SoftmaxState:
    """The state after these tokens, without outputs."""
    tokens, k, v = k_BGTD.shape[2], k_BGTD, v_BGTV
    past = 0 if state is None else state.k_BGSD.shape[2]
    if state is not None:
        k, v = torch.cat([state.k_BGSD, k], dim=2), torch.cat([state.v_BGSV, v], dim=2)
    document_BT = _documents(layout, tokens, k.device)
    return _trimmed(SoftmaxState(k, v, _live_after(document_BT, state, past, tokens, k.shape[0])))


def _joined(
    k_BGTD: Tensor, v_BGTV: Tensor, state: SoftmaxState | None, taken: int
) -> tuple[Tensor, Tensor, tuple[GrowingBuffer, GrowingBuffer] | None]:
    """Past and new keys and values; the first `taken` new ones behind the past in memory that grows."""
    if taken and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        old = (k_BGTD[:, :, :0], v_BGTV[:, :, :0]) if state is None else (state.k_BGSD, state.v_BGSV)
        buffers = (state and state.buffers) or (GrowingBuffer(), GrowingBuffer())
        k = buffers[0].then(old[0], k_BGTD[:, :, :taken])
        v = buffers[1].then(old[1], v_BGTV[:, :, :taken])
        if taken == k_BGTD.shape[2]:
            return k, v, buffers
        return torch.cat([k, k_BGTD[:, :, taken:]], dim=2), torch.cat([v, v_BGTV[:, :, taken:]], dim=2), buffers
    if state is None:
        return k_BGTD, v_BGTV, None
    return torch.cat([state.k_BGSD, k_BGTD], dim=2), torch.cat([state.v_BGSV, v_BGTV], dim=2), state.buffers


def _documents(layout: Layout, tokens: int, device: torch.device) -> Tensor | None:
    """The document of each new token, 0 for the past's, -1 for dead ones, `[B or 1, T]`; None: all live and the past's
    (or the first)."""
    starts_BT, live_BT = layout.starts(tokens, device), layout.live()
    if layout.is_plain:
        return None
    if "growing_softmax" not in layout.memo:
        if starts_BT is None:
            document = torch.zeros_like(layout.positions(tokens, device))
        else:
            document = starts_BT.long().cumsum(-1)
        layout.memo["growing_softmax"] = document if live_BT is None else document.masked_fill(~live_BT, -1)
    document_BT: Tensor = layout.memo["growing_softmax"]
    return document_BT


def _live_after(
    document_BT: Tensor | None, state: SoftmaxState | None, past: int, tokens: int, rows: int
) -> Tensor | None:
    """Which of the past and the first `tokens` new tokens belong to the document that goes on after these."""
    old = None if state is None else state.live_BS
    if document_BT is None:
        return old if old is None else F.pad(old, (0, tokens), value=True)
    document = document_BT[:, :tokens].expand(rows, -1)
    current = document.amax(-1, keepdim=True).clamp(min=0) if tokens else document.new_zeros(rows, 1)
    before = document.new_ones(rows, past, dtype=torch.bool) if old is None else old
    live = torch.cat([before & (current == 0), document == current], dim=1)
    return None if bool(live.all()) else live


def _trimmed(state: SoftmaxState) -> SoftmaxState:
    """Without what is dead in every row at the front."""
    live = state.live_BS
    if live is None or bool(live[:, :1].any()):
        return state
    first = int(live.any(0).long().argmax()) if bool(live.any()) else live.shape[1]
    rest = live[:, first:]
    k, v = state.k_BGSD[:, :, first:].clone(), state.v_BGSV[:, :, first:].clone()
    return SoftmaxState(k, v, None if bool(rest.all()) else rest)


def _visible(
    document_BT: Tensor | None, state: SoftmaxState | None, queries: int, tokens: int, k_BGSD: Tensor
) -> Tensor:
    """Which past and new tokens each query sees, `[B or 1, 1, U, S + T]` bool."""
    past, device = k_BGSD.shape[2] - tokens, k_BGSD.device
    slot = torch.arange(tokens, device=device)
    document = torch.zeros(1, tokens, dtype=torch.long, device=device) if document_BT is None else document_BT
    of_query = document[:, tokens - queries :, None]
    new = (slot[tokens - queries :, None] >= slot) & (of_query == document[:, None]) & (of_query >= 0)
    live = None if state is None else state.live_BS
    old = of_query == 0 if live is None else live[:, None] & (of_query == 0)
    rows = max(new.shape[0], old.shape[0])
    return torch.cat([old.expand(rows, -1, past), new.expand(rows, -1, -1)], dim=-1)[:, None]
