"""Mamba in place of attention, started from the attention's projections (2408.15237, section 2, the Mamba-1 variant).

    C <- Wq, B <- Wk, x <- Wv, out <- Wo;    gate z, step dt, A, D and the convolution are new
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,    y_t = (C_t . h_t + D x_t) silu(z_t)       per channel

A head's D channels are cut into sub-heads of N channels, each with N numbers of its B and C: a selective scan with
state N. Heads are repeated whole from key/value heads, so that the C, B, x and output columns of one attention head
meet (the published code repeats sub-heads, which pairs dimensions of different sub-heads where D > N).

Letters: B batch, T tokens, M model width, H query heads, G key/value heads, D head dimension (values too), E = H D
channels, N state size, S = E / N sub-heads, K convolution taps.
"""

from __future__ import annotations

import math
from typing import Literal, Unpack

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.errors import InputError
from linearize.mixers.base import AttentionShape, Mixer
from linearize.mixers.gates import (
    Repeat,
    copy_projection,
    repeat_heads,
    start_conv,
    start_step_bias,
    wide,
)
from linearize.mixers.layer_mixer import AttentionWeights, LayerMixerConfig, RecurrentState, last
from linearize.mixers.recurrent_mixer import Inputs, RecurrentMixer
from linearize.ops.dispatch import Call, Dispatcher, Query
from linearize.ops.layout import Layout
from linearize.ops.recurrent.front_end import RecurrenceOptions
from linearize.ops.recurrent.layer_steps import KernelOptions
from linearize.ops.recurrent.selective_scan import DISPATCH as SELECTIVE_SCAN
from linearize.ops.recurrent.selective_scan import ScanCall, selective_scan
from linearize.ops.short_conv import short_conv

PUBLISHED_STATE = 16
SHORTEST_STEP, LONGEST_STEP = 1e-3, 1e-1


class MambaConfig(LayerMixerConfig):
    """The defaults are the published ones.

    `state_dim`: state per channel; must divide the head dimension (None: 16, or all of a smaller head). `conv_taps`:
    tokens that the convolution sees. `repeat`: key/value heads of x are repeated to query heads `before` or `after`
    the convolution. `step_rank`: rank of dt's projection (None: a sixteenth of the model width, rounded up).
    """

    name: Literal["mamba"] = "mamba"
    state_dim: int | None = Field(None, ge=1)
    conv_taps: int = Field(4, ge=1)
    repeat: Repeat = "before"
    step_rank: int | None = Field(None, ge=1)

    def build(self, shape: AttentionShape) -> Mixer:
        """The mixer, started at random.

        Raises:
            InputError: values not as wide as keys, or a state size that does not divide the head dimension.
        """
        return Mamba(self, shape)


