"""Safetensors files read and written one tensor at a time, by offset: for models larger than memory.

Nothing is mapped into memory, so that memory holds what was asked for and no more.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from linearize.errors import InputError
from linearize.modeling.io.checkpoint_checks import is_finite, not_numbers
from linearize.modeling.io.integrity import tensors_of
from linearize.modeling.io.model_source import find_model
from linearize.modeling.library_internals import find_hub_file
from linearize.storage.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
Entry: TypeAlias = tuple[torch.dtype, tuple[int, ...]]
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SAMPLE_BYTES = 4096  # of each tensor's start and middle, for the fingerprint


class TensorPlace(NamedTuple):
    """Where a tensor lies: file, first byte, number of bytes; and what it is."""

    path: Path
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightFiles:
    """The tensors of a model folder (or Hub name) by name."""

    def __init__(self, name_or_path: str) -> None:
        """Only headers are read.

        Raises:
            InputError: no safetensors, an index that names a file or a tensor that is not there, a truncated file.
        """
        source = find_model(name_or_path)
        if source.gguf_file is not None:
            raise InputError(f"{source} is a GGUF file, which is read as a whole: leave out --stream")
        name_or_path = source.name
        self.places: dict[str, TensorPlace] = {}
        index = _located(name_or_path, INDEX)
        single = None if index is not None else _located(name_or_path, SINGLE)
        if single is not None:
            self.places = _places(single)
        elif index is not None:
            self._read_index(name_or_path, index)
        else:
            raise InputError(f"{name_or_path} holds neither {SINGLE} nor {INDEX}: save its weights as safetensors")

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU. Raises InputError for a file that ended early."""
        place = self.places[name]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        if place.size:
            numbers: Any = tensor.reshape(-1).view(torch.uint8).numpy()
            view = memoryview(numbers)
            with place.path.open("rb", buffering=0) as file:
                file.seek(place.start)
                done = 0
                while done < place.size:
                    got = file.readinto(view[done : done + 2**30])
                    if not got:
                        raise InputError(f"{place.path} ends within {name}: the file is truncated, fetch it again")
                    done += got
        if not is_finite(tensor):
            raise not_numbers(str(place.path), name)
        return tensor

    def check_samples(self) -> None:
        """Look at a few values of each tensor, from its start and middle. Raises InputError where some are no numbers,
        as in a model that diverged; single ones are found where their tensor is read."""
        for name, place in self.places.items():
            if place.dtype.is_floating_point and place.size:
                values = [torch.frombuffer(bytearray(part), dtype=place.dtype) for part in _samples(place) if part]
                if not all(map(is_finite, values)):
                    raise not_numbers(str(place.path), name)

    def lazy(self, name: str) -> LazyTensor:
        """A tensor that is read when it is indexed."""
        return LazyTensor(self, name)

    def types(self) -> dict[str, str]:
        """The type of each tensor, as safetensors names it."""
        return {name: _NAMES[place.dtype] for name, place in self.places.items()}

    def fingerprint(self) -> str:
        """Changes with names, shapes, types and (by samples of each tensor) values, not with the division into files;
        reads little of a large model."""
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(self.places):
            place = self.places[name]
            digest.update(f"{name} {place.dtype} {place.shape}".encode())
            for part in _samples(place):
                digest.update(part)
        return digest.hexdigest()

    def _read_index(self, name_or_path: str, index: Path) -> None:
        document = read_json(index)
        weight_map: Mapping[str, str] = document.get("weight_map", {}) if isinstance(document, dict) else {}
        if not weight_map:
            raise InputError(f"{index} names no weights: fetch it again")
        for file in sorted(set(weight_map.values())):
            path = _located(name_or_path, file)
            if path is None:
                raise InputError(f"{index} names {file}, which is missing: fetch that file too")
            self.places |= _places(path)
        if lost := sorted(set(weight_map) - set(self.places)):
            raise InputError(f"{weight_map[lost[0]]} lacks {lost[0]}, which {index} places there: fetch it again")


def _samples(place: TensorPlace) -> Iterator[bytes]:
    """The first bytes of a tensor, and those from its middle on."""
    with place.path.open("rb") as file:
        for offset in (0, place.size // 2 // place.dtype.itemsize * place.dtype.itemsize):
            file.seek(place.start + offset)
            yield file.read(min(SAMPLE_BYTES, place.size - offset))


class LazyTensor:
    """Stands for a tensor where one is indexed with `[...]`, as safetensors' slices are."""

    def __init__(self, files: WeightFiles, name: str) -> None:
        self._files, self._name = files, name

    def __getitem__(self, index: Any) -> Tensor:
        return self._files.read(self._name)[index]


def _located(name_or_path: str, file: str) -> Path | None:
    """The file of a folder, or of a Hub name in its cache (fetched where it is not there yet)."""
    folder = Path(name_or_path)
    if folder.is_dir():
        path = folder / file
        return path if path.is_file() else None
    try:
        located = find_hub_file(name_or_path, file)
    except OSError as error:
        raise InputError(f"cannot find {name_or_path} on the Hub: {error}") from error
    return None if located is None else Path(located)


def _places(path: Path) -> dict[str, TensorPlace]:
    """What a file's header says. Raises InputError for a file that is no safetensors file or not whole."""
    with path.open("rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
    places = {}
    for name, entry in tensors_of(path).items():
        if entry["dtype"] not in DTYPES:
            raise InputError(f"{path} holds {name} as {entry['dtype']}, which cannot be read here: save it as bfloat16")
        start, end = entry["data_offsets"]
        places[name] = TensorPlace(path, begin + start, end - start, DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return places


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
