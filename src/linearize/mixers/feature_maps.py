"""Feature maps phi of linear attention: per query head, applied after RoPE to q and k, separate for each.

| name | phi(x) | source |
|---|---|---|
| `hedgehog` | [softmax(x W), softmax(-x W)], at least 1e-12 | Hedgehog, 2402.04347; LoLCATs, 2410.10254 |
| `t2r` | relu(x W + b) | T2R, 2103.13076 |
| `elu` | elu(x) + 1 | Katharopoulos et al., 2006.16236 |
| `exp` | [exp(x W - max), exp(-x W + min)] | LoLCATs, appendix |
| `gain` | hedgehog's features times exp(x u + c) | here: lets the linear term grow with q and k as exp(q . k) does |

Letters: G key/value heads, H query heads, R = H / G, D head dimension, F features, C tokens; leading dimensions are
free.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from linearize.mixers.base import AttentionShape
from linearize.ops.hedgehog import hedgehog, project
from linearize.ops.window_linear.spec import GAIN_LIMIT, FeatureWeights

FeatureMapName = Literal["hedgehog", "t2r", "elu", "exp", "gain"]
FeatureStart = Literal["identity", "scales"]


class FeatureMap(nn.Module):
    """phi: `[..., G, C, D] -> [..., H, C, num_features]` (or H heads in, for queries)."""

    def __init__(self, name: FeatureMapName, shape: AttentionShape, dim: int, start: FeatureStart) -> None:
        super().__init__()
        self.name, self.heads, self.dim, self.start, self.head_dim = name, shape.num_heads, dim, start, shape.head_dim
        if name == "t2r" or name in ("hedgehog", "exp", "gain"):
            self.weight_HDF = nn.Parameter(torch.empty(shape.num_heads, shape.head_dim, dim))
        if name == "t2r":
            self.bias_HF = nn.Parameter(torch.empty(shape.num_heads, dim))
        if name == "gain":
            self.gain_HD = nn.Parameter(torch.empty(shape.num_heads, shape.head_dim))
            self.log_scale_H = nn.Parameter(torch.empty(shape.num_heads))
        self.reset_parameters()

    @property
    def num_features(self) -> int:
        """Width of phi(x)."""
        return {"elu": self.head_dim, "t2r": self.dim}.get(self.name, 2 * self.dim)

    def feature_weights(self) -> FeatureWeights:
        """What a kernel needs to compute the map itself."""
        names = {"weight_HDC": "weight_HDF", "bias_HC": "bias_HF", "gain_HD": "gain_HD", "log_scale_H": "log_scale_H"}
        return FeatureWeights(name=self.name, **{ours: getattr(self, own, None) for ours, own in names.items()})

    def reset_parameters(self) -> None:
        """W starts as copies of the identity, the rest as zeros.

        `scales`: each copy at its own scale, so that the copies can part; with fewer columns than dimensions every
        (D / F)-th column, so that all of RoPE's frequencies are seen.
        """
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(self._start()) if name == "weight_HDF" else parameter.zero_()

    def _start(self) -> Tensor:
        if self.start == "scales" and self.dim < self.head_dim:
            spread = torch.arange(self.dim) * self.head_dim // self.dim
            return torch.eye(self.head_dim)[:, spread]
        copies = -(-self.dim // self.head_dim)
        scales = torch.logspace(-0.5, 0.7, copies) if self.start == "scales" and copies > 1 else torch.ones(copies)
        eye = torch.eye(self.head_dim)
        return torch.cat([eye * scale for scale in scales], dim=1)[:, : self.dim]

    def forward(self, x: Tensor) -> Tensor:
        """Features of x; keys of a group are mapped once per query head without being repeated."""
        if self.name == "elu":
            return F.elu(self._repeat(x)) + 1
        if self.name == "hedgehog":
            return hedgehog(x, self.weight_HDF.to(x.dtype))
        if self.name == "gain":
            log_gain = self._project(x, self.gain_HD[..., None]) + self.log_scale_H[:, None, None].to(x.dtype)
            return hedgehog(x, self.weight_HDF.to(x.dtype), log_gain.clamp(-GAIN_LIMIT, GAIN_LIMIT))
        z = self._project(x, self.weight_HDF)
        if self.name == "t2r":
            return F.relu(z + self.bias_HF[:, None].to(z.dtype))
        return torch.cat([(z - z.amax(-1, keepdim=True)).exp(), (z.amin(-1, keepdim=True) - z).exp()], dim=-1)

    def _project(self, x: Tensor, weight_HDF: Tensor) -> Tensor:
        return project(x, weight_HDF.to(x.dtype))

    def _repeat(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.heads // x.shape[-3], dim=-3)
