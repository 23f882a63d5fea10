"""Which backend of the gated delta rule runs a call, and the backend by flash-linear-attention's Triton kernel,
imported when it is first called for.

Letters: B batch, H heads, T tokens, K key dimension, V value dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops.dispatch import Call, Dispatcher
from linearize.ops.layout import Layout
from linearize.ops.recurrent.front_end import FLA, recurrent_rules
from linearize.ops.varlen import in_sequences

DISPATCH = Dispatcher("gated_delta", recurrent_rules(FLA, "many tokens: products of chunks"))


def choice(call: Call) -> tuple[str, str]:
    """The backend for a call and why."""
    return DISPATCH.choice(call)


def fla_gated_delta(
    q_BHTK: Tensor,
    k_BHTK: Tensor,
    v_BHTV: Tensor,
    log_decay_BHT: Tensor,
    beta_BHT: Tensor,
    *,
    layout: Layout,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`y` in the dtype of v, 0 at dead tokens, and the fp32 state after the last token. Arguments as in fla 0.6.0."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found]

    dtype = v_BHTV.dtype
    wide = torch.promote_types(dtype, torch.float32)
    inputs = (q_BHTK.to(dtype), k_BHTK.to(dtype), v_BHTV, log_decay_BHT.to(wide), beta_BHT.to(wide))
    state = None if state is None else state.to(wide)

    def call(given: tuple[Tensor, ...], first: Tensor | None, bounds: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta = given
        y, after = chunk_gated_delta_rule(
            q=q,
            k=k,
            v=v,
            g=g,
            beta=beta,
            scale=1.0,
            initial_state=first,
            output_final_state=True,
            use_qk_l2norm_in_kernel=False,
            cu_seqlens=bounds,
        )
        return y, after

    return in_sequences(call, inputs, layout, state)
