"""The attention function of converted layers: transformers computes q, k, v and the output projection, a mixer what
is between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, Cache

from linearize.modeling.cache import MixerCacheLayer
from linearize.ops.layout import Layout
from linearize.ops.window_linear import Branch

ATTENTION = "linearize"
Tap = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class MixerCall:
    """What one forward pass of the student tells all its mixers.

    `tap`: stands in for the mixer in every converted layer: `tap(module, q, k, v, scaling=, softcap=,
    sliding_window=, layout=)
    -> y [B, H, T, V]`; attention transfer uses it to compute both attentions and pass the teacher's on.
    """

    layout: Layout
    cache: Cache | None = None
    branch: Branch = "both"
    tap: Tap | None = None


def mixer_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    mixer_call: MixerCall | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention through the layer's mixer, in transformers' calling convention.

    `query: [B, H, T, D]`, `key`, `value: [B, G, T, D]` after RoPE and norms -> `[B, T, H, V]`. What other keywords
    could mean was
    checked at conversion (`surgery.probe`).
    """
    assert mixer_call is not None, "a converted layer was called outside of LinearizedForCausalLM"
    scores: dict[str, Any] = {"scaling": query.shape[-1] ** -0.5 if scaling is None else scaling, "softcap": softcap}
    layout = mixer_call.layout
    if mixer_call.tap is not None:
        y_BHTV = mixer_call.tap(module, query, key, value, layout=layout, sliding_window=sliding_window, **scores)
    elif mixer_call.cache is None:
        mixer: Any = module.mixer
        y_BHTV, _state = mixer(query, key, value, layout=layout, branch=mixer_call.branch, need_state=False, **scores)
    else:
        layer = mixer_call.cache.layers[module.layer_idx]  # type: ignore[index]
        assert isinstance(layer, MixerCacheLayer)
        y_BHTV = layer.step(module.mixer, query, key, value, layout=layout, branch=mixer_call.branch, **scores)  # type: ignore[arg-type]
    return y_BHTV.transpose(1, 2), None


AttentionInterface.register(ATTENTION, mixer_attention)
