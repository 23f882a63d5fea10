"""`mamba2_steps` and `gated_delta_net_steps`: what these mixers do between their projections, in one launch.

Heads of more than 128 x 128 numbers are cut along their values and take a second launch for gate and norm.

Letters: B batch, H heads, T tokens, U of them (the last) with an output, K key dimension, V value dimension, R columns
of the projection, C channels of the convolution, P past inputs of the convolution (W = P + 1 taps).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.ops.layout import Layout
from linearize.ops.recurrent.layer_steps import MOST_TAPS
from linearize.ops.triton import MOST_TOKENS
from linearize.ops.triton.heads import heads_kernel, norm_kernel
from linearize.ops.triton.launch import WHOLE_TILE, Span, positions, power_of_two, read_state, rows_of, state_memory
from linearize.ops.triton.launch import tile as make_tile

HeadRange = tuple[int, int, int, int]  # first column, heads there, first channel, heads there


@dataclass(frozen=True, kw_only=True)
class HeadSizes:
    """`groups` key/value heads are repeated for `heads` query heads, before the convolution or (`after`) behind it."""

    heads: int
    groups: int
    key_dim: int
    value_dim: int
    repeat: str

    @property
    def convolved(self) -> int:
        """Key and value heads that the convolution sees."""
        return self.heads if self.repeat == "before" else self.groups


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadInputs:
    """Arguments of a call, whichever mixer it is for; `parts`: of q, k and v."""

    x_BTR: Tensor
    gate_BTC: Tensor
    step_BTH: Tensor
    beta_BTH: Tensor | None
    weight_CW: Tensor
    bias_C: Tensor | None
    step_bias_H: Tensor
    A_log_H: Tensor
    skip_H: Tensor | None
    norm_weight: Tensor
    parts: tuple[HeadRange, HeadRange, HeadRange]


def mamba2_steps(
    projected_BTR: Tensor,
    *,
    conv_weight_CW: Tensor,
    conv_bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    D_H: Tensor,
    norm_weight: Tensor,
    sizes: HeadSizes,
    eps: float,
    layout: Layout,
    memory: Tensor | None = None,
    taps_BPC: Tensor | None = None,
    outputs: int | None = None,
    commit: int | None = None,
    memory_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`y: [B, U, H V]` before the output projection, and after `commit` tokens `S: [B, H, K, V]` and taps `[B, P, C]`.

    Columns of `projected_BTR`: gate [H V], x [G V], B [G K], C [H K], dt [H]; channels: x, B, C. `norm_weight: [H V]`.
    `memory`, `taps_BPC`: the state before (None: none, both). `memory_out`: where S is written, `memory` itself for in
    place (None: new memory); the taps are always new memory.
    """
    H, G, K, V, N = sizes.heads, sizes.groups, sizes.key_dim, sizes.value_dim, sizes.convolved
    columns = (H * V, H * V + G * V, H * V + G * V + G * K)
    step_BTH = projected_BTR[..., columns[2] + H * K :]
    inputs = HeadInputs(
        x_BTR=projected_BTR,
        gate_BTC=projected_BTR[..., : H * V],
        step_BTH=step_BTH,
        beta_BTH=None,
        weight_CW=conv_weight_CW,
        bias_C=conv_bias_C,
        step_bias_H=dt_bias_H,
        A_log_H=A_log_H,
        skip_H=D_H,
        norm_weight=norm_weight,
        parts=((columns[2], H, N * (V + K), H), (columns[1], G, N * V, N), (columns[0], G, 0, N)),
    )
    return _run(inputs, sizes, eps, layout, (memory, taps_BPC), (outputs, commit), memory_out)


