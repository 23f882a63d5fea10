"""What one window + linear attention computes: its options, in one frozen value that every backend of the operation
takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.ops.window_linear.window import WindowShape

Branch = Literal["both", "window", "linear"]
FeatureMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class WindowLinear:
    """Options and parameters of the operation.

    `feature_q`: [B, H, T, D] -> [B, H, T, F]; `feature_k`: [B, G, T, D] -> [B, H, T, F]; None: no linear branch.
    `shared_shift`: the linear term is multiplied by exp(-m) like the window term, m = max(c_n, 0), so that both
    branches weigh a
    token on one scale. Without it (as published) only the window term is: exp(s - c_n) beside phi_q . phi_k.
    `log_window_factor_H`, `linear_factor_H`: log g and the factor of the linear term, per query head; None: 1.
    `logits`: both are given as the logit x of g instead: log g is log sigmoid(x), the factor sigmoid(-x). A kernel
    computes them by itself; everything else asks for `resolved()`.
    `branch`: which branch contributes; for ablation and for the window-only control.
    """

    window: int
    shape: WindowShape
    scaling: float
    num_sinks: int = 0
    softcap: float | None = None
    shared_shift: bool = False
    feature_q: FeatureMap | None = None
    feature_k: FeatureMap | None = None
    log_window_factor_H: Tensor | None = None
    linear_factor_H: Tensor | None = None
    logits: bool = False
    branch: Branch = "both"

    def __post_init__(self) -> None:
        assert (self.feature_q is None) == (self.feature_k is None)
        assert 0 <= self.num_sinks <= self.window or self.num_sinks == 0

    def resolved(self) -> WindowLinear:
        """The same operation with log g and the linear factor as they are."""
        if not self.logits:
            return self
        log_g, factor = self.log_window_factor_H, self.linear_factor_H
        return replace(
            self,
            logits=False,
            log_window_factor_H=None if log_g is None else F.logsigmoid(log_g),
            linear_factor_H=None if factor is None else torch.sigmoid(-factor),
        )

    @property
    def has_linear(self) -> bool:
        """Whether a linear branch exists and contributes."""
        return self.feature_q is not None and self.branch != "window"

    @property
    def has_window(self) -> bool:
        """Whether anything is seen by softmax."""
        return self.window > 0 and self.branch != "linear"

    def features_q(self, q_BHTD: Tensor) -> Tensor:
        """phi_q with the linear factor applied, `[B, H, T, F]`."""
        assert self.feature_q is not None
        phi = self.feature_q(q_BHTD)
        return phi if self.linear_factor_H is None else phi * self.linear_factor_H[:, None, None].to(phi.dtype)

    def features_k(self, k_BGTD: Tensor) -> Tensor:
        """phi_k, `[B, H, T, F]`."""
        assert self.feature_k is not None
        return self.feature_k(k_BGTD)

    def shift(self, c: Tensor) -> Tensor:
        """The shift m_n from the largest window score c_n (minus infinity where the window is empty)."""
        if self.shared_shift:
            return c.detach().clamp(min=0)
        return torch.where(torch.isinf(c), torch.zeros_like(c), c)


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the folded sums: fp32, or fp64 where the model is."""
    return torch.promote_types(x.dtype, torch.float32)


def with_ones(v: Tensor) -> Tensor:
    """[v, 1]: one product then gives numerator and normaliser together."""
    return torch.cat([v, v.new_ones(*v.shape[:-1], 1)], dim=-1)


def divide(total: Tensor) -> Tensor:
    """Numerator over normaliser; 0 where nothing was attended to (padding, or an ablated branch)."""
    numerator, normaliser = total[..., :-1], total[..., -1:]
    return numerator / normaliser.masked_fill(normaliser == 0, 1)
