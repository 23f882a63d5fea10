"""What a model calls its cache: `cache` since transformers 5.24, `past_key_values` before it and in older remote code.

A forward with `**kwargs` takes the other name without an error and ignores it, so the name is read from the signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Literal

from torch import nn
from transformers import Cache, GenerationMixin
from transformers.utils import ModelOutput

from linearize.errors import InputError

CacheArgument = Literal["cache", "past_key_values"]
NAMES: tuple[CacheArgument, ...] = ("cache", "past_key_values")


def cache_argument(model: nn.Module) -> CacheArgument:
    """The name that this model's forward takes; transformers' own name where the signature has neither."""
    return _argument_of(type(model).forward)


def with_cache(model: nn.Module, cache: Cache | None) -> dict[str, Cache | None]:
    """The cache as a keyword argument of this model's forward."""
    return {cache_argument(model): cache}


def cache_of(output: ModelOutput) -> Cache | None:
    """The cache in a model's output, under either name."""
    cache: Cache | None = output.get("cache")
    return cache if cache is not None else output.get("past_key_values")


def given_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The one cache that a caller passed, under either name.

    Raises:
        InputError: two different caches, or something that is not a `Cache`.
    """
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise InputError("cache and past_key_values are two names of one argument, and two caches were given: give one")
    chosen = past_key_values if cache is None else cache
    if chosen is not None and not isinstance(chosen, Cache):
        raise InputError(
            f"the cache is a {type(chosen).__name__}: give a transformers DynamicCache(config=model.config), "
            "or none and use_cache=True"
        )
    return chosen


@cache
def _argument_of(forward: Callable[..., object]) -> CacheArgument:
    parameters = inspect.signature(forward).parameters
    return next((name for name in NAMES if name in parameters), _library_argument())


@cache
def _library_argument() -> CacheArgument:
    parameters = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in parameters else "past_key_values"
