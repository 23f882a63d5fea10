"""Blocks of large tensors that fit a core's caches: a few heads of a few rows at a time, in memory that is used again.

Letters: B batch, G heads that share something.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
BLOCK = 1 << 17  # numbers per matrix of scores or features: a few of them fit a core's caches
ALIGNED = 16  # numbers: rows that start at multiples of this are loaded whole


@dataclass(frozen=True)
class HeadBlock:
    """Some heads of some rows, all chunks of the chunk group: `[B, G, ...]` becomes `[b, g, ...]`."""

    rows: slice
    groups: slice

    def of(self, x_BG: Tensor) -> Tensor:
        """These heads' part."""
        return x_BG[self.rows, self.groups]

    def mask(self, x_B: Tensor) -> Tensor:
        """These rows' part of `[B or 1, ...]`, with a size of 1 for the heads."""
        return (x_B if x_B.shape[0] == 1 else x_B[self.rows]).unsqueeze(1)


def head_blocks(batch: int, groups: int, numbers: int) -> Iterator[HeadBlock]:
    """All heads of all rows, about `BLOCK` numbers at a time where one head has `numbers`."""
    heads = max(1, BLOCK // max(numbers, 1))
    row_step, group_step = max(1, heads // groups), min(heads, groups)
    yield from alike([
        HeadBlock(slice(row, row + row_step), slice(group, group + group_step))
        for row in range(0, batch, row_step)
        for group in range(0, groups, group_step)
    ])  # fmt: skip


def alike(items: Sequence[T], *, reverse: bool = False) -> Iterator[T]:
    """All items, where the work on each is the same and writes to memory that exists already.

    A simulation of costs sees the first item alone (the last may be smaller), and how often to count its work.
    """
    scale = _LOCAL.scale
    if scale is None or len(items) < 2:
        yield from reversed(items) if reverse else items
        return
    scale(len(items))
    try:
        yield items[0]
    finally:
        scale(1 / len(items))


@contextmanager
def counting_repeats(scale: Callable[[float], None]) -> Iterator[None]:
    """Inside, `alike` gives the first item alone between calls of `scale(count)` and `scale(1 / count)`."""
    before, _LOCAL.scale = _LOCAL.scale, scale
    try:
        yield
    finally:
        _LOCAL.scale = before


def device_kind(x: Tensor) -> str:
    """What work on a tensor is arranged for: `cpu` or another type of device; in a simulation of costs, whose tensors
    are all on a simulated CPU, the one that is planned for."""
    return _LOCAL.planned or x.device.type


@contextmanager
def planned_for(kind: str) -> Iterator[None]:
    """Inside, `device_kind` gives this type of device."""
    before, _LOCAL.planned = _LOCAL.planned, kind
    try:
        yield
    finally:
        _LOCAL.planned = before


class Scratch:
    """Memory by name that the next head block uses again; what a name gives holds until it is asked for again."""

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, name: str, *shape: int, like: Tensor) -> Tensor:
        """Unset numbers of this shape, contiguous, in the dtype and on the device of `like`."""
        key, size = (name, like.dtype, like.device), math.prod(shape)
        if (
            type(like) is not Tensor
        ):  # tensors without contents (`training/memory_simulation.py`) are of one simulation only
            return like.new_empty(shape)
        flat = self._flat.get(key)
        if flat is None or flat.numel() < size:
            with torch.inference_mode(False):  # what is made inside that mode cannot be written to outside
                flat = torch.empty(size, dtype=like.dtype, device=like.device)
            if type(flat) is Tensor:
                self._flat[key] = flat
        return flat[:size].view(shape)

    def rows(self, name: str, *shape: int, like: Tensor) -> Tensor:
        """The same with rows that start at multiples of `ALIGNED`, for last dimensions that are one more than that."""
        padded = -(-shape[-1] // ALIGNED) * ALIGNED
        return self(name, *shape[:-1], padded, like=like)[..., : shape[-1]]


@dataclass
class _Local(threading.local):
    scratch: Scratch = field(default_factory=Scratch)
    scale: Callable[[float], None] | None = None
    planned: str | None = None


_LOCAL = _Local()


def scratch() -> Scratch:
    """This thread's: a few matrices of about `BLOCK` numbers, or as many as one head of a chunk group has."""
    return _LOCAL.scratch
