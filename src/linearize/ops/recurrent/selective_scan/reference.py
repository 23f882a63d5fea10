"""The selective scan of Mamba as its equation, one token after the other (2312.00752, equation 2, algorithm 2).

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,    y_t = C_t . h_t        for every channel by itself

Letters: B batch, T tokens, U of them (the last) with an output, E channels, N state size, G groups of
channels that share B and C.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.layout import Layout


def reference(
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

    A dt of 0 passes the state through unchanged: so padding is told to every backend of the operation.
    """
    channels = x_BTE.shape[-1] // B_BTGN.shape[2]
    B_BTEN, C_BUEN = (w.repeat_interleave(channels, dim=2) for w in (B_BTGN, C_BUGN))
    first = x_BTE.shape[1] - C_BUGN.shape[1]
    opens_BT = layout.starts(x_BTE.shape[1], x_BTE.device)
    h_BEN = committed = start_state(x_BTE, A_EN) if state is None else state
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


def start_state(x_BTE: Tensor, A_EN: Tensor) -> Tensor:
    """The state of sequences that have not begun: zeros `[B, E, N]`."""
    return x_BTE.new_zeros(x_BTE.shape[0], *A_EN.shape)
