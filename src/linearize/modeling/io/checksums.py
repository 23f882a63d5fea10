"""Checksums: what tells damaged weights and files from whole ones, and a model from another of the same name."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.modeling.io.quantized import parts_of


def crc32(tensors: Mapping[str, Tensor], start: bytes = b"") -> str:
    """CRC-32 over `start`, then over names, types, shapes and values of tensors, whatever their order (3 GB/s)."""
    found = zlib.crc32(start)
    for name in sorted(tensors):
        for part in _bytes(name, tensors[name]):
            found = zlib.crc32(part, found)
    return f"{found:08x}"


def file_crc32(path: Path) -> int:
    """CRC-32 of a file, read in pieces."""
    found = 0
    with path.open("rb") as file:
        while part := file.read(2**24):
            found = zlib.crc32(part, found)
    return found


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
