"""One version of the package against another on the same teacher: first training step, `plan`, both stages, decoding.

    git worktree add /tmp/before bd53180
    python -m benchmarks.before_after before=/tmp/before after=. --teacher DIR --data novels.jsonl

Every version runs in processes of its own, through its command line and what every version of the package has. Seconds
of a step are the median of a few; a conversion is followed up to its last step, or for `--limit` seconds (no first step
by then: null); `quiet` is the longest time in which it wrote nothing to the terminal before its first step. Decoding:
medians of 32 tokens after a random text, teacher with a preallocated cache and `window-linear` in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.timing import publish

ROWS, LENGTH, POLL = 5, 2048, 0.05
PARTS = ("decoding", "plan", "conversion")


def environment(tree: Path, threads: int) -> dict[str, str]:
    """That of a process which runs this version."""
    own = {"PYTHONPATH": str(tree.resolve() / "src"), "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **own}


def plan(tree: Path, teacher: str, threads: int) -> dict[str, Any]:
    """Seconds of `plan`, and the parameters that it counts."""
    command = [sys.executable, "-m", "linearize", "plan", teacher, "--json"]
    began = time.monotonic()
    run = subprocess.run(command, env=environment(tree, threads), capture_output=True, text=True, check=True)
    seconds = time.monotonic() - began
    counted = re.search(r'"(?:teacher_)?parameters": (\d+)', run.stdout)
    return {"plan_seconds": seconds, "plan_parameters": int(counted[1]) if counted else None}


def conversion(tree: Path, teacher: str, data: str, threads: int, limit: float) -> dict[str, Any]:
    """Seconds from the command to the first step, of a step of each stage, and of what is not steps."""
    tokens = ROWS * LENGTH
    settings = [f"data.length={LENGTH}"]
    settings += [
        f"stages.{number}.{key}={value}" for number in (0, 1) for key, value in (("tokens", tokens), ("batch", 1))
    ]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "linearize", "convert", teacher, "--data", data, "--out", f"{folder}/student"]
        command += [part for setting in settings for part in ("--set", setting)]
        began = time.monotonic()
        process = subprocess.Popen(
            command, env=environment(tree, threads), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            written, logged = _followed(process, Path(folder), began, limit)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    last = max((moment for at in logged.values() for moment in at), default=None)
    first = min((moment for at in logged.values() for moment in at), default=None)
    until = limit if first is None else first
    moments = [0.0, *(moment for moment in written if moment < until), until]
    quiet = max(later - earlier for earlier, later in pairwise(moments))
    steps = {
        stage: statistics.median(later - earlier for earlier, later in pairwise(at))
        for stage, at in logged.items()
        if len(at) == ROWS
    }
    trained = sum(steps.get(stage, 0.0) * len(at) for stage, at in logged.items())
    return {
        "first_step_seconds": first,
        "quiet_seconds": quiet,
        **{f"{stage}_tokens_per_second": LENGTH / seconds for stage, seconds in steps.items()},
        "last_step_seconds": last,
        "not_training_seconds": None if last is None else last - trained,
    }


def _followed(
    process: subprocess.Popen[bytes], folder: Path, began: float, limit: float
) -> tuple[list[float], dict[str, list[float]]]:
    """When the process wrote something, and when each step of each stage was logged, seconds."""
    written: list[float] = []
    logged: dict[str, list[float]] = defaultdict(list)
    seen: set[tuple[str, int]] = set()
    shown = b""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        ended, now = False, 0.0
        while not ended and len(seen) < 2 * ROWS and now < limit:
            ended = process.poll() is not None
            now = time.monotonic() - began
            if selector.select(POLL) and (new := os.read(process.stdout.fileno(), 1 << 16)):
                written.append(now)
                shown = (shown + new)[-2000:]
            for path in folder.rglob("training.jsonl"):
                with suppress(FileNotFoundError):  # its folder is being renamed
                    new_steps = set(_steps(path.read_text(encoding="utf-8", errors="replace"))) - seen
                    for stage, step in sorted(new_steps):
                        seen.add((stage, step))
                        logged[stage].append(now)
    if process.returncode:
        raise SystemExit(f"the conversion ended with {process.returncode}: {shown.decode(errors='replace')}")
    return written, logged


def _steps(text: str) -> list[tuple[str, int]]:
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # half of a line
        if "loss" in record and record["step"] > 0:
            records.append((record["stage"], record["step"]))
    return records


DECODE = """
import json, statistics, sys, time, torch
from transformers import AutoModelForCausalLM, StaticCache
from linearize.mixers import MIXERS
from linearize.modeling import LinearizedForCausalLM
torch.set_flush_denormal(True)
teacher = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
options = dict(feature_map="gain", feature_dim=32, shift="shared", num_sinks=1, window_shape="terraced")
mixer = MIXERS["lolcats"](**options)
student = LinearizedForCausalLM.from_teacher(teacher, [mixer] * teacher.config.num_hidden_layers).eval()
teacher = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
result = {}
with torch.inference_mode():
    for context in (256, 1024, 4096):
        ids = torch.randint(3, teacher.config.vocab_size, (1, context + 32), generator=torch.Generator().manual_seed(0))
        static = StaticCache(config=teacher.config, max_cache_len=context + 32)
        caches = {"teacher": static, "student": None}
        models, times = {"teacher": teacher, "student": student}, {"teacher": [], "student": []}
        for name, model in models.items():
            output = model(input_ids=ids[:, :context], past_key_values=caches[name], use_cache=True)
            caches[name] = output.past_key_values
        for at in range(context, context + 32):
            for name, model in models.items():
                began = time.perf_counter()
                model(input_ids=ids[:, at : at + 1], past_key_values=caches[name], use_cache=True)
                times[name].append(time.perf_counter() - began)
        result |= {f"{name}_ms_at_{context}": 1e3 * statistics.median(of) for name, of in times.items()}
print(json.dumps(result))
"""


def decoding(tree: Path, teacher: str, threads: int) -> dict[str, Any]:
    """Milliseconds of a token at three contexts, fp32."""
    command = [sys.executable, "-c", DECODE, teacher]
    run = subprocess.run(command, env=environment(tree, threads), stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all versions and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="+", metavar="NAME=TREE")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds to follow a conversion for")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for version in chosen.versions:
        name, _, tree = version.partition("=")
        commit = subprocess.run(["git", "-C", tree, "describe", "--always", "--dirty"], capture_output=True, text=True)
        rows.append({"version": name, "commit": commit.stdout.strip()})
    parts: dict[str, Callable[[Path], dict[str, Any]]] = {
        "decoding": lambda tree: decoding(tree, chosen.teacher, chosen.threads),
        "plan": lambda tree: plan(tree, chosen.teacher, chosen.threads),
        "conversion": lambda tree: conversion(tree, chosen.teacher, chosen.data, chosen.threads, chosen.limit),
    }
    for name in chosen.parts:
        for row, version in zip(rows, chosen.versions, strict=True):
            row |= parts[name](Path(version.partition("=")[2]))
            print(json.dumps(row), file=sys.stderr, flush=True)
    setting = {
        "threads": chosen.threads,
        "length": LENGTH,
        "rows": ROWS,
        "limit": chosen.limit,
        "recipe": "window-linear",
        "dtype": "fp32",
    }
    asked = "first step within 30 s and a pass over one batch; plan within 15 s; decoding at least the teacher's"
    publish(asked, setting, rows, chosen.out)


if __name__ == "__main__":
    main()
