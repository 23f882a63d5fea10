"""A mixer outside linearize: plain linear attention with the feature map elu + 1 (Katharopoulos et al., 2006.16236).

    y_n = phi(q_n)^T S_n / (phi(q_n)^T z_n),    S_n = sum_{i <= n} phi(k_i) v_i^T,    z_n = sum_{i <= n} phi(k_i)

Packaged, one line of pyproject.toml makes every `linearize` command know it, without an import anywhere:

    [project.entry-points."linearize.mixers"]
    elu_linear = "elu_linear:EluLinearConfig"

In a script or notebook `linearize.register_mixer(EluLinearConfig)` does the same.

Letters: B batch, T tokens, U of them (the last) with an output, H query heads, G key/value heads, D head dimension,
V value dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from linearize.mixers import AttentionMixer, AttentionShape, Mixer, MixerConfig, MixerCost
from linearize.ops.dispatch import Call, Dispatcher, Query
from linearize.ops.layout import Layout
from linearize.ops.recurrent.decay_linear import DISPATCH, decay_linear


class EluLinearConfig(MixerConfig):
    """`eps`: smallest normaliser, which a sum of features close to 0 is raised to."""

    name: Literal["elu_linear"] = "elu_linear"
    eps: float = 1e-6

    def build(self, shape: AttentionShape) -> Mixer:
        """The mixer; it has no parameters."""
        return EluLinear(self, shape)


@dataclass(frozen=True, eq=False)
class EluLinearState:
    """`sums: [B, G, D, V + 1]`: S, and z in the last column, at least fp32."""

    sums: Tensor

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.sums.numel() * self.sums.element_size()

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> EluLinearState:
        """The same with a function applied to the sums, whose first dimension is the batch."""
        return EluLinearState(change(self.sums))

    def widened(self, more: int) -> EluLinearState:
        """Itself: a sum takes any number of tokens."""
        return self


class EluLinear(AttentionMixer):
    """The sums and the normaliser are one recurrence without decay, over values with a column of ones."""

    config: EluLinearConfig

    def __init__(self, config: EluLinearConfig, shape: AttentionShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape

    def reset_parameters(self) -> None:
        """Nothing to start."""

    def forward(
        self,
        q_BHUD: Tensor,
        k_BGTD: Tensor,
        v_BGTV: Tensor,
        *keys_BGTD: Tensor,
        scaling: float,
        layout: Layout,
        softcap: float | None = None,
        state: EluLinearState | None = None,
        need_state: bool = True,
        branch: Any = "both",
        commit: int | None = None,
    ) -> tuple[Tensor, EluLinearState | None]:
        """See `AttentionMixer.forward`; there is no softmax whose scores would be scaled or capped."""
        sums_BHUV, after = self._sums(
            features(q_BHUD), k_BGTD, v_BGTV, layout=layout, state=state, need_state=need_state, commit=commit
        )
        normaliser_BHU1 = sums_BHUV[..., -1:].clamp_min(self.config.eps)
        return (sums_BHUV[..., :-1] / normaliser_BHU1).to(v_BGTV.dtype), after

    def advance(
        self, k_BGTD: Tensor, v_BGTV: Tensor, *keys_BGTD: Tensor, layout: Layout, state: EluLinearState | None = None
    ) -> EluLinearState:
        """See `AttentionMixer.advance`."""
        no_queries = k_BGTD.new_empty(len(k_BGTD), self.shape.num_heads, 0, k_BGTD.shape[-1])
        _, after = self._sums(features(no_queries), k_BGTD, v_BGTV, layout=layout, state=state)
        assert after is not None
        return after

    def operations(self, query: Query) -> list[tuple[Dispatcher, Call]]:
        """See `Mixer.operations`."""
        return [(DISPATCH, query.wide().call(Call))]

    def cost(self, element_size: int) -> MixerCost:
        """D (V + 1) sums per key/value head; each query head adds to them and reads them."""
        sums = self.shape.head_dim * (self.shape.value_dim + 1)
        return MixerCost(
            state_bytes=self.shape.num_kv_heads * sums * max(4, element_size),
            bytes_per_token=0,
            flops_per_token=self.shape.num_heads * 4 * sums,
        )

    def _sums(
        self,
        q_BHUD: Tensor,
        k_BGTD: Tensor,
        v_BGTV: Tensor,
        *,
        layout: Layout,
        state: EluLinearState | None,
        need_state: bool = True,
        commit: int | None = None,
    ) -> tuple[Tensor, EluLinearState | None]:
        """`phi(q)^T [S | z]`, `[B, H, U, V + 1]`, and the sums after the first `commit` tokens."""
        group = self.shape.num_heads // self.shape.num_kv_heads
        k, v = (x.repeat_interleave(group, dim=1) for x in (features(k_BGTD), v_BGTV.to(wide(v_BGTV))))
        y, after = decay_linear(
            q_BHUD,
            k,
            F.pad(v, (0, 1), value=1.0),
            k.new_zeros(k.shape[:3]),
            layout=layout,
            state=None if state is None else state.sums.repeat_interleave(group, dim=1),
            need_state=need_state,
            commit=commit,
        )
        return y, None if after is None else EluLinearState(after[:, ::group].contiguous())


def features(x: Tensor) -> Tensor:
    """elu(x) + 1, in fp32 or more."""
    return F.elu(x.to(wide(x))) + 1


def wide(x: Tensor) -> torch.dtype:
    """The dtype to compute in."""
    return torch.promote_types(x.dtype, torch.float32)
