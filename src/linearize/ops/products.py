"""Products and exponentials in the form that CPUs are fast in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNDERFLOW = -80.0  # exponents below this give 0: exp and products of subnormal numbers are tens of times slower
NARROW = 16  # products with fewer columns run at a tenth of the speed of their transpose


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for equal leading dimensions, `[..., M, K] @ [..., K, N]`; the result may be a transposed view."""
    lead = a.shape[:-2]
    a, b = a.flatten(0, -3), b.flatten(0, -3)
    if b.shape[-1] < NARROW and b.shape[-1] < a.shape[-2]:
        return torch.bmm(b.mT, a.mT).mT.unflatten(0, lead)
    return torch.bmm(a, b).unflatten(0, lead)


def decay_factors_(x: Tensor) -> Tensor:
    """exp in place, 1 above 0 and 0 below `UNDERFLOW`."""
    return torch.threshold_(x.clamp_(min=UNDERFLOW, max=0).exp_(), math.exp(UNDERFLOW) * 1.001, 0)
