"""What the benchmarks of a GPU share: its clock, what the machine reaches at best, and small runs where there is none.

With `--interpret` everything runs small on a CPU, kernels in Triton's interpreter: the scripts are proven, the times
mean nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from linearize.evaluation.speed.running import Timing
from linearize.ops.triton import has_triton

PACKAGES = ("triton", "flash-attn", "flash-linear-attention", "mamba-ssm", "causal-conv1d")
FLUSH_BYTES = 512 * 2**20  # several times the largest L2 cache there is
MATMUL, COPY = 8192, 2**30  # side of the matrices, bytes of the copy
Run = Callable[[], Any]


def arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None, small: Mapping[str, Any]) -> Any:
    """The options; `--interpret` sets those to `small` that were not given."""
    parser.add_argument("--interpret", action="store_true", help="run everything small, on CPU; times mean nothing")
    first, _ = parser.parse_known_args(argv)
    if first.interpret:
        parser.set_defaults(**small)
    return parser.parse_args(argv)


def device_for(chosen: Any, module: str, argv: Sequence[str] | None) -> torch.device | None:
    """Where to run; None, and one line that says so, where nothing can be. Starts anew for the interpreter."""
    if chosen.interpret and has_triton() and os.environ.get("TRITON_INTERPRET") != "1":  # read when triton is imported
        again = [sys.executable, "-m", module, *(sys.argv[1:] if argv is None else argv)]
        sys.exit(subprocess.run(again, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode)
    if has_triton() and (chosen.interpret or torch.cuda.is_available()):
        return torch.device("cpu" if chosen.interpret else "cuda")
    print("needs a GPU and triton: nothing was measured (--interpret runs everything small, without times)")
    return None


def facts(device: torch.device) -> dict[str, Any]:
    """Name, driver and versions; the GPU's own only where there is one."""
    results: dict[str, Any] = {"device": device.type, "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            results[package] = version(package)
    if device.type != "cuda":
        return results
    shown = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError):
        results["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip().splitlines()[:1]
    return results | {
        "gpu": shown.name,
        "capability": f"{shown.major}.{shown.minor}",
        "memory_bytes": shown.total_memory,
        "multiprocessors": shown.multi_processor_count,
    }


class Clock:
    """Times runs in turn, each from cold caches: on a GPU by events, with all of the L2 cache overwritten before."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def seconds(self, run: Run) -> float:
        """Of one run."""
        if self._flush is None:
            began = time.perf_counter()
            run()
            return time.perf_counter() - began
        self._flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)  # the launches are queued before the device is free for them
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    def interleaved(self, runs: Mapping[str, Run], repeats: int, warmup: int = 3) -> dict[str, Timing | str]:
        """All runs in turn, `repeats` times round; a run that fails (memory, an unknown shape) gives its reason."""
        results: dict[str, list[float]] = {}
        failed: dict[str, str] = {}
        for turn in range(warmup + repeats):
            for name, run in runs.items():
                if name in failed:
                    continue
                try:
                    took = self.seconds(run)
                except (RuntimeError, NotImplementedError, ImportError, TypeError) as error:
                    failed[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
                    self._let_go()
                    continue
                if turn >= warmup:
                    results.setdefault(name, []).append(took)
        return {name: failed[name] if name in failed else _timing(results[name]) for name in runs}

    def _let_go(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _timing(seconds: list[float]) -> Timing:
    median = statistics.median(seconds)
    return Timing(seconds=median, lowest=min(seconds), highest=max(seconds), cpu_seconds=median)


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """What this machine reached in this run: floating-point operations of a large product, bytes of a large copy (read
    and written), both in a second."""

    flops: float
    bytes: float


def peaks(clock: Clock, dtype: torch.dtype, *, side: int = MATMUL, size: int = COPY) -> Peaks:
    """Measured at the best of several runs."""
    device = clock.device
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    runs: dict[str, Run] = {"mm": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times = {name: min(clock.seconds(run) for _ in range(5)) for name, run in runs.items()}
    return Peaks(flops=2 * side**3 / times["mm"], bytes=2 * size / times["copy"])


def shares(timing: Timing, peak: Peaks, *, flops: float, moved: float) -> dict[str, float]:
    """Shares of both peaks that a run with this work reached."""
    return {
        "share_of_matmul_peak": flops / timing.seconds / peak.flops,
        "share_of_bandwidth": moved / timing.seconds / peak.bytes,
    }


def timings_json(times: Mapping[str, Timing | str]) -> dict[str, Any]:
    """For JSON: milliseconds (median, lowest, highest), or the reason."""
    return {
        name: x if isinstance(x, str) else [round(1e3 * t, 6) for t in (x.seconds, x.lowest, x.highest)]
        for name, x in times.items()
    }


def fastest(times: Mapping[str, Timing | str], names: Iterable[str]) -> str | None:
    """The fastest of these runs; None where none of them ran."""
    ran = {name: x.seconds for name in names if isinstance(x := times.get(name), Timing)}
    return min(ran, key=lambda name: ran[name]) if ran else None


def ratio(times: Mapping[str, Timing | str], above: str | None, below: str | None) -> float | None:
    """How many times as long `above` takes as `below`; None where one did not run."""
    a, b = times.get(above or ""), times.get(below or "")
    return a.seconds / b.seconds if isinstance(a, Timing) and isinstance(b, Timing) else None
