"""How fast hidden states are written and read, compared with `dd` on the same disk.

    python -m benchmarks.hidden_states --folder SCRATCH --out benchmarks/hidden_states.json

Writes end on the disk (`fsync`, `conv=fdatasync`), reads begin there (the files' pages are dropped from the cache
before). Runs alternate and medians are printed, since the speed of a shared disk varies. Every row is checksummed as
it is written and checked as it is read.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from linearize.metrics.report import provenance
from linearize.storage.atomic import atomic_write_text
from linearize.training.blockwise.budget import boundary_bytes
from linearize.training.blockwise.hidden_store import HiddenStore

BATCH, LENGTH, WIDTH, LAYERS, BLOCK = 4, 1024, 2048, 4, 2  # rows of 4 MiB in bf16, at two boundaries


def run(folder: Path, megabytes: int) -> dict[str, float]:
    """One round of all four; bytes per second."""
    rows = max(1, megabytes * 2**20 // (BATCH * LENGTH * WIDTH * 2 * 2)) * BATCH
    store = HiddenStore(
        folder / "hidden", {"train": (rows, LENGTH)}, boundaries=2, model_dim=WIDTH, dtype=torch.bfloat16,
        identity={},
    )  # fmt: skip
    hidden = torch.randn(7, LENGTH, WIDTH).bfloat16()
    results = {"write": _timed(lambda: _write(store, hidden), store.payload_bytes)}
    assert store.written_bytes() == boundary_bytes(rows * LENGTH, WIDTH, LAYERS, BLOCK), "the formula is exact"
    plain, source = folder / "dd.bin", _source(folder, store)
    blocks = ["bs=4M", f"count={store.payload_bytes // 2**22}"]
    results["dd_write"] = _timed(
        lambda: _dd(f"if={source}", f"of={plain}", *blocks, "conv=fdatasync"), plain_bytes := store.payload_bytes
    )
    _drop(folder.rglob("*.bin"))
    results["read"] = _timed(lambda: _read(store, rows), store.payload_bytes)
    results["dd_read"] = _timed(lambda: _dd(f"if={plain}", "of=/dev/null", *blocks), plain_bytes)
    shutil.rmtree(folder / "hidden")
    plain.unlink()
    source.unlink()
    return results


def _source(folder: Path, store: HiddenStore) -> Path:
    """The same bytes as one file in memory, for dd to write: some disks keep zeros without writing them."""
    memory = Path("/dev/shm")
    path = (memory if memory.is_dir() else folder) / f"linearize-hidden-states-{os.getpid()}"
    with path.open("wb") as file:
        for shard in sorted(folder.glob("hidden/*/*.bin")):
            file.write(shard.read_bytes())
    assert path.stat().st_size == store.payload_bytes
    return path


def _write(store: HiddenStore, hidden: torch.Tensor) -> None:
    shards = [shard for boundary in range(store.boundaries) for shard in store.shards(boundary)]
    store.write((shard, (hidden[row % 7][None] for row in range(shard.first, shard.end))) for shard in shards)


def _read(store: HiddenStore, rows: int) -> None:
    """Read as training does: a batch into one of two buffers."""
    buffers = [store.buffer("train", BATCH) for _ in range(2)]
    for boundary in range(store.boundaries):
        for number, first in enumerate(range(0, rows, BATCH)):
            store.read(boundary, "train", range(first, first + BATCH), buffers[number % 2])


def _dd(*arguments: str) -> None:
    subprocess.run(["dd", *arguments], check=True, capture_output=True)


def _timed(work: Any, size: int) -> float:
    begun = time.perf_counter()
    work()
    return size / (time.perf_counter() - begun)


def _drop(paths: Iterable[Path]) -> None:
    """Drop their pages from the cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rounds = [run(options.folder, options.megabytes) for _ in range(options.rounds)]
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    result = {
        "megabytes": options.megabytes, "bytes_per_second": medians, "rounds": rounds,
        "write_share_of_dd": round(medians["write"] / medians["dd_write"], 3),
        "read_share_of_dd": round(medians["read"] / medians["dd_read"], 3),
        "provenance": provenance(),
    }  # fmt: skip
    atomic_write_text(options.out, json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "provenance"}, indent=2))


if __name__ == "__main__":
    main()
