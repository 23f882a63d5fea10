"""Window + linear attention with one normaliser: `window_linear` picks the form, every form computes the same.

| form | file | time and memory | for |
|---|---|---|---|
| reference | `reference.py` | T x S | proof; a few tokens (padded decode, verification) |
| step | `step.py` | S | one token without padding: decode |
| chunked | `chunked.py` | linear in T | training, prefill |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from linearize.ops.forms import ForcedForm
from linearize.ops.layout import Layout
from linearize.ops.window_linear.chunked import chunked
from linearize.ops.window_linear.reference import reference
from linearize.ops.window_linear.spec import Branch, WindowLinear
from linearize.ops.window_linear.state import WindowLinearState
from linearize.ops.window_linear.step import is_step, step
from linearize.ops.window_linear.update import gather_slots, next_state
from linearize.ops.window_linear.window import WindowShape

__all__ = [
    "FORMS",
    "Branch",
    "WindowLinear",
    "WindowLinearState",
    "WindowShape",
    "advance",
    "use_form",
    "window_linear",
]

FORMS: dict[str, Callable[..., tuple[Tensor, WindowLinearState | None]]] = {"reference": reference, "chunked": chunked}
FEW_TOKENS = 32
_forced = ForcedForm("window_linear")
use_form = _forced.use


def window_linear(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    *,
    spec: WindowLinear,
    layout: Layout,
    state: WindowLinearState | None = None,
    need_state: bool = True,
) -> tuple[Tensor, WindowLinearState | None]:
    """Attend; returns `y: [B, H, T, V]` and the state after the last token (None unless `need_state`).

    Half-precision inputs are computed in fp32 and the ring is kept in their dtype; the folded sum is at least fp32.
    """
    form = _choose(q_BHTD, layout, state, spec)
    dtype = q_BHTD.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(q_BHTD.device.type, enabled=False):
        y, after = form(
            q_BHTD.to(wide),
            k_BGTD.to(wide),
            v_BGTV.to(wide),
            spec=spec,
            layout=layout,
            state=state,
            need_state=need_state,
        )
    return y.to(dtype), None if after is None else _narrow(after, dtype)


def _choose(
    q_BHTD: Tensor, layout: Layout, state: WindowLinearState | None, spec: WindowLinear
) -> Callable[..., tuple[Tensor, WindowLinearState | None]]:
    if not (spec.has_window or spec.has_linear):
        return nothing
    if (forced := _forced.get()) is not None:
        return FORMS[forced]
    if is_step(q_BHTD, layout, state):
        return step
    return reference if q_BHTD.shape[2] <= FEW_TOKENS else chunked


def nothing(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    *,
    spec: WindowLinear,
    layout: Layout,
    state: WindowLinearState | None = None,
    need_state: bool = True,
) -> tuple[Tensor, WindowLinearState | None]:
    """An ablation that leaves nothing to attend to (the window of pure linear attention): 0, and the usual state."""
    y = torch.zeros_like(v_BGTV).repeat_interleave(q_BHTD.shape[1] // k_BGTD.shape[1], dim=1)
    after = next_state(gather_slots(k_BGTD, v_BGTV, layout, state, spec), layout, state, spec) if need_state else None
    return y, after


def advance(
    k_BGTD: Tensor, v_BGTV: Tensor, *, spec: WindowLinear, layout: Layout, state: WindowLinearState | None = None
) -> WindowLinearState:
    """The state after these tokens, without outputs: what a rollback replays."""
    dtype = k_BGTD.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(k_BGTD.device.type, enabled=False):
        slots = gather_slots(k_BGTD.to(wide), v_BGTV.to(wide), layout, state, spec)
        return _narrow(next_state(slots, layout, state, spec), dtype)


def _narrow(state: WindowLinearState, dtype: torch.dtype) -> WindowLinearState:
    """Ring and sinks in the dtype of the keys and values; the sums stay wide."""
    names = ("k_BGRD", "v_BGRV", "sink_k_BGND", "sink_v_BGNV")
    return replace(state, **{n: x.to(dtype) for n in names if (x := getattr(state, n)) is not None})
