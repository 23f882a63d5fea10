"""Window + linear attention over `WindowBuffers` in PyTorch: static layouts, ring and sum written where they are.

A call's tokens are those that go into the state (each row's live ones in front) and those after them; none opens a
document, so a key is seen by its position alone: from the query's window edge on by softmax (and the first tokens for
ever), earlier ones by features. A single token is written first and seen in the ring: nothing is put side by side.

Letters: B batch, H query heads, G key/value heads, R query heads for each, T tokens, U of them (the last) with an
output, S those that no state holds, C ring slots, N sinks, P positions, D head dimension, V value dimension, F
features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.matmul import exp_or_zero, flattens, row_products
from linearize.ops.window_linear.spec import WindowLinear, with_ones
from linearize.ops.window_linear.state import WindowBuffers, take_slots
from linearize.ops.window_linear.static_masks import Moves, Seen
from linearize.ops.window_linear.store import Store, num_stored


def in_place(
    q_BHUD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    *,
    spec: WindowLinear,
    layout: Layout,
    state: WindowBuffers,
    commit: int,
) -> Tensor:
    """`y: [B, H, U, V]`; `state` then holds the first `commit` tokens too: all, or at most T - U. Inputs are wide."""
    spec, tokens = spec.resolved(), k_BGTD.shape[2]
    positions = layout.positions(tokens, k_BGTD.device)
    query_BU = positions[:, tokens - q_BHUD.shape[2] :]
    if commit == tokens == 1:
        _write(state, k_BGTD, v_BGTV, positions, dead=False)
        seen = _seen(layout, query_BU, None, state.next_B + 1, state, spec)
        y = _attend(q_BHUD, (), seen, state, spec)
        _settle(state, spec, state.next_B + 1, 1, layout)
        return y
    if spec.store and commit == tokens:
        return _one_by_one(q_BHUD, k_BGTD, v_BGTV, layout, state, spec)
    early = commit if commit < tokens else 0
    if early:
        _commit(state, k_BGTD[:, :, :early], v_BGTV[:, :, :early], layout.part(0, early), spec)
    k, v, rest = k_BGTD[:, :, early:], v_BGTV[:, :, early:], layout.part(early, tokens)
    if spec.store:
        return _one_by_one(q_BHUD, k, v, rest, state.map_batch(torch.clone), spec)
    seen = _seen(rest, query_BU, rest.positions(k.shape[2], k.device), state.next_B, state, spec)
    y = _attend(q_BHUD, (k, v), seen, state, spec)
    if commit > early:
        _commit(state, k, v, rest, spec)
    return y


def _one_by_one(
    q_BHUD: Tensor, k_BGTD: Tensor, v_BGTV: Tensor, layout: Layout, state: WindowBuffers, spec: WindowLinear
) -> Tensor:
    """Each token goes into the state before the next one's outputs: what a store decides between them counts."""
    tokens, queries = k_BGTD.shape[2], q_BHUD.shape[2]
    position_BT, ys = layout.positions(tokens, k_BGTD.device).expand(q_BHUD.shape[0], -1), []
    for t in range(tokens):
        now, part = position_BT[:, t : t + 1], slice(t, t + 1)
        _write(state, k_BGTD[:, :, part], v_BGTV[:, :, part], now, dead=True)
        following = torch.maximum(state.next_B, now[:, 0] + 1)
        if (u := t - tokens + queries) >= 0:
            seen = Seen.of(now, None, state.begin_B, following, state.k_BGCD.shape[2], spec)
            ys.append(_attend(q_BHUD[:, :, u : u + 1], (), seen, state, spec))
        _settle(state, spec, following, 1)
    return torch.cat(ys, dim=2)


def _seen(
    layout: Layout, query_BU: Tensor, new_BS: Tensor | None, held_B: Tensor, state: WindowBuffers, spec: WindowLinear
) -> Seen:
    """`Seen.of`, once for all layers of a kind."""
    slots = state.k_BGCD.shape[2]
    key = ("seen", slots, spec.window, spec.shape, spec.num_sinks)
    if key not in layout.memo:
        layout.memo[key] = Seen.of(query_BU, new_BS, state.begin_B, held_B, slots, spec)
    masks: Seen = layout.memo[key]
    return masks


