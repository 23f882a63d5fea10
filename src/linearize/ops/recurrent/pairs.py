"""Which of a few tokens see each other, and what is left of a state after them: for backends that take them all at
once.

Letters: B batch, H heads, T tokens, K key dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.matmul import UNDERFLOW

LOWEST = -1000.0  # exp of less is 0 in fp64 too; sums of such log decays stay exact


@dataclass(frozen=True, eq=False)
class Pairs:
    """Masks of T tokens; a size of 1 stands for all rows.

    `seen_BTT`: token i sees token j <= i. `live_BT`: alive (None: all are). `document_BT`: how many documents have
    opened since the call began; 0 is that of the state (None: none has).
    """

    seen_BTT: Tensor
    live_BT: Tensor | None
    document_BT: Tensor | None


def pairs(layout: Layout, num_tokens: int, device: torch.device) -> Pairs:
    """The masks; computed once for all layers that share a layout."""
    key = ("pairs", num_tokens)
    if key not in layout.memo:
        seen = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()[None]
        starts = layout.starts(num_tokens, device)
        document = None if starts is None else starts.long().cumsum(-1)
        if document is not None:
            seen = seen & (document[:, :, None] == document[:, None])
        layout.memo[key] = Pairs(seen, layout.live(), document)
    found: Pairs = layout.memo[key]
    return found


def decay_factor(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """exp of an exponent that is at most 0 where it counts."""
    return exponent.clamp(min=UNDERFLOW, max=0).to(dtype).exp()


def column(x: Tensor) -> Tensor:
    """`[B, H, T]` as `[B, H, T, 1]`; with a dimension per key as it is."""
    return x[..., None] if x.dim() == 3 else x


def like_decays(mask_BT: Tensor, log_decay: Tensor) -> Tensor:
    """A mask of tokens for log decays `[B, H, T]` or `[B, H, T, K]`."""
    return mask_BT[:, None] if log_decay.dim() == 3 else mask_BT[:, None, :, None]


def state_after(k: Tensor, written: Tensor, total: Tensor, where: Pairs, state: Tensor | None, commit: int) -> Tensor:
    """The state after the first `commit` tokens, of which token j writes `written[j]` along `k[j]`; `total`: summed log
    decays."""
    total = total[:, :, :commit]
    last = total[:, :, -1:]
    leave, through = column(decay_factor(last - total, k.dtype)), column(decay_factor(last, k.dtype)).mT
    if where.document_BT is not None:
        document = where.document_BT[:, None, :commit, None]
        leave, through = leave * (document == document[:, :, -1:]), through * (document[:, :, -1:] == 0)
    added = (k[:, :, :commit] * leave).mT @ written[:, :, :commit]
    return added if state is None else torch.addcmul(added, through, state)
