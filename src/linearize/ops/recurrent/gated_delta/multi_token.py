"""A few tokens of the gated delta rule at once, as one chunk that starts from the state: verification of guesses.

With delta_i what token i writes along k_i (see `chunked.py`),
    (1 + A) delta = beta (v - carried k S),  A_ij = beta_i pair_ij k_i . k_j  for j < i,
    y_i = carried_i q_i S + sum_{j <= i} pair_ij (q_i . k_j) delta_j,
    S_n = kept S + sum_{j <= n} written_j k_j delta_j^T.

Letters: B batch, H heads, T tokens, U of them (the last) with an output, K key dimension, V value dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.recurrent.pairs import LOWEST, decay_factor, pairs, state_after


def multi_token(
    q_BHUK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_decay_BHT: Tensor,
    beta_BHT: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
    commit: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Same arguments, outputs and values as `reference`; no state (None) where `commit` is 0 and there was none."""
    tokens, asked = k_BHTK.shape[2], q_BHUK.shape[2]
    where, first = pairs(layout, tokens, k_BHTK.device), tokens - asked
    log_decay = log_decay_BHT.clamp(min=LOWEST)
    if where.live_BT is not None:
        log_decay, beta_BHT = (x.masked_fill(~where.live_BT[:, None], 0) for x in (log_decay, beta_BHT))
    total, beta = log_decay.cumsum(2, dtype=torch.float64), beta_BHT[..., None]
    both = torch.cat([k_BHTK, q_BHUK], dim=2)
    pair = decay_factor(total[..., :, None] - total[..., None, :], k_BHTK.dtype) * where.seen_BTT[:, None]
    scores = both @ k_BHTK.mT
    written = beta * v_BHTV
    recalled = None
    if state is not None:
        carried = decay_factor(total, k_BHTK.dtype)
        if where.document_BT is not None:
            carried = carried * (where.document_BT[:, None] == 0)
        recalled = both @ state * torch.cat([carried, carried[:, :, first:]], dim=2)[..., None]
        written = written - beta * recalled[:, :, :tokens]
    system = scores[:, :, :tokens] * pair * beta
    delta = torch.linalg.solve_triangular(system, written, upper=False, unitriangular=True)
    after = (
        state if commit == 0 else state_after(k_BHTK, delta, total, where, state, tokens if commit is None else commit)
    )
    y = (scores[:, :, tokens:] * pair[:, :, first:]) @ delta
    return y if recalled is None else y + recalled[:, :, tokens:], after