class Mamba(RecurrentMixer):
    """Selective scan between the attention's projections, gated."""

    config: MambaConfig
    fp32_parameters = ("A_log", "D", "dt_bias")
    watched = ("A_log", "dt_bias")
    conv_bias: nn.Parameter

    def __init__(self, config: MambaConfig, shape: AttentionShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        self.state_dim = _state_dim(config, shape)
        self.channels = shape.num_heads * shape.head_dim
        self.kv_channels = shape.num_kv_heads * shape.head_dim
        rank = config.step_rank or math.ceil(shape.model_dim / 16)
        convolved = self.channels if config.repeat == "before" else self.kv_channels
        rows = 2 * (self.channels + self.kv_channels)
        self.in_proj = nn.Linear(shape.model_dim, rows, bias=shape.qkv_bias)
        self.dt_in = nn.Linear(shape.model_dim, rank, bias=False)
        self.dt_proj = nn.Linear(rank, self.channels, bias=False)
        self.out_proj = nn.Linear(self.channels, shape.model_dim, bias=shape.output_bias)
        self.conv_weight = nn.Parameter(torch.empty(convolved, config.conv_taps))
        self.conv_bias = nn.Parameter(torch.empty(convolved))
        self.dt_bias = nn.Parameter(torch.empty(self.channels))
        self.A_log = nn.Parameter(torch.empty(self.channels, self.state_dim))
        self.D = nn.Parameter(torch.empty(self.channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As published: A = -(1 .. N), steps log-uniform in [0.001, 0.1], D = 1; torch's own start for the rest."""
        for linear in (self.in_proj, self.dt_in, self.out_proj):
            linear.reset_parameters()
        bound = self.dt_proj.in_features**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        start_conv(self.conv_weight, self.conv_bias)
        start_step_bias(self.dt_bias, dt_min=SHORTEST_STEP, dt_max=LONGEST_STEP)
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.state_dim + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def start_from(self, weights: AttentionWeights) -> None:
        """C <- Wq, B <- Wk, x <- Wv, out <- Wo, biases too; nothing where the config says `random`."""
        if self.config.initialise == "random":
            return
        x, B, C = self.channels, self.channels + self.kv_channels, self.channels + 2 * self.kv_channels
        copy_projection(
            self.in_proj,
            (x, weights.v, weights.v_bias),
            (B, weights.k, weights.k_bias),
            (C, weights.q, weights.q_bias),
        )
        copy_projection(self.out_proj, (0, weights.o, weights.o_bias))

    def project(self, hidden_BTM: Tensor) -> tuple[Tensor, ...]:
        """z, x, B, C `[B, T, 2 (H + G) D]` and dt before its bias `[B, T, E]`."""
        return self.in_proj(hidden_BTM), self.dt_proj(self.dt_in(hidden_BTM))

    def inputs(
        self,
        projected: tuple[Tensor, ...],
        layout: Layout,
        state: RecurrentState | None = None,
        need_state: bool = False,
        commit: int | None = None,
    ) -> Inputs:
        """See `RecurrentMixer.inputs`: x, dt, A, B, C of the scan, x, dt and A in at least fp32."""
        projected_BTR, dt_BTE = projected
        sizes = [self.channels, self.kv_channels, self.kv_channels, self.channels]
        z_BTE, x_BTC, B_BTC, C_BTE = projected_BTR.split(sizes, dim=-1)
        if self.config.repeat == "before":
            x_BTC = self._repeat(x_BTC)
        x_BTC, taps = short_conv(
            x_BTC,
            self.conv_weight,
            self.conv_bias,
            taps_BKC=None if state is None else state.taps,
            layout=layout,
            need_state=need_state,
            commit=commit,
        )
        x_BTE = F.silu(wide(x_BTC))
        if self.config.repeat == "after":
            x_BTE = self._repeat(x_BTE)
        dt_BTE = F.softplus(wide(dt_BTE) + wide(self.dt_bias))
        B_BTSN, C_BTSN = (w.unflatten(-1, (-1, self.state_dim)) for w in (self._repeat(B_BTC), C_BTE))
        return z_BTE, (x_BTE, dt_BTE, -wide(self.A_log).exp(), B_BTSN, C_BTSN), taps

    def recurrence(
        self, inputs: tuple[Tensor, ...], outputs: int | None, **options: Unpack[RecurrenceOptions]
    ) -> tuple[Tensor, Tensor | None]:
        """See `RecurrentMixer.recurrence`: `[B, U, E]`."""
        x_BTE, dt_BTE, A_EN, B_BTSN, C_BTSN = inputs
        y_BUE, memory = selective_scan(x_BTE, dt_BTE, A_EN, B_BTSN, last(C_BTSN, outputs), **options)
        return torch.addcmul(y_BUE, wide(self.D), last(x_BTE, outputs)), memory

    def finish(self, y: Tensor, gate_BUE: Tensor) -> Tensor:
        """See `RecurrentMixer.finish`."""
        return y * F.silu(wide(gate_BUE))

    def kernel_steps(self, *projected: Tensor, **options: Unpack[KernelOptions]) -> tuple[Tensor, Tensor, Tensor]:
        """See `RecurrentMixer.kernel_steps`: `ops/triton/mamba.py`."""
        from linearize.ops.triton.mamba import ChannelSizes, mamba_steps

        shape = self.shape
        return mamba_steps(
            *projected,
            conv_weight_CW=self.conv_weight,
            conv_bias_C=self.conv_bias,
            dt_bias_E=self.dt_bias,
            A_log_EN=self.A_log,
            D_E=self.D,
            sizes=ChannelSizes(
                heads=shape.num_heads,
                groups=shape.num_kv_heads,
                head_dim=shape.head_dim,
                state_dim=self.state_dim,
                repeat=self.config.repeat,
            ),
            **options,
        )

    def recurrence_call(self, query: Query) -> tuple[Dispatcher, Call]:
        """See `RecurrentMixer.recurrence_call`."""
        state = {"state_dim": self.state_dim, "has_state": query.past, "need_state": not query.gradients}
        return SELECTIVE_SCAN, query.wide().call(ScanCall, **state)

    @property
    def num_sums(self) -> int:
        """N sums per channel."""
        return self.A_log.numel()

    def matrix(self, hidden_BTM: Tensor, *, layout: Layout) -> Tensor:
        """The mean over a head's channels of their matrices, `[B, H, T, T]`, D on the diagonal; before the gate.

        Each channel p has its own, y_p = M_p x_p with x after the convolution. Of all single matrices the mean is the
        nearest to them (sum of squared Frobenius distances). Takes D N products over [B, H, T, T].
        """
        _, (x_BTE, dt_BTE, A_EN, B_BTSN, C_BTSN), _ = self.inputs(self.project(hidden_BTM), layout)
        heads, dim, tokens, device = self.shape.num_heads, self.shape.head_dim, x_BTE.shape[1], x_BTE.device
        if (live := layout.live()) is not None:
            dt_BTE = dt_BTE.masked_fill(~live[..., None], 0)
        total_BTE = dt_BTE.cumsum(1, dtype=torch.float64)
        dt, total, B, C = (
            w.flatten(2).unflatten(2, (heads, dim)).permute(3, 0, 2, 1) for w in (dt_BTE, total_BTE, B_BTSN, C_BTSN)
        )
        A_DHN = A_EN.unflatten(0, (heads, dim)).transpose(0, 1)
        matrix: Tensor | int = 0
        for p in range(dim):
            since = (total[p][..., :, None] - total[p][..., None, :]).clamp(min=0).to(dt.dtype)
            first = p - p % self.state_dim
            terms = (
                C[first + n][..., :, None] * (A_DHN[p, :, n, None, None] * since).exp() * B[first + n][..., None, :]
                for n in range(self.state_dim)
            )
            matrix = matrix + sum(terms) * dt[p][..., None, :] / dim
        skip_H = wide(self.D).unflatten(0, (heads, dim)).mean(-1)
        eye = torch.eye(tokens, dtype=skip_H.dtype, device=device)
        return matrix * _visible(layout, tokens, device) + skip_H[:, None, None] * eye

    def _repeat(self, x_BTC: Tensor) -> Tensor:
        return repeat_heads(x_BTC, self.shape.num_kv_heads, self.shape.num_heads)


def _state_dim(config: MambaConfig, shape: AttentionShape) -> int:
    """The state size, checked against the head dimension."""
    dim = shape.head_dim
    if shape.value_dim != dim:
        raise InputError(
            f"mixer mamba: the teacher's values have {shape.value_dim} dimensions and its keys {dim}, both must have "
            "as many: use mamba2"
        )
    size = config.state_dim or min(PUBLISHED_STATE, dim)
    if dim % size:
        allowed = [n for n in range(1, dim + 1) if dim % n == 0]
        setting = "state_dim" if config.state_dim else "the default state_dim"
        raise InputError(
            f"mixer mamba: {setting} {size} does not divide the head dimension {dim}: set state_dim to one of "
            + ", ".join(map(str, allowed))
        )
    return size


def _visible(layout: Layout, tokens: int, device: torch.device) -> Tensor:
    """Which tokens each token sees, `[B or 1, 1, T, T]`: those before it in its document, and itself."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()[None]
    if (starts := layout.starts(tokens, device)) is not None:
        document = starts.long().cumsum(-1)
        seen = seen & (document[:, :, None] == document[:, None, :])
    return seen[:, None]
