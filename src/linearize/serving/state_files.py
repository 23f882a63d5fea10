"""States of texts on disk, one safetensors file each: written whole or not at all, checked when read, the least
recently used ones removed.

A file's name is the length of its text and the key of it (`LENGTH-KEY.safetensors`); the text itself is nowhere.
Several servers of one model may share a folder.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open

from linearize.errors import one_line
from linearize.modeling.io.integrity import crc32
from linearize.modeling.text_cache import SavedText
from linearize.serving.notices import notice
from linearize.storage.atomic import atomic_write_bytes

Key = tuple[int, str]
ENDING = ".safetensors"
SECONDS_OF_A_WRITE = 60  # another server may be writing a file that is younger


class StateFiles:
    """The files of one model's states, at most `limit` bytes together. All methods may be called from any thread."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Makes the folder, for its owner alone, and removes what killed servers left half-written.

        Raises:
            OSError: the folder cannot be made or read.
        """
        self.folder, self.limit = folder, limit
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in folder.glob(f".*{ENDING}.partial-*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > SECONDS_OF_A_WRITE:
                    path.unlink()

    def keys(self) -> set[Key]:
        """The states that are there."""
        return {key for path in self.folder.glob(f"*{ENDING}") if (key := _key(path)) is not None}

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, size, _ in self._files())

    def write(self, key: Key, saved: SavedText) -> None:
        """Write a state and remove the least recently used ones beyond the limit.

        Raises:
            OSError: a full disk, or a folder that cannot be written; nothing half-written stays.
        """
        path = self._path(key)
        data = safetensors.torch.save(saved.tensors, {"numbers": _numbers(saved), "crc32": _checksum(key, saved)})
        if len(data) > self.limit:
            return
        self._remove_oldest(self.limit - len(data))
        atomic_write_bytes(path, data)

    def read(self, key: Key) -> SavedText | None:
        """A state, None where it is not there any more or is damaged; damaged files are removed."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            saved = SavedText(key[0], tensors, json.loads(metadata["numbers"]))
            if metadata["crc32"] != _checksum(key, saved):
                raise ValueError("its checksum is another one")
            os.utime(path)
            return saved
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            notice(f"a stored conversation state is damaged and was dropped ({path.name}: {one_line(error)})")
            with suppress(OSError):
                path.unlink()
            return None

    def _path(self, key: Key) -> Path:
        return self.folder / f"{key[0]}-{key[1]}{ENDING}"

    def _files(self) -> list[tuple[float, int, Path]]:
        """When each file was last used, its size, and its path."""
        files = []
        for path in self.folder.glob(f"*{ENDING}"):
            with suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        return files

    def _remove_oldest(self, limit: int) -> None:
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= limit:
                return
            with suppress(OSError):
                path.unlink()
            total -= size


def _key(path: Path) -> Key | None:
    length, _, digest = path.name.removesuffix(ENDING).partition("-")
    return (int(length), digest) if length.isdigit() and digest else None


def _numbers(saved: SavedText) -> str:
    return json.dumps(saved.numbers, sort_keys=True)


def _checksum(key: Key, saved: SavedText) -> str:
    return crc32(saved.tensors, f"{key} {_numbers(saved)}".encode())
