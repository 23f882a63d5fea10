"""Bytes of a cache, of a model's weights, and the most that a run takes at once."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from linearize.ops.window_linear.decoder import WindowDecoder


def cache_bytes(cache: Any) -> int:
    """Return the bytes that the layers of a transformers cache occupy.

    Tensors are found in the layers' attributes, through dataclasses, tuples, lists and dicts. Each storage counts
    once and whole: a small view keeps the whole tensor it was cut from alive.
    """
    storages: dict[int, int] = {}
    for layer in cache.layers:
        _collect(vars(layer), storages)
    return sum(storages.values())


def weight_bytes(model: PreTrainedModel) -> int:
    """Return the bytes of a model's parameters and buffers, shared ones once."""
    storages: dict[int, int] = {}
    _collect([*model.parameters(), *model.buffers()], storages)
    return sum(storages.values())


def peak_bytes(device: torch.device, run: Callable[[], Any]) -> int:
    """Return the most bytes that tensors made by `run` took at once; what was there before (weights) does not count.

    On a GPU from torch's own counter. On the CPU from the allocations that torch's profiler reports: exact for small
    models too, where the resident memory of a process mostly shows what its allocator kept. So `run` must make all it
    measures itself: what it frees of earlier tensors is not known to the profiler.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    from torch.autograd.profiler import profile

    meter = profile(use_cpu=True, profile_memory=True)
    collects = gc.isenabled()
    gc.disable()  # garbage of earlier runs is not freed in the middle of this one
    with _quiet():
        meter.__enter__()
    try:
        made = run()
    finally:
        with _quiet():
            meter.__exit__(None, None, None)
        if collects:
            gc.enable()
    del made
    return _highest(meter.kineto_results)


def _highest(profile: Any) -> int:
    """Return the highest sum of bytes allocated and freed, in order of time."""
    total = highest = 0
    for event in sorted((e for e in profile.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the process's stderr: starting and stopping the profiler writes log lines there."""
    sys.stderr.flush()
    try:
        stderr = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    try:
        with open(os.devnull, "w") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


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
    elif isinstance(value, WindowDecoder):
        _collect(vars(value), storages)
