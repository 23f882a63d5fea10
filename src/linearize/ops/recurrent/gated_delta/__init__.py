"""The gated delta rule (2412.06464): a state that decays per head and overwrites what a key already holds.

| backend | file | time and memory | for |
|---|---|---|---|
| reference | `reference.py` | one product per token | proof; one token: decode |
| multi_token | `multi_token.py` | T x T, the state once | a few tokens: verification of guesses |
| chunked | `chunked.py` | linear in T, products of chunks | training, prefill |
| fla | `backends.py` | a Triton kernel | CUDA tensors, where `fla` is installed; documents as sequences |
| triton | `../triton/` | tail and guesses in one launch | a few CUDA tokens without gradients |

Letters: B batch, H heads, T tokens, U of them (the last) with an output, K key dimension, V value dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linearize.ops.dispatch import Call, wants_gradients
from linearize.ops.layout import Layout
from linearize.ops.recurrent.front_end import run_recurrence
from linearize.ops.recurrent.gated_delta.backends import DISPATCH, fla_gated_delta
from linearize.ops.recurrent.gated_delta.chunked import chunked
from linearize.ops.recurrent.gated_delta.multi_token import multi_token
from linearize.ops.recurrent.gated_delta.reference import reference

__all__ = ["BACKENDS", "gated_delta", "use_backend"]


def steps(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """The multi-step kernel, which is imported when first asked for; its arguments are those of the other backends."""
    from linearize.ops.triton.recurrence import gated_delta_steps

    return gated_delta_steps(*inputs, **options)


BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "reference": reference,
    "multi_token": multi_token,
    "chunked": chunked,
    "fla": fla_gated_delta,
    "triton": steps,
}
WIDENING = {"chunked", "fla"}  # backends that take half precision and compute in fp32 themselves
use_backend = DISPATCH.use


def gated_delta(
    q_BHUK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_decay_BHT: Tensor,
    beta_BHT: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    need_state: bool = True,
    commit: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T, y_t = S_t^T q_t; nothing is scaled.

    `q_BHUK`: of the last U of the T tokens, which get outputs. `log_decay_BHT`: g, at most 0. `state: [B, H, K, V]`, at
    least fp32. A token that opens a document finds a state of zeros; a dead one writes nothing and leaves the state
    alone, its outputs mean nothing.
    Returns `y: [B, H, U, V]` in the dtype of v, and the state after the first `commit` tokens (None: after all; no
    state unless `need_state`). Half-precision inputs are computed in fp32.
    """
    given = (q_BHUK, k_BHTK, v_BHTV, log_decay_BHT, beta_BHT)
    call = Call(
        device=v_BHTV.device.type,
        dtype=torch.promote_types(v_BHTV.dtype, torch.float32),
        tokens=k_BHTK.shape[2],
        layout=layout,
        gradients=wants_gradients(*given, state),
    )
    options: dict[str, Any] = {"layout": layout, "state": state, "need_state": need_state, "commit": commit}
    y, after = run_recurrence(DISPATCH, _invoke, q_BHUK, given[1:], call=call, widening=WIDENING, **options)
    return y.to(v_BHTV.dtype), after


def _invoke(name: str, *inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    return BACKENDS[name](*inputs, **options)
