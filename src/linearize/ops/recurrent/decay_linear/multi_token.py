"""A few tokens at once: every output straight from the state before them, without chunks. For verification of guesses.

    y_i = exp(G_i) q_i S + sum_{j <= i} (q_i . exp(G_i - G_j) k_j) v_j,        G_i = g_1 + ... + g_i
    S_n = exp(G_n) S + sum_{j <= n} exp(G_n - G_j) k_j v_j^T

so that the state is read once and the one after n tokens written once, however many tokens there are.

Letters: B batch, H heads, T tokens, U of them (the last) with an output, K key dimension, V value dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.recurrent.pairs import LOWEST, Pairs, column, decay_factor, like_decays, pairs, state_after


def multi_token(
    q_BHUK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_decay: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    commit: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Same arguments, outputs and values as `reference`; no state (None) where `commit` is 0 and there was none."""
    tokens, asked = k_BHTK.shape[2], q_BHUK.shape[2]
    where = pairs(layout, tokens, k_BHTK.device)
    if where.live_BT is not None:
        k_BHTK = k_BHTK * where.live_BT[:, None, :, None]
        log_decay = log_decay.masked_fill(~like_decays(where.live_BT, log_decay), 0)
    total = log_decay.clamp(min=LOWEST).cumsum(2, dtype=torch.float64)
    after = (
        state if commit == 0 else state_after(k_BHTK, v_BHTV, total, where, state, tokens if commit is None else commit)
    )
    if asked == 0:
        return v_BHTV[:, :, :0], after
    late = total[:, :, tokens - asked :]
    y = _scores(q_BHUK, k_BHTK, late, total, where) @ v_BHTV
    if state is not None:
        enter = column(decay_factor(late, q_BHUK.dtype))
        if where.document_BT is not None:
            enter = enter * (where.document_BT[:, None, tokens - asked :, None] == 0)
        y = y + (q_BHUK * enter) @ state
    return y, after


def _scores(q: Tensor, k: Tensor, late: Tensor, total: Tensor, where: Pairs) -> Tensor:
    """q_i . exp(G_i - G_j) k_j for j <= i of one document, else 0: `[B, H, U, T]`."""
    seen = where.seen_BTT[:, None, -q.shape[2] :]
    if total.dim() == 3:
        return (q @ k.mT) * decay_factor(late[..., None] - total[:, :, None], q.dtype).masked_fill(~seen, 0)
    between = decay_factor(late[:, :, :, None] - total[:, :, None], q.dtype)
    return torch.einsum("bhuk,bhutk,bhtk->bhut", q, between, k).masked_fill(~seen, 0)
