"""New tokens without padding or packing, a few (verification of a draft, prefill in small parts) or one (decoding).

`multi_token`: what is committed goes into ring and sum first (one copy of the ring); the rest attends from there, past
and new keys side by side but never put together. Keys that are in the window of no query, and are not folded yet, are
few: only they get features. `step`: all that waits in the ring is in the one token's window, so nothing is masked.

Letters: B batch, G key/value heads, R query heads for each, H = G R, T new tokens, U of them (the last) with an output,
M = R U, N sinks that left the ring, P ring, S = N + P + T slots, D, V, F.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.matmul import exp_or_zero
from linearize.ops.window_linear.spec import WindowLinear, divide, fold_boundary, in_window, with_ones
from linearize.ops.window_linear.state import WindowLinearState, appended
from linearize.ops.window_linear.store import num_stored_at, plain_after
from linearize.ops.window_linear.update import between, next_joined_state, next_plain_state


def multi_token(
    q_BHUD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    *,
    spec: WindowLinear,
    layout: Layout,
    state: WindowLinearState,
    need_state: bool = True,
    commit: int | None = None,
) -> tuple[Tensor, WindowLinearState | None]:
    """Attend; same arguments, outputs and values as `reference`, state after `commit` tokens (None: all)."""
    tokens, start, after = k_BGTD.shape[2], layout.start, None
    if commit is not None:
        if commit:
            state = next_joined_state(k_BGTD[:, :, :commit], v_BGTV[:, :, :commit], start, state, spec)
            k_BGTD, v_BGTV = k_BGTD[:, :, commit:], v_BGTV[:, :, commit:]
        after = state
    elif need_state:
        after = next_joined_state(k_BGTD, v_BGTV, start, state, spec)
    slots = _slots(q_BHUD.shape[2], start + tokens, k_BGTD.shape[2], layout, state, spec)
    return _attend(q_BHUD, k_BGTD, v_BGTV, slots, state, spec), after if need_state else None


@dataclass(frozen=True, eq=False)
class _Slots:
    """`sinks`: how many have left the ring. `hidden_US`: slots outside the query's window (None: all are inside).

    `first`, `far_UP`: slots from `first` on that some query sees only through the sum, which does not hold them yet;
    None: there are none.
    """

    sinks: int
    hidden_US: Tensor | None
    first: int
    far_UP: Tensor | None


def _slots(
    num_queries: int, end: int, num_new: int, layout: Layout, state: WindowLinearState, spec: WindowLinear
) -> _Slots:
    """Where each slot stands for each query; once for all layers that share layout and window."""
    ring, have = state.k_BGRD.shape[2], 0 if state.sink_k_BGND is None else state.sink_k_BGND.shape[2]
    key = ("multi_token", num_queries, end, num_new, ring, have, spec.window, spec.shape, spec.num_sinks)
    if key not in layout.memo:
        layout.memo[key] = _place(num_queries, end, end - num_new - ring, have, spec, state.k_BGRD.device)
    slots: _Slots = layout.memo[key]
    return slots


def _place(num_queries: int, end: int, oldest: int, have: int, spec: WindowLinear, device: torch.device) -> _Slots:
    """`oldest`: position of the ring's first slot; `end`: of the token after the last."""
    sinks = min(have, max(oldest, 0))
    query = torch.arange(end - num_queries, end, device=device)[:, None]
    slot = torch.cat([torch.arange(sinks, device=device), torch.arange(oldest, end, device=device)])
    near = (in_window(query, slot, spec.window, spec.shape) | (slot < spec.num_sinks)) & (slot <= query)
    hidden = None if bool(near.all()) else ~near
    first = max(oldest, spec.num_sinks)
    beyond = fold_boundary(end - 1, spec.window, spec.shape)
    if beyond <= first:
        return _Slots(sinks, hidden, 0, None)
    far = slice(sinks + first - oldest, sinks + beyond - oldest)
    return _Slots(sinks, hidden, first - oldest, ((slot <= query) & ~near)[:, far])


def _attend(
    q_BHUD: Tensor, k_BGTD: Tensor, v_BGTV: Tensor, slots: _Slots, state: WindowLinearState, spec: WindowLinear
) -> Tensor:
    groups, dtype = k_BGTD.shape[1], q_BHUD.dtype
    keys, values = [state.k_BGRD.to(dtype), k_BGTD], [state.v_BGRV.to(dtype), v_BGTV]
    if slots.sinks:
        assert state.sink_k_BGND is not None and state.sink_v_BGNV is not None
        keys.insert(0, state.sink_k_BGND[:, :, : slots.sinks].to(dtype))
        values.insert(0, state.sink_v_BGNV[:, :, : slots.sinks].to(dtype))
    q_BGMD = q_BHUD.reshape(q_BHUD.shape[0], groups, -1, q_BHUD.shape[-1])
    p, m = _weights(torch.cat([q_BGMD @ k.mT for k in keys], dim=-1), slots.hidden_US, spec)
    recalled = None
    if spec.has_linear and (state.memory_BHFV is not None or slots.far_UP is not None):
        recalled = _recall(spec.features_q(q_BHUD), keys, values, slots, state, spec)
        recalled = recalled * (-m.view(*q_BHUD.shape[:3], 1)).exp() if spec.shared_shift else recalled
    parts = zip(p.split([k.shape[2] for k in keys], dim=-1), values, strict=True)
    summed = [part @ v for part, v in parts]
    total = torch.cat([sum(summed[1:], summed[0]), p.sum(-1, keepdim=True)], dim=-1)
    total = total.view(*q_BHUD.shape[:3], -1)
    return divide(total if recalled is None else total + recalled)


