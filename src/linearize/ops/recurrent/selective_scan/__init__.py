"""The selective scan of Mamba: `selective_scan` picks the backend, every backend computes the same.

| backend | file | for |
|---|---|---|
| reference | `reference.py` | proof; decode |
| multi_token | `multi_token.py` | a few tokens: verification of guesses |
| chunked | `chunked.py` | training, prefill |
| mamba_ssm | `backends.py` | CUDA tensors, where that package is installed and can do the call |
| triton | `../triton/` | a few CUDA tokens without gradients: tail and guesses in one launch |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from linearize.ops.dispatch import wants_gradients
from linearize.ops.layout import Layout
from linearize.ops.recurrent.front_end import run_recurrence
from linearize.ops.recurrent.selective_scan.backends import DISPATCH, ScanCall, mamba_ssm
from linearize.ops.recurrent.selective_scan.chunked import chunked
from linearize.ops.recurrent.selective_scan.multi_token import multi_token
from linearize.ops.recurrent.selective_scan.reference import reference

__all__ = ["BACKENDS", "selective_scan", "use_backend"]


def steps(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """The multi-step kernel, which is imported when first asked for; its arguments are those of the other backends."""
    from linearize.ops.triton.channels import selective_scan_steps

    need_state = options.pop("need_state")
    y, after = selective_scan_steps(*inputs, **options)
    return y, after if need_state else None


BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "reference": reference,
    "multi_token": multi_token,
    "chunked": chunked,
    "mamba_ssm": mamba_ssm,
    "triton": steps,
}
use_backend = DISPATCH.use


def selective_scan(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTGN: Tensor,
    C_BUGN: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    need_state: bool = True,
    commit: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """h = exp(dt A) h + dt B x, y = C . h; returns `y: [B, U, E]` and `h: [B, E, N]` (None unless `need_state`).

    `dt`: step sizes, after the softplus; `A`: negative; channel e uses B and C of group e // (E / G). `C_BUGN`: of the
    last U of the T tokens, which get outputs. `commit`: h is that after the first `commit` tokens (None: after all).
    Half-precision inputs are computed in fp32; the state is at least fp32. At dead tokens the state passes through
    unchanged; the state carried into a document's first token is zero.
    """
    assert (
        x_BTE.shape == dt_BTE.shape and x_BTE.shape[-1] % B_BTGN.shape[2] == 0 and B_BTGN.shape[2:] == C_BUGN.shape[2:]
    )
    given = (x_BTE, dt_BTE, A_EN, B_BTGN, C_BUGN)
    wide = reduce(torch.promote_types, (w.dtype for w in given), torch.float32)
    call = ScanCall(
        device=x_BTE.device.type,
        dtype=wide,
        tokens=x_BTE.shape[1],
        layout=layout,
        whole=commit is None and C_BUGN.shape[1] == x_BTE.shape[1],
        gradients=wants_gradients(*given, state),
        state_dim=A_EN.shape[1],
        has_state=state is not None,
        need_state=need_state,
    )
    if (live_BT := layout.live()) is not None:
        dt_BTE = dt_BTE.masked_fill(~live_BT[..., None], 0)

    A, handed_on = A_EN.to(wide), need_state or not call.whole  # the parts of a call hand their state on

    def invoke(name: str, C: Tensor, x: Tensor, dt: Tensor, B: Tensor, **rest: Any) -> tuple[Tensor, Tensor | None]:
        return BACKENDS[name](x, dt, A, B, C, need_state=handed_on, **rest)

    options: dict[str, Any] = {"layout": layout, "state": state, "need_state": need_state, "commit": commit}
    inputs = (x_BTE, dt_BTE, B_BTGN)
    y, after = run_recurrence(DISPATCH, invoke, C_BUGN, inputs, call=call, time_dim=1, **options)
    return y.to(x_BTE.dtype), after
