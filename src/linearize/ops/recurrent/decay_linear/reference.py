"""The recurrence as written: one token after the other.

Letters: B batch, H heads, T tokens, U of them (the last) with an output, K key dimension, V value dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.layout import Layout


def reference(
    q_BHUK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_decay: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    commit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t v_t^T; y_t = q_t^T S_t (2405.21060, eq. 16; 2312.06635, eq. 3).

    `log_decay`: g, `[B, H, T]` or `[B, H, T, K]`. A token that opens a document finds S = 0; a dead one changes
    nothing.
    """
    batch, heads, tokens, key = k_BHTK.shape
    first = tokens - q_BHUK.shape[2]
    S = committed = k_BHTK.new_zeros(batch, heads, key, v_BHTV.shape[-1]) if state is None else state.to(k_BHTK.dtype)
    starts, live = layout.starts(tokens, k_BHTK.device), layout.live()
    decay = log_decay.exp()[..., None] if log_decay.dim() == 4 else log_decay.exp()[..., None, None]
    y = []
    for t in range(tokens):
        before = S if starts is None else S.masked_fill(starts[:, t, None, None, None], 0)
        after = (decay[:, :, t] * before).addcmul_(k_BHTK[:, :, t, :, None], v_BHTV[:, :, t, None, :])
        S = after if live is None else torch.where(live[:, t, None, None, None], after, S)
        if t + 1 == commit:
            committed = S
        if t >= first:
            y.append((q_BHUK[:, :, t - first, None] @ S)[:, :, 0])
    return torch.stack(y, dim=2) if y else v_BHTV[:, :, :0], S if commit is None else committed
