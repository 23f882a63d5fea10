"""The state of window + linear attention: a folded sum, and the keys and values that are still inside the window.

Letters: B batch, G key/value heads, H query heads, D head dimension, V value dimension, F features, R ring slots, N
sinks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.tensor_state import TensorState


@dataclass(frozen=True, eq=False)
class WindowLinearState(TensorState):
    """What a window + linear layer remembers of a sequence.

    `next`: position that the next token of the current document would have (one int for all rows, or `[B]`).
    `memory_BHFV`: sum of phi_k(k) [v, 1]^T over tokens folded so far, at least fp32; None without a linear branch.
    Its last value column
    is the normaliser z.
    `k_BGRD`, `v_BGRV`: the last R tokens, oldest first; those at positions below the fold boundary are dead.
    `sink_k_BGND`, `sink_v_BGNV`: the first tokens of the document, kept for ever; None without sinks.
    `begin`: position of the document's first token, `[B]`: slots of lower ones, in the ring or among the sinks, are
    dead; None: 0 in every row, as almost always.
    """

    next: int | Tensor
    k_BGRD: Tensor
    v_BGRV: Tensor
    memory_BHFV: Tensor | None = None
    sink_k_BGND: Tensor | None = None
    sink_v_BGNV: Tensor | None = None
    begin: Tensor | None = None

    def fixed(self, *, ring: int, num_sinks: int) -> WindowLinearState:
        """The same state in the largest shapes that it can have, whatever was read: dead slots in front of the ring's,
        sinks that are still to come behind the others, `next` as a tensor `[B]`."""
        rows, device = self.k_BGRD.shape[0], self.k_BGRD.device
        following = self.next if isinstance(self.next, Tensor) else torch.full((rows,), self.next, device=device)
        k, v = (F.pad(x, (0, 0, ring - x.shape[2], 0)) for x in (self.k_BGRD, self.v_BGRV))
        sink_k, sink_v = (
            None if x is None else F.pad(x, (0, 0, 0, num_sinks - x.shape[2]))
            for x in (self.sink_k_BGND, self.sink_v_BGNV)
        )
        return WindowLinearState(following, k, v, self.memory_BHFV, sink_k, sink_v, self.begin)
