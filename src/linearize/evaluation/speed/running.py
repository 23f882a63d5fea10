"""How a model is run and timed: its cache and attention, random text in chunks or token by token, several in turn.

Letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from linearize.modeling import LinearizedForCausalLM
from linearize.modeling.cache_argument import cache_of, with_cache
from linearize.modeling.forward_call import last_logits

CacheKind = Literal["static", "dynamic", "own"]
CLEARLY = 1.2  # times as fast as the usual configuration: then another one is taken


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
    """Return what to try: a student has its own cache and its attention as loaded, any other model each cache with each
    attention; flash attention joins where it is installed, on a GPU in half precision."""
    if isinstance(model, LinearizedForCausalLM):
        return (RunConfig("own", str(model.config._attn_implementation or "eager")),)
    names = list(dict.fromkeys([*attentions, *(["flash_attention_2"] if _has_flash(model) else [])]))
    return tuple(RunConfig(cache, name) for name in names for cache in caches)


def _has_flash(model: PreTrainedModel) -> bool:
    from transformers.utils import is_flash_attn_2_available

    return model.device.type == "cuda" and model.dtype.itemsize == 2 and bool(is_flash_attn_2_available())


def fastest(seconds: Mapping[RunConfig, float]) -> RunConfig:
    """Return the first configuration that no other is clearly faster than, so that noise does not change the choice."""
    best = min(seconds.values())
    return next(config for config, taken in seconds.items() if taken <= CLEARLY * best)


def new_cache(config: RunConfig, model: PreTrainedModel, capacity: int) -> Any:
    """Return an empty cache for `capacity` tokens; None where the model makes its own."""
    if config.cache == "static":
        return StaticCache(config=model.config, max_cache_len=capacity)
    return DynamicCache(config=model.config) if config.cache == "dynamic" else None


@contextmanager
def attending(model: PreTrainedModel, attention: str) -> Iterator[None]:
    """Give the model this attention inside the `with` block; a student stays as it is."""
    before = model.config._attn_implementation
    if isinstance(model, LinearizedForCausalLM) or attention == before:
        yield
        return
    model.set_attn_implementation(attention)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def measuring(models: Sequence[PreTrainedModel]) -> Iterator[None]:
    """Models in eval mode and no gradients inside the `with` block."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for model, was_training in zip(models, training, strict=True):
            model.train(was_training)


def random_text(models: Sequence[PreTrainedModel], batch: int, length: int, seed: int) -> Tensor:
    """Return token ids `[batch, length]` on the first model's device, drawn from what all the models know."""
    vocabulary = min(model.config.get_text_config().vocab_size for model in models)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch, length), generator=generator).to(models[0].device)


def feed(model: Any, cache: Any, ids_BT: Tensor) -> tuple[Tensor, Any]:
    """Read tokens; return the logits `[B, V]` of the last one and the cache. `cache` None: the model makes its own."""
    out = model(input_ids=ids_BT, use_cache=True, **with_cache(model, cache), **last_logits(model, ids_BT))
    return out.logits[:, -1], cache_of(out)


def prefill(model: Any, cache: Any, ids_BT: Tensor, chunk: int) -> tuple[Tensor, Any]:
    """`feed` in chunks of at most `chunk` tokens."""
    logits_BV = ids_BT.new_empty(0)
    for chunk_BT in ids_BT.split(chunk, dim=1):
        logits_BV, cache = feed(model, cache, chunk_BT)
    return logits_BV, cache


def decode(model: Any, cache: Any, ids_BT: Tensor) -> Any:
    """Read tokens one by one, choosing the next greedily each time (and not using it); return the cache after them."""
    for token_B1 in ids_BT.split(1, dim=1):
        logits_BV, cache = feed(model, cache, token_B1)
        logits_BV.argmax(dim=-1)
    return cache


def repeated(cache: Any, rows: int) -> Any:
    """Return a copy of a cache of one row with that row `rows` times."""
    copied = copy.deepcopy(cache)
    for layer in copied.layers:
        if hasattr(layer, "batch_repeat_interleave"):
            layer.batch_repeat_interleave(rows)
        else:
            layer.keys = layer.keys.repeat_interleave(rows, dim=0)
            layer.values = layer.values.repeat_interleave(rows, dim=0)
    return copied


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one thing that was timed several times: median, lowest and highest, of the wall clock; and the median
    of the processor time, which other programs on the machine disturb less."""

    seconds: float
    lowest: float
    highest: float
    cpu_seconds: float

    def ms_per_token(self, tokens: int) -> tuple[float, tuple[float, float]]:
        """Return milliseconds of one of `tokens` steps: the median, and the lowest and highest."""
        scale = 1000 / tokens
        return self.seconds * scale, (self.lowest * scale, self.highest * scale)


def interleaved(
    runs: Mapping[str, Callable[[], Any]],
    repeats: int,
    *,
    warmup: int = 1,
    before: Callable[[str], Any] = lambda name: None,
) -> dict[str, Timing]:
    """Time all runs in turn, `repeats` times round after `warmup` untimed rounds, so that disturbances hit all alike.

    `before(name)` is called untimed ahead of each run.
    """
    for _ in range(warmup):
        for name, run in runs.items():
            before(name)
            run()
    wall: dict[str, list[float]] = {name: [] for name in runs}
    cpu: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            before(name)
            began, began_cpu = now(), time.process_time()
            run()
            wall[name].append(now() - began)
            cpu[name].append(time.process_time() - began_cpu)
    return {
        name: Timing(
            seconds=statistics.median(times),
            lowest=min(times),
            highest=max(times),
            cpu_seconds=statistics.median(cpu[name]),
        )
        for name, times in wall.items()
    }


@dataclass(frozen=True, kw_only=True)
class DecodeRun:
    """A model that decodes: `filled()` makes the cache of its context anew for each repeat."""

    model: PreTrainedModel
    config: RunConfig
    filled: Callable[[], Any]


def time_decode(runs: Mapping[str, DecodeRun], ids_BT: Tensor, repeats: int, *, warmup: int = 1) -> dict[str, Timing]:
    """Time the same tokens `[B, T]` one by one after each model's context, in turn; caches are filled untimed."""
    cache: Any = None

    def fill(name: str) -> None:
        nonlocal cache
        cache = None  # the one before is freed first
        cache = runs[name].filled()

    with ExitStack() as stack:
        for run in runs.values():
            stack.enter_context(attending(run.model, run.config.attention))
        steps = {name: lambda model=run.model: decode(model, cache, ids_BT) for name, run in runs.items()}
        return interleaved(steps, repeats, warmup=warmup, before=fill)


def now() -> float:
    """Return seconds on a clock, once the GPU (where there is one) has done its work."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
