"""Which tokens of one of vLLM's steps belong to which sequence: made once per step, for all converted layers.

vLLM hands a step over as one row of tokens. A sequence of which one token comes is *decoding*: all of those run in one
call on batched states (the last token of a prompt, or its only one, is no different). The others run one by one, from
the state after their earlier chunk or from none.

Letters: N decoding sequences, S sequences of the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from linearize.ops.layout import Layout


@dataclass(frozen=True, eq=False)
class Decodes:
    """Sequences of which one token comes. `token_N`: its place in the row (`in_order`: ascending); `page_N`: the
    sequence's page; `pages`: the same as a slice, where they have one distance and the host knows them; `first_N`:
    whether it is the sequence's first token, so that the page holds another one's state (None: nowhere)."""

    token_N: Tensor
    in_order: bool
    page_N: Tensor
    pages: slice | None
    first_N: Tensor | None
    layout: Layout


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens `start` to `stop` of the row, all of one sequence, which has read `past` tokens before."""

    start: int
    stop: int
    past: int
    page_1: Tensor
    layout: Layout


@dataclass(frozen=True, eq=False)
class Step:
    """The sequences of a step, by whether one token of them comes or more."""

    decodes: Decodes | None
    chunks: tuple[Chunk, ...]

    @staticmethod
    def of(starts: Sequence[int], lengths: Sequence[int], page_S: Tensor) -> Step:
        """`starts`: where each sequence's tokens begin in the row, and the end; `lengths`: tokens of each sequence with
        these; `page_S`: its page."""
        new = [stop - start for start, stop in pairwise(starts)]
        single = [row for row, count in enumerate(new) if count == 1]
        chunks = []
        for row, count in enumerate(new):
            if count > 1:
                past = lengths[row] - count
                chunks.append(Chunk(starts[row], starts[row + 1], past, page_S[row : row + 1], Layout(start=past)))
        return Step(_decodes(single, starts, lengths, page_S) if single else None, tuple(chunks))


def _decodes(rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int], page_S: Tensor) -> Decodes:
    device, pages = page_S.device, None
    if device.type == "cpu":
        page_of = dict(zip(rows, page_S[list(rows)].tolist(), strict=True))
        by_page = sorted(rows, key=page_of.__getitem__)
        if (pages := as_slice([page_of[row] for row in by_page])) is not None:
            rows = by_page
    position_N, token_N, row_N = (
        torch.tensor(numbers, device=device)
        for numbers in ([lengths[row] - 1 for row in rows], [starts[row] for row in rows], rows)
    )
    page_N = page_S[row_N]
    return Decodes(
        token_N=token_N,
        in_order=list(rows) == sorted(rows),
        page_N=page_N,
        pages=pages,
        first_N=position_N == 0 if any(lengths[row] == 1 for row in rows) else None,
        layout=Layout(position_BT=position_N[:, None], tail=0),
    )


def as_slice(numbers: Sequence[int]) -> slice | None:
    """The slice that takes these ascending numbers; None where no slice does."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if step < 1 or any(b - a != step for a, b in pairwise(numbers)):
        return None
    return slice(numbers[0], numbers[-1] + 1, step)
