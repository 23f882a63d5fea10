"""Which layers a static cache has for a model, and which models have none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from linearize.errors import InputError
from linearize.modeling.cache import MixerCacheLayer
from linearize.modeling.cache_argument import with_cache
from linearize.modeling.static.cache import StaticAttentionLayer, StaticMixerLayer
from linearize.modeling.student import LinearizedForCausalLM
from linearize.ops.dispatch import MAX_MULTI_TOKEN

if TYPE_CHECKING:
    from linearize.mixers import AttentionShape


def static_layers(model: PreTrainedModel, tail: int, capacity: int | None, most: int = 1) -> list[Any]:
    """The layers of a static cache for this model, found out with a token or three; changes nothing.

    `tail`: tokens that mixers hold back. `most`: tokens of a step, where they hold none back. `capacity`: tokens that
    softmax layers of the whole text have room for.

    Raises:
        InputError: a model with a layer that has no static form, or no capacity where one is needed.
    """
    if model.training:
        raise InputError("a static step runs models in eval mode: call model.eval() first")
    found: list[Any] = DynamicCache(config=model.config).layers
    if not all(isinstance(layer, MixerCacheLayer) for layer in found):
        _check_softmax(model)
    return [_static(index, layer, tail, capacity, max(tail, most)) for index, layer in enumerate(found)]


def _static(
    index: int, layer: Any, tail: int, capacity: int | None, most: int
) -> StaticMixerLayer | StaticAttentionLayer:
    if isinstance(layer, MixerCacheLayer):
        return StaticMixerLayer(tail, most)
    if type(layer) is DynamicSlidingWindowLayer:
        return StaticAttentionLayer(layer.sliding_window + 2 * MAX_MULTI_TOKEN, layer.sliding_window)
    if type(layer) is not DynamicLayer:
        raise InputError(f"layer {index} ({type(layer).__name__}) has no static cache: decode without")
    if capacity is None or capacity < 1:
        raise InputError(f"layer {index} holds the whole text (softmax attention): give a capacity of at least 1")
    return StaticAttentionLayer(capacity, None)


def _check_softmax(model: PreTrainedModel) -> None:
    """Softmax layers must hold in the cache what they attend to: keys and values of every head (not latents)."""
    cache: Any = DynamicCache(config=model.config)
    with torch.inference_mode():
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model(input_ids=token, use_cache=True, **with_cache(model, cache))
    for index, (layer, shape) in enumerate(zip(cache.layers, _shapes(model), strict=True)):
        if isinstance(layer, MixerCacheLayer) or layer.keys is None:
            continue
        held = (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        if held != (shape.num_kv_heads, shape.head_dim, shape.value_dim):
            raise InputError(f"layer {index} keeps something else than its keys and values: it has no static cache")


def _shapes(model: PreTrainedModel) -> list[AttentionShape]:
    """Sizes of the attention in each layer. Raises InputError where transformers' attention interface is not used."""
    if isinstance(model, LinearizedForCausalLM):
        return model.config.attention_shapes()
    from linearize.modeling.probe import probe

    return [site.shape for site in probe(model)]
