"""LoLCATs attention: a softmax window and a linear branch under one normaliser (2410.10254, section 3.3)."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from linearize.mixers.base import AttentionShape, Mixer, MixerCost
from linearize.mixers.feature_maps import FeatureMap, FeatureMapName, FeatureStart
from linearize.mixers.window_mixer import WindowMixer, WindowMixerConfig
from linearize.ops.window_linear import Branch, WindowLinear, WindowShape


class LolcatsConfig(WindowMixerConfig):
    """Window + linear attention; the defaults are the published ones.

    `window`: tokens (0: linear attention alone). `window_shape`: `terraced` (block b sees blocks b - 1 and b) or
    `sliding`.
    `feature_dim`: columns F of W; hedgehog, exp and gain give 2 F features. `affine`: the linear term is scaled by 1
    - g.
    `num_sinks`: first tokens of a document that stay in the window for ever. `shift`: `window` (published: only the
    window term is
    shifted by its maximum) or `shared` (both branches are, so that a token weighs the same on either side of the
    window's edge).
    `store`: pairs of key and value that each key/value head keeps exact beyond a terraced window (LoLA, 2505.23666).
    `feature_start`: `identity` copies, or copies at several `scales`.
    """

    name: Literal["lolcats"] = "lolcats"
    window: int = Field(64, ge=0)
    window_shape: WindowShape = "terraced"
    feature_map: FeatureMapName = "hedgehog"
    feature_dim: int = Field(64, ge=1)
    feature_start: FeatureStart = "identity"
    affine: bool = False
    num_sinks: int = Field(0, ge=0)
    store: int = Field(0, ge=0)
    shift: Literal["window", "shared"] = "window"

    @model_validator(mode="after")
    def _store_fits(self) -> Self:
        if self.store and not (self.window and self.window_shape == "terraced"):
            raise ValueError(
                f"store {self.store} needs a terraced window, whose blocks it decides on, and this one is "
                f"{self.window_shape} of {self.window} tokens: set window_shape=terraced, window above 0, or store=0"
            )
        return self

    @property
    def has_two_branches(self) -> bool:
        """See `MixerConfig`."""
        return self.window > 0

    def build(self, shape: AttentionShape) -> Mixer:
        """The mixer, initialised."""
        return Lolcats(self, shape)


class Lolcats(WindowMixer):
    """y_n = (window softmax terms + phi_q(q_n)^T S_n) / (their sum), S folded from what left the window."""

    config: LolcatsConfig

    def __init__(self, config: LolcatsConfig, shape: AttentionShape) -> None:
        super().__init__(config, shape)
        self.feature_q = FeatureMap(config.feature_map, shape, config.feature_dim, config.feature_start)
        self.feature_k = FeatureMap(config.feature_map, shape, config.feature_dim, config.feature_start)
        self.window_factor_H = nn.Parameter(torch.zeros(shape.num_heads))

    def reset_parameters(self) -> None:
        """Identity-like maps, window factor logit 0."""
        self.feature_q.reset_parameters()
        self.feature_k.reset_parameters()
        nn.init.zeros_(self.window_factor_H)

    def spec(self, *, scaling: float, softcap: float | None, branch: Branch) -> WindowLinear:
        """The operation that this mixer runs."""
        factor_H = self.window_factor_H.to(torch.promote_types(self.window_factor_H.dtype, torch.float32))
        return WindowLinear(
            window=self.config.window,
            shape=self.config.window_shape,
            num_sinks=self.config.num_sinks,
            scaling=scaling,
            softcap=softcap,
            shared_shift=self.config.shift == "shared",
            feature_q=self.feature_q,
            feature_k=self.feature_k,
            log_window_factor_H=factor_H,
            linear_factor_H=factor_H if self.config.affine else None,
            logits=True,
            branch=branch,
            store=self.config.store,
        )

    def cost(self, element_size: int) -> MixerCost:
        """Ring and sinks as for a window, plus F (V + 1) fp32 sums per query head."""
        window, shape = super().cost(element_size), self.shape
        features, heads = self.feature_q.num_features, shape.num_heads
        memory = heads * features * (shape.value_dim + 1)
        stored = self.config.store * shape.num_kv_heads * (shape.head_dim + shape.value_dim)
        maps = 4 * heads * shape.head_dim * self.config.feature_dim * (self.config.feature_map != "elu")
        return MixerCost(
            state_bytes=window.state_bytes + memory * max(4, element_size) + stored * element_size,
            bytes_per_token=0,
            flops_per_token=window.flops_per_token + 4 * memory + maps + 2 * stored * heads // shape.num_kv_heads,
        )
