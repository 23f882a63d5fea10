"""The gated delta rule in chunks, linear in T: the sequence is cut, documents and padding become decays.

Letters: B batch, H heads, R = B H rows, T tokens, N chunks, C tokens of a chunk, K key dimension, V value dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.gated_delta.chunk import delta_chunks
from linearize.ops.layout import Layout

CHUNK = 64
SMALLEST = -1000.0  # exp of less is 0 in fp64 too, and so is its gradient


def chunked(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_decay_BHT: Tensor,
    beta_BHT: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same arguments, outputs and values as `reference`; cannot be differentiated twice."""
    (batch, heads, tokens, key_dim), value_dim = k_BHTK.shape, v_BHTV.shape[-1]
    opens, live = layout.starts(tokens, k_BHTK.device), layout.live()
    log_decay = log_decay_BHT.clamp(min=SMALLEST)
    if opens is not None:
        log_decay = log_decay.masked_fill(opens[:, None], 0)
    if live is not None:
        log_decay, beta_BHT = (x.masked_fill(~live[:, None], 0) for x in (log_decay, beta_BHT))
    q, k, v, beta, log_decay = (_cut(x) for x in (q_BHTK, k_BHTK, v_BHTV, beta_BHT, log_decay))
    total = log_decay.to(torch.float64).cumsum(-1)  # fp64: differences stay exact beside a strong decay
    document = None if opens is None else _cut(opens[:, None].expand(batch, heads, -1)).cumsum(-1)
    memory = v_BHTV.new_zeros(batch, heads, key_dim, value_dim) if state is None else state.to(v_BHTV.dtype)
    y_NRCV, after = delta_chunks(q, k, v, beta, total, document, memory.flatten(0, 1).contiguous())
    y_BHNCV = y_NRCV.unflatten(1, (batch, heads)).permute(1, 2, 0, 3, 4)
    return y_BHNCV.flatten(2, 3)[:, :, :tokens], after.unflatten(0, (batch, heads))


def _cut(x_BHT: Tensor) -> Tensor:
    """`[B, H, T, ...] -> [N, R, C, ...]`; what is missing in the last chunk is filled with zeros."""
    tokens = x_BHT.shape[2]
    chunk = min(CHUNK, tokens)
    if missing := -tokens % chunk:
        x_BHT = F.pad(x_BHT, (0, 0) * (x_BHT.dim() - 3) + (0, missing))
    return x_BHT.unflatten(2, (-1, chunk)).movedim(2, 0).flatten(1, 2).contiguous()
