"""One new token, no padding or packing: decoding. All that waits in the ring is in its window, so nothing is masked.

Letters: B batch, G key/value heads, R query heads for each, H = G R, S keys (sinks, ring, the token), D, V, F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.window_linear.ring_buffer import appended
from linearize.ops.window_linear.spec import WindowLinear, divide
from linearize.ops.window_linear.state import WindowLinearState
from linearize.ops.window_linear.update import next_plain_state


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
    total, m = None, None  # `m`: of a shared shift
    if spec.has_window:
        total, m = _window(q_BH1D.unflatten(1, (groups, -1)).squeeze(3), k, v, layout.start, state, spec)
    if spec.has_linear and state.memory_BHFV is not None:
        recalled = spec.features_q(q_BH1D) @ state.memory_BHFV.to(dtype)
        recalled = recalled * (-m).exp() if m is not None else recalled
        total = recalled if total is None else total + recalled
    if spec.has_linear and spec.window == 0:  # then the token itself is beyond the window
        total = _own(q_BH1D, k_BG1D, v_BG1V, spec, total)
    assert total is not None
    after = next_plain_state(k, v, past, layout.start, state, spec, ring_buffer=ring_buffer) if need_state else None
    return divide(total), after


def _window(
    q_BGRD: Tensor, k_BGSD: Tensor, v_BGSV: Tensor, position: int, state: WindowLinearState, spec: WindowLinear
) -> tuple[Tensor, Tensor | None]:
    """[sum of g exp(s - m) v, sum of g exp(s - m)], `[B, H, 1, V + 1]`, and a shared m, `[B, H, 1, 1]`.

    The token sees itself, so that m is finite.
    """
    out_of_ring = max(position + 1 - k_BGSD.shape[2], 0)  # sinks that have left the ring
    k_sink, v_sink = state.sink_k_BGND, state.sink_v_BGNV
    with_sinks = k_sink is not None and v_sink is not None and out_of_ring > 0
    s = q_BGRD @ k_BGSD.mT
    if with_sinks:
        assert k_sink is not None
        s = torch.cat([q_BGRD @ k_sink[:, :, :out_of_ring].to(s.dtype).mT, s], dim=-1)
    s = s * spec.scaling
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    m = s.amax(-1, keepdim=True)
    m = m.detach().clamp(min=0) if spec.shared_shift else m
    p = (s - m).exp()
    if spec.log_window_factor_H is not None:
        p = p * spec.log_window_factor_H.exp().to(p.dtype).view(p.shape[1], p.shape[2], 1)
    num_sinks = p.shape[-1] - k_BGSD.shape[2]
    total = p[..., num_sinks:] @ v_BGSV
    if with_sinks:
        assert v_sink is not None
        total = total + p[..., :num_sinks] @ v_sink[:, :, :out_of_ring].to(p.dtype)
    total = torch.cat([total, p.sum(-1, keepdim=True)], dim=-1)
    return total.flatten(1, 2)[:, :, None], m.flatten(1, 2)[:, :, None] if spec.shared_shift else None


def _own(q_BH1D: Tensor, k_BG1D: Tensor, v_BG1V: Tensor, spec: WindowLinear, total: Tensor | None) -> Tensor:
    """The token's own linear term added."""
    a = (spec.features_q(q_BH1D) * spec.features_k(k_BG1D)).sum(-1, keepdim=True)
    v = v_BG1V.repeat_interleave(a.shape[1] // v_BG1V.shape[1], dim=1)
    own = torch.cat([a * v, a], dim=-1)
    return own if total is None else total + own
