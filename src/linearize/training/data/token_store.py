"""Documents as arrays: their tokens one after the other, where each document ends, and where the loss counts.

A store is in memory, or in a folder of memory-mapped files that was written once. A document of it is made when it is
read. Letters: D documents, N tokens of all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import xxhash
from numpy.typing import NDArray

from linearize.errors import InputError
from linearize.training.data.documents import Document

FORMAT = 1
META = "meta.json"
TOKENS, COUNTS, ENDS, HASHES = "tokens.bin", "counts.bin", "ends.bin", "hashes.bin"
_CHECKED_AT_ONCE = 2**24  # bytes of a file that are in memory while its checksum is computed
_DTYPES = {name: np.dtype(name) for name in ("uint16", "uint32")}


class DamagedStoreError(Exception):
    """The files of a store are not what was written; the message says which, and how."""


@dataclass(frozen=True, kw_only=True)
class StoreFacts:
    """What is to be reported of the text in a store, besides the tokens themselves.

    `cut_at_blank_lines`: the documents of a text file were separated by blank lines. `notes`: warnings about its rows.
    """

    cut_at_blank_lines: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenStore(Sequence[Document]):
    """Arrays of D documents.

    `tokens` `[N]`: 16 or 32 bits each. `counts` `[N]`: 1 where predicting the token counts (None: everywhere). `ends`
    `[D]`: where each document ends. `hashes` `[D]`: equal for equal tokens. `digest` identifies all of it.
    """

    tokens: NDArray[np.unsignedinteger[Any]]
    counts: NDArray[np.uint8] | None
    ends: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    digest: str
    facts: StoreFacts = field(default_factory=StoreFacts)
    folder: Path | None = None

    @classmethod
    def of(cls, documents: Iterable[Document]) -> TokenStore:
        """A store in memory."""
        arrays = [(_array(d.tokens, np.dtype("uint32")), np.array(d.loss_mask, dtype=np.uint8)) for d in documents]
        tokens = np.concatenate([np.empty(0, np.uint32), *(tokens for tokens, _ in arrays)])
        counts = np.concatenate([np.empty(0, np.uint8), *(counts for _, counts in arrays)])
        ends = np.cumsum([len(tokens) for tokens, _ in arrays], dtype=np.int64)
        digest = hashlib.sha256()
        for array in (tokens, counts, ends):
            digest.update(array.tobytes())
        return cls(
            tokens=tokens, counts=None if counts.all() else counts, ends=ends,
            hashes=np.array([_hash(tokens) for tokens, _ in arrays], dtype=np.uint64), digest=digest.hexdigest(),
        )  # fmt: skip

    @classmethod
    def open(cls, folder: Path, *, check: bool = True) -> TokenStore:
        """A store in a folder, mapped; with `check` all bytes are compared with their checksums.

        Raises:
            DamagedStoreError: a file is missing, of another size, or not what was written.
        """
        try:
            meta = json.loads((folder / META).read_text("utf-8"))
            files: Mapping[str, Mapping[str, Any]] = meta["files"]
            dtype = _DTYPES[meta["dtype"]]
            facts = StoreFacts(cut_at_blank_lines=meta["cut_at_blank_lines"], notes=tuple(meta["notes"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DamagedStoreError(f"{folder / META} cannot be read ({error})") from error
        for name, entry in files.items():
            _check(folder / name, entry, contents=check)
        counts = _mapped(folder / COUNTS, np.dtype("uint8")) if COUNTS in files else None
        return cls(
            tokens=_mapped(folder / TOKENS, dtype), counts=counts, ends=_mapped(folder / ENDS, np.dtype("int64")),
            hashes=_mapped(folder / HASHES, np.dtype("uint64")), facts=facts, folder=folder, digest=_digest(files),
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Document: ...

    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...

    def __getitem__(self, index: int | slice) -> Document | list[Document]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        return self.document(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))

    def document(self, start: int, end: int) -> Document:
        """The tokens from `start` to `end` as a document."""
        counts = [1] * (end - start) if self.counts is None else self.counts[start:end].tolist()
        return Document(self.tokens[start:end].tolist(), counts)

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process, a store in a folder is its path: that process maps the files itself."""
        return (_reopened, (self.folder, self.digest)) if self.folder is not None else (_rebuilt, (vars(self),))


