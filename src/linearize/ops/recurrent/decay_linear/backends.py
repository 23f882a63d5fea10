"""Which backend of the recurrence runs a call, and the backend by `fla` (flash-linear-attention, Triton), where
installed.

fla's layout is `[B, T, H, .]`; a decay per head is its `chunk_simple_gla`, one per key dimension its `chunk_gla`.
Padding and documents become sequences (`ops/varlen.py`). Arguments as in fla 0.6.0.

Letters: B batch, H heads, T tokens, K key dimension, V value dimension.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from linearize.ops.dispatch import Call, Dispatcher
from linearize.ops.layout import Layout
from linearize.ops.recurrent.front_end import FLA, recurrent_rules
from linearize.ops.varlen import in_sequences

DISPATCH = Dispatcher("decay_linear", recurrent_rules(FLA, "many tokens: products of chunks"))


def choice(call: Call) -> tuple[str, str]:
    """The backend for a call and why."""
    return DISPATCH.choice(call)


def fla_decay_linear(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, log_decay: Tensor, *, layout: Layout, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same arguments and values as `reference`; y in the dtype of v, fp32 state, 0 at dead tokens."""
    module, name = ("simple_gla", "chunk_simple_gla") if log_decay.dim() == 3 else ("gla", "chunk_gla")
    op = getattr(import_module(f"fla.ops.{module}"), name)
    wide = torch.promote_types(v_BHTV.dtype, torch.float32)
    inputs = (q_BHTK.to(v_BHTV.dtype), k_BHTK.to(v_BHTV.dtype), v_BHTV, log_decay.to(wide))
    state = None if state is None else state.to(wide)

    def call(given: tuple[Tensor, ...], first: Tensor | None, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, g = given
        y, after = op(q, k, v, g=g, scale=1.0, initial_state=first, output_final_state=True, cu_seqlens=bounds)
        return y, after

    return in_sequences(call, inputs, layout, state)
