"""The base of Mamba, Mamba-2 and Gated DeltaNet: projections, short convolution, recurrence, gated output.

A mixer says what its projections are, what its recurrence takes (`inputs`), how it runs (`recurrence`) and how its
output is gated (`finish`); here it is run by one kernel or by operations, with or without a state.

Letters: B batch, T tokens, U of them (the last) with an output, R columns of a projection, E channels or heads times
their width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.base import MixerCost
from linearize.mixers.gates import l2_norm, repeat_heads, wide
from linearize.mixers.layer_mixer import LayerMixer, MixOptions, RecurrentState, last, recurrence_options
from linearize.ops.conv_heads import Heads, can_convolve, conv_heads
from linearize.ops.dispatch import Call, Dispatcher, Query
from linearize.ops.layout import Layout
from linearize.ops.recurrent.front_end import RecurrenceOptions
from linearize.ops.recurrent.layer_steps import DISPATCH as LAYER
from linearize.ops.recurrent.layer_steps import KernelOptions, LayerCall, run_layer
from linearize.ops.short_conv import short_conv

Inputs = tuple[Tensor, tuple[Tensor, ...], Tensor | None]  # gate, what the recurrence takes, taps after


class RecurrentMixer(LayerMixer):
    """A recurrence between the attention's projections, after a short convolution.

    `watched`: parameters of the kernel, besides the convolution, through which gradients may be asked for.
    `products_per_sum`: multiply-adds per number of the state and token (decay, write, read).
    """

    conv_weight: nn.Parameter
    conv_bias: nn.Parameter | None
    out_proj: nn.Linear
    watched: ClassVar[tuple[str, ...]]
    products_per_sum: ClassVar[int] = 3

    @property
    @abstractmethod
    def num_sums(self) -> int:
        """Numbers in the memory of one sequence."""

    @abstractmethod
    def inputs(
        self,
        projected: tuple[Tensor, ...],
        layout: Layout,
        state: RecurrentState | None = None,
        need_state: bool = False,
        commit: int | None = None,
    ) -> Inputs:
        """The gate, the tensors that `recurrence` takes, and the last inputs of the convolution."""

    @abstractmethod
    def recurrence(
        self, inputs: tuple[Tensor, ...], outputs: int | None, **options: Unpack[RecurrenceOptions]
    ) -> tuple[Tensor, Tensor | None]:
        """What the operation gives for the last `outputs` tokens, skip included, and the memory."""

    @abstractmethod
    def finish(self, y: Tensor, gate_BUE: Tensor) -> Tensor:
        """`[B, U, E]`: gate and norm."""

    @abstractmethod
    def kernel_steps(self, *projected: Tensor, **options: Unpack[KernelOptions]) -> tuple[Tensor, Tensor, Tensor]:
        """`by_operations` in one launch: y, memory, taps."""

    @abstractmethod
    def recurrence_call(self, query: Query) -> tuple[Dispatcher, Call]:
        """The recurrence that such a call runs: see `Mixer.operations`."""

    def mix(
        self, *projected: Tensor, outputs: int | None = None, **options: Unpack[MixOptions]
    ) -> tuple[Tensor, RecurrentState | None]:
        """See `LayerMixer.mix`."""
        y_BUE, after = run_layer(
            projected,
            tuple(getattr(self, name) for name in self.watched),
            self.conv_weight,
            options["layout"],
            lambda: self.by_kernel(*projected, outputs=outputs, **options),
            lambda: self.by_operations(*projected, outputs=outputs, **options),
        )
        return self.out_proj(y_BUE), after

    def by_kernel(
        self, *projected: Tensor, outputs: int | None, **options: Unpack[MixOptions]
    ) -> tuple[Tensor, RecurrentState | None]:
        """`by_operations` in one launch."""
        state = options.get("state")
        y, memory, taps = self.kernel_steps(
            *projected,
            layout=options["layout"],
            memory=None if state is None else state.memory,
            taps_BPC=None if state is None else state.taps,
            outputs=outputs,
            commit=options.get("commit"),
        )
        return y, RecurrentState(memory, taps) if options.get("need_state", True) else None

    def by_operations(
        self, *projected: Tensor, outputs: int | None, **options: Unpack[MixOptions]
    ) -> tuple[Tensor, RecurrentState | None]:
        """`y: [B, U, E]` before the output projection, and the state."""
        y, gate, after = self.recall(*projected, outputs=outputs, **options)
        return self.finish(y, last(gate, outputs)).to(projected[0].dtype), after

    def recall(
        self, *projected: Tensor, outputs: int | None = None, **options: Unpack[MixOptions]
    ) -> tuple[Tensor, Tensor, RecurrentState | None]:
        """What the recurrence gives before gate and norm, at least fp32; the gate of all tokens; the state."""
        gate, inputs, taps = self.inputs(
            projected,
            options["layout"],
            options.get("state"),
            options.get("need_state", True),
            options.get("commit"),
        )
        y, memory = self.recurrence(inputs, outputs, **recurrence_options(options))
        return y, gate, None if memory is None else RecurrentState(memory, taps)

    def advance(self, *projected: Tensor, layout: Layout, state: RecurrentState | None = None) -> RecurrentState:
        """See `LayerMixer.advance`."""
        *_, after = self.recall(*projected, layout=layout, state=state, outputs=0)
        assert after is not None
        return after

    def convolved_heads(
        self,
        projected_BTR: Tensor,
        parts: Sequence[Heads],
        layout: Layout,
        state: RecurrentState | None,
        need_state: bool,
        commit: int | None,
        passed: tuple[int, int] = (0, 0),
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The first and the last columns as they are (`passed`: how many), then `[B, T, heads, .]` of each part after
        convolution and SiLU, at its length; and the taps.

        The parts are side by side. In one pass where nothing is kept, otherwise one operation after the other.
        """
        columns, dtype = projected_BTR.shape[-1], projected_BTR.dtype
        before, after = passed
        if state is None and not need_state and commit is None and can_convolve(projected_BTR, layout):
            bias = None if self.conv_bias is None else self.conv_bias.to(dtype)
            ranges = tuple((a, b) for a, b in ((0, before), (columns - after, columns)) if b > a)
            weight = self.conv_weight.to(dtype)
            return conv_heads(projected_BTR, weight, bias, parts, passed=ranges, layout=layout), None
        kept: tuple[Tensor, ...] = ()
        x_BTC = projected_BTR
        if before or after:
            first, x_BTC, second = projected_BTR.split((before, columns - before - after, after), dim=-1)
            kept = first, second
        if any(part.groups < part.heads for part in parts):
            cut = x_BTC.split([part.groups * part.dim for part in parts], dim=-1)
            x_BTC = torch.cat([repeat_heads(x, p.groups, p.heads) for x, p in zip(cut, parts, strict=True)], dim=-1)
        x_BTC, taps = short_conv(
            x_BTC,
            self.conv_weight,
            self.conv_bias,
            taps_BKC=None if state is None else state.taps,
            layout=layout,
            need_state=need_state,
            commit=commit,
        )
        cut = F.silu(wide(x_BTC)).split([part.heads * part.dim for part in parts], dim=-1)
        heads = (x.unflatten(-1, (-1, part.dim)) for x, part in zip(cut, parts, strict=True))
        scaled = (x if part.length is None else l2_norm(x) * part.length for x, part in zip(heads, parts, strict=True))
        return (*kept, *scaled), taps

    def operations(self, query: Query) -> list[tuple[Dispatcher, Call]]:
        """See `Mixer.operations`."""
        layer = query.call(LayerCall, taps=self.conv_weight.shape[1])
        return [(LAYER, layer), self.recurrence_call(query)]

    def cost(self, element_size: int) -> MixerCost:
        """State in at least fp32 and the convolution's past inputs; the products of the state, and the taps."""
        sums, (channels, taps) = self.num_sums, self.conv_weight.shape
        return MixerCost(
            state_bytes=max(4, element_size) * sums + (taps - 1) * channels * element_size,
            bytes_per_token=0,
            flops_per_token=2 * (self.products_per_sum * sums + taps * channels),
        )
