"""What a layer mixer does between its projections: one kernel (convolution, gates, recurrence, norm), or operations.

| backend | for |
|---|---|
| triton | a few CUDA tokens without gradients: decode, verification |
| operations | everything else: the convolution and the recurrence, each with its own backends |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Required, TypedDict, TypeVar

import torch
from torch import Tensor

from linearize.ops import triton as kernels
from linearize.ops.dispatch import Call, Dispatcher, Rule, always, wants_gradients
from linearize.ops.layout import Layout

MOST_TAPS = 8
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerCall(Call):
    """A call of a layer; `taps`: those of its convolution, the current token's included."""

    taps: int


class KernelOptions(TypedDict, total=False):
    """Keywords of a layer's kernel: the state before (None: none, both), the tokens with an output (None: all), and
    after which the state is wanted (None: all)."""

    layout: Required[Layout]
    memory: Tensor | None
    taps_BPC: Tensor | None
    outputs: int | None
    commit: int | None


def kernel_why_not_chosen(call: LayerCall) -> str | None:
    """Why the fused kernel does not run a call; None: it does."""
    return kernels.why_not_chosen(call) or _many_taps(call)


def kernel_unsupported(call: LayerCall) -> str | None:
    """Why a call is beyond the fused kernel."""
    return kernels.unsupported(call) or _many_taps(call)


def _many_taps(call: LayerCall) -> str | None:
    return f"a convolution of more than {MOST_TAPS} taps" if call.taps > MOST_TAPS else None


DISPATCH = Dispatcher(
    "layer",
    [
        Rule(
            "triton",
            kernel_why_not_chosen,
            "a few tokens on a GPU: all between the projections in one launch",
            built=True,
            unsupported=kernel_unsupported,
        ),
        Rule("operations", always, "convolution, gates, recurrence and norm one after the other"),
    ],
)
use_backend = DISPATCH.use


def choice(call: LayerCall) -> tuple[str, str]:
    """The backend for a call and why."""
    return DISPATCH.choice(call)


def run_layer(
    projected: tuple[Tensor, ...],
    watched: tuple[Tensor, ...],
    conv_weight_CW: Tensor,
    layout: Layout,
    by_kernel: Callable[[], Result],
    by_operations: Callable[[], Result],
) -> Result:
    """The result of the backend chosen. `projected: [B, T, ...]`; `watched`: parameters through which gradients may be
    asked for."""
    first = projected[0]
    call = LayerCall(
        device=first.device.type,
        dtype=first.dtype,
        tokens=first.shape[1],
        layout=layout,
        gradients=wants_gradients(*projected, conv_weight_CW, *watched),
        taps=conv_weight_CW.shape[1],
    )

    def run(backend: str) -> Result:
        if backend != "triton":
            return by_operations()
        with torch.autocast(first.device.type, enabled=False):
            return by_kernel()

    return DISPATCH.run(call, run)
