"""The state of window + linear attention: a folded sum, and the keys and values that are still inside the window.

Letters: B batch, G key/value heads, H query heads, D head dimension, V value dimension, F features, R ring slots, N
sinks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from linearize.ops.tensor_state import TensorState
from linearize.ops.window_linear.ring_buffer import RingBuffer


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
    `ring_buffer`: memory with free slots that the ring may lie in (decoding).
    """

    next: int | Tensor
    k_BGRD: Tensor
    v_BGRV: Tensor
    memory_BHFV: Tensor | None = None
    sink_k_BGND: Tensor | None = None
    sink_v_BGNV: Tensor | None = None
    begin: Tensor | None = None
    ring_buffer: RingBuffer | None = None
