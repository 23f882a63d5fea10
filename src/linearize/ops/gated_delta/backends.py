"""Which form of the gated delta rule runs a call, and the form by flash-linear-attention's Triton kernel, imported when
it is first called for.

Letters: B batch, H heads, T tokens, K key dimension, V value dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops import triton as kernels
from linearize.ops.forms import Call, Dispatcher, Rule, more_than, never
from linearize.ops.layout import Layout
from linearize.ops.pairs import MANY

DISPATCH = Dispatcher(
    "gated_delta",
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


def fla_form(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_decay_BHT: Tensor,
    beta_BHT: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`y` and the fp32 state after the last token; the layout must be plain. The kernel takes `[B, T, H, ...]`."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found]

    assert layout.is_plain, "the kernel knows no padding or packing"
    dtype = v_BHTV.dtype
    y_BTHV, after = chunk_gated_delta_rule(
        q=q_BHTK.transpose(1, 2).to(dtype).contiguous(),
        k=k_BHTK.transpose(1, 2).to(dtype).contiguous(),
        v=v_BHTV.transpose(1, 2).contiguous(),
        g=log_decay_BHT.transpose(1, 2).to(torch.float32).contiguous(),
        beta=beta_BHT.transpose(1, 2).to(torch.float32).contiguous(),
        scale=1.0,
        initial_state=None if state is None else state.to(torch.float32),
        output_final_state=True,
        use_qk_l2norm_in_kernel=False,
    )
    return y_BTHV.transpose(1, 2), after
