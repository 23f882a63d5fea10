"""Batches whose rows keep different numbers of draft tokens: what the cache's layers and the attention mask are told.

A column of the cache is one token of each row. Where rows keep different counts, a row's rejected tokens stay behind as
dead columns: mixers never see them, and kept softmax layers have them hidden by the attention mask until `compact`
takes them out.

Letters: B batch, S columns of the cache, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from linearize.errors import InputError
from linearize.modeling.cache import MixerCacheLayer


def check_past_mask(cache: Cache | None, attention_mask: Tensor | None) -> None:
    """Refuse a mask that says something else of the past tokens than what the mixers were told when they read them.

    Raises:
        InputError: zeros where every past token was read, or no mask where some were padding.
    """
    layers = [] if cache is None else [layer for layer in cache.layers if isinstance(layer, MixerCacheLayer)]
    if not layers or not (past := layers[0].get_seq_length()):
        return
    if attention_mask is None and layers[0].has_dead:
        raise InputError(
            "the cache holds padding, or tokens that a row did not keep, and no attention_mask was given: give it for "
            "all columns, with zeros there (accept_rows returns those of the last tokens)"
        )
    if attention_mask is not None and not layers[0].has_dead and not bool(attention_mask[:, :past].all()):
        raise InputError(
            "attention_mask hides past tokens that are in the state already: a mixer cannot forget them; "
            "give ones for them, or start without a cache"
        )


def accept_rows(cache: Cache, counts_B: Sequence[int] | Tensor, total: int) -> Tensor:
    """Row b keeps the first `counts_B[b]` of the last `total` tokens of the cache.

    Columns that no row keeps are dropped from all layers. Returns the attention mask of those that stay, `[B, max of
    counts_B]` int64 with 0 on dead ones: it takes the place of the mask's last `total` columns.

    Raises:
        InputError: counts out of range, or a layer that cannot roll back, or not by row; nothing is changed then.
    """
    counts = counts_B.tolist() if isinstance(counts_B, Tensor) else list(counts_B)
    if not counts or not all(0 <= count <= total for count in counts):
        raise InputError(f"rows keep {counts} of {total} tokens: give one count per row, each from 0 to {total}")
    most = max(counts)
    layer: Any
    for index, layer in enumerate(cache.layers):
        _check(index, layer, len(counts), total, ragged=min(counts) < most)
    for layer in cache.layers:
        if isinstance(layer, MixerCacheLayer):
            layer.accept(counts)
        else:
            layer.crop(most - total)
    device = counts_B.device if isinstance(counts_B, Tensor) else torch.device("cpu")
    return (torch.arange(most, device=device) < torch.tensor(counts, device=device)[:, None]).long()


def _check(index: int, layer: Any, rows: int, total: int, *, ragged: bool) -> None:
    if isinstance(layer, MixerCacheLayer):
        if layer.held != total or (layer.pending is not None and layer.pending.inputs[0].shape[0] != rows):
            raise InputError(
                f"layer {index} holds {layer.held} tokens back and {total} were to be decided in {rows} rows: call "
                "activate_past_recording first and decide on all tokens since the last acceptance"
            )
    elif not getattr(layer, "is_croppable", False):
        raise InputError(f"layer {index} of the cache ({type(layer).__name__}) cannot roll back: use a DynamicCache")
    elif ragged and not _is_whole(layer):
        raise InputError(
            f"layer {index} keeps softmax attention over a sliding window, in which rows of a batch cannot keep "
            "different numbers of tokens: decode one row at a time"
        )


def _is_whole(layer: object) -> bool:
    return isinstance(layer, DynamicLayer) and not isinstance(layer, DynamicSlidingWindowLayer)


def compact(cache: Cache, mask_BS: Tensor) -> Tensor:
    """Take dead columns out of the cache; gives the mask of what stays, `[B, S']`, S' the most tokens of a row.

    `mask_BS`: 1 where a column of the cache is a token of the row. Each row's tokens move to the right, behind padding
    on the left. To be called between `accept_rows` and the next forward pass; costs a copy of the kept softmax layers'
    keys and values, so once in a while is enough.

    Raises:
        InputError: a mask that is not of the cache's size, or a cache that keeps a sliding window of softmax attention;
            nothing is changed then.
    """
    columns = cache.get_seq_length()
    if mask_BS.dim() != 2 or mask_BS.shape[1] != columns:
        raise InputError(
            f"compact: the mask has shape {list(mask_BS.shape)}, the cache {columns} columns: give them all"
        )
    softmax: list[Any] = [layer for layer in cache.layers if not isinstance(layer, MixerCacheLayer)]
    if not all(_is_whole(layer) for layer in softmax):
        raise InputError(
            "compact: a layer of the cache keeps no whole text (sliding window or static): nothing to take out"
        )
    if any(isinstance(layer, MixerCacheLayer) and layer.held for layer in cache.layers):
        raise InputError("compact: tokens are waiting to be accepted or dropped: call accept_rows first")
    live = mask_BS.bool()
    width = int(live.sum(-1).max())
    has_dead = not bool(live.sum(-1).eq(width).all())
    order = live.long().argsort(dim=1, stable=True)[:, columns - width :]
    for layer in softmax:
        if layer.is_initialized:
            layer.keys, layer.values = (_take(x, order) for x in (layer.keys, layer.values))
    for layer in cache.layers:
        if isinstance(layer, MixerCacheLayer):
            layer.cumulative_length -= columns - width
            layer.has_dead = has_dead
    return mask_BS.gather(1, order)


def _take(x_BGSD: Tensor, order_BN: Tensor) -> Tensor:
    index = order_BN.to(x_BGSD.device)[:, None, :, None]
    return x_BGSD.gather(2, index.expand(-1, x_BGSD.shape[1], -1, x_BGSD.shape[3]))
