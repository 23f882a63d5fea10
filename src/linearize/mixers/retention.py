"""Retention that starts from attention: linear attention with a fixed decay per head and a norm of the output instead
of a normaliser (SUPRA, 2405.06640, section 3; RetNet, 2307.08621).

Letters: B batch, T tokens, M model width, H query heads, G key/value heads, D head dimension, V value dimension.
"""

from __future__ import annotations

from typing import Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.base import AttentionShape, Mixer, MixerCost
from linearize.mixers.gates import copy_projection, repeat_heads, rotate, split_heads, wide
from linearize.mixers.layer_mixer import (
    AttentionWeights,
    LayerMixer,
    LayerMixerConfig,
    MixOptions,
    RecurrentState,
    recurrence_options,
)
from linearize.ops.dispatch import Call, Dispatcher, Query
from linearize.ops.layout import Layout
from linearize.ops.recurrent.decay_linear import DISPATCH as DECAY_LINEAR
from linearize.ops.recurrent.decay_linear import decay_linear

NORM_EPS = 1e-5  # of the published GroupNorm, which has no weights


class RetentionConfig(LayerMixerConfig):
    """Retention in the place of attention.

    `decay`: of head h; `retnet`: 1 - 2^(-5 - h), as in the paper; `alibi`: exp(-2^(-8 (h + 1) / H)), as in the
    published 7B checkpoint, which forgets faster.
    """

    name: Literal["retention"] = "retention"
    decay: Literal["retnet", "alibi"] = "retnet"

    def build(self, shape: AttentionShape) -> Mixer:
        """The mixer; `start_from` copies the teacher's projections."""
        return Retention(self, shape)


