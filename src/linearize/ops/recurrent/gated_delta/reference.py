"""The gated delta rule token by token: equation 10 of Gated Delta Networks (2412.06464). Proof, and decode.

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
    log_decay_BHT: Tensor,
    beta_BHT: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    commit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`y: [B, H, U, V]` and the state `[B, H, K, V]` after the first `commit` tokens (None: after all).

    S' = exp(g_t) S_{t-1};  S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T;  y_t = S_t^T q_t.
    """
    (batch, heads, tokens, key_dim), value_dim = k_BHTK.shape, v_BHTV.shape[-1]
    opens, live = layout.starts(tokens, k_BHTK.device), layout.live()
    first = tokens - q_BHUK.shape[2]
    memory = committed = v_BHTV.new_zeros(batch, heads, key_dim, value_dim) if state is None else state.to(v_BHTV.dtype)
    decay_BHT = log_decay_BHT.exp()
    ys = []
    for t in range(tokens):
        k, v, beta = k_BHTK[:, :, t, :, None], v_BHTV[:, :, t], beta_BHT[:, :, t, None]
        now = memory if opens is None else memory.masked_fill(opens[:, t, None, None, None], 0)
        now = now * decay_BHT[:, :, t, None, None]
        delta_BHV = beta * (v - (k.mT @ now)[:, :, 0])
        now = torch.addcmul(now, k, delta_BHV[..., None, :])
        if t >= first:
            ys.append((q_BHUK[:, :, t - first, None] @ now)[:, :, 0])
        memory = now if live is None else torch.where(live[:, t, None, None, None], now, memory)
        if t + 1 == commit:
            committed = memory
    return torch.stack(ys, dim=2) if ys else v_BHTV[:, :, :0], memory if commit is None else committed
