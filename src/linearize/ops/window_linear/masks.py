"""What the queries of each chunk see, and which tokens a chunk's memory takes up.

A plain text's chunks are all alike but for the first few, so theirs are made once for all.

Letters: B batch, N chunks, C chunk size, J sinks, K = J + 2 C keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.window_linear.slots import Alignment, Slots
from linearize.ops.window_linear.spec import WindowLinear, in_window

UNLIKE = 3  # chunks of a plain text that have no two chunks of tokens that can be folded before them


@dataclass(frozen=True, eq=False)
class GroupMasks:
    """What a chunk group's queries may see, and the options of the operation.

    `bias`: [B or 1, N or 1, C, K], minus infinity at keys not seen by softmax, else 0 (None: no window part). `far`: [B
    or 1, N or 1, C, 2 C], 1 at keys of the tile that are seen by features, else 0 (None: none is). `fold`: [B or 1, N,
    C], 1 for each token of chunk n - 2 that the memory takes up before chunk n, else 0 (None: all). `keep`: [B or 1,
    N], 0 where a document opens (None: nowhere).
    """

    bias: Tensor | None
    far: Tensor | None
    fold: Tensor | None
    keep: Tensor | None
    scaling: float
    softcap: float | None
    shared_shift: bool

    def part(self, chunks: slice) -> GroupMasks:
        """The masks of some of the chunks, where each has its own."""
        names = ("bias", "far", "fold", "keep")
        return replace(self, **{name: x[:, chunks] for name in names if (x := getattr(self, name)) is not None})


@dataclass(frozen=True, eq=False)
class Masks:
    """Those of the first chunks, and of each chunk after them (None: there is none)."""

    first: GroupMasks
    chunks: int
    others: GroupMasks | None

    def part(self, start: int, stop: int) -> GroupMasks:
        """The masks of some of the chunks, all of them among the first or none."""
        if start >= self.chunks:
            assert self.others is not None
            return self.others
        assert stop <= self.chunks
        return self.first.part(slice(start, stop))

    def with_options(self, spec: WindowLinear) -> Masks:
        """The same masks with the options of another layer."""
        first, others = (
            None
            if x is None
            else replace(x, scaling=spec.scaling, softcap=spec.softcap, shared_shift=spec.shared_shift)
            for x in (self.first, self.others)
        )
        assert first is not None
        return Masks(first, self.chunks, others)


def masks_of(
    alignment: Alignment, slots: Slots, layout: Layout, chunk: int, step: int, spec: WindowLinear, dtype: torch.dtype
) -> Masks:
    """The masks for chunk groups of `step` chunks; computed once for all layers that share layout and window."""
    memo = ("masks", chunk, step, spec.window, spec.shape, spec.num_sinks, spec.branch, spec.has_linear, dtype)
    if slots.num_past == 0 and memo in layout.memo:
        masks: Masks = layout.memo[memo]
        return masks.with_options(spec)
    chunks = alignment.num_chunks
    if alignment.source_BA is None:
        chunks = min(chunks, -(-UNLIKE // step) * step)
    first = group_masks(alignment, slice(0, chunks), chunk, spec, dtype)
    others = None
    if chunks < alignment.num_chunks:
        others = replace(group_masks(alignment, slice(chunks, chunks + 1), chunk, spec, dtype), fold=None, keep=None)
    result = Masks(first, chunks, others)
    if slots.num_past == 0:
        layout.memo[memo] = result
    return result


def group_masks(alignment: Alignment, chunks: slice, chunk: int, spec: WindowLinear, dtype: torch.dtype) -> GroupMasks:
    """The masks of some chunks, each with its own."""
    c = torch.arange(-chunk, chunk, device=alignment.first_BN.device)
    first = alignment.first_BN[:, chunks, None]
    query, key = (first + c[chunk:])[..., None], (first + c)[..., None, :]
    live = (alignment.follows_BN[:, chunks, None] | (c >= 0))[..., None, :] & (key >= spec.num_sinks)
    present = present_slots(alignment, chunk)
    if present is not None and not alignment.whole:
        before = torch.nn.functional.pad(present[:, :-1], (0, 0, 1, 0))
        live = live & torch.cat([before, present], dim=-1)[:, chunks, None]
    seen = live & (key <= query)
    near = in_window(query, key, spec.window, spec.shape)
    one_block = spec.shape == "terraced" and chunk == spec.window
    far = None if one_block or not spec.has_linear else (seen & ~near).to(dtype)
    bias = None
    if spec.has_window:
        shown = seen & near
        if spec.num_sinks:
            sink = torch.arange(spec.num_sinks, device=c.device)
            early = sink <= query
            if alignment.begin_BN is not None:
                early = early & (sink >= alignment.begin_BN[:, chunks, None, None])
            shown = torch.cat([early.expand(*shown.shape[:-1], -1), shown], dim=-1)
        bias = torch.zeros(shown.shape, dtype=dtype, device=c.device).masked_fill_(~shown, -torch.inf)
    keep = torch.cat([alignment.carried_B1, alignment.follows_BN[:, 1:]], dim=1)[:, chunks]
    fold = _foldable(alignment, present, chunk, spec)[:, chunks].to(dtype)
    return GroupMasks(
        bias, far, fold, None if bool(keep.all()) else keep.to(dtype), spec.scaling, spec.softcap, spec.shared_shift
    )


def present_slots(alignment: Alignment, chunk: int) -> Tensor | None:
    """Which aligned slots hold a token, `[B, N, C]` (None: all do, but for the end)."""
    return None if alignment.source_BA is None else (alignment.source_BA >= 0).unflatten(1, (-1, chunk))


def _foldable(alignment: Alignment, present: Tensor | None, chunk: int, spec: WindowLinear) -> Tensor:
    """Which tokens of chunk n - 2 enter the sum before chunk n, `[B or 1, N, C]`: its document's, but for sinks."""
    position = alignment.first_BN[..., None] + torch.arange(chunk, device=alignment.first_BN.device)
    fold = position >= spec.num_sinks
    if present is not None:
        fold = fold & present
    same = alignment.follows_BN[:, 2:] & alignment.follows_BN[:, 1:-1]
    return torch.nn.functional.pad(fold[:, :-2] & same[..., None], (0, 0, 2, 0))[:, : alignment.num_chunks]
