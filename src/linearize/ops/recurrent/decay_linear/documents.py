"""Which tokens of a chunk may see each other, the state before the chunk and the state after it.

Letters: B batch, N chunks, C tokens of a chunk, T tokens, J rows times heads of a chunk group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.layout import Layout


@dataclass(frozen=True, eq=False)
class Documents:
    """Masks of one division into chunks, 0 or 1 in the dtype of the computation; a batch of 1 stands for all rows.

    `pair_BNCC`: token i (second to last) sees token j <= i. `enters_BNC`: a token sees the state before its chunk;
    `leaves_BNC`: the state after its chunk holds the token; `passes_BN`: what was before the chunk is still in the
    state after it.
    """

    pair_BNCC: Tensor
    enters_BNC: Tensor
    leaves_BNC: Tensor
    passes_BN: Tensor

    def part(self, batch: slice, heads: int, span: slice) -> Documents:
        """The masks of a chunk group's rows and chunks, each row for all its heads: `[J, N, ...]`, where J may be 1."""
        parts = []
        for mask in (self.pair_BNCC, self.enters_BNC, self.leaves_BNC, self.passes_BN):
            rows = (mask if mask.shape[0] == 1 else mask[batch])[:, span]
            parts.append(rows if rows.shape[0] == 1 else rows.repeat_interleave(heads, dim=0))
        return Documents(*parts)


def masked(x_PCK: Tensor, mask_JN: Tensor) -> Tensor:
    """x times a mask of fewer dimensions, which stands for all of J where its first size is 1; in new memory."""
    mask = mask_JN.view(*mask_JN.shape, *(1,) * (x_PCK.dim() + 1 - mask_JN.dim()))
    return (x_PCK.unflatten(0, (-1, mask.shape[1])) * mask).flatten(0, 1)


def documents(
    layout: Layout, num_tokens: int, chunk: int, device: torch.device, dtype: torch.dtype
) -> Documents | None:
    """The masks for `num_tokens` tokens in chunks of `chunk`, None where no document opens; once for all layers that
    share a layout."""
    key = ("documents", num_tokens, chunk, dtype)
    if key not in layout.memo:
        starts = layout.starts(num_tokens, device)
        layout.memo[key] = None if starts is None else _documents(starts, chunk, dtype)
    found: Documents | None = layout.memo[key]
    return found


def _documents(starts_BT: Tensor, chunk: int, dtype: torch.dtype) -> Documents:
    missing = -starts_BT.shape[1] % chunk
    number = F.pad(starts_BT, (0, missing)).long().cumsum(-1).unflatten(1, (-1, chunk))
    before = F.pad(number[:, :-1, -1:], (0, 0, 1, 0))
    last = number[:, :, -1:]
    pair = (number[..., :, None] == number[..., None, :]).tril()
    masks = (pair, number == before, number == last, (last == before)[..., 0])
    return Documents(*(mask.to(dtype) for mask in masks))
