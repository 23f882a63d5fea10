"""The gated delta rule in chunks, linear in T: the sequence is cut, documents and padding become decays.

Letters: B batch, H heads, R = B H rows, T tokens, N chunks, C tokens of a chunk, K key dimension, V value dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.layout import Layout
from linearize.ops.recurrent.gated_delta.chunk import delta_chunks

CHUNK = 32  # measured for heads of 16 and 64: docs/log.md
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
    chunk = min(CHUNK, tokens)
    total = _cut(log_decay.to(torch.float64), chunk).cumsum(-1)  # fp64: differences stay exact beside a strong decay
    document = None if opens is None else _cut(opens[:, None].expand(batch, heads, -1), chunk).cumsum(-1)
    wide = torch.promote_types(v_BHTV.dtype, torch.float32)
    if state is None:
        state = v_BHTV.new_zeros(batch, heads, key_dim, value_dim, dtype=wide)
    memory = state.to(wide).flatten(0, 1).contiguous()
    y, after = delta_chunks(q_BHTK, k_BHTK, v_BHTV, beta_BHT, total, document, memory)
    return y, after.unflatten(0, (batch, heads))


def _cut(x_BHT: Tensor, chunk: int) -> Tensor:
    """`[B, H, T] -> [N, R, C]`; what is missing in the last chunk is filled with zeros."""
    if missing := -x_BHT.shape[2] % chunk:
        x_BHT = F.pad(x_BHT, (0, missing))
    return x_BHT.unflatten(2, (-1, chunk)).movedim(2, 0).flatten(1, 2).contiguous()
