"""Gated DeltaNet that starts from attention (2412.06464; initialised as in The Mamba in the Llama, 2408.15237).

Equal to the `Qwen3_5GatedDeltaNet` layer of transformers with `repeat="before"` (as many key heads as query heads), so
that it can be exported.

Letters: B batch, T tokens, M model width, H query heads, G key/value heads, D head dimension (keys), V value dimension,
C channels of the convolution, K taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.base import AttentionShape, Mixer
from linearize.mixers.gates import (
    Repeat,
    copy_projection,
    head_sizes,
    norm_then_gate,
    start_conv,
    start_decay,
    start_step_bias,
    wide,
)
from linearize.mixers.layer_mixer import (
    AttentionSample,
    AttentionWeights,
    LayerMixerConfig,
    RecurrentState,
    last,
)
from linearize.mixers.recurrent_mixer import Inputs, RecurrentMixer
from linearize.ops.conv_heads import Heads
from linearize.ops.dispatch import Call, Dispatcher, Query
from linearize.ops.layout import Layout
from linearize.ops.recurrent.front_end import RecurrenceOptions
from linearize.ops.recurrent.gated_delta import DISPATCH as GATED_DELTA
from linearize.ops.recurrent.gated_delta import gated_delta
from linearize.ops.recurrent.layer_steps import KernelOptions

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


class GatedDeltaNet(RecurrentMixer):
    """y = out(norm(delta rule(q, k, v)) silu(gate)), with q, k of length 1 after a convolution and SiLU.

    Rows of `qkv_proj`: q [H D], k [G D], v [G V]. Channels of the convolution: q, k, v, with k and v at H heads
    (`repeat="before"`) or G. Decay: g = -exp(A_log) softplus(decay_proj h + dt_bias); write strength: beta =
    sigmoid(beta_proj h). The state: `memory: [B, H, D, V]`.
    """

    config: GatedDeltaNetConfig
    fp32_parameters = ("A_log", "dt_bias")
    watched = ("A_log", "norm_weight")
    products_per_sum = 4  # and the correction of what a key holds

    def __init__(self, config: GatedDeltaNetConfig, shape: AttentionShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        heads, groups, width = shape.num_heads, shape.num_kv_heads, shape.model_dim
        self.rows = (heads * shape.head_dim, groups * shape.head_dim, groups * shape.value_dim)
        copies = heads if config.repeat == "before" else groups
        self.channels = (heads * shape.head_dim, copies * shape.head_dim, copies * shape.value_dim)
        self.qkv_proj = nn.Linear(width, sum(self.rows), bias=shape.qkv_bias)
        self.conv_weight = nn.Parameter(torch.empty(sum(self.channels), config.conv_taps))
        self.register_parameter("conv_bias", None)
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

    def inputs(
        self,
        projected: tuple[Tensor, ...],
        layout: Layout,
        state: RecurrentState | None = None,
        need_state: bool = False,
        commit: int | None = None,
    ) -> Inputs:
        """See `RecurrentMixer.inputs`: q `[B, T, H, D]`, k `[B, H, T, D]`, v `[B, H, T, V]`, log decay and beta
        `[B, H, T]`, all at least fp32."""
        (qkv, decay, beta, gate), shape, (q_rows, k_rows, _) = projected, self.shape, self.rows
        heads, groups, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        copies = heads if self.config.repeat == "before" else groups
        parts = (
            Heads(first=0, groups=heads, heads=heads, dim=dim, length=dim**-0.5),
            Heads(first=q_rows, groups=groups, heads=copies, dim=dim, length=1.0),
            Heads(first=q_rows + k_rows, groups=groups, heads=copies, dim=shape.value_dim),
        )
        (q, k, v), taps = self.convolved_heads(qkv, parts, layout, state, need_state, commit)
        if self.config.repeat == "after":
            k, v = (x.repeat_interleave(heads // groups, dim=2) for x in (k, v))
        step = F.softplus(wide(decay) + wide(self.dt_bias))
        decay = (step * -wide(self.A_log).exp()).transpose(1, 2)
        beta = torch.sigmoid(wide(beta)).transpose(1, 2)
        return gate, (q, k.transpose(1, 2), v.transpose(1, 2), decay, beta), taps

    def recurrence(
        self, inputs: tuple[Tensor, ...], outputs: int | None, **options: Unpack[RecurrenceOptions]
    ) -> tuple[Tensor, Tensor | None]:
        """See `RecurrentMixer.recurrence`: `[B, U, H, V]`."""
        q, k, v, decay, beta = inputs
        y, memory = gated_delta(last(q, outputs).transpose(1, 2), k, v, decay, beta, **options)
        return y.transpose(1, 2), memory

    def finish(self, y: Tensor, gate_BUE: Tensor) -> Tensor:
        """See `RecurrentMixer.finish`."""
        gate = gate_BUE.unflatten(-1, (self.shape.num_heads, -1))
        return norm_then_gate(y, gate, wide(self.norm_weight), self.shape.norm_eps).flatten(-2)

    def kernel_steps(self, *projected: Tensor, **options: Unpack[KernelOptions]) -> tuple[Tensor, Tensor, Tensor]:
        """See `RecurrentMixer.kernel_steps`: `ops/triton/heads.py`."""
        from linearize.ops.triton.fused_heads import gated_delta_net_steps

        return gated_delta_net_steps(
            *projected,
            conv_weight_CW=self.conv_weight,
            dt_bias_H=self.dt_bias,
            A_log_H=self.A_log,
            norm_weight_V=self.norm_weight,
            sizes=head_sizes(self.shape, self.config.repeat),
            eps=self.shape.norm_eps,
            **options,
        )

    def recurrence_call(self, query: Query) -> tuple[Dispatcher, Call]:
        """See `RecurrentMixer.recurrence_call`."""
        return GATED_DELTA, query.wide().call(Call)

    @property
    def num_sums(self) -> int:
        """A matrix per head."""
        return self.shape.num_heads * self.shape.head_dim * self.shape.value_dim

    def matrix(self, hidden_BTM: Tensor, *, layout: Layout) -> Tensor:
        """What multiplies the values, before norm and gate."""
        _, (q, k, v, decay, beta), _ = self.inputs(self.project(hidden_BTM), layout)
        q, eye = q.transpose(1, 2), torch.eye(v.shape[2], dtype=v.dtype, device=v.device).expand(*v.shape[:2], -1, -1)
        return gated_delta(q, k, eye, decay, beta, layout=layout, need_state=False)[0]

    def calibrate(self, samples: Sequence[AttentionSample]) -> None:
        """Decay, write strength, gate and output scale from the teacher's attention: see `calibration.py`."""
        from linearize.mixers.calibration import calibrate_gated_delta_net

        calibrate_gated_delta_net(self, samples)
