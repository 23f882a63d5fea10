"""The gated delta rule (2412.06464): a state that decays per head and overwrites what a key already holds.

| form | file | time and memory | for |
|---|---|---|---|
| reference | `reference.py` | one product per token | proof; one token: decode |
| chunked | `chunked.py`, `chunk.py` | linear in T, products of chunks | training, prefill |
| fla | `backends.py` | a Triton kernel | CUDA tensors without padding or packing, where `fla` is installed |

Letters: B batch, H heads, T tokens, K key dimension, V value dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from linearize.ops.forms import ForcedForm
from linearize.ops.gated_delta.backends import fla_form, has_fla
from linearize.ops.gated_delta.chunked import chunked
from linearize.ops.gated_delta.reference import reference
from linearize.ops.layout import Layout

__all__ = ["FORMS", "gated_delta", "use_form"]

FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": reference,
    "chunked": chunked,
    "fla": fla_form,
}
_forced = ForcedForm("gated_delta")
use_form = _forced.use


def gated_delta(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_decay_BHT: Tensor,
    beta_BHT: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    need_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(g_t) S_{t-1} + k_t (beta_t (v_t - exp(g_t) S_{t-1}^T k_t))^T, y_t = S_t^T q_t; nothing is scaled.

    `log_decay_BHT`: g, at most 0. `state: [B, H, K, V]`, at least fp32. A token that opens a document finds a state of
    zeros; padding writes nothing and leaves the state alone, its outputs mean nothing.
    Returns `y: [B, H, T, V]` in the dtype of v, and the state after the last token (None unless `need_state`).
    Half-precision inputs are computed in fp32.
    """
    dtype = v_BHTV.dtype
    wide = torch.promote_types(dtype, torch.float32)
    inputs = (q_BHTK, k_BHTK, v_BHTV, log_decay_BHT, beta_BHT)
    form = _choose(v_BHTV, layout)
    with torch.autocast(v_BHTV.device.type, enabled=False):
        given = inputs if form is fla_form else tuple(x.to(wide) for x in inputs)
        y, after = form(*given, layout=layout, state=state)
    return y.to(dtype), after if need_state else None


def _choose(v_BHTV: Tensor, layout: Layout) -> Callable[..., tuple[Tensor, Tensor]]:
    if (forced := _forced.get()) is not None:
        return FORMS[forced]
    if v_BHTV.shape[2] == 1:
        return reference
    if v_BHTV.is_cuda and layout.is_plain and v_BHTV.dtype != torch.float64 and has_fla():
        return fla_form
    return chunked
