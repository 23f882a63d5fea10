"""Safetensors files written tensor by tensor: a student larger than memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from linearize.modeling.io.weight_files import DTYPES, INDEX, SINGLE

Entry: TypeAlias = tuple[torch.dtype, tuple[int, ...]]
SHARD_BYTES = 5_000_000_000


class ShardedWriter:
    """Writes safetensors files tensor by tensor, in any order, and their index; never more than a tensor in memory."""

    def __init__(
        self, folder: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], shard_bytes: int
    ) -> None:
        """`entries`: dtype and shape of every tensor by name, in the order they will have; files hold at most
        `shard_bytes`, or one tensor."""
        self.folder, self.entries, self.written = folder, dict(entries), set[str]()
        shards: list[list[str]] = [[]]
        filled = 0
        for name in entries:
            size = self._size(name)
            if shards[-1] and filled + size > shard_bytes:
                shards, filled = [*shards, []], 0
            shards[-1].append(name)
            filled += size
        count = len(shards)
        self.files = {
            (SINGLE if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"): names
            for i, names in enumerate(shards)
        }
        self._starts: dict[str, tuple[Path, int]] = {}
        for file, names in self.files.items():
            self._begin(folder / file, names)

    def write(self, name: str, tensor: Tensor) -> None:
        """One tensor, in the dtype that was announced."""
        dtype, shape = self.entries[name]
        assert tuple(tensor.shape) == shape, f"{name}: {tuple(tensor.shape)} given, {shape} announced"
        path, start = self._starts[name]
        numbers: Any = tensor.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
        view = memoryview(numbers)
        with path.open("r+b", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < len(view):
                done += file.write(view[done : done + 2**30])
        self.written.add(name)

    def close(self) -> None:
        """Everything on the disk, and the index where there are several files."""
        missing = sorted(set(self.entries) - self.written)
        assert not missing, f"not written: {missing[:3]}"
        for file in self.files:
            descriptor = os.open(self.folder / file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        if len(self.files) > 1:
            total = sum(map(self._size, self.entries))
            weight_map = {name: file for file, names in self.files.items() for name in names}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _size(self, name: str) -> int:
        dtype, shape = self.entries[name]
        return torch.Size(shape).numel() * dtype.itemsize

    def _begin(self, path: Path, names: list[str]) -> None:
        """The file with its header, and its tensors as holes."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        codes = {dtype: code for code, dtype in DTYPES.items()}
        place = 0
        for name in names:
            dtype, shape = self.entries[name]
            end = place + self._size(name)
            header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [place, end]}
            place = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        with path.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            file.truncate(8 + len(encoded) + place)
        self._starts |= {name: (path, 8 + len(encoded) + header[name]["data_offsets"][0]) for name in names}
