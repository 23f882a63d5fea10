"""The recurrences token by token, as their papers write them: proof of every other backend, and decode.

    decay_linear:    S_t = exp(g_t) S_{t-1} + k_t v_t^T,                y_t = q_t^T S_t
    gated_delta:     S_t = S' + k_t (beta_t (v_t - S'^T k_t))^T,        y_t = S_t^T q_t,   S' = exp(g_t) S_{t-1}
    selective_scan:  h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,          y_t = C_t . h_t    (each channel by itself)

All take the tokens' inputs, a `layout` and the state before them, and return the outputs of the last U tokens and the
state after the first `commit` tokens (None: after all).

Letters: B batch, H heads, T tokens, U of them (the last) with an output, K key dimension, V value dimension. The
scan: E channels, N state size, G groups of channels that share B and C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.layout import Layout


def decay_linear(
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


def gated_delta(
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
    """Scan; returns `y: [B, U, E]` and the state `h: [B, E, N]` after the first `commit` tokens (None: after all; no
    state unless `need_state`).

    A dt of 0 passes the state through unchanged: this is how every backend of the operation gets padding.
    """
    channels = x_BTE.shape[-1] // B_BTGN.shape[2]
    B_BTEN, C_BUEN = (w.repeat_interleave(channels, dim=2) for w in (B_BTGN, C_BUGN))
    first = x_BTE.shape[1] - C_BUGN.shape[1]
    opens_BT = layout.starts(x_BTE.shape[1], x_BTE.device)
    h_BEN = committed = x_BTE.new_zeros(x_BTE.shape[0], *A_EN.shape) if state is None else state
    y = []
    for t in range(x_BTE.shape[1]):
        if opens_BT is not None:
            h_BEN = h_BEN.masked_fill(opens_BT[:, t, None, None], 0)
        decay_BEN = (dt_BTE[:, t, :, None] * A_EN).exp()
        h_BEN = decay_BEN * h_BEN + B_BTEN[:, t] * (dt_BTE[:, t] * x_BTE[:, t])[..., None]
        if t + 1 == commit:
            committed = h_BEN
        if t >= first:
            y.append((C_BUEN[:, t - first] * h_BEN).sum(-1))
    after = h_BEN if commit is None else committed
    return torch.stack(y, dim=1) if y else x_BTE[:, :0], after if need_state else None
