"""Mamba-2 that starts from attention: C is the query, B the key, x the value (The Mamba in the Llama, 2408.15237,
algorithm 1).

Equal to the Mamba-2 layer of transformers' GraniteMoeHybrid with as many groups as heads, so that it can be exported.

Letters: B batch, T tokens, M model width, H query heads, G key/value heads, D head dimension (state), V value
dimension, C channels of the convolution, K taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self, Unpack

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.base import AttentionShape, Mixer
from linearize.mixers.gates import (
    Repeat,
    copy_projection,
    gate_then_norm,
    head_sizes,
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
from linearize.ops.recurrent.decay_linear import DISPATCH as DECAY_LINEAR
from linearize.ops.recurrent.decay_linear import decay_linear
from linearize.ops.recurrent.front_end import RecurrenceOptions
from linearize.ops.recurrent.layer_steps import KernelOptions


class Mamba2Config(LayerMixerConfig):
    """Mamba-2 in the place of attention.

    `repeat`: whether key/value heads are repeated for their query heads `before` the convolution (which then has its
    own weights per query head; this is what GraniteMoeHybrid can hold) or `after`. `conv_taps`: tokens that the
    convolution sees. `dt_min`, `dt_max`: step sizes at the start, log-uniform in between. Published: 4 taps, steps in
    [0.001, 0.1].
    """

    name: Literal["mamba2"] = "mamba2"
    repeat: Repeat = "before"
    conv_taps: int = Field(4, ge=1)
    dt_min: float = Field(1e-3, gt=0)
    dt_max: float = Field(0.1, gt=0)

    @model_validator(mode="after")
    def _steps_in_order(self) -> Self:
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min {self.dt_min} is larger than dt_max {self.dt_max}: give at most dt_max")
        return self

    def build(self, shape: AttentionShape) -> Mixer:
        """The mixer, started as Mamba-2 is; `start_from` copies the teacher's projections."""
        return Mamba2(self, shape)


