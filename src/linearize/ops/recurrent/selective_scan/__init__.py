"""The selective scan of Mamba: `selective_scan` picks the backend, every backend computes the same.

| backend | where | for |
|---|---|---|
| reference | `../reference.py` | proof; decode |
| multi_token | `../multi_token.py` | a few tokens: verification of draft tokens |
| chunked | `chunked.py` | training, prefill |
| mamba_ssm | here | CUDA tensors, where that package is installed and can do the call |
| triton | `../../triton/channels.py` | a few CUDA tokens without gradients: one launch |

`mamba_ssm`'s `selective_scan_fn(u: [B, E, T], delta: [B, E, T], A: [E, N], B: [B, G, N, T], C: [B, G, N, T])` begins
from a state of zeros, knows no documents, and gives no gradient through the last state (2.3.2, as since 1.0).

Letters: B batch, T tokens, U of them (the last) with an output, E channels, N state size, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, reduce
from importlib import import_module
from importlib.util import find_spec
from typing import Unpack

import torch
from torch import Tensor

from linearize.ops.dispatch import Call, Dispatcher, Rule, wants_gradients
from linearize.ops.layout import Layout
from linearize.ops.recurrent import multi_token, reference
from linearize.ops.recurrent.front_end import Backend, StepOptions, recurrent_rules, run_recurrence
from linearize.ops.recurrent.selective_scan.chunked import chunked

__all__ = ["BACKENDS", "DISPATCH", "ScanCall", "choice", "selective_scan", "use_backend"]

MOST_STATE = 256  # of mamba_ssm's kernel
FORGETS = 120.0


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
    inputs = (x_BTE, dt_BTE, A_EN, B_BTGN, C_BUGN)
    wide = reduce(torch.promote_types, (w.dtype for w in inputs), torch.float32)
    call = ScanCall(
        device=x_BTE.device.type,
        dtype=wide,
        tokens=x_BTE.shape[1],
        layout=layout,
        whole=commit is None and C_BUGN.shape[1] == x_BTE.shape[1],
        gradients=wants_gradients(*inputs, state),
        state_dim=A_EN.shape[1],
        has_state=state is not None,
        need_state=need_state,
    )
    if (live_BT := layout.live()) is not None:
        dt_BTE = dt_BTE.masked_fill(~live_BT[..., None], 0)

    A, handed_on = A_EN.to(wide), need_state or not call.whole  # the parts of a call hand their state on

    def invoke(
        name: str, C: Tensor, x: Tensor, dt: Tensor, B: Tensor, **options: Unpack[StepOptions]
    ) -> tuple[Tensor, Tensor | None]:
        return BACKENDS[name](x, dt, A, B, C, need_state=handed_on, **options)

    y, after = run_recurrence(
        DISPATCH,
        invoke,
        C_BUGN,
        (x_BTE, dt_BTE, B_BTGN),
        call=call,
        layout=layout,
        state=state,
        need_state=need_state,
        commit=commit,
        time_dim=1,
    )
    return y.to(x_BTE.dtype), after


@cache
def kernel() -> Callable[..., tuple[Tensor, Tensor] | Tensor] | None:
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
choice, use_backend = DISPATCH.choice, DISPATCH.use


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
    y_BET, h_BEN = (out, None) if isinstance(out, Tensor) else out
    return y_BET.transpose(1, 2), h_BEN


def _by_triton(*inputs: Tensor, need_state: bool, **options: Unpack[StepOptions]) -> tuple[Tensor, Tensor | None]:
    from linearize.ops.triton.channels import selective_scan_steps

    y, after = selective_scan_steps(*inputs, **options)
    return y, after if need_state else None


BACKENDS: dict[str, Backend] = {
    "reference": reference.selective_scan,
    "multi_token": multi_token.selective_scan,
    "chunked": chunked,
    "mamba_ssm": mamba_ssm,
    "triton": _by_triton,
}
