"""The cache of a kept softmax layer in memory with room for tokens to come.

transformers' own layer joins old and new keys in new memory at every token, which copies the whole past each time. Here
a token is written behind the past, and the memory moves when its room is used up: an eighth more at a time.

Letters: B batch, G key/value heads, S past tokens, T new tokens, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from linearize.ops.growing_softmax import GrowingBuffer


class GrowingLayer(DynamicLayer):
    """transformers' `DynamicLayer` whose `keys` and `values` are the filled part of larger memory.

    All that takes other tensors for them (another order of rows, a crop, a copy) works as there. With gradients, and
    while `torch.compile` traces, keys and values are joined as there too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers = (GrowingBuffer(), GrowingBuffer())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Put new keys and values `[B, G, T, D]` behind the old ones; gives all, `[B, G, S + T, D]`."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            joined: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return joined
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        keys, values = self._buffers
        self.keys, self.values = keys.then(self.keys, key_states), values.then(self.values, value_states)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens; those that come are written over them."""
        super().crop(tokens_to_remove)
        for buffer, filled in zip(self._buffers, (self.keys, self.values), strict=True):
            buffer.shorten(filled)

    def reset(self) -> None:
        """Forget everything, the memory too."""
        super().reset()
        self._buffers = (GrowingBuffer(), GrowingBuffer())

    def offload(self) -> None:
        """Move keys and values to the CPU, and give the memory back."""
        super().offload()
        self._buffers = (GrowingBuffer(), GrowingBuffer())


def use_growing_layers(cache: Cache) -> Cache:
    """The same cache, whose empty layers of transformers' growing kind are of this one; others stay as they are."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = GrowingLayer()
    return cache
