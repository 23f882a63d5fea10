"""Projections for a few tokens at a time on a processor: weights laid out once, so that no call has to rearrange them.

A product of a weight with one token reads the weight once. With a few tokens torch first copies the weight into blocks,
which takes longer than the product itself: verification of guesses would pay for it in every projection. oneDNN can
keep the blocks; that costs the projections' memory a second time, for as long as the context is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_TOKENS = 64  # beyond it blocks gain nothing
SMALLEST = 1 << 16  # numbers of a weight below which the call costs more than the copy


@contextmanager
def packed_projections(model: nn.Module, tokens: int) -> Iterator[int]:
    """Inside the block, projections of 2 to 64 tokens use packed weights; gives how many projections do.

    `tokens`: how many a call usually has. Only fp32 weights on a CPU are packed, and only used where nothing is
    differentiated; elsewhere everything is as it was. Weights must not change inside the block.
    """
    linears = [module for module in model.modules() if type(module) is nn.Linear and _packable(module)]
    try:
        for linear in linears:
            linear.forward = _forward(linear, tokens)  # type: ignore[assignment, method-assign]
        yield len(linears)
    finally:
        for linear in linears:
            del linear.forward


def _packable(linear: nn.Linear) -> bool:
    weight = linear.weight
    usable = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    own = "forward" not in vars(linear)
    return (
        usable and own and weight.device.type == "cpu" and weight.dtype is torch.float32 and weight.numel() >= SMALLEST
    )


def _forward(linear: nn.Linear, tokens: int) -> Callable[[Tensor], Tensor]:
    blocks = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), tokens)

    def forward(x: Tensor) -> Tensor:
        rows = x.numel() // max(1, x.shape[-1])
        if 1 < rows <= MOST_TOKENS and x.dtype is torch.float32 and not torch.is_grad_enabled():
            bias = None if linear.bias is None else linear.bias.detach()
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x.flatten(0, -2), blocks, bias, "none", [], "")
            return y.unflatten(0, x.shape[:-1])
        return F.linear(x, linear.weight, linear.bias)

    return forward
