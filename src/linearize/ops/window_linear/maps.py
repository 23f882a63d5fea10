"""Feature maps that a kernel can compute by itself: which one, and its parameters.

| name | phi(x) of one head |
|---|---|
| `hedgehog` | [softmax(x W), softmax(-x W)], at least 1e-12 |
| `t2r` | relu(x W + b) |
| `elu` | elu(x) + 1 |
| `exp` | [exp(x W - max), exp(min - x W)] |
| `gain` | hedgehog's times exp(x u + c), the exponent from -15 to 15 |

Letters: H query heads, D head dimension, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

KNOWN_MAPS = ("hedgehog", "t2r", "elu", "exp", "gain")
DOUBLED = {"hedgehog", "exp", "gain"}  # two features for each column


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
    tell = getattr(feature_map, "feature_weights", None)
    if tell is None:
        return None
    found = tell()
    assert isinstance(found, FeatureWeights) and found.name in KNOWN_MAPS
    return found
