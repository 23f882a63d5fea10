"""What one window + linear attention computes: its options in one frozen value that every backend takes, which tokens a
window holds, and the feature maps that a kernel can compute by itself.

| map | phi(x) of one head |
|---|---|
| `hedgehog` | [softmax(x W), softmax(-x W)], at least 1e-12 |
| `t2r` | relu(x W + b) |
| `elu` | elu(x) + 1 |
| `exp` | [exp(x W - max), exp(min - x W)] |
| `gain` | hedgehog's times exp(x u + c), the exponent from -15 to 15 |

Letters: B batch, G key/value heads, H query heads, T tokens, D head dimension, F features, C columns of a map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

WindowShape = Literal["terraced", "sliding"]
Position = TypeVar("Position", int, Tensor)
GAIN_LIMIT = 15.0  # of the exponent of a `gain` map
MOST_CHUNK = 128  # tokens of a chunk that a program of a kernel holds
KNOWN_MAPS = ("hedgehog", "t2r", "elu", "exp", "gain")
DOUBLED = {"hedgehog", "exp", "gain"}  # two features for each column
Branch = Literal["both", "window", "linear"]
FeatureMap = Callable[[Tensor], Tensor]


def in_window(query: Tensor, key: Tensor, window: int, shape: WindowShape) -> Tensor:
    """Whether `key` (a position, not after `query`) is inside the query's window; broadcasts.

    Sliding: the last `window` tokens. Terraced: with b = floor(n / window), blocks b - 1 and b (LoLCATs, 2410.10254,
    section 3.3).
    """
    if window == 0:
        return torch.zeros_like(query - key, dtype=torch.bool)
    if shape == "sliding":
        return query - key < window
    return query // window - key // window < 2


def fold_boundary(next_position: Position, window: int, shape: WindowShape) -> Position:
    """First position that is still in the window of a query at `next_position`; everything before it is in the
    state."""
    if window == 0:
        return next_position
    start = next_position - window + 1 if shape == "sliding" else (next_position // window - 1) * window
    return max(start, 0) if isinstance(start, int) else start.clamp(min=0)


def most_leaving(num_tokens: int, window: int, shape: WindowShape) -> int:
    """The most positions that `fold_boundary` passes while so many tokens come."""
    return window * -(-num_tokens // window) if window and shape == "terraced" else num_tokens


def ring_slots(window: int, shape: WindowShape) -> int:
    """The most tokens that can wait in the ring before they are folded."""
    if window == 0:
        return 0
    return window - 1 if shape == "sliding" else 2 * window - 1


def chunk_of(window: int, shape: WindowShape) -> int:
    """Tokens of a kernel's chunk, a power of two: a terraced window's block, so that nothing of two chunks lies beyond
    the window, or else at least the window's reach."""
    block = 1 << max(0, window - 1).bit_length()
    if shape == "terraced" and window >= 64 and block == window:
        return window
    reach = window if shape == "sliding" else 2 * window - 1
    return max(64, 1 << max(0, reach - 1).bit_length())


@dataclass(frozen=True, eq=False, kw_only=True)
class FeatureWeights:
    """A known map's name and parameters: `weight_HDC` (W), `bias_HC` (b), `gain_HD` (u), `log_scale_H` (c)."""

    name: str
    weight_HDC: Tensor | None = None
    bias_HC: Tensor | None = None
    gain_HD: Tensor | None = None
    log_scale_H: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """The parameters in the order of the fields."""
        return self.weight_HDC, self.bias_HC, self.gain_HD, self.log_scale_H


def weights_of(feature_map: object) -> FeatureWeights | None:
    """What a map says of itself in `feature_weights()`; None for one that a kernel does not know."""
    read = getattr(feature_map, "feature_weights", None)
    if read is None:
        return None
    weights = read()
    assert isinstance(weights, FeatureWeights) and weights.name in KNOWN_MAPS
    return weights


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
    `store`: pairs of a key/value head that stay exact beyond a terraced window (`store.py`); 0: none. They contribute
    where both branches do.
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
    store: int = 0

    def __post_init__(self) -> None:
        assert (self.feature_q is None) == (self.feature_k is None)
        assert 0 <= self.num_sinks <= self.window or self.num_sinks == 0
        assert not self.store or (self.window and self.shape == "terraced")

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
