"""Which backend of the selective scan runs a call, and the CUDA kernel of `mamba_ssm`, where that package is installed.

Its `selective_scan_fn(u: [B, E, T], delta: [B, E, T], A: [E, N], B: [B, G, N, T], C: [B, G, N, T])` begins from a state
of zeros, knows no documents, and gives no gradient through the last state (2.3.2, as since 1.0).

Letters: B batch, T tokens, E channels, N state size, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from linearize.ops.dispatch import Call, Dispatcher, Rule
from linearize.ops.layout import Layout
from linearize.ops.recurrent.front_end import recurrent_rules

MOST_STATE = 256
FORGETS = 120.0


@cache
def kernel() -> Callable[..., Any] | None:
    """`mamba_ssm`'s function, imported at the first call; None where the package is not installed, or was built without
    the kernel (as its 2.3 may be)."""
    if find_spec("mamba_ssm") is None:
        return None
    interface = import_module("mamba_ssm.ops.selective_scan_interface")
    return None if getattr(interface, "selective_scan_cuda", None) is None else interface.selective_scan_fn


@dataclass(frozen=True, eq=False, kw_only=True)
class ScanCall(Call):
    """A call of the scan: N, whether there is a state before it, whether one is wanted after it."""

    state_dim: int
    has_state: bool = False
    need_state: bool = True


def why_not_chosen(call: ScanCall) -> str | None:
    """Why `mamba_ssm` does not run a call; None: it does."""
    if call.device != "cuda":
        return f"the tensors are on {call.device}"
    if call.need_state and call.gradients:
        return "it has no gradient through the last state"
    return unsupported(call)


def unsupported(call: ScanCall) -> str | None:
    """Why a call is beyond `mamba_ssm`."""
    if call.dtype != torch.float32 or call.state_dim > MOST_STATE:
        return f"it takes fp32 and a state of at most {MOST_STATE}"
    if call.has_state or not call.whole:
        return "it begins from no state and gives every output"
    return None if kernel() is not None else "mamba_ssm is not installed, or without its CUDA kernel"


MAMBA_SSM = Rule(
    "mamba_ssm", why_not_chosen, "many tokens on a GPU: its CUDA kernel", built=True, unsupported=unsupported
)
DISPATCH = Dispatcher("selective_scan", recurrent_rules(MAMBA_SSM, "many tokens: chunks"))


def choice(call: ScanCall) -> tuple[str, str]:
    """The backend for a call and why."""
    return DISPATCH.choice(call)


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
    """Scan; same arguments, outputs and values as `reference`, where nothing is refused.

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
