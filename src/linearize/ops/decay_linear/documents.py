"""Which tokens of a chunk may see each other, the state before the chunk and the state after it.

Letters: B batch, N chunks, C tokens of a chunk, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.layout import Layout


@dataclass(frozen=True, eq=False)
class Documents:
    """Masks of one division into chunks; a size of 1 stands for all rows or all chunks.

    `pair_BNCC`: token i (second to last) sees token j <= i. `enters_BNC`: a token sees the state before its chunk;
    `leaves_BNC`: the state after its chunk holds the token; `passes_BN`: what was before the chunk is still in the
    state after it. None: everywhere.
    """

    pair_BNCC: Tensor
    enters_BNC: Tensor | None = None
    leaves_BNC: Tensor | None = None
    passes_BN: Tensor | None = None


def documents(layout: Layout, num_tokens: int, chunk: int, device: torch.device) -> Documents:
    """The masks for `num_tokens` tokens in chunks of `chunk`; computed once for all layers that share a layout."""
    key = ("documents", num_tokens, chunk)
    if key not in layout.memo:
        layout.memo[key] = _documents(layout, num_tokens, chunk, device)
    found = layout.memo[key]
    assert isinstance(found, Documents)
    return found


def _documents(layout: Layout, num_tokens: int, chunk: int, device: torch.device) -> Documents:
    causal = torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril()
    starts = layout.starts(num_tokens, device)
    if starts is None:
        return Documents(causal[None, None])
    missing = -num_tokens % chunk
    number = F.pad(starts, (0, missing)).long().cumsum(-1).unflatten(1, (-1, chunk))
    before = F.pad(number[:, :-1, -1:], (0, 0, 1, 0))
    last = number[:, :, -1:]
    pair = causal & (number[..., :, None] == number[..., None, :])
    return Documents(pair, number == before, number == last, (last == before)[..., 0])
