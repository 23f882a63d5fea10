"""The CUDA kernel of `mamba_ssm` for the selective scan, where that package is installed.

Its `selective_scan_fn(u: [B, E, T], delta: [B, E, T], A: [E, N], B: [B, G, N, T], C: [B, G, N, T])` begins from a state
of zeros, knows no documents, and gives no gradient through the last state.

Letters: B batch, T tokens, E channels, N state size, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from linearize.ops.layout import Layout

MOST_STATE = 256
FORGETS = 120.0


@cache
def kernel() -> Callable[..., Any] | None:
    """`mamba_ssm`'s function, imported at the first call; None where the package is not installed."""
    if find_spec("mamba_ssm") is None:
        return None
    return import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn


def can_run(x_BTE: Tensor, A_EN: Tensor, *, state: Tensor | None, need_state: bool) -> bool:
    """Whether the kernel can do this call; x is fp32 here unless the model is fp64."""
    if not x_BTE.is_cuda or x_BTE.dtype != torch.float32 or A_EN.shape[1] > MOST_STATE or state is not None:
        return False
    return not (need_state and torch.is_grad_enabled()) and kernel() is not None


def mamba_ssm(
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
    """Scan; same arguments, outputs and values as `reference`, where `can_run` allows it.

    A document's first token forgets by a step so long that exp(dt A) is 0 in fp32, with x scaled so that dt x stays.
    """
    opens_BT, function = layout.starts(x_BTE.shape[1], x_BTE.device), kernel()
    assert function is not None and state is None
    if opens_BT is not None:
        long_E = FORGETS / A_EN.detach().abs().amin(-1).clamp(min=torch.finfo(A_EN.dtype).tiny * FORGETS)
        x_BTE = torch.where(opens_BT[..., None], x_BTE * dt_BTE / long_E, x_BTE)
        dt_BTE = torch.where(opens_BT[..., None], long_E, dt_BTE)
    x_BET, dt_BET = (w.transpose(1, 2).contiguous() for w in (x_BTE, dt_BTE))
    B_BGNT, C_BGNT = (w.permute(0, 2, 3, 1).contiguous() for w in (B_BTGN, C_BTGN))
    out = function(x_BET, dt_BET, A_EN.contiguous(), B_BGNT, C_BGNT, return_last_state=need_state)
    y_BET, h_BEN = out if need_state else (out, None)
    return y_BET.transpose(1, 2), h_BEN