class Mamba2(RecurrentMixer):
    """y = out(norm(SSD(C, dt B, x, dt A) + D x, gate)).

    Rows of `in_proj`: gate [H V], x [G V], B [G D], C [H D], dt [H]. Channels of the convolution: x, B, C, with x and B
    at H heads (`repeat="before"`) or G. The state: `memory: [B, H, D, V]`.
    """

    config: Mamba2Config
    fp32_parameters = ("A_log", "dt_bias", "D")
    watched = ("A_log", "norm_weight")
    conv_bias: nn.Parameter

    def __init__(self, config: Mamba2Config, shape: AttentionShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        heads, groups = shape.num_heads, shape.num_kv_heads
        self.inner = heads * shape.value_dim
        self.rows = (self.inner, groups * shape.value_dim, groups * shape.head_dim, heads * shape.head_dim, heads)
        copies = heads if config.repeat == "before" else groups
        self.channels = (copies * shape.value_dim, copies * shape.head_dim, heads * shape.head_dim)
        self.in_proj = nn.Linear(shape.model_dim, sum(self.rows), bias=shape.qkv_bias)
        self.conv_weight = nn.Parameter(torch.empty(sum(self.channels), config.conv_taps))
        self.conv_bias = nn.Parameter(torch.empty(sum(self.channels)))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm_weight = nn.Parameter(torch.empty(self.inner))
        self.out_proj = nn.Linear(self.inner, shape.model_dim, bias=shape.output_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Mamba-2's published start: A in -(1..16), D and the norm's weight 1, torch's own for the rest."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()
        start_conv(self.conv_weight, self.conv_bias)
        start_step_bias(self.dt_bias, dt_min=self.config.dt_min, dt_max=self.config.dt_max)
        start_decay(self.A_log)
        nn.init.ones_(self.D)
        nn.init.ones_(self.norm_weight)

    def start_from(self, weights: AttentionWeights) -> None:
        """Copy v to x, k to B, q to C, o to the output; gate and step size keep their random rows."""
        gate, x, B = self.rows[:3]
        copy_projection(
            self.in_proj,
            (gate, weights.v, weights.v_bias),
            (gate + x, weights.k, weights.k_bias),
            (gate + x + B, weights.q, weights.q_bias),
        )
        copy_projection(self.out_proj, (0, weights.o, weights.o_bias))

    def project(self, hidden_BTM: Tensor) -> tuple[Tensor, ...]:
        """Gate, x, B, C and dt before its bias, `[B, T, R]`."""
        return (self.in_proj(hidden_BTM),)

    def inputs(
        self,
        projected: tuple[Tensor, ...],
        layout: Layout,
        state: RecurrentState | None = None,
        need_state: bool = False,
        commit: int | None = None,
    ) -> Inputs:
        """See `RecurrentMixer.inputs`: C `[B, T, H, D]`, dt B `[B, H, T, D]`, x `[B, T, H, V]`, dt A `[B, H, T]`, at
        least fp32."""
        shape, (gate_rows, x_rows, B_rows, _, dt_rows) = self.shape, self.rows
        heads, groups = shape.num_heads, shape.num_kv_heads
        copies = heads if self.config.repeat == "before" else groups
        parts = (
            Heads(first=gate_rows, groups=groups, heads=copies, dim=shape.value_dim),
            Heads(first=gate_rows + x_rows, groups=groups, heads=copies, dim=shape.head_dim),
            Heads(first=gate_rows + x_rows + B_rows, groups=heads, heads=heads, dim=shape.head_dim),
        )
        (gate, dt, x, B, C), taps = self.convolved_heads(
            projected[0], parts, layout, state, need_state, commit, passed=(gate_rows, dt_rows)
        )
        if self.config.repeat == "after":
            x, B = (w.repeat_interleave(heads // groups, dim=2) for w in (x, B))
        dt_BTH = F.softplus(wide(dt) + wide(self.dt_bias))
        key = (B * dt_BTH[..., None]).transpose(1, 2)
        return gate, (C, key, x, (dt_BTH * -wide(self.A_log).exp()).transpose(1, 2)), taps

    def recurrence(
        self, inputs: tuple[Tensor, ...], outputs: int | None, **options: Unpack[RecurrenceOptions]
    ) -> tuple[Tensor, Tensor | None]:
        """See `RecurrentMixer.recurrence`: `[B, U, H, V]`."""
        C, key, x, decay = inputs
        y, memory = decay_linear(last(C, outputs).transpose(1, 2), key, x.transpose(1, 2), decay, **options)
        return torch.addcmul(y.transpose(1, 2), wide(self.D)[:, None], last(x, outputs)), memory

    def finish(self, y: Tensor, gate_BUE: Tensor) -> Tensor:
        """See `RecurrentMixer.finish`."""
        heads = self.shape.num_heads
        weight = wide(self.norm_weight).unflatten(0, (heads, -1))
        return gate_then_norm(y, gate_BUE.unflatten(-1, (heads, -1)), weight, self.shape.norm_eps).flatten(-2)

    def kernel_steps(self, *projected: Tensor, **options: Unpack[KernelOptions]) -> tuple[Tensor, Tensor, Tensor]:
        """See `RecurrentMixer.kernel_steps`: `ops/triton/heads.py`."""
        from linearize.ops.triton.fused_heads import mamba2_steps

        return mamba2_steps(
            *projected,
            conv_weight_CW=self.conv_weight,
            conv_bias_C=self.conv_bias,
            dt_bias_H=self.dt_bias,
            A_log_H=self.A_log,
            D_H=self.D,
            norm_weight=self.norm_weight,
            sizes=head_sizes(self.shape, self.config.repeat),
            eps=self.shape.norm_eps,
            **options,
        )

    def recurrence_call(self, query: Query) -> tuple[Dispatcher, Call]:
        """See `RecurrentMixer.recurrence_call`."""
        return DECAY_LINEAR, query.wide().call(Call)

    @property
    def num_sums(self) -> int:
        """A matrix per head."""
        return self.shape.num_heads * self.shape.head_dim * self.shape.value_dim

    def matrix(self, hidden_BTM: Tensor, *, layout: Layout) -> Tensor:
        """What multiplies x: C B^T with steps and decays, plus D on the diagonal."""
        _, (C, key, x, decay), _ = self.inputs(self.project(hidden_BTM), layout)
        C, eye = C.transpose(1, 2), torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        mixed, _ = decay_linear(C, key, eye.expand(*C.shape[:2], -1, -1), decay, layout=layout, need_state=False)
        return mixed + wide(self.D)[:, None, None] * eye

    def calibrate(self, samples: Sequence[AttentionSample]) -> None:
        """Decay, convolution, D, gate and norm from the teacher's attention: see `calibration.py`."""
        from linearize.mixers.calibration import calibrate_mamba2

        calibrate_mamba2(self, samples)
