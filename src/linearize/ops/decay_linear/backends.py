"""Which form of the recurrence runs a call, and the form by `fla` (flash-linear-attention, Triton), where installed.

fla's layout is `[B, T, H, .]`; a decay per head is its `chunk_simple_gla`, one per key dimension its `chunk_gla`.

Letters: B batch, H heads, T tokens, K key dimension, V value dimension.
"""

from __future__ import annotations

from importlib import import_module

from torch import Tensor

from linearize.ops import triton as kernels
from linearize.ops.forms import Call, Dispatcher, Rule, more_than, never
from linearize.ops.layout import Layout
from linearize.ops.pairs import MANY

DISPATCH = Dispatcher(
    "decay_linear",
    [
        Rule("triton", kernels.refuses, "a few tokens on a GPU: one launch", built=True),
        Rule("reference", more_than(1), "one token: the recurrence itself"),
        Rule("few", more_than(MANY), "a few tokens: the state read once"),
        Rule("fla", kernels.fla_refuses, "many tokens on a GPU: fla's chunks", built=True),
        Rule("chunked", never, "many tokens: products of chunks"),
    ],
)


def choice(call: Call) -> tuple[str, str]:
    """The form for a call and why."""
    return DISPATCH.choice(call)


def fla_decay_linear(
    q_BHTK: Tensor, k_BHTK: Tensor, v_BHTV: Tensor, log_decay: Tensor, *, layout: Layout, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same arguments and values as `reference`, for plain layouts."""
    assert layout.is_plain
    module, name = ("simple_gla", "chunk_simple_gla") if log_decay.dim() == 3 else ("gla", "chunk_gla")
    op = getattr(import_module(f"fla.ops.{module}"), name)
    q, k, v, g = (x.transpose(1, 2).contiguous() for x in (q_BHTK, k_BHTK, v_BHTV, log_decay))
    y, after = op(q, k, v, g=g, scale=1.0, initial_state=state, output_final_state=True)
    return y.transpose(1, 2), after
