"""The same operation by `fla` (flash-linear-attention, Triton), for CUDA tensors where it is installed.

fla's layout is `[B, T, H, .]`; a decay per head is its `chunk_simple_gla`, one per key dimension its `chunk_gla`.

Letters: B batch, H heads, T tokens, K key dimension, V value dimension.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

from torch import Tensor

from linearize.ops.layout import Layout


@cache
def has_fla() -> bool:
    """Whether fla can be imported (the import itself takes seconds and happens at the first use)."""
    return find_spec("fla") is not None


def fla_takes(q_BHTK: Tensor, layout: Layout) -> bool:
    """Whether fla runs this call: CUDA tensors in at most fp32, no padding, no packing."""
    return q_BHTK.device.type == "cuda" and layout.is_plain and q_BHTK.element_size() <= 4 and has_fla()


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
