"""Window + linear attention as its equation, with T x S matrices (LoLCATs, 2410.10254, equation 6; `docs/methods.md`).

    y_n = [ sum_{i in W(n)} g exp(s_ni - m_n) v_i + r_n phi_q(q_n)^T sum_{j not in W(n)} phi_k(k_j) v_j^T ]
          / [ the same with every v replaced by 1 ],           s_ni = q_n . k_i / sqrt(D),  c_n = max_{i in W(n)} s_ni

As published m_n = c_n and r_n = 1; with a shared shift m_n = max(c_n, 0) and r_n = exp(-m_n).
This backend proves the others and is also the fast one for a few tokens (decode, verification of a draft).

Letters: B batch, G key/value heads, R query heads per key/value head, H = G R, T new tokens, S slots (sinks, ring,
new), D, V, F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.window_linear.slots import Slots, gather_slots
from linearize.ops.window_linear.spec import WindowLinear, divide, in_window, most_leaving, state_dtype, with_ones
from linearize.ops.window_linear.state import WindowLinearState
from linearize.ops.window_linear.update import next_state


def reference(
    q_BHUD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    *,
    spec: WindowLinear,
    layout: Layout,
    state: WindowLinearState | None = None,
    need_state: bool = True,
) -> tuple[Tensor, WindowLinearState | None]:
    """Attend; returns `y: [B, H, U, V]` and the state after the last token (None unless `need_state`).

    `q_BHUD`: of the last U of the T tokens.
    """
    slots = gather_slots(k_BGTD, v_BGTV, layout, state, spec)
    k, v, position, origin = _with_sinks(slots, state, spec)
    near, far, carried = _masks(slots, position, origin, q_BHUD.shape[2], spec)
    dtype = state_dtype(q_BHUD)
    value = with_ones(v.to(dtype))
    weights, scale = _window_weights(q_BHUD, k, near, spec)
    static = layout.tail is not None
    if spec.has_linear and not static and bool(far.any()):
        a = spec.features_q(q_BHUD) @ spec.features_k(k).transpose(-1, -2)
        weights = weights + scale * (a.to(dtype) * far[:, None])
    groups = k.shape[1]
    total = (weights.unflatten(1, (groups, -1)) @ value[:, :, None]).flatten(1, 2)
    if spec.has_linear and static:
        total = total + scale * _beyond(q_BHUD, slots, spec)
    if spec.has_linear and state is not None and state.memory_BHFV is not None:
        recalled = spec.features_q(q_BHUD).to(dtype) @ state.memory_BHFV
        total = total + scale * recalled * carried[:, None, :, None]
    return divide(total).to(q_BHUD.dtype), next_state(slots, layout, state, spec) if need_state else None


def _beyond(q_BHUD: Tensor, slots: Slots, spec: WindowLinear) -> Tensor | int:
    """The linear term of keys that are in no state yet and beyond the window of some query, `[B, H, U, V + 1]`, where
    the layout is static: of as many as there may be."""
    tokens, groups = slots.new_position.shape[1], slots.k_BGSD.shape[1]
    size = most_leaving(tokens - 1, spec.window, spec.shape) if spec.window else tokens
    if size == 0:
        return 0
    k, v, position = slots.unfolded(size, spec)
    query, key = slots.new_position[:, tokens - q_BHUD.shape[2] :, None], position[:, None]
    far = (key <= query) & (key >= spec.num_sinks) & ~in_window(query, key, spec.window, spec.shape)
    dtype = state_dtype(q_BHUD)
    a = (spec.features_q(q_BHUD) @ spec.features_k(k).mT).to(dtype) * far[:, None]
    return (a.unflatten(1, (groups, -1)) @ with_ones(v.to(dtype))[:, :, None]).flatten(1, 2)


def _with_sinks(
    slots: Slots, state: WindowLinearState | None, spec: WindowLinear
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sinks of the carried document that are no longer in the ring, in front of the other slots."""
    if state is None or state.sink_k_BGND is None or state.sink_v_BGNV is None:
        return slots.k_BGSD, slots.v_BGSV, slots.position, slots.origin
    k = torch.cat([state.sink_k_BGND.to(slots.k_BGSD.dtype), slots.k_BGSD], dim=2)
    v = torch.cat([state.sink_v_BGNV.to(slots.v_BGSV.dtype), slots.v_BGSV], dim=2)
    num_sinks, following = state.sink_k_BGND.shape[2], slots.follow
    j = torch.arange(num_sinks, device=k.device)
    in_ring = ((slots.position[..., None] == j) & (slots.origin == slots.carried_origin)[..., None]).any(1)
    position = torch.where((j < following) & ~in_ring, j, -1)
    if slots.begin is not None:
        position = position.masked_fill(position < slots.begin, -1)
    rows = max(position.shape[0], slots.position.shape[0])
    position = torch.cat([position.expand(rows, -1), slots.position.expand(rows, -1)], dim=1)
    origin = torch.cat([slots.carried_origin.expand(rows, num_sinks), slots.origin.expand(rows, -1)], dim=1)
    return k, v, position, origin


def _masks(
    slots: Slots, position: Tensor, origin: Tensor, num_queries: int, spec: WindowLinear
) -> tuple[Tensor, Tensor, Tensor]:
    """Which keys each query sees: in the window, beyond it; and whether the carried sum is of its document."""
    first = slots.new_position.shape[1] - num_queries
    query_position, query_origin = slots.new_position[:, first:, None], slots.new_origin[:, first:, None]
    key_position, key_origin = position[:, None], origin[:, None]
    seen = (query_origin == key_origin) & (key_position >= 0) & (key_position <= query_position)
    near = in_window(query_position, key_position, spec.window, spec.shape) | (key_position < spec.num_sinks)
    carried = query_origin[..., 0] == slots.carried_origin
    if spec.branch == "linear":
        return torch.zeros_like(seen), seen & ~near, carried
    return seen & near, seen & ~near, carried


def _window_weights(q_BHTD: Tensor, k_BGSD: Tensor, near: Tensor, spec: WindowLinear) -> tuple[Tensor, Tensor]:
    """g exp(s - m) inside the window, 0 elsewhere, `[B, H, T, S]`; and the factor r_n of the linear term, `[B, H, T,
    1]`."""
    groups = k_BGSD.shape[1]
    s = (q_BHTD.unflatten(1, (groups, -1)) @ k_BGSD[:, :, None].transpose(-1, -2)).flatten(1, 2).to(state_dtype(q_BHTD))
    s = s * spec.scaling
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    s = s.masked_fill(~near[:, None], -torch.inf)
    m = spec.shift(s.amax(-1, keepdim=True)) if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    log_g = 0 if spec.log_window_factor_H is None else spec.log_window_factor_H[:, None, None].to(s.dtype)
    return (s - m + log_g).exp(), (-m).exp() if spec.shared_shift else torch.ones_like(m)
