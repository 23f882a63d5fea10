"""The cache of one text (a batch of one row) as named tensors and numbers, and back: what a server keeps of a text.

Letters: G key/value heads, S tokens, D head dimension, V value dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from linearize.modeling.cache import MixerCacheLayer
from linearize.modeling.cache_argument import with_cache
from linearize.modeling.growing_layer import GrowingLayer, use_growing_layers

SOFTMAX_LAYERS = (DynamicLayer, GrowingLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True, eq=False)
class SavedText:
    """What a cache holds after `length` tokens: tensors on the CPU, and plain numbers of the mixers' states."""

    length: int
    tensors: dict[str, Tensor]
    numbers: dict[str, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors."""
        return sum(x.numel() * x.element_size() for x in self.tensors.values())


def empty_cache(model: PreTrainedModel) -> Any:
    """A cache for a text to be read, whose softmax layers grow in place."""
    return use_growing_layers(DynamicCache(config=model.config))


class TextCaches:
    """Saves and restores the caches of a model. `can_save`: whether every layer is of a kind that is known here."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Reads one token, which shows what each layer holds."""
        self.model = model
        self.example = empty_cache(model)
        with torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            model(input_ids=token, use_cache=True, **with_cache(model, self.example))
        self.can_save = all(map(_is_known, self.example.layers))

    def save(self, cache: Cache) -> SavedText:
        """A copy of what the cache holds."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, int] = {}
        layer: Any
        for index, layer in enumerate(cache.layers):
            value = layer.state if isinstance(layer, MixerCacheLayer) else {"keys": layer.keys, "values": layer.values}
            for name, part in _parts(str(index), value):
                if isinstance(part, Tensor):
                    tensors[name] = _copied(part)
                else:
                    numbers[name] = part
        return SavedText(int(cache.get_seq_length()), tensors, numbers)

    def restore(self, saved: SavedText) -> Any:
        """A cache that goes on from what was saved, which stays as it is.

        Raises:
            KeyError: a tensor that this model's cache needs is not there.
        """
        cache = empty_cache(self.model)
        for index, (layer, example) in enumerate(zip(cache.layers, self.example.layers, strict=True)):
            if isinstance(layer, MixerCacheLayer):
                fill_mixer_layer(layer, _rebuilt(str(index), example.state, saved, self.model.device), saved.length)
            else:
                keys, values = (saved.tensors[f"{index}.{name}"].to(self.model.device) for name in ("keys", "values"))
                fill_softmax_layer(layer, keys, values, saved.length)
        return cache


def fill_mixer_layer(layer: MixerCacheLayer, state: Any, length: int) -> None:
    """An empty layer goes on from a state after `length` tokens."""
    layer.state, layer.cumulative_length, layer.is_initialized = state, length, True


def fill_softmax_layer(layer: Any, k_1GSD: Tensor, v_1GSV: Tensor, length: int) -> None:
    """An empty layer goes on from the keys and values of a text of `length` tokens, of which S (the last) are there."""
    layer.update(k_1GSD, v_1GSV)
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = length


def _is_known(layer: Any) -> bool:
    return isinstance(layer, MixerCacheLayer) or (type(layer) in SOFTMAX_LAYERS and layer.keys is not None)


def _copied(x: Tensor) -> Tensor:
    x = x.detach()
    return x.contiguous().clone() if x.device.type == "cpu" else x.to("cpu").contiguous()


def _parts(name: str, value: Any) -> Iterator[tuple[str, Tensor | int]]:
    """Tensors and numbers inside a state; memory with free slots behind it is left out, as states go on without."""
    if isinstance(value, Tensor) or type(value) is int:
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _parts(f"{name}.{key}", part)
    elif dataclasses.is_dataclass(value):
        for entry in dataclasses.fields(value):
            yield from _parts(f"{name}.{entry.name}", getattr(value, entry.name))


def _rebuilt(name: str, example: Any, saved: SavedText, device: torch.device) -> Any:
    """A state of the example's class from what was saved under this name."""
    values: dict[str, Any] = {}
    for entry in dataclasses.fields(example):
        key, old = f"{name}.{entry.name}", getattr(example, entry.name)
        if dataclasses.is_dataclass(old):
            values[entry.name] = _rebuilt(key, old, saved, device)
        elif key in saved.tensors:
            values[entry.name] = saved.tensors[key].to(device, copy=True)
        elif key in saved.numbers:
            values[entry.name] = saved.numbers[key]
        elif isinstance(old, Tensor | int):
            raise KeyError(key)
        else:
            values[entry.name] = None
    return type(example)(**values)
