"""How a model is run for timing: which cache, which attention. A teacher runs in its best configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from transformers import DynamicCache, PreTrainedModel, StaticCache

from linearize.modeling import LinearizedForCausalLM

CacheKind = Literal["static", "dynamic", "own"]
CLEARLY = 1.2  # times as fast as the usual way: then another one is taken
EAGER_BYTES = 2**30  # scores of one layer beyond which a prefill with eager attention is not tried
PRUNED_BEYOND = 2.0  # times as slow at one context: then not tried at longer ones


@dataclass(frozen=True)
class RunConfig:
    """`cache`: preallocated, growing, or the student's own; `attention`: transformers' name of softmax attention."""

    cache: CacheKind
    attention: str

    def __str__(self) -> str:
        return f"{self.cache} cache, {self.attention}"


def run_configs(
    model: PreTrainedModel, caches: Sequence[CacheKind], attentions: Sequence[str]
) -> tuple[RunConfig, ...]:
    """What to try: a student has its own cache and its attention as loaded, any other model each cache with each
    attention; flash attention joins where it is installed, on a GPU in half precision."""
    if isinstance(model, LinearizedForCausalLM):
        return (RunConfig("own", str(model.config._attn_implementation or "eager")),)
    names = list(dict.fromkeys([*attentions, *(["flash_attention_2"] if _has_flash(model) else [])]))
    return tuple(RunConfig(cache, name) for name in names for cache in caches)


def _has_flash(model: PreTrainedModel) -> bool:
    from transformers.utils import is_flash_attn_2_available

    return model.device.type == "cuda" and model.dtype.itemsize == 2 and bool(is_flash_attn_2_available())


def eager_bytes(model: PreTrainedModel, batch: int, context: int, chunk: int) -> int:
    """What one layer's softmax scores in fp32 take where they are written out, as eager attention does."""
    heads: int = model.config.get_text_config().num_attention_heads
    return 4 * batch * heads * context * min(chunk, context)


def fastest(seconds: Mapping[RunConfig, float]) -> RunConfig:
    """The first way that no other is clearly faster than, so that noise does not change the choice."""
    best = min(seconds.values())
    return next(config for config, taken in seconds.items() if taken <= CLEARLY * best)


def new_cache(config: RunConfig, model: PreTrainedModel, room: int) -> Any:
    """An empty cache for `room` tokens; None where the model makes its own."""
    if config.cache == "static":
        return StaticCache(config=model.config, max_cache_len=room)
    return DynamicCache(config=model.config) if config.cache == "dynamic" else None


@contextmanager
def attending(model: PreTrainedModel, attention: str) -> Iterator[None]:
    """The model with this attention, for as long as the block lasts; a student stays as it is."""
    before = model.config._attn_implementation
    if isinstance(model, LinearizedForCausalLM) or attention == before:
        yield
        return
    model.set_attn_implementation(attention)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
