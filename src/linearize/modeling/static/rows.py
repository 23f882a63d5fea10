"""Texts of different lengths that decode together, one row of a static step each; a text may join or leave at any time.

Letters: B rows in use, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from linearize.errors import InputError
from linearize.modeling.cache import MixerCacheLayer
from linearize.modeling.static.cache import StaticMixerLayer
from linearize.modeling.static.step import StaticStep
from linearize.modeling.student import LinearizedForCausalLM
from linearize.modeling.text_cache import empty_cache, fill_mixer_layer, fill_softmax_layer


class StaticRows:
    """At most `most` texts. The rows in use are the first ones: where one leaves, the last one takes its place."""

    def __init__(self, model: PreTrainedModel, *, most: int, capacity: int) -> None:
        """`capacity`: the most tokens of a text, where softmax layers hold all of it.

        Raises:
            InputError: a model that has no static step; says why.
        """
        self.step = StaticStep(model, batch=most, capacity=capacity, rollback=False)
        self.step.rows = 0

    @property
    def num_rows(self) -> int:
        """Rows in use."""
        return self.step.rows

    @property
    def num_bytes(self) -> int:
        """Memory of all rows; 0 before the first text joined."""
        total = 0
        for layer in self.step.cache.layers:
            held = [layer.keys, layer.values] if not isinstance(layer, StaticMixerLayer) else []
            total += sum(x.numel() * x.element_size() for x in held if x is not None)
            if isinstance(layer, StaticMixerLayer) and layer.state is not None:
                total += layer.state.num_bytes
        return total

    def join(self, cache: Cache) -> int:
        """A text goes on in a row of its own from what a cache of one row holds; gives the row.

        Raises:
            InputError: all rows are in use.
        """
        step, row, length = self.step, self.step.rows, int(cache.get_seq_length())
        if row == step.batch:
            raise InputError(f"{row} texts are decoded together, and no more rows are there: wait until one has left")
        mixers = _mixers(step.model)
        source: Any
        for index, (layer, source) in enumerate(zip(step.cache.layers, cache.layers, strict=True)):
            if isinstance(source, MixerCacheLayer):
                layer.put(row, mixers[index].fixed(source.state, most=layer.most), step.batch)
            else:
                layer.put(row, source.keys, source.values, length, step.batch)
        self._place(row, length)
        step.rows += 1
        return row

    def leave(self, row: int) -> None:
        """A text has ended; the last row takes its place."""
        last = self.step.rows - 1
        if row != last:
            for layer in self.step.cache.layers:
                layer.move(last, row)
            self._place(row, self.step.lengths[last])
        self.step.rows = last
        self.step.lengths = self.step.lengths[:last]

    def cache_of(self, row: int) -> Any:
        """What a row holds, as a cache of one row in memory of its own."""
        step, length = self.step, self.step.lengths[row]
        cache, mixers = empty_cache(step.model), _mixers(step.model)
        for index, (layer, target) in enumerate(zip(step.cache.layers, cache.layers, strict=True)):
            if isinstance(target, MixerCacheLayer):
                fill_mixer_layer(target, mixers[index].plain(layer.row(row), position=length), length)
            else:
                keys, values = layer.row(row, length)
                fill_softmax_layer(target, keys, values, length)
        return cache

    def read(self, tokens_B: Sequence[int]) -> Tensor:
        """Read one token in each row; gives the logits after it, `[B, V]`, which the next call may overwrite."""
        tokens = torch.tensor(tokens_B, device=self.step.model.device)
        return self.step.step(tokens[:, None])[:, -1]

    def _place(self, row: int, length: int) -> None:
        self.step.lengths = [*self.step.lengths[:row], length, *self.step.lengths[row + 1 :]]
        self.step.start_B[row] = length


def _mixers(model: PreTrainedModel) -> dict[int, Any]:
    return dict(model.mixers()) if isinstance(model, LinearizedForCausalLM) else {}
