"""Which of a few tokens see each other, for the backends of operations that take them all at once.

Letters: B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.ops.layout import Layout

LOWEST = -1000.0  # exp of less is 0 in fp64 too; sums of such log decays stay exact


@dataclass(frozen=True, eq=False)
class Pairs:
    """Masks of T tokens; a size of 1 stands for all rows.

    `seen_BTT`: token i sees token j <= i. `live_BT`: alive (None: all are). `document_BT`: how many documents have
    opened since the call began; 0 is that of the state (None: none has).
    """

    seen_BTT: Tensor
    live_BT: Tensor | None
    document_BT: Tensor | None


def pairs(layout: Layout, num_tokens: int, device: torch.device) -> Pairs:
    """The masks; computed once for all layers that share a layout."""
    key = ("pairs", num_tokens)
    if key not in layout.memo:
        seen = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=device).tril()[None]
        starts = layout.starts(num_tokens, device)
        document = None if starts is None else starts.long().cumsum(-1)
        if document is not None:
            seen = seen & (document[:, :, None] == document[:, None])
        layout.memo[key] = Pairs(seen, layout.live(), document)
    found: Pairs = layout.memo[key]
    return found


def in_parts(
    backend: Callable[..., tuple[Tensor, Any]],
    queries: Tensor,
    inputs: tuple[Tensor, ...],
    *,
    time_dim: int,
    layout: Layout,
    state: Any,
    commit: int | None,
) -> tuple[Tensor, Any]:
    """`backend` where it knows no `commit` and wants a query for every token: the committed tokens by themselves first.

    `backend(queries, *inputs, layout=, state=) -> (y, state)`. Tokens that have no query are given zeros for one, and
    their outputs are left out.
    """
    tokens, asked = inputs[0].shape[time_dim], queries.shape[time_dim]
    missing = list(queries.shape)
    missing[time_dim] = tokens - asked
    queries = torch.cat([queries.new_zeros(missing), queries], dim=time_dim)
    if commit is None or commit == 0:
        y, after = backend(queries, *inputs, layout=layout, state=state)
        return y.narrow(time_dim, tokens - asked, asked), after if commit is None else state
    ys, after = [], state
    committed = state
    for start, stop in ((0, commit), (commit, tokens)):
        if stop > start:
            part = [x.narrow(time_dim, start, stop - start) for x in (queries, *inputs)]
            y, after = backend(*part, layout=layout.part(start, stop), state=after)
            ys.append(y)
        committed = after if stop == commit else committed
    return torch.cat(ys, dim=time_dim).narrow(time_dim, tokens - asked, asked), committed
