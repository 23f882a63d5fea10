"""Where answers are decoded: together in the rows of a static step, or one after the other where a model has none."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from linearize.errors import InputError
from linearize.modeling.cache_argument import with_cache
from linearize.modeling.static.rows import StaticRows
from linearize.modeling.text_cache import TextCaches
from linearize.numbers import size_text


class Rows(Protocol):
    """See `StaticRows`."""

    @property
    def num_rows(self) -> int:
        """Rows in use."""

    def join(self, cache: Cache) -> int:
        """A text goes on in a row of its own."""

    def leave(self, row: int) -> None:
        """A text has ended; the last row takes its place."""

    def cache_of(self, row: int) -> Any:
        """What a row holds, as a cache of one row."""

    def read(self, tokens_B: Sequence[int]) -> Tensor:
        """Read one token in each row; gives the logits after it, `[B, V]`."""


class SeparateRows:
    """Texts with a cache each, read one after the other: for models that have no static step."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._caches = model, list[Any]()

    @property
    def num_rows(self) -> int:
        """See `Rows`."""
        return len(self._caches)

    def join(self, cache: Cache) -> int:
        """See `Rows`; the cache is copied, since several answers may go on from it."""
        self._caches.append(copy.deepcopy(cache))
        return len(self._caches) - 1

    def leave(self, row: int) -> None:
        """See `Rows`."""
        self._caches[row] = self._caches[-1]
        self._caches.pop()

    def cache_of(self, row: int) -> Any:
        """See `Rows`; to be read before the row goes on."""
        return self._caches[row]

    @torch.no_grad()
    def read(self, tokens_B: Sequence[int]) -> Tensor:
        """See `Rows`."""
        logits = []
        for token, cache in zip(tokens_B, self._caches, strict=True):
            ids = torch.tensor([[token]], device=self._model.device)
            logits.append(self._model(input_ids=ids, use_cache=True, **with_cache(self._model, cache)).logits[0, -1])
        return torch.stack(logits)


def rows_for(model: PreTrainedModel, caches: TextCaches, *, most: int, capacity: int, memory: int) -> tuple[Rows, int]:
    """Rows for texts of at most `capacity` tokens, and how many: as many as are asked for and `memory` bytes hold.

    Raises:
        InputError: the memory does not hold a single text.
    """
    try:
        if not caches.can_save:
            raise InputError("its cache has layers of another kind")
        one = StaticRows(model, most=1, capacity=capacity)
        one.join(caches.example)
        size = one.num_bytes
        rows: Rows | None = None
    except InputError:
        rows, size = SeparateRows(model), _bytes_of_cache(caches, capacity)
    count = min(most, memory // max(size, 1))
    if count < 1:
        raise InputError(
            f"a text of {capacity:,} tokens takes {size_text(size)} and {size_text(memory)} are there: give more with "
            "--memory, or a shorter --context"
        )
    return rows or StaticRows(model, most=count, capacity=capacity), count


def _bytes_of_cache(caches: TextCaches, capacity: int) -> int:
    """What a growing cache takes at most: its softmax layers hold every token."""
    total = 0
    for layer in caches.example.layers:
        pair = [x for x in (getattr(layer, "keys", None), getattr(layer, "values", None)) if x is not None]
        total += capacity * sum(x.nbytes for x in pair)
        total += getattr(layer, "num_bytes", 0)
    return total