def _weights(s_BGMS: Tensor, hidden_US: Tensor | None, spec: WindowLinear) -> tuple[Tensor, Tensor]:
    """g exp(s - m), and m, `[B, G, M, 1]`."""
    s = s_BGMS * spec.scaling
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    if hidden_US is not None:
        num_queries = hidden_US.shape[0]
        s = s.unflatten(2, (-1, num_queries)).masked_fill(hidden_US, -torch.inf).flatten(2, 3)
    m = spec.shift(s.amax(-1, keepdim=True))
    p = exp_or_zero(s - m)
    if spec.log_window_factor_H is not None:
        factor = spec.log_window_factor_H.exp().to(p.dtype).view(p.shape[1], -1, 1, 1)
        p = (p.unflatten(2, (factor.shape[1], -1)) * factor).flatten(2, 3)
    return p, m


def _recall(
    phi_BHUF: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    slots: _Slots,
    state: WindowLinearState,
    spec: WindowLinear,
) -> Tensor:
    """The linear term's numerator and normaliser, `[B, H, U, V + 1]`: the sum, and keys beyond the window."""
    total = None if state.memory_BHFV is None else phi_BHUF @ state.memory_BHFV.to(phi_BHUF.dtype)
    if slots.far_UP is None:
        assert total is not None
        return total
    far = slice(slots.first, slots.first + slots.far_UP.shape[1])
    k, v = (between(some[-2], some[-1], far) for some in (keys, values))
    a_BHUP = (phi_BHUF @ spec.features_k(k).mT).masked_fill(~slots.far_UP, 0)
    added = a_BHUP @ with_ones(v).repeat_interleave(a_BHUP.shape[1] // v.shape[1], dim=1)
    return added if total is None else total + added


def step(
    q_BH1D: Tensor,
    k_BG1D: Tensor,
    v_BG1V: Tensor,
    *,
    spec: WindowLinear,
    layout: Layout,
    state: WindowLinearState,
    need_state: bool = True,
) -> tuple[Tensor, WindowLinearState | None]:
    """Attend; same arguments, outputs and values as `reference`."""
    dtype, groups = q_BH1D.dtype, k_BG1D.shape[1]
    past, ring_buffer = state.k_BGRD.shape[2], None
    if need_state and not torch.is_grad_enabled():  # autograd may have kept what a ring buffer shows
        ring_buffer, slots = appended(k_BG1D, v_BG1V, state, spec)
        k, v = (x.to(dtype) for x in ring_buffer.shown(slots))
    else:
        k = torch.cat([state.k_BGRD.to(dtype), k_BG1D], dim=2)
        v = torch.cat([state.v_BGRV.to(dtype), v_BG1V], dim=2)
    numerator, normaliser, m = None, None, None  # `m`: of a shared shift
    at_once = _takes_sdpa(q_BH1D, v, spec) and state.memory_BHFV is not None
    if spec.has_window and not at_once:
        numerator, normaliser, m = _window(
            q_BH1D.unflatten(1, (groups, -1)).squeeze(3), k, v, layout.start, state, spec
        )
    if spec.has_linear and state.memory_BHFV is not None:
        recalled = spec.features_q(q_BH1D) @ state.memory_BHFV.to(dtype)
        if m is not None:
            recalled = recalled * (-m).exp()
        of_values, of_ones = recalled[..., :-1], recalled[..., -1:]
        if at_once:
            numerator = _between_branches(q_BH1D, k, v, (of_values, of_ones), layout.start, state, spec)
        else:
            numerator = of_values if numerator is None else numerator + of_values
            normaliser = of_ones if normaliser is None else normaliser + of_ones
    if spec.has_linear and spec.window == 0:  # then the token itself is beyond the window
        own, alone = _own(q_BH1D, k_BG1D, v_BG1V, spec)
        numerator = own if numerator is None else numerator + own
        normaliser = alone if normaliser is None else normaliser + alone
    assert numerator is not None
    after = None
    if need_state:
        following = plain_after if spec.store else next_plain_state
        after = following(k, v, past, layout.start, state, spec, ring_buffer=ring_buffer)
    if normaliser is None:  # divided already
        return numerator, after
    if not spec.has_window:  # in a window the token sees itself
        normaliser = normaliser.masked_fill(normaliser == 0, 1)
    return numerator / normaliser, after


def _takes_sdpa(q_BH1D: Tensor, v_BGSV: Tensor, spec: WindowLinear) -> bool:
    """Whether one call of SDPA serves for the window: on a CPU, without gradients, where the shift is shared (so that
    it cancels and the call's logarithm of the normaliser is enough)."""
    return (
        spec.has_window
        and spec.has_linear
        and spec.shared_shift
        and spec.softcap is None
        and q_BH1D.device.type == "cpu"
        and q_BH1D.shape[3] == v_BGSV.shape[3]
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _between_branches(
    q_BH1D: Tensor,
    k_BGSD: Tensor,
    v_BGSV: Tensor,
    recalled: tuple[Tensor, Tensor],
    position: int,
    state: WindowLinearState,
    spec: WindowLinear,
) -> Tensor:
    """The mean of the window's and the linear branch's values, weighted by their normalisers g Z and r:
    y = w y_window + (1 - w) y_linear with w = sigmoid(log g + log Z - log r), `[B, H, 1, V]`."""
    keys, values = _seen(k_BGSD, v_BGSV, position, state, spec)
    k, v = (x[0] if len(x) == 1 else torch.cat(x, dim=2) for x in (keys, values))
    y_BGRV, log_z_BGR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BH1D.view(*k.shape[:2], -1, k.shape[3]), k, v, scale=spec.scaling
    )
    y, log_z = y_BGRV.reshape(*q_BH1D.shape[:3], -1), log_z_BGR.reshape(q_BH1D.shape[0], -1, 1, 1)
    of_values, of_ones = recalled
    of_ones = of_ones.clamp(min=torch.finfo(of_ones.dtype).tiny)  # 0 where nothing is folded yet
    if spec.log_window_factor_H is not None:
        log_z = log_z + spec.log_window_factor_H.to(log_z.dtype).view(-1, 1, 1)
    return torch.lerp(of_values / of_ones, y, torch.sigmoid(log_z - of_ones.log()))


def _seen(
    k_BGSD: Tensor, v_BGSV: Tensor, position: int, state: WindowLinearState, spec: WindowLinear
) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values that the token at `position` sees by softmax: sinks that left the ring, ring, store."""
    dtype, keys, values = k_BGSD.dtype, list[Tensor](), list[Tensor]()
    out_of_ring = max(position + 1 - k_BGSD.shape[2], 0)
    if state.sink_k_BGND is not None and state.sink_v_BGNV is not None and out_of_ring:
        keys.append(state.sink_k_BGND[:, :, :out_of_ring].to(dtype))
        values.append(state.sink_v_BGNV[:, :, :out_of_ring].to(dtype))
    keys.append(k_BGSD)
    values.append(v_BGSV)
    if spec.store and spec.branch == "both" and (stored := num_stored_at(position, spec)):
        assert state.store_k_BGPD is not None and state.store_v_BGPV is not None
        keys.append(state.store_k_BGPD[:, :, :stored].to(dtype))
        values.append(state.store_v_BGPV[:, :, :stored].to(dtype))
    return keys, values


def _window(
    q_BGRD: Tensor, k_BGSD: Tensor, v_BGSV: Tensor, position: int, state: WindowLinearState, spec: WindowLinear
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of g exp(s - m) v, `[B, H, 1, V]`, and of g exp(s - m), and a shared m, both `[B, H, 1, 1]`.

    The token sees itself, so that m is finite.
    """
    keys, values = _seen(k_BGSD, v_BGSV, position, state, spec)
    scores = [q_BGRD @ k.mT for k in keys]
    s = (scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)) * spec.scaling
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    m = s.amax(-1, keepdim=True)
    m = m.detach().clamp(min=0) if spec.shared_shift else m
    p = exp_or_zero(s - m)
    if spec.log_window_factor_H is not None:
        p = p * spec.log_window_factor_H.exp().to(p.dtype).view(p.shape[1], p.shape[2], 1)
    first, *others = zip(p.split([v.shape[2] for v in values], dim=-1), values, strict=True)
    total = first[0] @ first[1]
    for weights, v in others:
        total = total + weights @ v
    numerator, normaliser, m = (x.flatten(1, 2)[:, :, None] for x in (total, p.sum(-1, keepdim=True), m))
    return numerator, normaliser, m if spec.shared_shift else None


def _own(q_BH1D: Tensor, k_BG1D: Tensor, v_BG1V: Tensor, spec: WindowLinear) -> tuple[Tensor, Tensor]:
    """The token's own linear term, and its weight."""
    a = (spec.features_q(q_BH1D) * spec.features_k(k_BG1D)).sum(-1, keepdim=True)
    return a * v_BG1V.repeat_interleave(a.shape[1] // v_BG1V.shape[1], dim=1), a
