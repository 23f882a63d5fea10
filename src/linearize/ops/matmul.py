"""Products and exponentials in the form that CPUs are fast in."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

UNDERFLOW = -80.0  # exponents below this give 0: exp and products of subnormal numbers are tens of times slower
NARROW = 16  # products with fewer columns run at a tenth of the speed of their transpose
_SETTING: Any = getattr(torch.backends.mkldnn, "matmul", None)  # torch >= 2.9
LOG2_E = math.log2(math.e)  # exp2 takes half the time of exp


@cache
def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 numbers faster than fp32 ones: one with AMX, or with AVX512-BF16 that is not
    Intel's, whose bf16 products without AMX (as in many virtual machines) run at half the speed of fp32 ones."""
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and "intel" not in cpu_name().lower()


def cpu_name() -> str:
    """The processor's name where the system tells it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextmanager
def bf16_products(dtype: torch.dtype) -> Iterator[bool]:
    """Inside, products of fp32 numbers on a CPU with units for it round their factors to bf16 and add up in fp32, if
    `dtype`, in which the numbers were given, is bf16; yields whether.

    What was given in bf16 loses nothing; weights and sums lose what softmax attention in bf16 loses of its weights. The
    setting is oneDNN's, and the process's: products of other threads are computed so too in the meantime.
    """
    is_bf16 = dtype == torch.bfloat16 and _SETTING is not None and not torch.compiler.is_compiling()
    if not (is_bf16 and has_bf16_units()):
        yield False
        return
    with _precision("bf16"):
        yield True


@contextmanager
def whole_products() -> Iterator[None]:
    """Inside `bf16_products`, where differences of large numbers count: fp32 again."""
    if _SETTING is None or torch.compiler.is_compiling() or _SETTING.fp32_precision != "bf16":
        yield
        return
    with _precision("ieee"):
        yield


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before = _SETTING.fp32_precision
    _SETTING.fp32_precision = name
    try:
        yield
    finally:
        _SETTING.fp32_precision = before


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for equal leading dimensions, `[..., M, K] @ [..., K, N]`; the result may be a transposed view."""
    lead = a.shape[:-2]
    a, b = a.flatten(0, -3), b.flatten(0, -3)
    if _is_narrow(a, b):
        return torch.bmm(b.mT, a.mT).mT.unflatten(0, lead)
    return torch.bmm(a, b).unflatten(0, lead)


def flattens(x: Tensor) -> bool:
    """Whether the first two dimensions are one in memory, so that flattening them copies nothing."""
    rows, groups, *_ = x.shape
    return rows == 1 or groups == 1 or x.stride(0) == groups * x.stride(1)


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, `[B, G, M, K] @ [B, G, K, N]`, without a copy of a large `b` whose rows are apart in memory."""
    if flattens(b):
        return a @ b
    dim = int(b.shape[1] <= b.shape[0])
    return torch.stack([torch.bmm(x, y) for x, y in zip(a.unbind(dim), b.unbind(dim), strict=True)], dim=dim)


def product_into(out: Tensor, a: Tensor, b: Tensor, *, beta: float = 0, alpha: float = 1) -> Tensor:
    """out = beta out + alpha a @ b, `[..., M, K] @ [..., K, N]` with any leading dimensions of `out`.

    `a` and `b` may have theirs flattened to one. Nothing is copied where the last two dimensions of `out` are
    contiguous and the others are one step apart.
    """
    a, b = (x.flatten(0, -3) for x in (a, b))
    if _is_narrow(a, b):
        return _blend(out, torch.bmm(b.mT, a.mT).mT.unflatten(0, out.shape[:-2]), beta, alpha)
    flat = _flat(out)
    if flat is None:
        return _blend(out, torch.bmm(a, b).unflatten(0, out.shape[:-2]), beta, alpha)
    torch.baddbmm(flat, a, b, beta=beta, alpha=alpha, out=flat)
    return out


def _is_narrow(a: Tensor, b: Tensor) -> bool:
    return b.shape[-1] < NARROW and b.shape[-1] < a.shape[-2]


def _blend(out: Tensor, result: Tensor, beta: float, alpha: float) -> Tensor:
    if beta == 0:
        return torch.mul(result, alpha, out=out) if alpha != 1 else out.copy_(result)
    assert beta == 1
    return out.add_(result, alpha=alpha)


def _flat(out: Tensor) -> Tensor | None:
    """`out` with one leading dimension, where that is a contiguous view of it."""
    flat = out if out.dim() == 3 else None
    if flat is None and out.is_contiguous():
        flat = out.view(-1, *out.shape[-2:])
    elif flat is None and all(n == 1 for n in out.shape[:-3]):
        flat = out.view(out.shape[-3:])
    return flat if flat is not None and flat.is_contiguous() else None


def exp_or_zero(x: Tensor) -> Tensor:
    """exp, 0 below `UNDERFLOW` (masked scores, say); keeps its result alone for the backward pass."""
    result: Tensor = _ExpOrZero.apply(x) if torch.is_grad_enabled() and x.requires_grad else _exp_or_zero(x)
    return result


def _exp_or_zero(x: Tensor) -> Tensor:
    return _exp_of_clamped_(x.clamp(min=UNDERFLOW))


def _exp_of_clamped_(x: Tensor) -> Tensor:
    """exp in place of numbers from `UNDERFLOW` on, 0 for those at it."""
    return torch.threshold_(x.exp_(), math.exp(UNDERFLOW) * 1.001, 0)


class _ExpOrZero(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        p = _exp_or_zero(x)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        return grads[0] * p


def decay_factors_(x: Tensor) -> Tensor:
    """exp in place, 1 above 0 and 0 below `UNDERFLOW`."""
    return _exp_of_clamped_(x.clamp_(min=UNDERFLOW, max=0))