def gated_delta_net_steps(
    qkv_BTR: Tensor,
    decay_BTH: Tensor,
    beta_BTH: Tensor,
    gate_BTC: Tensor,
    *,
    conv_weight_CW: Tensor,
    dt_bias_H: Tensor,
    A_log_H: Tensor,
    norm_weight_V: Tensor,
    sizes: HeadSizes,
    eps: float,
    layout: Layout,
    memory: Tensor | None = None,
    taps_BPC: Tensor | None = None,
    outputs: int | None = None,
    commit: int | None = None,
    memory_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `mamba2_steps`. Columns of `qkv_BTR`: q [H K], k [G K], v [G V], channels in that order; `gate_BTC`: [H V]."""
    H, G, K, N = sizes.heads, sizes.groups, sizes.key_dim, sizes.convolved
    inputs = HeadInputs(
        x_BTR=qkv_BTR,
        gate_BTC=gate_BTC,
        step_BTH=decay_BTH,
        beta_BTH=beta_BTH,
        weight_CW=conv_weight_CW,
        bias_C=None,
        step_bias_H=dt_bias_H,
        A_log_H=A_log_H,
        skip_H=None,
        norm_weight=norm_weight_V,
        parts=((0, H, 0, H), (H * K, G, H * K, N), (H * K + G * K, G, H * K + N * K, N)),
    )
    return _run(inputs, sizes, eps, layout, (memory, taps_BPC), (outputs, commit), memory_out)


def _run(
    inputs: HeadInputs,
    sizes: HeadSizes,
    eps: float,
    layout: Layout,
    state: tuple[Tensor | None, Tensor | None],
    span_given: tuple[int | None, int | None],
    memory_out: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, tokens, _), (channels, width) = inputs.x_BTR.shape, inputs.weight_CW.shape
    assert tokens <= MOST_TOKENS and width <= MOST_TAPS, f"{tokens} tokens, {width} taps"
    H, K, V = sizes.heads, sizes.key_dim, sizes.value_dim
    span, x, device = Span.of(tokens, *span_given), rows_of(inputs.x_BTR), inputs.x_BTR.device
    norm = power_of_two(K) * power_of_two(V) <= WHOLE_TILE
    tile = make_tile(K, V, whole=norm)
    after = state_memory(x, (batch, H, K, V), memory_out)
    taps_out = torch.empty(batch, width - 1, channels, dtype=x.dtype, device=device)
    y = torch.empty(batch, span.outputs, H * V, dtype=x.dtype if norm else torch.float32, device=device)
    memory, taps, position = read_state(state[0]), state[1], positions(layout, batch)
    taps = taps_out if taps is None else taps.to(x.dtype).contiguous()
    tensors = _pointers(inputs, x)
    flags: dict[str, bool] = {"DELTA": inputs.beta_BTH is not None, "NORM": norm, "HAS_BIAS": inputs.bias_C is not None}
    flags |= {"HAS_STATE": memory is not None, "HAS_POSITION": position is not None}
    heads_kernel[(batch * H, tile.blocks(V))](
        *tensors[:4],
        x if position is None else position,
        taps,
        taps_out,
        *tensors[4:],
        after if memory is None else memory,
        after,
        y,
        *(w.stride()[:2] for w in tensors[:4]),
        span.tokens,
        span.first,
        span.commit,
        eps,
        H=H,
        K=K,
        V=V,
        C=channels,
        P=width - 1,
        QUERY=inputs.parts[0],
        KEY=inputs.parts[1],
        VALUE=inputs.parts[2],
        BLOCK_K=tile.key,
        BLOCK_V=tile.value,
        **flags,
        num_warps=tile.warps,
    )
    return (y if norm else _normed(y, inputs, span, sizes, eps)), after, taps_out


def _pointers(inputs: HeadInputs, x: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the kernel's order: four with strides, then parameters; x stands for those that a mixer has not."""
    gate, step = rows_of(inputs.gate_BTC), rows_of(inputs.step_BTH)
    beta = x if inputs.beta_BTH is None else rows_of(inputs.beta_BTH)
    bias, skip = (x if w is None else w.contiguous() for w in (inputs.bias_C, inputs.skip_H))
    weight, shift, A_log, scale = (
        w.contiguous() for w in (inputs.weight_CW, inputs.step_bias_H, inputs.A_log_H, inputs.norm_weight)
    )
    return x, gate, step, beta, weight, bias, shift, A_log, skip, scale


def _normed(y_BUC: Tensor, inputs: HeadInputs, span: Span, sizes: HeadSizes, eps: float) -> Tensor:
    """Gate and norm of whole heads, in the dtype of the inputs."""
    gate = rows_of(inputs.gate_BTC)
    out = torch.empty_like(y_BUC, dtype=gate.dtype)
    if out.numel():
        norm_kernel[(y_BUC.shape[0] * span.outputs * sizes.heads,)](
            y_BUC,
            gate,
            inputs.norm_weight.contiguous(),
            out,
            gate.stride()[:2],
            span.tokens,
            span.outputs,
            eps,
            H=sizes.heads,
            V=sizes.value_dim,
            BLOCK_V=power_of_two(sizes.value_dim),
            DELTA=inputs.beta_BTH is not None,
            num_warps=1,
        )
    return out