def _attend(q_BHUD: Tensor, new: tuple[Tensor, ...], seen: Seen, state: WindowBuffers, spec: WindowLinear) -> Tensor:
    """What queries see of the state and of new keys and values."""
    dtype, groups = q_BHUD.dtype, state.k_BGCD.shape[1]
    total: Sequence[Tensor] | None = None
    m = None
    if spec.has_window:
        parts = [(state.k_BGCD, state.v_BGCV, seen.ring_B1UC)]
        if seen.sinks_B1UN is not None:
            parts.append((state.sink_k_BGND, state.sink_v_BGNV, seen.sinks_B1UN))
        if seen.new_B1US is not None:
            parts.append((new[0], new[1], seen.new_B1US))
        if spec.store and spec.branch == "both":
            store = _store(state, spec)
            parts.append((store.k_BGPD, store.v_BGPV, store.live()[:, None, None]))
        *total, m = _window(q_BHUD, [(k.to(dtype), v.to(dtype), x) for k, v, x in parts], spec)
    if spec.has_linear:
        assert state.memory_BHFV is not None
        phi_q = spec.features_q(q_BHUD)
        recalled = row_products(phi_q, state.memory_BHFV.to(dtype))
        for k, v, far in _beyond(new, seen, state):
            a = (phi_q @ spec.features_k(k.to(dtype)).mT) * far
            recalled = recalled + (a.unflatten(1, (groups, -1)) @ with_ones(v.to(dtype))[:, :, None]).flatten(1, 2)
        if m is not None and spec.shared_shift:
            recalled = recalled * (-m).exp()
        linear = recalled[..., :-1], recalled[..., -1:]
        total = linear if total is None else [x + more for x, more in zip(total, linear, strict=True)]
    if total is None:  # an ablation that leaves nothing to attend to
        return q_BHUD.new_zeros(*q_BHUD.shape[:3], state.v_BGCV.shape[3])
    numerator, normaliser = total
    return numerator / normaliser.masked_fill(normaliser == 0, 1)


