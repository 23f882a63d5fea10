"""Gated DeltaNet that starts from attention (2412.06464; initialised as in The Mamba in the Llama, 2408.15237).

Equal to the `Qwen3_5GatedDeltaNet` layer of transformers with `repeat="before"` (as many key heads as query heads), so
that it can be exported.

Letters: B batch, T tokens, M model width, H query heads, G key/value heads, D head dimension (keys), V value dimension,
C channels of the convolution, K taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.base import AttentionShape, Mixer, MixerCost
from linearize.mixers.gates import (
    Repeat,
    copy_projection,
    head_sizes,
    l2_norm,
    norm_then_gate,
    repeat_heads,
    start_conv,
    start_decay,
    start_step_bias,
    wide,
)
from linearize.mixers.layer_mixer import (
    AttentionSample,
    AttentionWeights,
    LayerMixer,
    LayerMixerConfig,
    RecurrentState,
    last,
)
from linearize.ops.conv_heads import Heads, can_convolve, conv_heads
from linearize.ops.dispatch import Call, Dispatcher, Query
from linearize.ops.layout import Layout
from linearize.ops.recurrent.gated_delta import gated_delta
from linearize.ops.recurrent.gated_delta.backends import DISPATCH as GATED_DELTA
from linearize.ops.recurrent.layer_steps import DISPATCH as LAYER
from linearize.ops.recurrent.layer_steps import LayerCall, run_layer
from linearize.ops.short_conv import short_conv

START = 0.02  # standard deviation of new projections (Qwen3-Next's initializer_range)


class GatedDeltaNetConfig(LayerMixerConfig):
    """Gated DeltaNet in the place of attention.

    `repeat`: whether key/value heads are repeated for their query heads `before` the convolution (which then has its
    own weights per query head; this is what Qwen3.5 can hold) or `after`. `conv_taps`: tokens that the convolution
    sees. Published: 4 taps.
    """

    name: Literal["gated_delta_net"] = "gated_delta_net"
    repeat: Repeat = "before"
    conv_taps: int = Field(4, ge=1)

    def build(self, shape: AttentionShape) -> Mixer:
        """The mixer, started as published; `start_from` copies the teacher's projections."""
        return GatedDeltaNet(self, shape)


