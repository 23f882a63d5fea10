"""What one more token costs at a given context: time, and bytes of cache, for student and teacher.

The teacher decodes with a preallocated StaticCache: growing a DynamicCache copies all keys and values for every token,
which would flatter the student.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache

from linearize.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DecodeCost:
    """One model at one context. `ms_per_token` is the median over repeats, `ms_spread` their (lowest, highest)."""

    model: str
    context: int
    batch: int
    ms_per_token: float
    ms_spread: tuple[float, float]
    cache_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)


def decode_cost(
    student: PreTrainedModel | None,
    teacher: PreTrainedModel | None,
    *,
    contexts: Sequence[int] = (256, 1024, 4096),
    batch: int = 1,
    repeats: int = 5,
    tokens: int = 8,
    warmup: int = 4,
    chunk: int = 512,
    seed: int = 0,
) -> list[DecodeCost]:
    """Decode time and cache bytes of both models at each context, teacher with a static, student with its own cache.

    The context is random text, prefilled `chunk` tokens at a time; then `warmup` tokens go untimed, and `repeats`
    runs of `tokens` tokens are timed. Contexts beyond the model's trained length are allowed. Raises InputError for a
    size below 1.
    """
    for name, size in {"batch": batch, "repeats": repeats, "tokens": tokens, "chunk": chunk}.items():
        if size < 1:
            raise InputError(f"decode cost: {name} is {size}: it must be at least 1")
    if min(contexts, default=0) < 1:
        raise InputError(f"decode cost: contexts {list(contexts)}: give at least one, each at least 1")
    costs = []
    for context in sorted(contexts):
        for name, model in (("teacher", teacher), ("student", student)):
            if model is not None:
                room = context + warmup + repeats * tokens
                cache = StaticCache(config=model.config, max_cache_len=room) if name == "teacher" else None
                ids = _random_text(model, batch, room, seed)
                ms, cache = _time_decoding(model, cache, ids, context, warmup, tokens, chunk)
                costs.append(_cost(name, context, batch, ms, cache_bytes(cache)))
    return costs


def _cost(name: str, context: int, batch: int, ms: list[float], size: int) -> DecodeCost:
    return DecodeCost(
        model=name,
        context=context,
        batch=batch,
        ms_per_token=statistics.median(ms),
        ms_spread=(min(ms), max(ms)),
        cache_bytes=size,
    )


def _random_text(model: PreTrainedModel, batch: int, length: int, seed: int) -> Tensor:
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch, length), generator=generator).to(model.device)


@torch.inference_mode()
def _time_decoding(
    model: PreTrainedModel, cache: Any, ids_BT: Tensor, context: int, warmup: int, tokens: int, chunk: int
) -> tuple[list[float], Any]:
    """Milliseconds per token of each repeat, after prefill and warm-up; and the cache as it is then."""
    was_training = model.training
    model.eval()
    try:
        for piece in ids_BT[:, :context].split(chunk, dim=1):
            cache = _feed(model, cache, piece)
        for token in ids_BT[:, context : context + warmup].split(1, dim=1):
            cache = _feed(model, cache, token)
        times = []
        for repeat in ids_BT[:, context + warmup :].split(tokens, dim=1):
            began = _now(model)
            for token in repeat.split(1, dim=1):
                cache = _feed(model, cache, token)
            times.append((_now(model) - began) * 1000 / tokens)
    finally:
        model.train(was_training)
    return times, cache


def _feed(model: PreTrainedModel, cache: Any, ids_BT: Tensor) -> Any:
    return model(input_ids=ids_BT, past_key_values=cache, use_cache=True).past_key_values


def _now(model: PreTrainedModel) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def cache_bytes(cache: Any) -> int:
    """Bytes of memory that the layers of a transformers cache hold.

    Tensors are found in the layers' attributes, through dataclasses, tuples, lists and dicts. Each storage counts
    once and whole: a small view keeps the whole tensor it was cut from alive.
    """
    storages: dict[int, int] = {}
    for layer in cache.layers:
        _collect(vars(layer), storages)
    return sum(storages.values())


def _collect(value: Any, storages: dict[int, int]) -> None:
    """Add the storages of all tensors in `value`, by address."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    elif is_dataclass(value):
        _collect([getattr(value, field.name) for field in fields(value)], storages)
    elif isinstance(value, dict):
        _collect(list(value.values()), storages)
    elif isinstance(value, tuple | list):
        for part in value:
            _collect(part, storages)
