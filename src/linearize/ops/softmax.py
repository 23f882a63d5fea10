"""Softmax attention over documents: what the teacher computes, for attention transfer.

Letters: B batch, H query heads, G key/value heads, T tokens, D head dimension, V value dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.layout import Layout


def softmax_attention(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTV: Tensor,
    *,
    scaling: float,
    layout: Layout,
    softcap: float | None = None,
    sliding_window: int | None = None,
) -> Tensor:
    """Causal softmax attention inside each document, `[B, H, T, V]`; padding rows see nothing and give 0.

    `sliding_window`: the last so many tokens only. `softcap`: scores are softcap tanh(s / softcap) (Gemma 2).
    """
    gqa = q_BHTD.shape[1] != k_BGTD.shape[1]
    if layout.is_plain and softcap is None and sliding_window is None:
        return F.scaled_dot_product_attention(q_BHTD, k_BGTD, v_BGTV, is_causal=True, scale=scaling, enable_gqa=gqa)
    seen = visible(layout, q_BHTD.shape[2], q_BHTD.device, sliding_window)
    y = masked_softmax(q_BHTD, k_BGTD, v_BGTV, seen, scaling=scaling, softcap=softcap)
    return y if layout.position_BT is None else y.masked_fill((layout.position_BT < 0)[:, None, :, None], 0)


def masked_softmax(
    q_BHUD: Tensor, k_BGSD: Tensor, v_BGSV: Tensor, seen: Tensor, *, scaling: float, softcap: float | None = None
) -> Tensor:
    """Softmax over the keys that `seen` (`[B or 1, 1, U, S]` bool) marks; what a query that sees none gives, the caller
    replaces."""
    groups = k_BGSD.shape[1]
    if softcap is None:
        gqa = q_BHUD.shape[1] != groups
        return F.scaled_dot_product_attention(q_BHUD, k_BGSD, v_BGSV, attn_mask=seen, scale=scaling, enable_gqa=gqa)
    wide = torch.promote_types(q_BHUD.dtype, torch.float32)
    s = q_BHUD.unflatten(1, (groups, -1)).to(wide) @ k_BGSD[:, :, None].to(wide).mT * scaling
    s = (softcap * torch.tanh(s / softcap)).masked_fill(~seen[:, :, None], -torch.inf)
    y = s.softmax(-1).nan_to_num(0.0).to(v_BGSV.dtype) @ v_BGSV[:, :, None]
    return y.flatten(1, 2).to(q_BHUD.dtype)


def visible(layout: Layout, num_tokens: int, device: torch.device, sliding_window: int | None = None) -> Tensor:
    """Which keys each query sees, bool `[B or 1, 1, T, T]`; computed once per layout."""
    memo = ("visible", sliding_window)
    if memo not in layout.memo:
        position = layout.positions(num_tokens, device)
        slot = torch.arange(num_tokens, device=device)
        origin = slot - position
        seen = (origin[:, :, None] == origin[:, None]) & (slot[:, None] >= slot) & (position >= 0)[:, None]
        if sliding_window is not None:
            seen = seen & (slot[:, None] - slot < sliding_window)
        layout.memo[memo] = seen[:, None]
    mask = layout.memo[memo]
    assert isinstance(mask, Tensor)
    return mask