class GatedDeltaNet(LayerMixer):
    """y = out(norm(delta rule(q, k, v)) silu(gate)), with q, k of length 1 after a convolution and SiLU.

    Rows of `qkv_proj`: q [H D], k [G D], v [G V]. Channels of the convolution: q, k, v, with k and v at H heads
    (`repeat="before"`) or G. Decay: g = -exp(A_log) softplus(decay_proj h + dt_bias); write strength: beta =
    sigmoid(beta_proj h). The state: `memory: [B, H, D, V]`.
    """

    config: GatedDeltaNetConfig
    fp32_parameters = ("A_log", "dt_bias")

    def __init__(self, config: GatedDeltaNetConfig, shape: AttentionShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        heads, groups, width = shape.num_heads, shape.num_kv_heads, shape.model_dim
        self.rows = (heads * shape.head_dim, groups * shape.head_dim, groups * shape.value_dim)
        copies = heads if config.repeat == "before" else groups
        self.channels = (heads * shape.head_dim, copies * shape.head_dim, copies * shape.value_dim)
        self.qkv_proj = nn.Linear(width, sum(self.rows), bias=shape.qkv_bias)
        self.conv_weight = nn.Parameter(torch.empty(sum(self.channels), config.conv_taps))
        self.beta_proj = nn.Linear(width, heads, bias=False)
        self.decay_proj = nn.Linear(width, heads, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.gate_proj = nn.Linear(width, heads * shape.value_dim, bias=False)
        self.norm_weight = nn.Parameter(torch.empty(shape.value_dim))
        self.out_proj = nn.Linear(heads * shape.value_dim, width, bias=shape.output_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The published start: beta near 1/2, the gate near 0, A in (0, 16), steps in [0.001, 0.1] as Mamba's.

        A gate near silu(0) = 0 makes the layer's first output small and of either sign: the published layers are
        trained from there. `calibrate` opens it.
        """
        self.qkv_proj.reset_parameters()
        self.out_proj.reset_parameters()
        for linear in (self.beta_proj, self.decay_proj, self.gate_proj):
            nn.init.normal_(linear.weight, std=START)
        start_conv(self.conv_weight)
        start_step_bias(self.dt_bias, dt_min=1e-3, dt_max=0.1)
        start_decay(self.A_log, lowest=0.01, highest=16.0)
        nn.init.ones_(self.norm_weight)

    def start_from(self, weights: AttentionWeights) -> None:
        """Copy q, k, v and the output projection."""
        q, k, _ = self.rows
        copy_projection(
            self.qkv_proj,
            (0, weights.q, weights.q_bias),
            (q, weights.k, weights.k_bias),
            (q + k, weights.v, weights.v_bias),
        )
        copy_projection(self.out_proj, (0, weights.o, weights.o_bias))

    def project(self, hidden_BTM: Tensor) -> tuple[Tensor, ...]:
        """q, k, v `[B, T, R]`, decay before its bias and write strength before its sigmoid `[B, T, H]`, gate."""
        decay, beta = self.decay_proj(hidden_BTM), self.beta_proj(hidden_BTM)
        return self.qkv_proj(hidden_BTM), decay, beta, self.gate_proj(hidden_BTM)

    def mix(
        self,
        *projected: Tensor,
        layout: Layout,
        state: RecurrentState | None = None,
        need_state: bool = True,
        commit: int | None = None,
        outputs: int | None = None,
    ) -> tuple[Tensor, RecurrentState | None]:
        """See `LayerMixer.mix`."""
        options: dict[str, Any] = {"layout": layout, "state": state, "need_state": need_state, "commit": commit}
        y_BUC, after = run_layer(
            projected,
            (self.A_log, self.norm_weight),
            self.conv_weight,
            layout,
            lambda: self.by_kernel(*projected, outputs=outputs, **options),
            lambda: self.by_operations(*projected, outputs=outputs, **options),
        )
        return self.out_proj(y_BUC), after

    def by_operations(
        self, qkv: Tensor, decay: Tensor, beta: Tensor, gate: Tensor, *, outputs: int | None, **options: Any
    ) -> tuple[Tensor, RecurrentState | None]:
        """`y: [B, U, H V]` before the output projection, and the state; `options`: those of `recall`."""
        y_BUHV, after = self.recall(qkv, decay, beta, outputs=outputs, **options)
        gate = last(gate, outputs).unflatten(-1, (self.shape.num_heads, -1))
        y = norm_then_gate(y_BUHV, gate, wide(self.norm_weight), self.shape.norm_eps)
        return y.flatten(-2).to(qkv.dtype), after

    def by_kernel(
        self, *projected: Tensor, state: RecurrentState | None, need_state: bool, **options: Any
    ) -> tuple[Tensor, RecurrentState | None]:
        """`by_operations` in one launch of `ops/triton/heads.py`; `options`: layout, commit, outputs."""
        from linearize.ops.triton.fused_heads import gated_delta_net_steps

        y, memory, taps = gated_delta_net_steps(
            *projected,
            conv_weight_CW=self.conv_weight,
            dt_bias_H=self.dt_bias,
            A_log_H=self.A_log,
            norm_weight_V=self.norm_weight,
            sizes=head_sizes(self.shape, self.config.repeat),
            eps=self.shape.norm_eps,
            memory=None if state is None else state.memory,
            taps_BPC=None if state is None else state.taps,
            **options,
        )
        return y, RecurrentState(memory, taps) if need_state else None

    def recall(
        self,
        qkv: Tensor,
        decay: Tensor,
        beta: Tensor,
        *,
        layout: Layout,
        state: RecurrentState | None = None,
        need_state: bool = True,
        commit: int | None = None,
        outputs: int | None = None,
    ) -> tuple[Tensor, RecurrentState | None]:
        """What the delta rule gives, `[B, U, H, V]` in at least fp32, before norm and gate; and the state."""
        q, *inputs, taps = self._inputs((qkv, decay, beta), layout, state, need_state, commit)
        memory = None if state is None else state.memory
        q = last(q, outputs).transpose(1, 2)
        y, memory = gated_delta(q, *inputs, layout=layout, state=memory, need_state=need_state, commit=commit)
        return y.transpose(1, 2), None if memory is None else RecurrentState(memory, taps)

    def advance(self, *projected: Tensor, layout: Layout, state: RecurrentState | None = None) -> RecurrentState:
        """See `LayerMixer.advance`."""
        _, after = self.recall(*projected[:3], layout=layout, state=state, outputs=0)
        assert after is not None
        return after

    def matrix(self, hidden_BTM: Tensor, *, layout: Layout) -> Tensor:
        """What multiplies the values, before norm and gate."""
        q, k, v, decay, beta, _ = self._inputs(self.project(hidden_BTM)[:3], layout)
        q, eye = q.transpose(1, 2), torch.eye(v.shape[2], dtype=v.dtype, device=v.device).expand(*v.shape[:2], -1, -1)
        return gated_delta(q, k, eye, decay, beta, layout=layout, need_state=False)[0]

    def calibrate(self, samples: Sequence[AttentionSample]) -> None:
        """Decay, write strength, gate and output scale from the teacher's attention: see `calibration.py`."""
        from linearize.mixers.calibration import calibrate_gated_delta_net

        calibrate_gated_delta_net(self, samples)

    def _inputs(
        self,
        projected: tuple[Tensor, ...],
        layout: Layout,
        state: RecurrentState | None = None,
        need_state: bool = False,
        commit: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """q `[B, T, H, D]`, k `[B, H, T, D]`, v `[B, H, T, V]`, log decay and beta `[B, H, T]`, all at least fp32;
        taps."""
        (qkv, decay, beta), taps = projected, None
        if state is None and not need_state and commit is None and can_convolve(qkv, layout):
            q, k, v = self._fused(qkv, layout)
        else:
            q, k, v, taps = self._one_by_one(qkv, layout, state, need_state, commit)
        if self.config.repeat == "after":
            k, v = (x.repeat_interleave(self.shape.num_heads // self.shape.num_kv_heads, dim=2) for x in (k, v))
        step = F.softplus(wide(decay) + wide(self.dt_bias))
        decay = (step * -wide(self.A_log).exp()).transpose(1, 2)
        beta = torch.sigmoid(wide(beta)).transpose(1, 2)
        return q, k.transpose(1, 2), v.transpose(1, 2), decay, beta, taps

    def _fused(self, qkv: Tensor, layout: Layout) -> tuple[Tensor, ...]:
        """q, k, v `[B, T, H or G, .]` after convolution and SiLU, q and k at their lengths."""
        shape, (q, k, _) = self.shape, self.rows
        heads, groups, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        copies = heads if self.config.repeat == "before" else groups
        parts = (
            Heads(first=0, groups=heads, heads=heads, dim=dim, length=dim**-0.5),
            Heads(first=q, groups=groups, heads=copies, dim=dim, length=1.0),
            Heads(first=q + k, groups=groups, heads=copies, dim=shape.value_dim),
        )
        return conv_heads(qkv, self.conv_weight.to(qkv.dtype), None, parts, layout=layout)

    def _one_by_one(
        self, qkv: Tensor, layout: Layout, state: RecurrentState | None, need_state: bool, commit: int | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What `_fused` gives, in any precision, after past inputs; and the taps."""
        shape = self.shape
        heads, groups, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        if self.config.repeat == "before" and groups < heads:
            q, k, v = qkv.split(self.rows, dim=-1)
            qkv = torch.cat([q, repeat_heads(k, groups, heads), repeat_heads(v, groups, heads)], dim=-1)
        options: dict[str, Any] = {"layout": layout, "need_state": need_state, "commit": commit}
        taps = None if state is None else state.taps
        qkv, taps = short_conv(qkv, self.conv_weight, None, taps_BKC=taps, **options)
        cut = F.silu(wide(qkv)).split(self.channels, dim=-1)
        q, k, v = (x.unflatten(-1, (-1, size)) for x, size in zip(cut, (dim, dim, shape.value_dim), strict=True))
        return l2_norm(q) * dim**-0.5, l2_norm(k), v, taps

    def operations(self, query: Query) -> list[tuple[Dispatcher, Call]]:
        """See `Mixer.operations`."""
        layer = query.call(LayerCall, taps=self.config.conv_taps)
        return [(LAYER, layer), (GATED_DELTA, query.wide().call(Call))]

    def cost(self, element_size: int) -> MixerCost:
        """State in fp32 and the convolution's taps; the state decayed, corrected, written and read, the convolution."""
        shape, taps = self.shape, self.config.conv_taps
        entries, channels = shape.num_heads * shape.head_dim * shape.value_dim, sum(self.channels)
        return MixerCost(
            state_bytes=max(4, element_size) * entries + (taps - 1) * channels * element_size,
            bytes_per_token=0,
            flops_per_token=2 * (4 * entries + taps * channels),
        )