def _window(
    q_BHUD: Tensor, parts: list[tuple[Tensor, Tensor, Tensor]], spec: WindowLinear
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of g exp(s - m) v `[B, H, U, V]`, sum of g exp(s - m) and m `[B, H, U, 1]`, over the parts' keys that are
    seen."""
    (heads, queries), groups = q_BHUD.shape[1:3], parts[0][0].shape[1]
    q = (q_BHUD * spec.scaling).unflatten(1, (groups, -1)).flatten(2, 3)
    scores = []
    for k, _, seen in parts:
        s = row_products(q, k.mT).unflatten(2, (-1, queries)).flatten(1, 2)
        s = s if spec.softcap is None else spec.softcap * torch.tanh(s / spec.softcap)
        scores.append(s.masked_fill(~seen, -torch.inf))
    s = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    m = spec.shift(s.amax(-1, keepdim=True))
    p = exp_or_zero(s - m)
    if spec.log_window_factor_H is not None:
        p = p * spec.log_window_factor_H.exp().to(p.dtype)[:, None, None]
    weights = p.unflatten(1, (groups, -1)).flatten(2, 3).split([k.shape[2] for k, *_ in parts], dim=-1)
    y = row_products(weights[0], parts[0][1])
    for w, (_, v, _) in zip(weights[1:], parts[1:], strict=True):
        y = y + row_products(w, v)
    return y.unflatten(2, (heads // groups, queries)).flatten(1, 2), p.sum(-1, keepdim=True), m


def _beyond(new: tuple[Tensor, ...], seen: Seen, state: WindowBuffers) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Keys and values that are in no sum yet and beyond the window of some query, and of which."""
    parts = []
    if seen.far_BP is not None and seen.far_ring_B1UP is not None:
        place = seen.far_BP % state.k_BGCD.shape[2]
        parts.append((take_slots(state.k_BGCD, place), take_slots(state.v_BGCV, place), seen.far_ring_B1UP))
    if seen.far_new_B1US is not None:
        parts.append((new[0], new[1], seen.far_new_B1US))
    return parts


def _commit(state: WindowBuffers, k_BGTD: Tensor, v_BGTV: Tensor, layout: Layout, spec: WindowLinear) -> None:
    """The live ones of these tokens go into ring, sinks and sum."""
    positions = layout.positions(k_BGTD.shape[2], k_BGTD.device)
    _write(state, k_BGTD, v_BGTV, positions, dead=layout.tail != 0)
    following = torch.maximum(state.next_B, positions.amax(1) + 1)
    _settle(state, spec, following, k_BGTD.shape[2])


def _write(state: WindowBuffers, k_BGTD: Tensor, v_BGTV: Tensor, position_BT: Tensor, *, dead: bool) -> None:
    """Put tokens into their slots of the ring; where some may be dead, theirs keep what they hold."""
    for ring, x in ((state.k_BGCD, k_BGTD), (state.v_BGCV, v_BGTV)):
        slots, tokens = ring.shape[2], x.shape[2]
        position, x = position_BT, x.to(ring.dtype)
        if dead:
            position = state.next_B[:, None] + torch.arange(tokens, device=x.device)
        place = (position % slots)[:, None, :, None].expand(*x.shape)
        if dead:
            x = torch.where((position_BT >= 0)[:, None, :, None], x, ring.gather(2, place))
        ring.scatter_(2, place, x)


def _settle(
    state: WindowBuffers, spec: WindowLinear, following_B: Tensor, most: int, layout: Layout | None = None
) -> None:
    """Sinks, sum and cursor after at most `most` tokens that are in the ring: the next token's position is given.
    `layout`: of these tokens; computes what they bring about once for all layers."""
    memo: dict[object, Any] = {} if layout is None else layout.memo
    key = ("moves", state.k_BGCD.shape[2], spec.window, spec.shape, spec.num_sinks)
    if key not in memo:
        memo[key] = Moves.of(state, spec, following_B, most)
    moves: Moves = memo[key]
    if moves.fresh_BN is not None:
        fresh = moves.fresh_BN
        place = torch.arange(spec.num_sinks, device=fresh.device).expand(fresh.shape) % state.k_BGCD.shape[2]
        for sink, ring in ((state.sink_k_BGND, state.k_BGCD), (state.sink_v_BGNV, state.v_BGCV)):
            sink.copy_(torch.where(fresh[:, None, :, None], take_slots(ring, place), sink))
    if spec.feature_k is not None and state.memory_BHFV is not None and moves.leaves_BP is not None:
        if spec.store:
            _admit(state, moves.place_BP, moves.leaves_BP, spec)
        else:
            _fold(state, moves.place_BP, moves.leaves_BP, moves.rows, spec)
    state.next_B.copy_(following_B)


def _fold(state: WindowBuffers, place_BP: Tensor, leaves_BP: Tensor, rows: Tensor | None, spec: WindowLinear) -> None:
    """memory + sum over the slots that leave of phi_k(k) [v, 1]^T, in place, in these rows (None: all)."""
    memory, ring_k, ring_v = state.memory_BHFV, state.k_BGCD, state.v_BGCV
    assert memory is not None
    if rows is not None:
        ring_k, ring_v, place_BP, leaves_BP = (x.index_select(0, rows) for x in (ring_k, ring_v, place_BP, leaves_BP))
    k, v = (take_slots(ring, place_BP).to(memory.dtype) for ring in (ring_k, ring_v))
    phi = spec.features_k(k) * leaves_BP[:, None, :, None].to(memory.dtype)
    value = with_ones(v).repeat_interleave(phi.shape[1] // k.shape[1], dim=1)
    if rows is not None:
        memory.index_add_(0, rows, phi.mT @ value)
    elif flattens(memory):
        memory.flatten(0, 1).baddbmm_(phi.mT.flatten(0, 1), value.flatten(0, 1))
    else:
        memory.add_(phi.mT @ value)


def _store(state: WindowBuffers, spec: WindowLinear) -> Store:
    assert state.memory_BHFV is not None and state.store_k_BGPD is not None and state.store_v_BGPV is not None
    count = num_stored(state.next_B, spec, state.begin_B)
    return Store(state.memory_BHFV, state.store_k_BGPD, state.store_v_BGPV, count)


def _admit(state: WindowBuffers, place_BP: Tensor, leaves_BP: Tensor, spec: WindowLinear) -> None:
    """`_fold` with a store, block after block."""
    store = _store(state, spec)
    for place, leaves in zip(place_BP.split(spec.window, 1), leaves_BP.split(spec.window, 1), strict=True):
        k, v = (take_slots(ring, place) for ring in (state.k_BGCD, state.v_BGCV))
        store = store.admit(k, v, leaves, spec)
    for memory, new in (
        (state.memory_BHFV, store.memory_BHFV), (state.store_k_BGPD, store.k_BGPD), (state.store_v_BGPV, store.v_BGPV)
    ):  # fmt: skip
        assert memory is not None
        memory.copy_(new)
