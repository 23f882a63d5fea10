"""Whether files and weights are whole: sizes and headers of a model's folder, and checksums of files and tensors."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import InputError
from linearize.modeling.io.quantized import parts_of
from linearize.storage.files import read_json

INDEX = "model.safetensors.index.json"
_DOCUMENTS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "adapter/adapter_config.json",
)  # fmt: skip
_MOST = 100_000_000  # bytes of a header that safetensors reads
_AGAIN = "copy or download the folder again"


def check_model_files(folder: Path) -> None:
    """Refuse a folder with a broken JSON document, a truncated shard, or an index that its shards do not keep.

    Raises:
        InputError: which file, what is wrong with it, and what to do.
    """
    for name in _DOCUMENTS:
        if (folder / name).is_file():
            _check_document(folder / name)
    for path in (*folder.glob("model.safetensors"), *folder.glob("adapter/*.safetensors")):
        tensors_of(path)
    if (folder / INDEX).is_file() and not (folder / "model.safetensors").is_file():
        _check_index(folder / INDEX)


def tensors_of(path: Path) -> Mapping[str, Any]:
    """The tensors that a safetensors file holds, as its header tells: `{name: {dtype, shape, data_offsets}}`.

    Raises:
        InputError: no such header, or the file does not end where the last tensor does.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, _MOST):
            raise InputError(f"{path} is damaged or cut short: it begins with no safetensors header; {_AGAIN}")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise InputError(f"{path} is damaged: its safetensors header cannot be read; {_AGAIN}") from error
    if size != end:
        how = "cut short" if size < end else "damaged"
        raise InputError(f"{path} is {how}: it has {size:,} bytes, its header speaks of {end:,}; {_AGAIN}")
    return dict(header)


def number_types(folder: Path) -> dict[str, str]:
    """The type of each tensor in a folder's weights, as the headers tell (`BF16`); files were checked before."""
    if (folder / "model.safetensors").is_file():
        shards = {"model.safetensors"}
    elif (folder / INDEX).is_file():
        shards = set(read_json(folder / INDEX)["weight_map"].values())
    else:
        return {}
    return {name: entry["dtype"] for shard in sorted(shards) for name, entry in tensors_of(folder / shard).items()}


def _check_index(path: Path) -> None:
    mapped = read_json(path)
    mapped = mapped.get("weight_map") if isinstance(mapped, dict) else None
    if not isinstance(mapped, dict) or not mapped:
        raise InputError(f"{path} is damaged: it has no weight_map; {_AGAIN}")
    shards = sorted({str(shard) for shard in mapped.values()})
    absent = [shard for shard in shards if not (path.parent / shard).is_file()]
    if absent:
        raise InputError(
            f"{path} names {absent[0]}, which is not there ({len(absent)} of {len(shards)} missing); {_AGAIN}"
        )
    stored = {shard: tensors_of(path.parent / shard) for shard in shards}
    for tensor, shard in mapped.items():
        if tensor not in stored[shard]:
            raise InputError(f"{path.parent / shard} lacks the tensor {tensor}, which {INDEX} says it has; {_AGAIN}")


def _check_document(path: Path) -> None:
    if not path.stat().st_size:
        raise InputError(f"{path} is empty; {_AGAIN}")
    try:
        document = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; {_AGAIN}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} is damaged: it holds no JSON object; {_AGAIN}")


def crc32(tensors: Mapping[str, Tensor], start: bytes = b"") -> str:
    """CRC-32 over `start`, then over names, types, shapes and values of tensors, whatever their order (3 GB/s)."""
    checksum = zlib.crc32(start)
    for name in sorted(tensors):
        for part in _bytes(name, tensors[name]):
            checksum = zlib.crc32(part, checksum)
    return f"{checksum:08x}"


def file_crc32(path: Path) -> int:
    """CRC-32 of a file, read in pieces."""
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(2**24):
            checksum = zlib.crc32(part, checksum)
    return checksum


def model_fingerprint(model: nn.Module) -> str:
    """Changes with any weight of a model, its config and its type of numbers; not with its name or place."""
    config: Any = model.config
    fields = {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return crc32(tensors, json.dumps(fields, sort_keys=True, default=str).encode())


def _bytes(name: str, tensor: Tensor) -> Iterator[Any]:
    yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
    if parts := parts_of(tensor):  # quantised: the tensors that it is made of
        for part, values in parts.items():
            yield from _bytes(part, values)
    elif tensor.numel():
        yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
