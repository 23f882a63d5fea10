"""What this machine can do at most in products of matrices, and how many a computation asks for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

SIZES = (512, 1024, 2048)
ROUNDS = 5


def matmul_peak(dtype: torch.dtype = torch.float32) -> float:
    """GFLOP/s: the best of a few square `torch.mm` with the threads that torch has."""
    best = 0.0
    for size in SIZES:
        a, b, out = (torch.randn(size, size).to(dtype) for _ in range(3))
        for _ in range(ROUNDS + 1):
            began = time.perf_counter()
            torch.mm(a, b, out=out)
            best = max(best, 2 * size**3 / (time.perf_counter() - began) / 1e9)
    return best


class _Products(TorchDispatchMode):
    """Adds up the FLOPs of the products that run inside."""

    flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        factors = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "addmm_": 1, "baddbmm_": 1}
        if name in factors:
            a, b = args[factors[name] : factors[name] + 2]
            self.flops += 2 * math.prod(a.shape) * b.shape[-1]
        return function(*args, **(kwargs or {}))


def product_flops(run: Callable[[], Any]) -> int:
    """FLOPs of all products of matrices in one call of `run`, backward included; 2 for a multiplication with its sum.

    As they are computed: also the half of a triangle that is thrown away, and what a backward pass computes again.
    """
    with _Products() as counted:
        run()
    return counted.flops


def attention_flops(q_BHTD: Tensor, value_dim: int, *, backward: bool) -> int:
    """FLOPs of causal softmax attention's products, the triangle alone: 2 forward, 5 more backward (2307.08691)."""
    batch, heads, tokens, dim = q_BHTD.shape
    pairs = batch * heads * tokens * (tokens + 1) // 2
    forward = 2 * pairs * (dim + value_dim)
    return forward + 2 * pairs * (3 * dim + 2 * value_dim) if backward else forward