class Retention(LayerMixer):
    """y = o(GroupNorm(retention(rope(phi(q)), rope(phi(k)), v))), phi(x) = relu(x W_h + b_h) shared by q and k.

    The group norm is per head, without weights. Keys are divided by sqrt(D). The state: `memory: [B, H, D, V]`.
    """

    config: RetentionConfig
    fp32_parameters = ()

    def __init__(self, config: RetentionConfig, shape: AttentionShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        heads, groups, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        bias = shape.qkv_bias
        self.q_proj = nn.Linear(shape.model_dim, heads * dim, bias=bias)
        self.k_proj = nn.Linear(shape.model_dim, groups * dim, bias=bias)
        self.v_proj = nn.Linear(shape.model_dim, groups * shape.value_dim, bias=bias)
        self.out_proj = nn.Linear(heads * shape.value_dim, shape.model_dim, bias=shape.output_bias)
        self.map_weight = nn.Parameter(torch.empty(heads, dim, dim))
        self.map_bias = nn.Parameter(torch.empty(heads, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The map starts as the identity (as every feature map here; published: torch's random start)."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            linear.reset_parameters()
        with torch.no_grad():
            self.map_weight.copy_(torch.eye(self.shape.head_dim).expand_as(self.map_weight))
            self.map_bias.zero_()

    def start_from(self, weights: AttentionWeights) -> None:
        """Copy all four projections."""
        copy_projection(self.q_proj, (0, weights.q, weights.q_bias))
        copy_projection(self.k_proj, (0, weights.k, weights.k_bias))
        copy_projection(self.v_proj, (0, weights.v, weights.v_bias))
        copy_projection(self.out_proj, (0, weights.o, weights.o_bias))

    def project(self, hidden_BTM: Tensor) -> tuple[Tensor, ...]:
        """q `[B, T, H D]`, k `[B, T, G D]`, v `[B, T, G V]`."""
        return self.q_proj(hidden_BTM), self.k_proj(hidden_BTM), self.v_proj(hidden_BTM)

    def mix(
        self, *projected: Tensor, outputs: int | None = None, **options: Unpack[MixOptions]
    ) -> tuple[Tensor, RecurrentState | None]:
        """See `LayerMixer.mix`."""
        (q, k, v), layout = projected, options["layout"]
        first = 0 if outputs is None else q.shape[1] - outputs
        queries = self._mapped(q[:, first:], layout.part(first, q.shape[1]))
        y, memory = decay_linear(queries, *self._inputs(k, v, layout), **recurrence_options(options))
        y = F.layer_norm(y, (self.shape.value_dim,), eps=NORM_EPS)
        out = self.out_proj(y.transpose(1, 2).flatten(-2).to(q.dtype))
        return out, None if memory is None else RecurrentState(memory)

    def advance(self, *projected: Tensor, layout: Layout, state: RecurrentState | None = None) -> RecurrentState:
        """See `LayerMixer.advance`."""
        _, k, v = projected
        k, v, decay = self._inputs(k, v, layout)
        memory = None if state is None else state.memory
        _, memory = decay_linear(k[:, :, :0], k, v, decay, layout=layout, state=memory)
        assert memory is not None
        return RecurrentState(memory)

    def matrix(self, hidden_BTM: Tensor, *, layout: Layout) -> Tensor:
        """What multiplies the values, before the norm."""
        q, k, v = self.project(hidden_BTM)
        q, (k, v, decay) = self._mapped(q, layout), self._inputs(k, v, layout)
        eye = torch.eye(v.shape[2], dtype=v.dtype, device=v.device).expand(*v.shape[:2], -1, -1)
        return decay_linear(q, k, eye, decay, layout=layout, need_state=False)[0]

    def _inputs(self, k_BTC: Tensor, v_BTC: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
        """Mapped and rotated k `[B, H, T, D]`, v `[B, H, T, V]`, log decays `[B, H, T]`, at least fp32."""
        shape = self.shape
        heads, groups = shape.num_heads, shape.num_kv_heads
        k = self._mapped(repeat_heads(k_BTC, groups, heads), layout) * shape.head_dim**-0.5
        v = wide(split_heads(repeat_heads(v_BTC, groups, heads), heads))
        key = ("retention", self.config.decay, heads, v.dtype)
        if key not in layout.memo:  # once for all layers
            layout.memo[key] = log_decays(self.config.decay, heads, v.device).to(v.dtype)
        decay: Tensor = layout.memo[key]
        return k, v, decay[:, None].expand(v.shape[:3])

    def _mapped(self, x_BTC: Tensor, layout: Layout) -> Tensor:
        """phi and rotary positions, `[B, H, T, D]`, at least fp32."""
        x_BHTD = wide(split_heads(x_BTC, self.shape.num_heads))
        x_BHTD = F.relu(x_BHTD @ wide(self.map_weight) + wide(self.map_bias)[:, None])
        return rotate(x_BHTD, layout, self.shape.rope_theta)

    def operations(self, query: Query) -> list[tuple[Dispatcher, Call]]:
        """See `Mixer.operations`."""
        return [(DECAY_LINEAR, query.wide().call(Call))]

    def cost(self, element_size: int) -> MixerCost:
        """State in at least fp32, decayed, written and read; the map of q and k."""
        shape = self.shape
        entries = shape.num_heads * shape.head_dim * shape.value_dim
        maps = 2 * shape.num_heads * shape.head_dim**2
        return MixerCost(
            state_bytes=max(4, element_size) * entries, bytes_per_token=0, flops_per_token=2 * (3 * entries + maps)
        )


def log_decays(kind: Literal["retnet", "alibi"], heads: int, device: torch.device | None = None) -> Tensor:
    """The log decay of each head, `[H]`, fp64 (RetNet, section 2.2; ALiBi's slopes, 2108.12409, also for H that is no
    power of two)."""
    head = torch.arange(heads, dtype=torch.float64, device=device)
    if kind == "retnet":
        return torch.log1p(-torch.exp2(-5 - head))
    return -torch.exp2(-8 * (head + 1) / heads)
