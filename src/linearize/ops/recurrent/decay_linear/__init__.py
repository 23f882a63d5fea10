"""Linear attention with decay: S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = q_t^T S_t; g per head or per key dimension.

One operation for SSD (Mamba-2: q = C, k = B, v = dt x, g = dt A), retention and gated linear attention.

| backend | file | time | for |
|---|---|---|---|
| reference | `reference.py` | T steps | proof; decode |
| multi_token | `multi_token.py` | T x T, the state once | a few tokens: verification of guesses |
| chunked | `chunked.py` | linear in T, matrix products | training, prefill |
| fla | `backends.py` | the same, in Triton | CUDA tensors, where `fla` is installed; documents as sequences |
| triton | `../triton/` | tail and guesses in one launch | a few CUDA tokens without gradients |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linearize.ops.dispatch import Call, wants_gradients
from linearize.ops.layout import Layout
from linearize.ops.recurrent.decay_linear.backends import DISPATCH, fla_decay_linear
from linearize.ops.recurrent.decay_linear.chunked import chunked
from linearize.ops.recurrent.decay_linear.multi_token import multi_token
from linearize.ops.recurrent.decay_linear.reference import reference
from linearize.ops.recurrent.front_end import run_recurrence

__all__ = ["BACKENDS", "decay_linear", "use_backend"]


def steps(*inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """The multi-step kernel, which is imported when first asked for; its arguments are those of the other backends."""
    from linearize.ops.triton.recurrence import decay_linear_steps

    return decay_linear_steps(*inputs, **options)


BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "reference": reference,
    "multi_token": multi_token,
    "chunked": chunked,
    "fla": fla_decay_linear,
    "triton": steps,
}
WIDENING = {"chunked", "fla"}  # backends that take half precision and compute in fp32 themselves
use_backend = DISPATCH.use


def decay_linear(
    q_BHUK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_decay: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    need_state: bool = True,
    commit: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Run the recurrence; returns `y: [B, H, U, V]` in the dtype of v and `S: [B, H, K, V]` (None unless `need_state`).

    `q_BHUK`: of the last U of the T tokens, which get outputs. `log_decay`: g <= 0, `[B, H, T]` or `[B, H, T, K]`.
    `commit`: S is that after the first `commit` tokens (None: after all). Nothing is scaled. Half precision is computed
    in fp32, and the state is fp32 (fp64 for fp64 inputs).
    """
    given = (q_BHUK, k_BHTK, v_BHTV, log_decay)
    call = Call(
        device=q_BHUK.device.type,
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
