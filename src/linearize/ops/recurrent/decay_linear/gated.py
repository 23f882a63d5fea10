"""Gated linear attention from what projections give: maps, gates and shared heads inside the kernel where one runs.

Letters: B batch, H query heads, G key/value heads, T tokens, U of them (the last) with an output, K key dimension,
V value dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.dispatch import Call, wants_gradients
from linearize.ops.layout import Layout
from linearize.ops.recurrent.decay_linear import decay_linear
from linearize.ops.recurrent.decay_linear.backends import DISPATCH


def gated_linear(
    q_BHUK: Tensor,
    k_BGTK: Tensor,
    v_BGTV: Tensor,
    keys_BGTK: Tensor,
    *,
    gate_divisor: float,
    layout: Layout,
    state: Tensor | None = None,
    need_state: bool = True,
    commit: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`decay_linear` of softmax(q), softmax(k), v and logsigmoid(keys) / `gate_divisor` (Liger, 2503.01496).

    Query heads of a group share keys, values and state. Returns `y: [B, H, U, V]` in the dtype of v, and the state
    `[B, G, K, V]`, at least fp32, after the first `commit` tokens (None: after all; no state unless `need_state`).
    """
    given = (q_BHUK, k_BGTK, v_BGTV, keys_BGTK)
    group = q_BHUK.shape[1] // k_BGTK.shape[1]

    def by_kernel() -> tuple[Tensor, Tensor | None]:
        from linearize.ops.triton.recurrence import decay_linear_steps

        until = commit if need_state else 0
        y, after = decay_linear_steps(*given, layout=layout, state=state, commit=until, gate_divisor=gate_divisor)
        return y, after if need_state else None

    def by_operations() -> tuple[Tensor, Tensor | None]:
        q, k, keys = (_wide(x) for x in (q_BHUK, k_BGTK, keys_BGTK))
        shared = (k.softmax(-1), v_BGTV, F.logsigmoid(keys) / gate_divisor)
        options: dict[str, Any] = {"layout": layout, "need_state": need_state, "commit": commit}
        before = None if state is None else _repeat(state, group)
        y, after = decay_linear(q.softmax(-1), *(_repeat(x, group) for x in shared), state=before, **options)
        return y, None if after is None else after[:, ::group].contiguous()

    call = Call(
        device=v_BGTV.device.type,
        dtype=torch.promote_types(v_BGTV.dtype, torch.float32),
        tokens=k_BGTK.shape[2],
        layout=layout,
        gradients=wants_gradients(*given, state),
    )
    if DISPATCH.choice(call)[0] != "triton":
        return by_operations()
    return DISPATCH.run(call, lambda backend: by_kernel() if backend == "triton" else by_operations())


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _repeat(x_BG: Tensor, group: int) -> Tensor:
    """Every key/value head for each of its query heads."""
    return x_BG if group == 1 else x_BG.repeat_interleave(group, dim=1)
