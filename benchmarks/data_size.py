"""Text of any size: memory, disk and time of preparing it, and of the first steps of training on it.

    python -m benchmarks.data_size --tokens 100M --folder SCRATCH --out benchmarks/data_size.json FILE.jsonl ...

The text of the files is cut into documents of 2,000 characters and repeated, each document with a number in front,
until it has about `--tokens` tokens of the tokenizer of the demo's teacher. Each of two processes then converts that
teacher and trains ten steps: the first one (`cold`) with an empty cache, the second (`warm`) with what the first one
kept. `peak_rss` is a process's own peak, with Python, torch, model, and mapped pages that were read; `without_data` is
the same conversion on a few thousand tokens, so that the difference is that of the data.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from linearize.numbers import parse_count
from linearize.storage.atomic import atomic_write_text

STEPS, LENGTH, BATCH = 10, 512, 2
CHARACTERS = 2000  # of a document
SMALL_TOKENS = 60_000
TOKENS_PER_CHARACTER = 0.357  # of the novels, with the demo's tokenizer


class FirstStep:
    """A `Progress` that keeps when the first step was done."""

    def __init__(self) -> None:
        self.at: float | None = None
        self.cpu = 0.0

    def begin(self, name: str, step: int, steps: int) -> None:
        """Nothing."""

    def step(self, step: int, *, loss: float | None, tokens_per_second: float, seconds_left: float) -> None:
        """Keep the time of the first call, on the clock and on the processor, which other programs may share."""
        if self.at is None:
            self.at, self.cpu = time.monotonic(), time.process_time()

    def heldout(self, step: int, loss: float, best: float) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""


def write_text(files: Sequence[Path], tokens: int, path: Path) -> None:
    """Write about so many tokens as JSON lines of `CHARACTERS` characters, the files again and again; none is equal."""
    left = round(tokens / TOKENS_PER_CHARACTER)
    with path.open("w", encoding="utf-8") as out:
        for number, text in enumerate(_parts(files)):
            text = f"{number} {text}"
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            left -= len(text)
            if left <= 0:
                return


def _parts(files: Sequence[Path]) -> Iterator[str]:
    while True:
        for file in files:
            with file.open(encoding="utf-8") as lines:
                for line in lines:
                    text = json.loads(line)["text"]
                    yield from (text[start : start + CHARACTERS] for start in range(0, len(text), CHARACTERS))


def train(spec: str, folder: Path) -> dict[str, Any]:
    """Convert the demo's teacher on the text, ten steps of the first stage; what it took."""
    from linearize.conversion.api import convert
    from linearize.demo.run import TEACHER

    began, progress = time.monotonic(), FirstStep()
    before = time.process_time()
    tokens = STEPS * BATCH * LENGTH
    settings = {
        "data.length": LENGTH, "data.measured_tokens": 4096, "stages.0.tokens": tokens, "stages.0.batch": BATCH,
        "stages.1.tokens": 0,
    }  # fmt: skip
    convert(str(TEACHER), data=[spec], out=folder, overrides=settings, device="cpu", progress=progress, overwrite=True)
    assert progress.at is not None
    return {
        "seconds_to_first_step": round(progress.at - began, 1),
        "cpu_seconds_to_first_step": round(progress.cpu - before, 1), "seconds": round(time.monotonic() - began, 1),
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def measured(text: Path, scratch: Path) -> dict[str, Any]:
    """What `train` returns in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.data_size", "--folder", str(scratch / "student"), "--train", str(text)]
    environment = {**os.environ, "LINEARIZE_CACHE": str(scratch / "cache")}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    numbers: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return numbers


def measure(files: Sequence[Path], tokens: int, folder: Path) -> dict[str, Any]:
    """All numbers; the files that it writes into `folder` are removed at the end."""
    from linearize.metrics.report import provenance

    scratch = folder / "data_size"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    small, text = scratch / "small.jsonl", scratch / "text.jsonl"
    write_text(files, SMALL_TOKENS, small)
    write_text(files, tokens, text)
    without, cold, warm = (measured(path, scratch) for path in (small, text, text))
    stores = [json.loads(path.read_text("utf-8")) for path in scratch.glob("cache/tokens/*/meta.json")]
    store = max(stores, key=lambda store: store["tokens"])
    stored = sum(file["bytes"] for file in store["files"].values())
    result = {
        "text_bytes": text.stat().st_size, "tokens": store["tokens"], "documents": store["documents"],
        "seconds_of_tokenizing": store["seconds"], "tokens_per_second": round(store["tokens"] / store["seconds"]),
        "tokens_per_cpu_second": round(store["tokens"] / cold["cpu_seconds_to_first_step"]),
        "stored_bytes": stored, "stored_bytes_per_token": round(stored / store["tokens"], 3),
        "without_data": without, "cold": cold, "warm": warm,
        "data_bytes_of_peak": {
            name: numbers["peak_rss"] - without["peak_rss"] for name, numbers in (("cold", cold), ("warm", warm))
        },
        "steps": STEPS, "length": LENGTH, "batch": BATCH, "provenance": provenance(seed=0),
    }  # fmt: skip
    shutil.rmtree(scratch)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="JSON lines with a text")
    parser.add_argument("--tokens", type=parse_count, default=2_000_000, help="like 100M")
    parser.add_argument("--folder", type=Path, help="for what it writes meanwhile")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.train is not None:
        print(json.dumps(train(options.train, options.folder)))
        return
    if not options.files or options.folder is None:
        parser.error("name the files, and a folder for what is written meanwhile (--folder)")
    result = json.dumps(measure(options.files, options.tokens, options.folder), indent=1)
    print(result)
    if options.out is not None:
        atomic_write_text(options.out, result + "\n")


if __name__ == "__main__":
    main()
