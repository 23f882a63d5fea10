"""Linear attention with decay: S_t = exp(g_t) S_{t-1} + k_t v_t^T, y_t = q_t^T S_t; g per head or per key dimension.

One operation for SSD (Mamba-2: q = C, k = B, v = dt x, g = dt A), retention and gated linear attention.

| form | file | time | for |
|---|---|---|---|
| reference | `reference.py` | T steps | proof; decode and a few tokens |
| chunked | `chunked.py` | linear in T, matrix products | training, prefill |
| fla | `backends.py` | the same, in Triton | CUDA tensors without padding or packing, where `fla` is installed |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from linearize.ops.decay_linear.backends import fla_decay_linear, fla_takes
from linearize.ops.decay_linear.chunked import chunked
from linearize.ops.decay_linear.reference import reference
from linearize.ops.forms import ForcedForm
from linearize.ops.layout import Layout

__all__ = ["FORMS", "decay_linear", "use_form"]

FORMS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": reference,
    "chunked": chunked,
    "fla": fla_decay_linear,
}
FEW_TOKENS = 8
_forced = ForcedForm("decay_linear")
use_form = _forced.use


def decay_linear(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_decay: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    need_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Run the recurrence; returns `y: [B, H, T, V]` in the dtype of v and `S: [B, H, K, V]` (None unless `need_state`).

    `log_decay`: g <= 0, `[B, H, T]` or `[B, H, T, K]`. Nothing is scaled. Half precision is computed in fp32, and the
    state is fp32 (fp64 for fp64 inputs).
    """
    dtype = v_BHTV.dtype
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(q_BHTK.device.type, enabled=False):
        form = _choose(q_BHTK, layout)
        inputs = (x.to(wide) for x in (q_BHTK, k_BHTK, v_BHTV, log_decay))
        y, after = form(*inputs, layout=layout, state=None if state is None else state.to(wide))
    return y.to(dtype), after if need_state else None


def _choose(q_BHTK: Tensor, layout: Layout) -> Callable[..., tuple[Tensor, Tensor]]:
    if (forced := _forced.get()) is not None:
        return FORMS[forced]
    if q_BHTK.shape[2] <= FEW_TOKENS:
        return reference
    return fla_decay_linear if fla_takes(q_BHTK, layout) else chunked
