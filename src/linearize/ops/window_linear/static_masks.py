"""What the tokens of a static call see, and what they bring about: the same in all layers of a kind, so computed once.

Where a value can be looked at for nothing (on a CPU, not while tracing), what does nothing is None.

Letters: B batch, U queries, S keys that no state holds, C ring slots, N sinks, P positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.ops.window_linear.spec import WindowLinear, fold_boundary, most_leaving, ring_slots
from linearize.ops.window_linear.state import WindowBuffers


@dataclass(frozen=True, eq=False, kw_only=True)
class Seen:
    """What queries see, the same in all layers of a kind. By softmax: `ring_B1UC`, `sinks_B1UN`, `new_B1US`. By
    features: ring tokens at `far_BP` where `far_ring_B1UP`, new ones where `far_new_B1US`. None: there are none."""

    ring_B1UC: Tensor
    sinks_B1UN: Tensor | None
    new_B1US: Tensor | None
    far_BP: Tensor | None
    far_ring_B1UP: Tensor | None
    far_new_B1US: Tensor | None

    @staticmethod
    def of(
        query_BU: Tensor, new_BS: Tensor | None, begin_B: Tensor, held_B: Tensor, slots: int, spec: WindowLinear
    ) -> Seen:
        """`new_BS`: positions of the keys that are not in the ring (-1: dead); None: the only query's is in it.
        `begin_B`, `held_B`: first position of the document, and first one that the ring does not hold."""
        device, window, sinks, alone = query_BU.device, spec.window, spec.num_sinks, new_BS is None
        ring_end, query, begin = held_B[:, None, None, None], query_BU[:, None, :, None], begin_B[:, None, None, None]
        edge = fold_boundary(query, window, spec.shape) + (window == 0)
        last = held_B[:, None] - 1
        ring = (last - (last - torch.arange(slots, device=device)) % slots)[:, None, None]
        sunk = torch.arange(sinks, device=device)
        state_end = held_B[:, None] - int(alone)  # of the sum, and of the sinks
        new = far_new = None
        if new_BS is not None:
            key = new_BS[:, None, None]
            new = ((key >= edge) | ((key >= 0) & (key < sinks))) & (key <= query)
            far_new = (key < edge) & (key >= sinks) if new_BS.shape[1] > window else None
        waiting = int(window == 0) if new_BS is None else _most_waiting(new_BS.shape[1] - 1, spec)
        far = fold_boundary(state_end, window, spec.shape) + torch.arange(waiting, device=device)
        key = far[:, None, None]
        return Seen(
            ring_B1UC=(ring >= torch.maximum(edge, begin)) & (ring <= query),
            sinks_B1UN=(sunk < torch.minimum(edge, state_end[:, None, None])) & (sunk >= begin) if sinks else None,
            new_B1US=new,
            far_BP=far if waiting else None,
            far_ring_B1UP=(key < edge) & (key >= begin.clamp(min=sinks)) & (key < ring_end) if waiting else None,
            far_new_B1US=far_new,
        )


def _most_waiting(tokens: int, spec: WindowLinear) -> int:
    """The most ring tokens that so many further tokens push beyond the window."""
    return min(most_leaving(tokens, spec.window, spec.shape), ring_slots(spec.window, spec.shape)) if tokens else 0


@dataclass(frozen=True, eq=False)
class Moves:
    """What some tokens bring about. `fresh_BN`: sinks that are there now; `leaves_BP`: whether the tokens in slots
    `place_BP` leave the window, in `rows` of the batch (None: in any). None: nothing."""

    fresh_BN: Tensor | None
    place_BP: Tensor
    leaves_BP: Tensor | None
    rows: Tensor | None

    @staticmethod
    def of(state: WindowBuffers, spec: WindowLinear, following_B: Tensor, most: int) -> Moves:
        """Of at most `most` tokens in each row."""
        before_B = state.next_B
        j = torch.arange(spec.num_sinks, device=before_B.device)
        fresh = (j >= before_B[:, None]) & (j < following_B[:, None])
        begin, end = (fold_boundary(n, spec.window, spec.shape)[:, None] for n in (before_B, following_B))
        position = begin + torch.arange(most_leaving(most, spec.window, spec.shape), device=begin.device)
        leaves = (position < end) & (position >= state.begin_B.clamp(min=spec.num_sinks)[:, None])
        return Moves(
            fresh_BN=fresh if spec.num_sinks and _worth(fresh) else None,
            place_BP=position % state.k_BGCD.shape[2],
            leaves_BP=leaves if _worth(leaves) else None,
            rows=_rows(leaves),
        )


def _rows(mask_BP: Tensor) -> Tensor | None:
    """The rows in which something is marked; None: all of them, or asking would cost a wait, or a graph."""
    if torch.compiler.is_compiling() or mask_BP.device.type != "cpu":
        return None
    any_B = mask_BP.any(1)
    return None if bool(any_B.all()) else any_B.nonzero()[:, 0]


def _worth(mask: Tensor) -> bool:
    """Whether a masked step does anything; True where asking would cost a wait, or a graph."""
    return torch.compiler.is_compiling() or mask.device.type != "cpu" or bool(mask.any())
