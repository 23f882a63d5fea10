"""How the chunked backend cuts its tensors, so that what is computed at a time stays in a processor's cache.

A chunk group is some rows of the batch, some heads, some chunks. On a processor it is one head and as many chunks as
fit, or all chunks of several heads where texts are short; elsewhere it is everything.

`Documents` are the masks of such chunks: which tokens may see each other, the state before the chunk and that after it.

Letters: B batch, H heads, T tokens, N chunks, C tokens of a chunk, J rows times heads of a chunk group, P chunks of a
chunk group times J.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.layout import Layout

GROUP_NUMBERS = 200_000  # per matrix of a chunk group: under 1 MiB, beyond which allocators give fresh memory


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of the batch and heads that go through the text together."""

    batch: slice
    heads: slice

    def of(self, x_BH: Tensor) -> Tensor:
        """These rows of a tensor `[B, H, ...]`."""
        return x_BH[self.batch, self.heads]


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """The chunk groups of a call: `rows` one after the other, in each `spans` of chunks in the text's order."""

    tokens: int
    chunk: int
    rows: tuple[Rows, ...]
    spans: tuple[slice, ...]

    @property
    def chunks(self) -> int:
        """All chunks."""
        return -(-self.tokens // self.chunk)

    @staticmethod
    def of(q_BHTK: Tensor, v_BHTV: Tensor, chunk: int) -> Cutting:
        """The chunk groups for these sizes."""
        batch, heads, tokens, key = q_BHTK.shape
        chunks = -(-tokens // chunk)
        every = Rows(batch=slice(0, batch), heads=slice(0, heads))
        if q_BHTK.device.type != "cpu" or torch.compiler.is_compiling():
            return Cutting(tokens=tokens, chunk=chunk, rows=(every,), spans=(slice(0, chunks),))
        fit = max(1, GROUP_NUMBERS // (chunk * max(chunk, key, v_BHTV.shape[-1])))
        together = min(heads, max(1, fit // chunks))
        if together == heads:
            several = max(1, fit // (chunks * heads))
            rows = [Rows(batch=slice(b, min(b + several, batch)), heads=every.heads) for b in range(0, batch, several)]
        else:
            cuts = [slice(h, min(h + together, heads)) for h in range(0, heads, together)]
            rows = [Rows(batch=slice(b, b + 1), heads=cut) for b in range(batch) for cut in cuts]
        spans = tuple(slice(n, min(n + fit, chunks)) for n in range(0, chunks, fit))
        return Cutting(tokens=tokens, chunk=chunk, rows=tuple(rows), spans=spans)

    def cut(self, rows: Rows, span: slice, dtype: torch.dtype, *tensors: Tensor) -> Iterator[Tensor]:
        """Chunks of `[B, H, T, ...]` as `[P, C, ...]` in `dtype`; what is missing in the last one is zeros."""
        first, last = span.start * self.chunk, span.stop * self.chunk
        for x in tensors:
            part = x[rows.batch, rows.heads, first:last].to(dtype)
            if last > self.tokens:
                part = F.pad(part, (0,) * (2 * (part.dim() - 3)) + (0, last - self.tokens))
            yield part.reshape(-1, self.chunk, *part.shape[3:])

    def put(self, rows: Rows, span: slice, out: Tensor, value_PC: Tensor) -> None:
        """Write chunks `[P, C, ...]` where `cut` took them."""
        first, last = span.start * self.chunk, min(span.stop * self.chunk, self.tokens)
        place = out[rows.batch, rows.heads, first:last]
        place.copy_(value_PC.view(*place.shape[:2], -1, *value_PC.shape[2:])[:, :, : last - first])


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
    docs: Documents | None = layout.memo[key]
    return docs


def _documents(starts_BT: Tensor, chunk: int, dtype: torch.dtype) -> Documents:
    missing = -starts_BT.shape[1] % chunk
    number = F.pad(starts_BT, (0, missing)).long().cumsum(-1).unflatten(1, (-1, chunk))
    before = F.pad(number[:, :-1, -1:], (0, 0, 1, 0))
    last = number[:, :, -1:]
    pair = (number[..., :, None] == number[..., None, :]).tril()
    masks = (pair, number == before, number == last, (last == before)[..., 0])
    return Documents(*(mask.to(dtype) for mask in masks))
