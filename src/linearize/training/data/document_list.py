"""Documents chosen from several stores, in an order; a document is read when it is asked for.

Letters: D documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from linearize.training.data.documents import Document
from linearize.training.data.token_store import TokenStore

Indices = NDArray[np.integer[Any]] | NDArray[np.bool_]


@dataclass(frozen=True, eq=False, kw_only=True)
class DocumentList(Sequence[Document]):
    """The documents `[D]`: which store each is in, where it starts there, its tokens, and its hash.

    `names`: where the text of each store is from.
    """

    stores: tuple[TokenStore, ...]
    names: tuple[str, ...]
    store_D: NDArray[np.int32]
    start_D: NDArray[np.int64]
    size_D: NDArray[np.int64]
    hash_D: NDArray[np.uint64]

    @classmethod
    def of(cls, documents: Sequence[Document] | TokenStore, name: str = "") -> DocumentList:
        """All documents of one store, or of a sequence, which becomes a store in memory."""
        if isinstance(documents, DocumentList):
            return documents
        store = documents if isinstance(documents, TokenStore) else TokenStore.of(documents)
        ends = np.asarray(store.ends)
        starts = np.concatenate([np.zeros(1, np.int64), ends])[:-1]
        return cls(
            stores=(store,), names=(name,), store_D=np.zeros(len(store), np.int32), start_D=starts,
            size_D=ends - starts, hash_D=np.array(store.hashes),
        )  # fmt: skip

    @classmethod
    def joined(cls, lists: Sequence[DocumentList]) -> DocumentList:
        """The documents of several lists, one after the other."""
        firsts = np.cumsum([0, *(len(part.stores) for part in lists)])
        return cls(
            stores=tuple(store for part in lists for store in part.stores),
            names=tuple(name for part in lists for name in part.names),
            store_D=np.concatenate(
                [part.store_D + np.int32(first) for part, first in zip(lists, firsts, strict=False)]
            ),
            start_D=np.concatenate([part.start_D for part in lists]),
            size_D=np.concatenate([part.size_D for part in lists]),
            hash_D=np.concatenate([part.hash_D for part in lists]),
        )

    def take(self, indices: Indices) -> DocumentList:
        """The documents with these numbers, in this order, or those where a mask `[D]` is true."""
        return DocumentList(
            stores=self.stores, names=self.names, store_D=self.store_D[indices], start_D=self.start_D[indices],
            size_D=self.size_D[indices], hash_D=self.hash_D[indices],
        )  # fmt: skip

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.size_D.sum())

    @property
    def digest(self) -> str:
        """What distinguishes these documents in this order from others."""
        digest = hashlib.sha256("".join(store.digest for store in self.stores).encode())
        for array in (self.store_D, self.start_D, self.size_D):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.size_D)

    @overload
    def __getitem__(self, index: int) -> Document: ...

    @overload
    def __getitem__(self, index: slice) -> DocumentList: ...

    def __getitem__(self, index: int | slice) -> Document | DocumentList:
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        start = int(self.start_D[index])
        return self.stores[self.store_D[index]].document(start, start + int(self.size_D[index]))

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))
