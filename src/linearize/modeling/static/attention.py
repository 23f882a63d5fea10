"""Softmax attention of kept layers over a static cache: all columns, those that are not to be seen masked by position.

Letters: B batch, T new tokens, C columns, H query heads, G key/value heads, R query heads for each, D head dimension,
V value dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from linearize.errors import InputError
from linearize.modeling.attention import ATTENTION, MixerCall
from linearize.modeling.library_internals import attention_of, set_attention
from linearize.modeling.static.cache import StaticAttentionLayer
from linearize.ops.layout import Layout

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
    **others: Any,
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
    found: Tensor = layout.memo[key]
    return found


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
