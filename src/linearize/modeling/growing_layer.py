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

MORE = 8  # a move makes room for one part in so many of the tokens there are
LEAST = 64  # tokens that a move makes room for at least


class GrowingLayer(DynamicLayer):
    """transformers' `DynamicLayer` whose `keys` and `values` are the filled part of larger memory.

    All that takes other tensors for them (another order of rows, a crop, a copy) works as there. With gradients, and
    while `torch.compile` traces, keys and values are joined as there too.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers = (_Buffer(), _Buffer())

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
        self._buffers = (_Buffer(), _Buffer())

    def offload(self) -> None:
        """Move keys and values to the CPU, and give the memory back."""
        super().offload()
        self._buffers = (_Buffer(), _Buffer())


class _Buffer:
    """Memory of `[B, G, S + room, D]`, of which the first `used` tokens are filled."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.used = 0

    def then(self, old: Tensor, new: Tensor) -> Tensor:
        """`old` and `new` one after the other; `old` is not copied where it is the filled part of this memory."""
        past, tokens = old.shape[-2] if old.numel() else 0, new.shape[-2]
        if not self._holds(old, new, past) or past + tokens > self.memory.shape[-2]:  # type: ignore[union-attr]
            whole = past + tokens + max(LEAST, (past + tokens) // MORE)
            with torch.inference_mode(False):  # what is made inside that mode cannot be written to outside
                memory = new.new_empty(*new.shape[:-2], whole, new.shape[-1])
            if past:
                memory[..., :past, :] = old
            self.memory = memory
        assert self.memory is not None
        self.used = past + tokens
        self.memory[..., past : self.used, :] = new
        return self.memory[..., : self.used, :]

    def shorten(self, filled: Tensor | None) -> None:
        """Take note that only so much is in use, if it is this memory's."""
        if self.memory is not None and filled is not None and filled.data_ptr() == self.memory.data_ptr():
            self.used = min(self.used, filled.shape[-2])

    def _holds(self, old: Tensor, new: Tensor, past: int) -> bool:
        """Whether `old` is all that is filled here, and `new` can go behind it: a tensor with fewer tokens may be that
        of another cache, whose further tokens are here."""
        memory = self.memory
        if memory is None or past != self.used or past == 0 or old.data_ptr() != memory.data_ptr():
            return False
        shape = (*memory.shape[:-2], memory.shape[-1])
        return all((*x.shape[:-2], x.shape[-1]) == shape and x.dtype == memory.dtype for x in (old, new))


def use_growing_layers(cache: Cache) -> Cache:
    """The same cache, whose empty layers of transformers' growing kind are of this one; others stay as they are."""
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[index] = GrowingLayer()
    return cache
