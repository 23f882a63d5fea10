"""A model that reads through its cache: random text, prefill in pieces, one token after the other.

Letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.modeling.cache_argument import cache_of, with_cache


def random_text(models: Sequence[PreTrainedModel], batch: int, length: int, seed: int) -> Tensor:
    """Token ids `[batch, length]` on the first model's device, drawn from what all the models know."""
    vocabulary = min(model.config.get_text_config().vocab_size for model in models)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch, length), generator=generator).to(models[0].device)


def feed(model: Any, cache: Any, ids_BT: Tensor) -> tuple[Tensor, Any]:
    """Read tokens: the logits of the last one, `[B, V]`, and the cache (None: the model makes its own)."""
    out = model(input_ids=ids_BT, use_cache=True, **with_cache(model, cache), **_last_only(model))
    return out.logits[:, -1], cache_of(out)


def prefill(model: Any, cache: Any, ids_BT: Tensor, chunk: int) -> tuple[Tensor, Any]:
    """`feed` in pieces of at most `chunk` tokens."""
    logits_BV = ids_BT.new_empty(0)
    for piece_BT in ids_BT.split(chunk, dim=1):
        logits_BV, cache = feed(model, cache, piece_BT)
    return logits_BV, cache


def decode(model: Any, cache: Any, ids_BT: Tensor) -> Any:
    """Read tokens one by one, choosing the next greedily each time (and not using it); the cache after them."""
    for token_B1 in ids_BT.split(1, dim=1):
        logits_BV, cache = feed(model, cache, token_B1)
        logits_BV.argmax(dim=-1)
    return cache


def repeated(cache: Any, rows: int) -> Any:
    """A copy of a cache of one row with that row `rows` times."""
    copied = copy.deepcopy(cache)
    for layer in copied.layers:
        if hasattr(layer, "batch_repeat_interleave"):
            layer.batch_repeat_interleave(rows)
        else:
            layer.keys = layer.keys.repeat_interleave(rows, dim=0)
            layer.values = layer.values.repeat_interleave(rows, dim=0)
    return copied


def _last_only(model: Any) -> dict[str, int]:
    """The keyword for logits of the last token only, for models that know it."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


@contextmanager
def measuring(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Models in eval mode and no gradients, for as long as the block lasts."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for model, was_training in zip(models, training, strict=True):
            model.train(was_training)
