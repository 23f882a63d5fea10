"""A mixture of sources: how often each document is read, so that the sources have given shares of the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from linearize.errors import InputError
from linearize.training.data.document_list import DocumentList


def weighted(documents: DocumentList, weights: Sequence[float], seed: int) -> DocumentList:
    """Documents whose tokens come from the sources in the proportion of `weights`, as many tokens as there are in all.

    A source that is smaller than its share is read several times: all of it, and then documents drawn by the seed. Of
    one that is larger, documents are drawn. The order is that of `documents`, time after time. A share is exact up to
    one document.

    Raises:
        InputError: a source without a document, as where all of it is held out.
    """
    assert len(weights) == len(documents.stores), "a weight for each source"
    sizes, chosen = documents.size_D, list[NDArray[np.int64]]()
    for source, weight in enumerate(weights):
        own = np.flatnonzero(documents.store_D == source)
        has = int(sizes[own].sum())
        if not has:
            raise InputError(
                f"data.sources.{source} {documents.names[source]!r}: no document of it is left to train on; give it "
                "more text, or hold out less (data.heldout)"
            )
        times, rest = divmod(documents.num_tokens * weight / sum(weights), has)
        order = np.random.default_rng([seed, source]).permutation(own)
        before = np.cumsum(sizes[order]) - sizes[order]
        drawn = np.sort(order[before + sizes[order] / 2 <= rest])
        chosen += [own] * int(times) + [drawn]
    return documents.take(np.concatenate(chosen))


def shares(documents: DocumentList, unweighted: DocumentList) -> str:
    """A line with the share of each source in the tokens, and how often its text is read."""
    total, texts = documents.num_tokens, []
    for source, name in enumerate(documents.names):
        tokens = int(documents.size_D[documents.store_D == source].sum())
        times = tokens / int(unweighted.size_D[unweighted.store_D == source].sum())
        texts.append(f"{name} {tokens / total:.1%} ({tokens:,} tokens, {times:.2f} times its text)")
    return "training text by source: " + ", ".join(texts)
