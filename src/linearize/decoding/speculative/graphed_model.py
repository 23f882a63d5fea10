"""A cached model for a GPU: fixed shapes and memory, so that reading some tokens replays one recorded CUDA graph.

Letters: B batch, b rows that still go on, T tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.decoding.speculative.cached_model import CachedModel
from linearize.decoding.speculative.draft_length import MAX_DRAFT_TOKENS
from linearize.errors import InputError
from linearize.modeling.static.graphs import weights_at
from linearize.modeling.static.layers import static_layers
from linearize.modeling.static.step import StaticStep
from linearize.ops.dispatch import MAX_MULTI_TOKEN

WIDTH = MAX_DRAFT_TOKENS + 2  # tokens that wait for `keep`: a draft reads up to two of the text, and its own
SPARE_CAPACITY = 512  # tokens beyond the prompts; the capacity is doubled where it runs out


class _Forced:
    """Whether models are graphed; None: those on a GPU are."""

    graphed: bool | None = None


@contextmanager
def force_graphed(graphed: bool) -> Iterator[None]:
    """Make all models graphed that are wrapped inside the `with` block, or none (tests, benchmarks)."""
    before, _Forced.graphed = _Forced.graphed, graphed
    try:
        yield
    finally:
        _Forced.graphed = before


def cached_model_for(model: PreTrainedModel, role: str) -> CachedModel:
    """Return this model with its cache, on a GPU with CUDA graphs unless it has no static form (after a warning).

    Raises:
        InputError: a model whose cache cannot roll back; or, under `force_graphed`, one without a static form.
    """
    graphed = model.device.type == "cuda" if _Forced.graphed is None else _Forced.graphed
    if not graphed:
        return CachedModel(model, role)
    try:
        static_layers(model, 1, 1)
    except InputError as error:
        if _Forced.graphed:
            raise
        warnings.warn(f"no CUDA graphs for the {role}: {error}", stacklevel=2)
        return CachedModel(model, role)
    return GraphedModel(model, role)


@dataclass(frozen=True, eq=False)
class _Ready:
    """A step with its graphs, the last object that used it, and the addresses of the weights that its graphs read."""

    step: StaticStep
    owner: weakref.ref[CachedModel]
    weights: int


_READY: weakref.WeakKeyDictionary[PreTrainedModel, _Ready] = weakref.WeakKeyDictionary()


class GraphedModel(CachedModel):
    """A `CachedModel` of static steps. The batch keeps its size: rows that have ended read on, and keep nothing.

    Graphs that were recorded for a model serve later batches of the same size, as long as the model lives.
    """

    _step: StaticStep

    def __init__(self, model: PreTrainedModel, role: str) -> None:
        """Raises InputError as `CachedModel`; rows may always keep different numbers of tokens."""
        super().__init__(model, role)
        self.by_row = True

    def read_prompt(self, input_ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
        """See `CachedModel`."""
        rows, tokens = input_ids_BT.shape
        self.lengths = [tokens] * rows if mask_BT is None else mask_BT.sum(1).tolist()
        self._step = self._take(rows, max(self.lengths) + SPARE_CAPACITY)
        self._rows, self._size = list(range(rows)), rows
        self._decided: list[int] | None = [0] * rows
        self._settled = 0  # tokens since the last `keep` that are decided on already
        self.passes += 1
        return self._step.prefill(input_ids_BT, mask_BT)

    def _take(self, rows: int, capacity: int) -> StaticStep:
        weights = weights_at(self.model)
        ready = _READY.get(self.model)
        if ready is None or ready.step.batch != rows or ready.weights != weights or ready.owner() is not None:
            step = StaticStep(self.model, batch=rows, width=WIDTH, capacity=capacity)
        else:
            step = ready.step
        if step.capacity is None or step.capacity < capacity:
            step.grow(capacity=capacity)
        _READY[self.model] = _Ready(step, weakref.ref(self), weights)
        return step

    def read(self, tokens_BT: Tensor, *, settled: bool = False) -> Tensor:
        """See `CachedModel`."""
        logits: list[Tensor] = []
        for part in tokens_BT.split(self._step.width if settled else tokens_BT.shape[1], dim=1):
            if logits:
                self._settled += self._step.held
                self._decided = self._of_all([self._step.held] * len(self._rows))
            logits.append(self._read(part))
        return logits[0] if len(logits) == 1 else torch.cat(logits, dim=1)

    def _read(self, tokens_bT: Tensor) -> Tensor:
        step, tokens = self._step, tokens_bT.shape[1]
        waiting = tokens + (step.held if self._decided is None else 0)
        if waiting > step.width:
            step.grow(width=max(waiting, min(MAX_MULTI_TOKEN, 2 * step.width)))
        if step.capacity is not None and max(step.lengths) + step.held + tokens > step.capacity:
            step.grow(capacity=2 * step.capacity)
        kept, self._decided = self._decided, None
        whole = len(self._rows) == self._size
        tokens_BT = tokens_bT if whole else tokens_bT.new_zeros(self._size, tokens)
        if not whole:
            tokens_BT[self._rows] = tokens_bT
        logits_BTV = step.step(tokens_BT, kept)
        self.passes += 1
        self.lengths = [length + tokens for length in self.lengths]
        return logits_BTV.clone() if whole else logits_BTV[self._rows]

    def keep(self, counts: Sequence[int]) -> None:
        """See `CachedModel`."""
        held, settled, self._settled = self._step.held + self._settled, self._settled, 0
        if min(counts) < settled:
            raise InputError(f"rows keep {list(counts)} tokens, {settled} were settled: read fewer tokens at a time")
        self.lengths = [length - held + count for length, count in zip(self.lengths, counts, strict=True)]
        self._decided = self._of_all([count - settled for count in counts])

    def _of_all(self, counts: Sequence[int]) -> list[int]:
        """Return counts of all rows of the batch from those of the rows that go on."""
        all_counts = [0] * self._size
        for row, count in zip(self._rows, counts, strict=True):
            all_counts[row] = count
        return all_counts

    def select(self, rows: Sequence[int]) -> None:
        """See `CachedModel`."""
        self._rows = [self._rows[row] for row in rows]
        self.lengths = [self.lengths[row] for row in rows]
