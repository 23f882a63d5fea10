"""What every method is measured with. Needs torch and numpy alone, so that it runs in a peer's own environment.

Letters: B batch, R rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers.options import Text

CLEAR_PEAK = Path("/proc/self/clear_refs")
STATUS = Path("/proc/self/status")


class Method(ABC):
    """A teacher, and the student that a method makes of it. `convert` is called once, after the teacher's losses."""

    @abstractmethod
    def convert(self) -> None:
        """Replace the teacher by the untrained student."""

    @abstractmethod
    def logits(self, ids_BT: Tensor) -> Tensor:
        """Logits `[B, T, V]` of the model as it is now."""

    @abstractmethod
    def step(self, ids_BT: Tensor) -> None:
        """Forward and backward pass of the training loss; gradients are cleared."""

    @abstractmethod
    def train(self, rows_RT: Tensor) -> list[float]:
        """Train on rows, one to an optimiser step; return the loss of each step."""

    @abstractmethod
    def prefill(self, ids_BT: Tensor) -> Any:
        """Read a context, with the logits of its last token; return the cache."""

    @abstractmethod
    def decode(self, cache: Any, ids_B1: Tensor) -> Any:
        """Read one token after a cache; return the new cache."""


def measure(method: Method, options: argparse.Namespace, text: Text) -> dict[str, Any]:
    """Measure the chosen sections; see `README.md` for what is in each."""
    heldout = text.heldout_RT[: options.heldout_rows, : options.heldout_length]
    result: dict[str, Any] = {}
    teacher = row_losses(method, heldout) if "loss" in options.measure else []
    method.convert()
    if "loss" in options.measure:
        result["loss"] = {"teacher": teacher} | _training(method, options, text, heldout)
    if "steps" in options.measure:
        result["steps"] = _steps(method, options, text)
    if "contexts" in options.measure:
        result["contexts"] = _contexts(method, options, text)
    return result


def row_losses(method: Method, rows_RT: Tensor) -> list[float]:
    """Mean next-token loss of each row, nats per token."""
    losses = []
    with torch.inference_mode():
        for ids_1T in rows_RT.split(1):
            logits_TV = method.logits(ids_1T)[0, :-1].float()
            losses.append(float(F.cross_entropy(logits_TV, ids_1T[0, 1:].to(logits_TV.device))))
    return losses


def _training(method: Method, options: argparse.Namespace, text: Text, heldout: Tensor) -> dict[str, Any]:
    length, before = options.train_length, row_losses(method, heldout)
    count = options.train_tokens // length
    run = timed(partial(method.train, text.train_T[: count * length].view(count, length)))
    return {
        "before": before,
        "after": row_losses(method, heldout),
        "heldout_length": options.heldout_length,
        "tokens": count * length,
        "length": length,
        "training_losses": run.pop("value"),
        **run,
    }


def _steps(method: Method, options: argparse.Namespace, text: Text) -> dict[str, Any]:
    rows = {n: text.train_T[None, :n] for n in options.step_lengths}
    method.step(rows[min(rows)])
    runs = {n: [timed(partial(method.step, ids)) for _ in range(options.repeats)] for n, ids in rows.items()}
    return {str(n): _median(tries) for n, tries in runs.items()}


def _contexts(method: Method, options: argparse.Namespace, text: Text) -> dict[str, Any]:
    measured = {}
    with torch.inference_mode():
        shortest = min(options.contexts)
        method.decode(method.prefill(text.train_T[None, :shortest]), text.train_T[None, :1])
        for context in options.contexts:
            prefills, decodes = [], []
            for _ in range(options.repeats):
                run = timed(partial(method.prefill, text.train_T[None, :context]))
                cache = run.pop("value")
                new = text.train_T[None, context : context + options.new_tokens]
                decodes.append(timed(partial(_decode, method, cache, new)))
                prefills.append(run)
                del cache
            measured[str(context)] = {"prefill": _median(prefills), "decode": _median(decodes)}
            measured[str(context)]["decode"]["tokens"] = options.new_tokens
    return measured


def _decode(method: Method, cache: Any, ids_BT: Tensor) -> None:
    for ids_B1 in ids_BT.split(1, dim=1):
        cache = method.decode(cache, ids_B1)


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = sorted(run["seconds"] for run in runs)
    return {
        "seconds": float(np.median(seconds)),
        "all_seconds": seconds,
        "cpu_seconds": float(np.median([run["cpu_seconds"] for run in runs])),
        "peak_bytes": max((run["peak_bytes"] for run in runs if run["peak_bytes"] is not None), default=None),
    }


def timed(run: Callable[[], Any]) -> dict[str, Any]:
    """`value` of the call, its `seconds`, `cpu_seconds`, and `peak_bytes` of the process while it ran (of the GPU's
    memory where there is one; None where the system does not say)."""
    reset_peak()
    began, began_cpu = _now(), time.process_time()
    value = run()
    seconds, cpu = _now() - began, time.process_time() - began_cpu
    return {"value": value, "seconds": seconds, "cpu_seconds": cpu, "peak_bytes": peak_bytes()}


def _now() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak() -> None:
    """Forget the peak so far."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR_PEAK.exists():
        CLEAR_PEAK.write_text("5")


def peak_bytes() -> int | None:
    """The largest resident size of this process since `reset_peak`, weights and libraries included."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    if not CLEAR_PEAK.exists():
        return None
    match = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    return None if match is None else 1024 * int(match[1])


def publish(
    name: str, options: argparse.Namespace, text: Text, result: Mapping[str, Any], provenance: Mapping[str, Any]
) -> None:
    """Print the result of a method, and write it to `--out`."""
    setting = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    setting |= {"teacher": options.teacher.name, "text_digest": text.digest, "dtype": "float32"}
    document = {"method": name, "setting": setting, **result, "provenance": dict(provenance)}
    line = json.dumps(document, indent=1) + "\n"
    print(line)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.out.with_suffix(".tmp")
        temporary.write_text(line, encoding="utf-8")
        os.replace(temporary, options.out)
