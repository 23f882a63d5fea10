"""What every method is measured with. Needs torch and numpy alone, so that it runs in a peer's own environment.

Letters: B batch, R rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SECTIONS = ("loss", "steps", "contexts")
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


@dataclass(frozen=True)
class Text:
    """Token ids of `benchmarks.peers.text`: `train` `[N]`, one long text, and `heldout` `[R, T]`, a document a row."""

    train_T: Tensor
    heldout_RT: Tensor
    digest: str

    @classmethod
    def load(cls, path: Path) -> Text:
        """Read the file. Raises ValueError for one without the two arrays."""
        try:
            with np.load(path) as arrays:
                train, heldout = arrays["train"], arrays["heldout"]
        except (OSError, KeyError, ValueError) as error:
            raise ValueError(f"--text {path}: {error}: write it with python -m benchmarks.peers.text") from error
        digest = hashlib.sha256(train.tobytes() + heldout.tobytes()).hexdigest()[:16]
        return cls(torch.from_numpy(train).long(), torch.from_numpy(heldout).long(), digest)


def parser(what: str | None) -> argparse.ArgumentParser:
    """Options that all methods have."""
    made = argparse.ArgumentParser(description=what, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--teacher", type=Path, required=True, help="folder of a Llama")
    made.add_argument("--text", type=Path, required=True, help="tokens written by benchmarks.peers.text")
    made.add_argument("--out", type=Path, help="JSON file to write; the result is printed in any case")
    made.add_argument("--measure", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    made.add_argument("--layers", type=int, help="keep only the first layers of the teacher")
    made.add_argument("--step-lengths", type=int, nargs="+", default=[512, 1024])
    made.add_argument("--train-tokens", type=int, default=32768)
    made.add_argument("--train-length", type=int, default=512)
    made.add_argument("--heldout-rows", type=int, default=8)
    made.add_argument("--heldout-length", type=int, default=1024)
    made.add_argument("--contexts", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    made.add_argument("--new-tokens", type=int, default=16, help="tokens decoded after each context")
    made.add_argument("--repeats", type=int, default=1)
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--seed", type=int, default=0)
    return made


def window_options(made: argparse.ArgumentParser) -> None:
    """Options of attention with a window."""
    made.add_argument("--window", type=int, default=64)
    made.add_argument("--feature-dim", type=int, default=64)
    made.add_argument("--shape", choices=("terraced", "sliding"), default="terraced")
    made.add_argument("--exchange", type=Path, help="file with weights and outputs of the published attention")


def check(options: argparse.Namespace, text: Text) -> None:
    """Raise ValueError, in one line, for sizes that do not fit together."""
    for name in ("layers", "train_length", "heldout_rows", "heldout_length", "new_tokens", "repeats", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: give at least 1")
    tokens, (rows, length) = len(text.train_T), text.heldout_RT.shape
    needs = {
        "loss": ("--train-tokens", options.train_tokens),
        "steps": ("--step-lengths", max(options.step_lengths)),
        "contexts": ("--contexts and --new-tokens", max(options.contexts) + options.new_tokens),
    }
    for name, need in (needs[section] for section in options.measure):
        if need > tokens:
            raise ValueError(f"{name}: {need} tokens needed, the text has {tokens}: lower it or write a longer text")
    if "loss" in options.measure and options.train_tokens < options.train_length:
        raise ValueError(f"--train-tokens {options.train_tokens}: give at least --train-length {options.train_length}")
    if options.heldout_rows > rows or options.heldout_length > length:
        raise ValueError(
            f"--heldout-rows {options.heldout_rows} of --heldout-length {options.heldout_length}: "
            f"the text has {rows} of {length}"
        )
    window = getattr(options, "window", None)
    if window is not None:
        lengths = {*options.step_lengths, *options.contexts, options.train_length, options.heldout_length}
        if wrong := sorted(n for n in lengths if n % window or n < 2 * window):
            raise ValueError(f"{wrong[0]} tokens: with --window {window} every length must be a multiple, at least two")


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
    run = timed(lambda: method.train(text.train_T[: count * length].view(count, length)))
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
    runs = {n: [timed(lambda ids=ids: method.step(ids)) for _ in range(options.repeats)] for n, ids in rows.items()}
    return {str(n): _median(tries) for n, tries in runs.items()}


def _contexts(method: Method, options: argparse.Namespace, text: Text) -> dict[str, Any]:
    measured = {}
    with torch.inference_mode():
        shortest = min(options.contexts)
        method.decode(method.prefill(text.train_T[None, :shortest]), text.train_T[None, :1])
        for context in options.contexts:
            prefills, decodes = [], []
            for _ in range(options.repeats):
                run = timed(lambda n=context: method.prefill(text.train_T[None, :n]))
                cache = run.pop("value")
                new = text.train_T[None, context : context + options.new_tokens]
                decodes.append(timed(lambda cache=cache, new=new: _decode(method, cache, new)))
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
        partial = options.out.with_suffix(".tmp")
        partial.write_text(line, encoding="utf-8")
        os.replace(partial, options.out)
