"""The selective scan of Mamba: `selective_scan` picks the form, every form computes the same.

| form | file | for |
|---|---|---|
| reference | `reference.py` | proof; a few tokens (decode, verification) |
| chunked | `chunked.py` | training, prefill |
| mamba_ssm | `backends.py` | CUDA tensors, where that package is installed and can do the call |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

import torch
from torch import Tensor

from linearize.ops.forms import ForcedForm
from linearize.ops.layout import Layout
from linearize.ops.selective_scan.backends import can_run, mamba_ssm
from linearize.ops.selective_scan.chunked import chunked
from linearize.ops.selective_scan.reference import reference

__all__ = ["FORMS", "selective_scan", "use_form"]

FORMS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "reference": reference,
    "chunked": chunked,
    "mamba_ssm": mamba_ssm,
}
FEW_TOKENS = 8
_forced = ForcedForm("selective_scan")
use_form = _forced.use


def selective_scan(
    x_BTE: Tensor,
    dt_BTE: Tensor,
    A_EN: Tensor,
    B_BTGN: Tensor,
    C_BTGN: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    need_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """h = exp(dt A) h + dt B x, y = C . h; returns `y: [B, T, E]` and `h: [B, E, N]` (None unless `need_state`).

    `dt`: step sizes, after the softplus; `A`: negative; channel e uses B and C of group e // (E / G). Half-precision
    inputs are computed in fp32; the state is at least fp32. At padding the state passes through unchanged; the state
    carried into a document's first token is zero.
    """
    assert x_BTE.shape == dt_BTE.shape and x_BTE.shape[-1] % B_BTGN.shape[2] == 0 and B_BTGN.shape == C_BTGN.shape
    inputs = (x_BTE, dt_BTE, A_EN, B_BTGN, C_BTGN)
    wide = reduce(torch.promote_types, (w.dtype for w in inputs), torch.float32)
    with torch.autocast(x_BTE.device.type, enabled=False):
        x, dt, A, B, C = (w.to(wide) for w in inputs)
        live_BT = layout.live()
        if live_BT is not None:
            dt = dt.masked_fill(~live_BT[..., None], 0)
        state = None if state is None else state.to(wide)
        form = _choose(x, A, state, need_state)
        y, after = form(x, dt, A, B, C, layout=layout, state=state, need_state=need_state)
    return y.to(x_BTE.dtype), after


def _choose(
    x_BTE: Tensor, A_EN: Tensor, state: Tensor | None, need_state: bool
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    if (forced := _forced.get()) is not None:
        return FORMS[forced]
    if x_BTE.shape[1] <= FEW_TOKENS:
        return reference
    return mamba_ssm if can_run(x_BTE, A_EN, state=state, need_state=need_state) else chunked