def _reopened(folder: Path, digest: str) -> TokenStore:
    try:
        store = TokenStore.open(folder, check=False)
    except DamagedStoreError as error:
        raise InputError(
            f"{error}: this process does not see the tokens that process 0 keeps there: set LINEARIZE_CACHE to a "
            "folder that all machines see"
        ) from error
    if store.digest != digest:
        raise InputError(f"{folder}: holds other tokens than process 0 keeps there; set LINEARIZE_CACHE to one folder")
    return store


def _rebuilt(values: dict[str, Any]) -> TokenStore:
    return TokenStore(**values)


class TokenWriter:
    """Writes the documents of a store into a folder, in the order in which they are added."""

    def __init__(self, folder: Path, largest_token: int) -> None:
        self._dtype = _DTYPES["uint16" if largest_token < 2**16 else "uint32"]
        self._files = {name: _HashedFile(folder / name) for name in (TOKENS, COUNTS, ENDS, HASHES)}
        self._folder, self._end, self._all_count = folder, 0, True

    def add(self, documents: Sequence[Document]) -> None:
        """Append documents."""
        if not documents:
            return
        arrays = [_array(document.tokens, self._dtype) for document in documents]
        counts = np.concatenate([np.array(document.loss_mask, dtype=np.uint8) for document in documents])
        ends = self._end + np.cumsum([len(array) for array in arrays], dtype=np.int64)
        self._end, self._all_count = int(ends[-1]), self._all_count and bool(counts.all())
        hashes = np.array([_hash(array) for array in arrays], dtype=np.uint64)
        for name, array in ((TOKENS, np.concatenate(arrays)), (COUNTS, counts), (ENDS, ends), (HASHES, hashes)):
            self._files[name].write(array.tobytes())

    def finish(self, facts: StoreFacts, **more: object) -> None:
        """Write what makes the folder a store; `more` is for people who look into it."""
        entries = {name: file.close() for name, file in self._files.items()}
        if self._all_count:
            (self._folder / COUNTS).unlink()
            del entries[COUNTS]
        meta = {"format": FORMAT, "dtype": self._dtype.name, **asdict(facts), **more, "files": entries}
        (self._folder / META).write_text(json.dumps(meta, indent=1), encoding="utf-8")

    def abandon(self) -> None:
        """Close the files of a store that will not be finished."""
        for file in self._files.values():
            with suppress(OSError):
                file.close()


@contextmanager
def store_writer(folder: Path, largest_token: int) -> Iterator[TokenWriter]:
    """A writer whose files are closed whatever happens inside."""
    writer = TokenWriter(folder, largest_token)
    try:
        yield writer
    finally:
        writer.abandon()


class _HashedFile:
    """A file that is written from its beginning to its end, with its size and checksum."""

    def __init__(self, path: Path) -> None:
        self._file, self._hash, self._bytes = path.open("wb"), xxhash.xxh3_128(), 0

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._bytes += len(data)

    def close(self) -> dict[str, int | str]:
        self._file.close()
        return {"bytes": self._bytes, "xxh3_128": self._hash.hexdigest()}


def file_checksum(path: Path) -> str:
    """XXH3 (128 bits) of a file's bytes. Raises OSError."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while data := file.read(_CHECKED_AT_ONCE):
            digest.update(data)
    return digest.hexdigest()


def _check(path: Path, entry: Mapping[str, Any], *, contents: bool) -> None:
    try:
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise DamagedStoreError(f"{path} has {size:,} bytes in place of {entry['bytes']:,}")
        if contents and file_checksum(path) != entry["xxh3_128"]:
            raise DamagedStoreError(f"{path} does not fit its checksum")
    except OSError as error:
        raise DamagedStoreError(f"{path} cannot be read ({error.strerror})") from error


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if not os.path.getsize(path):
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _array(tokens: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    array = np.array(tokens, dtype=np.int64)
    assert not len(array) or (array.min() >= 0 and array.max() <= np.iinfo(dtype).max), "a token beyond the vocabulary"
    return array.astype(dtype)


def _hash(tokens: NDArray[Any]) -> int:
    """Equal for the same tokens, whatever their type."""
    return xxhash.xxh3_64_intdigest(tokens.astype(np.uint32).tobytes())
