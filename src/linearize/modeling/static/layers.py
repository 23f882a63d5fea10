"""Which layers a static cache has for a model, and the softmax attention of kept layers over it: all columns, of
which those that a token must not see are masked by position.

Letters: B batch, T new tokens, C columns, H query heads, G key/value heads, R query heads for each, D head dimension,
V value dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from linearize.errors import InputError
from linearize.modeling.attention import ATTENTION, MixerCall
from linearize.modeling.cache import MixerCacheLayer
from linearize.modeling.cache_argument import with_cache
from linearize.modeling.library_internals import attention_of, set_attention
from linearize.modeling.static.cache import StaticAttentionLayer, StaticMixerLayer
from linearize.modeling.student import LinearizedForCausalLM
from linearize.ops.dispatch import MAX_MULTI_TOKEN
from linearize.ops.layout import Layout

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
    if isinstance(model, LinearizedForCausalLM):
        for index, mixer in model.mixers().items():
            if mixer.cost(4).bytes_per_token:
                raise InputError(
                    f"layer {index} ({mixer.config.name}) holds the whole text for some heads, which a static cache "  # type: ignore[attr-defined]
                    "has no memory for: decode without (no --compile)"
                )
    layers = DynamicCache(config=model.config).layers
    if not all(isinstance(layer, MixerCacheLayer) for layer in layers):
        _check_softmax(model)
    return [_static(index, layer, tail, capacity, max(tail, most)) for index, layer in enumerate(layers)]


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
        cached = (layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3])
        if cached != (shape.num_kv_heads, shape.head_dim, shape.value_dim):
            raise InputError(f"layer {index} keeps something else than its keys and values: it has no static cache")


def _shapes(model: PreTrainedModel) -> list[AttentionShape]:
    """Sizes of the attention in each layer. Raises InputError where transformers' attention interface is not used."""
    if isinstance(model, LinearizedForCausalLM):
        return model.config.attention_shapes()
    from linearize.modeling.probe import probe

    return [site.shape for site in probe(model)]


STATIC_ATTENTION = "linearize_static"
NOT_SCORES = {"position_ids", "mixer_hidden"}  # tensors that reach attention functions and change nothing there


def static_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    mixer_call: MixerCall | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention in transformers' calling convention, `q: [B, H, T, D]`, `k, v: [B, G, T, .]` -> `[B, T, H, V]`.

    Raises:
        InputError: attention that does more than scores and a window (sinks, position biases), or gets no `mixer_call`.
    """
    odd = sorted(name for name, x in others.items() if isinstance(x, Tensor) and name not in NOT_SCORES)
    if odd or mixer_call is None or mixer_call.cache is None:
        why = f"also uses {', '.join(odd)}" if odd else "passes no keywords on"
        raise InputError(f"{type(module).__name__} {why}: it cannot run in a static cache")
    layer: Any = mixer_call.cache.layers[module.layer_idx]  # type: ignore[index]
    position_BT = _positions(mixer_call.layout, query.shape[2])
    keys, values = layer.write(key, value, position_BT)
    seen = _seen(layer, mixer_call.layout, position_BT)
    y_BHTV = attend(query, keys, values, seen, query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
    return y_BHTV.transpose(1, 2), None


AttentionInterface.register(STATIC_ATTENTION, static_attention)


def attend(
    q_BHTD: Tensor, k_BGCD: Tensor, v_BGCV: Tensor, seen_B1TC: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """Softmax attention over the columns that are seen, `[B, H, T, V]`; heads of a group share keys without copies."""
    groups, tokens = k_BGCD.shape[1], q_BHTD.shape[2]
    copies = q_BHTD.shape[1] // groups
    q = q_BHTD.unflatten(1, (groups, copies)).flatten(2, 3)
    seen = seen_B1TC[:, :, None].expand(-1, -1, copies, -1, -1).flatten(2, 3)
    if softcap is None:
        y = F.scaled_dot_product_attention(q, k_BGCD, v_BGCV, attn_mask=seen, scale=scaling)
    else:
        scores = softcap * torch.tanh(q @ k_BGCD.mT * scaling / softcap)
        y = scores.masked_fill(~seen, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype) @ v_BGCV
    return y.unflatten(2, (copies, tokens)).flatten(1, 2)


def _positions(layout: Layout, tokens: int) -> Tensor:
    """Of the new tokens, `[B, T]`: behind those of the tail."""
    assert layout.position_BT is not None
    return layout.position_BT[:, layout.position_BT.shape[1] - tokens :]


def _seen(layer: StaticAttentionLayer, layout: Layout, position_BT: Tensor) -> Tensor:
    """`layer.seen`, once for all layers of a kind."""
    key = ("seen", layer.columns, layer.window)
    if key not in layout.memo:
        layout.memo[key] = layer.seen(position_BT)
    seen: Tensor = layout.memo[key]
    return seen


def softmax_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """The configs that say how the kept softmax layers of a model compute attention."""
    from linearize.modeling.probe import attention_configs

    return [config for config in attention_configs(model) if attention_of(config) != ATTENTION]


@contextmanager
def attending_static(configs: list[PreTrainedConfig]) -> Iterator[None]:
    """Kept softmax layers through `static_attention` inside the `with` block."""
    before = [attention_of(config) for config in configs]
    try:
        for config in configs:
            set_attention(config, STATIC_ATTENTION)
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            set_attention(config, old)
