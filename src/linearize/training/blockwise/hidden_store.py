"""The teacher's hidden states at the inputs of blocks, on disk: raw rows in shards, each written whole or not at all
and checked as it is read.

`FOLDER/manifest.json` describes the rows. Shard n of rows `name` at boundary b is `b/name-n.bin`, its rows one
after the other without anything between them, and `b/name-n.json`, the checksum of each row (XXH3, 64 bits: four times
as fast as CRC-32, which took as long as the disk).

Letters: B rows of a batch, T tokens, M model width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from linearize.errors import InputError
from linearize.storage.atomic import atomic_write_text
from linearize.storage.files import read_json

FORMAT = 2
SHARD_BYTES = 64 * 2**20
READ_BYTES = 2**18  # read at a time, and checked while it is in the processor's cache
MANIFEST = "manifest.json"


class Shard(NamedTuple):
    """Rows `first` to `end` (excluded) of the rows `name` at one boundary."""

    boundary: int
    name: str
    first: int
    end: int


class DamagedShardError(Exception):
    """A shard whose bytes are not those that were written."""

    def __init__(self, shard: Shard, path: Path) -> None:
        super().__init__(f"{path} is damaged: its bytes do not fit their checksum")
        self.shard = shard


class HiddenStore:
    """Hidden states of named rows, `rows: {name: (number of rows, T)}`, at `boundaries` boundaries."""

    def __init__(
        self,
        folder: Path,
        rows: Mapping[str, tuple[int, int]],
        *,
        boundaries: int,
        model_dim: int,
        dtype: torch.dtype,
        identity: Mapping[str, object],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Raises InputError for a folder that holds hidden states of something else."""
        self.folder, self.rows, self.boundaries = folder, dict(rows), boundaries
        self.model_dim, self.dtype = model_dim, dtype
        self.shard_rows = {name: max(1, shard_bytes // self.row_bytes(name)) for name in rows}
        self._sums: dict[Shard, list[int]] = {}
        self._check_manifest(identity)

    def row_bytes(self, name: str) -> int:
        """Of one row."""
        return self.rows[name][1] * self.model_dim * self.dtype.itemsize

    @property
    def payload_bytes(self) -> int:
        """Of all shards when all are there: itemsize x tokens x M x boundaries."""
        return self.boundaries * sum(count * self.row_bytes(name) for name, (count, _) in self.rows.items())

    def written_bytes(self) -> int:
        """Of the shards that are there."""
        return sum(path.stat().st_size for path in self.folder.glob("*/*.bin"))

    def shards(self, boundary: int) -> list[Shard]:
        """All shards of a boundary, there or not."""
        return [
            Shard(boundary, name, first, min(first + self.shard_rows[name], count))
            for name, (count, _) in self.rows.items()
            for first in range(0, count, self.shard_rows[name])
        ]

    def missing(self, boundary: int) -> list[Shard]:
        """The shards of a boundary that are not there, or not whole by their size."""
        return [shard for shard in self.shards(boundary) if not self._is_there(shard)]

    def discard(self, shard: Shard) -> None:
        """Remove a shard."""
        self._sums.pop(shard, None)
        for path in self._paths(shard):
            path.unlink(missing_ok=True)

    def write(self, shards: Iterable[tuple[Shard, Iterable[Tensor]]]) -> None:
        """Write shards from their rows in order (`[B, T, M]` each); the next one is computed while one is written.

        Raises OSError where the disk is full; whole shards stay.
        """
        with ThreadPoolExecutor(1) as finisher:
            pending: Future[None] | None = None
            for shard, parts in shards:
                partial, sums = self._write_partial(shard, parts)
                if pending is not None:
                    pending.result()
                pending = finisher.submit(self._finish, shard, partial, sums)
            if pending is not None:
                pending.result()

    def buffer(self, name: str, rows: int) -> Tensor:
        """An empty buffer for rows, `[B, T, M]`."""
        return torch.empty(rows, self.rows[name][1], self.model_dim, dtype=self.dtype)

    def read(self, boundary: int, name: str, rows: Sequence[int], out: Tensor | None = None) -> Tensor:
        """Read rows by number, `[B, T, M]`, into `out` unless it is None (new memory costs more than reading does).

        Raises DamagedShardError.
        """
        hidden = self.buffer(name, len(rows)) if out is None else out
        size = self.shard_rows[name]

        for place, row in enumerate(rows):
            first = row // size * size
            shard = Shard(boundary, name, first, min(first + size, self.rows[name][0]))
            self._read_row(shard, row - first, _bytes(hidden[place]))
        return hidden

    def _read_row(self, shard: Shard, row: int, view: memoryview) -> None:
        path, size = self._paths(shard)[0], self.row_bytes(shard.name)
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(row * size)
                done, digest = 0, xxhash.xxh3_64()
                while done < size and (got := file.readinto(view[done : done + READ_BYTES])):
                    digest.update(view[done : done + got])
                    done += got
            whole = done == size and digest.intdigest() == self._checksums(shard)[row]
        except FileNotFoundError:
            whole = False
        if not whole:
            raise DamagedShardError(shard, path)

    def _write_partial(self, shard: Shard, parts: Iterable[Tensor]) -> tuple[Path, list[int]]:
        path = self._paths(shard)[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial, sums, size = path.with_suffix(".partial"), [], self.row_bytes(shard.name)
        try:
            with partial.open("wb", buffering=0) as file:
                for hidden in parts:
                    view = _bytes(hidden.detach().to("cpu", self.dtype).contiguous())
                    rows = (view[start : start + size] for start in range(0, len(view), size))
                    sums += [xxhash.xxh3_64_intdigest(row) for row in rows]
                    _write_all(file, view)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        assert len(sums) == shard.end - shard.first, "a shard needs all of its rows"
        return partial, sums

    def _finish(self, shard: Shard, partial: Path, sums: list[int]) -> None:
        """Rename the shard, then write its checksums, which mark it as complete."""
        path, sidecar = self._paths(shard)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(path)
        atomic_write_text(sidecar, json.dumps({"format": FORMAT, "xxh3_64": sums}))
        self._sums[shard] = sums

    def _is_there(self, shard: Shard) -> bool:
        path = self._paths(shard)[0]
        expected = (shard.end - shard.first) * self.row_bytes(shard.name)
        return path.is_file() and path.stat().st_size == expected and bool(self._checksums(shard))

    def _checksums(self, shard: Shard) -> list[int]:
        """Checksums of a shard's rows; empty if there are none."""
        if shard not in self._sums:
            try:
                sums = json.loads(self._paths(shard)[1].read_text("utf-8"))["xxh3_64"]
            except (OSError, ValueError, KeyError, TypeError):
                return []
            if len(sums) != shard.end - shard.first:
                return []
            self._sums[shard] = sums
        return self._sums[shard]

    def _paths(self, shard: Shard) -> tuple[Path, Path]:
        stem = self.folder / f"{shard.boundary:03d}" / f"{shard.name}-{shard.first // self.shard_rows[shard.name]:05d}"
        return stem.with_suffix(".bin"), stem.with_suffix(".json")

    def _check_manifest(self, identity: Mapping[str, object]) -> None:
        """Write the manifest, or compare it with the one on disk."""
        manifest = {
            "format": FORMAT,
            "dtype": str(self.dtype).removeprefix("torch."),
            "model_dim": self.model_dim,
            "boundaries": self.boundaries,
            "rows": {name: list(size) for name, size in self.rows.items()},
            "shard_rows": self.shard_rows,
            **json.loads(json.dumps(dict(identity))),
        }
        path = self.folder / MANIFEST
        if not path.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write_text(path, json.dumps(manifest, indent=2))
            return
        stored = read_json(path)
        stored = stored if isinstance(stored, dict) else {}
        if wrong := [key for key in {**manifest, **stored} if stored.get(key) != manifest.get(key)]:
            key = wrong[0]
            raise InputError(
                f"{path.parent} holds hidden states of another run ({key} was {stored.get(key)}, is "
                f"{manifest.get(key)}): run with the same settings to continue it, or delete it"
            )


def in_parts(total: range, size: int) -> Iterator[range]:
    """Split a range into ranges of at most `size`."""
    return (total[start : start + size] for start in range(0, len(total), size))


def _bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    numbers: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(numbers)


def _write_all(file: Any, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += file.write(view[done:])
