"""Retrieval heads stay exact: some key/value groups of a layer keep their softmax attention, the others run a mixer
(2602.11374; HydraHead, 2606.20097).

Few heads of a model look up what stands far back. With these kept as they are, their keys and values grow with the
text; all other heads have the mixer's memory of constant size.

Letters: B batch, T tokens, U of them with an output, G key/value heads, R query heads for each, H = G R, V value
dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

import torch
from pydantic import Field, field_validator
from torch import Tensor

from linearize.errors import InputError
from linearize.mixers.base import AttentionMixer, AttentionShape, MixerConfig, MixerCost, MixerState
from linearize.mixers.gla import GlaConfig
from linearize.mixers.lolcats import LolcatsConfig
from linearize.mixers.sliding_window import SlidingWindowConfig
from linearize.ops.dispatch import Call, Dispatcher, Query
from linearize.ops.growing_softmax import SoftmaxState, advance_softmax, growing_softmax
from linearize.ops.layout import Layout
from linearize.ops.window_linear import Branch
from linearize.registry import Table, choice


def _table() -> Table[type[MixerConfig]]:
    from linearize.mixers import MIXERS

    return MIXERS


if TYPE_CHECKING:
    Inner: TypeAlias = MixerConfig
else:
    Inner = choice((LolcatsConfig, SlidingWindowConfig, GlaConfig), _table)


class RetrievalHeadsConfig(MixerConfig):
    """`groups`: key/value heads that keep softmax, with all their query heads. `mixer`: what the others run."""

    name: Literal["retrieval_heads"] = "retrieval_heads"
    groups: tuple[int, ...] = Field((0,), min_length=1)
    mixer: Inner = LolcatsConfig()

    @field_validator("groups")
    @classmethod
    def _each_once(cls, groups: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(groups)) < len(groups) or min(groups) < 0:
            raise ValueError(f"groups {list(groups)}: name each key/value head once, counted from 0")
        return tuple(sorted(groups))

    @property
    def inner(self) -> MixerConfig:
        """The mixer of the other heads."""
        return self.mixer

    @property
    def has_two_branches(self) -> bool:
        """As the inner mixer."""
        return self.mixer.has_two_branches

    @property
    def reads_projections(self) -> bool:
        """As the inner mixer."""
        return self.mixer.reads_projections

    def with_inner(self, inner: MixerConfig) -> RetrievalHeadsConfig:
        """The same heads kept, the others with another mixer."""
        return type(self)(groups=self.groups, mixer=inner)

    def build(self, shape: AttentionShape) -> RetrievalHeads:
        """The mixer, which starts as the inner one does.

        Raises:
            InputError: a group that the attention does not have.
        """
        if self.groups[-1] >= shape.num_kv_heads:
            raise InputError(
                f"plan.heads: group {self.groups[-1]} given, the layer has {shape.num_kv_heads} key/value heads: "
                f"allowed are 0 to {shape.num_kv_heads - 1}"
            )
        return RetrievalHeads(self, shape)


@dataclass(frozen=True, eq=False)
class HeadsState:
    """What both kinds of heads remember; `inner` is None where all groups keep softmax."""

    kept: SoftmaxState
    inner: MixerState | None

    @property
    def num_bytes(self) -> int:
        """Bytes held by both."""
        return self.kept.num_bytes + (0 if self.inner is None else self.inner.num_bytes)

    def map_batch(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same state with `change` applied to every tensor; all have the batch first."""
        inner = None if self.inner is None else self.inner.map_batch(change)
        return replace(self, kept=self.kept.map_batch(change), inner=inner)

    def widened(self, more: int) -> Self:
        """The same state for calls that commit `more` further tokens at once."""
        return replace(self, inner=None if self.inner is None else self.inner.widened(more))


class RetrievalHeads(AttentionMixer):
    """y of a kept group: causal softmax over the whole document; y of another: the inner mixer's."""

    config: RetrievalHeadsConfig

    def __init__(self, config: RetrievalHeadsConfig, shape: AttentionShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        groups = shape.num_kv_heads
        self.kept = list(config.groups)
        self.others = [group for group in range(groups) if group not in config.groups]
        self.inner: AttentionMixer | None = None
        if self.others:
            rest = replace(shape, num_kv_heads=len(self.others), num_heads=len(self.others) * shape.group)
            inner = config.mixer.build(rest)
            assert isinstance(inner, AttentionMixer)
            self.inner = inner

    @property
    def fp32_parameters(self) -> tuple[str, ...] | None:  # type: ignore[override]  # the inner mixer's
        """The inner mixer's, by their names here."""
        names = None if self.inner is None else self.inner.fp32_parameters
        return names if names is None else tuple(f"inner.{name}" for name in names)

    @property
    def needs_keys(self) -> bool:  # type: ignore[override]  # it depends on the inner mixer
        """Whether the inner mixer reads the key projection's output."""
        return self.inner is not None and self.inner.needs_keys

    def reset_parameters(self) -> None:
        """As the inner mixer starts."""
        if self.inner is not None:
            self.inner.reset_parameters()

    def forward(
        self,
        q_BHUD: Tensor,
        k_BGTD: Tensor,
        v_BGTV: Tensor,
        *keys_BGTD: Tensor,
        scaling: float,
        layout: Layout,
        softcap: float | None = None,
        state: HeadsState | None = None,
        need_state: bool = True,
        branch: Branch = "both",
        commit: int | None = None,
    ) -> tuple[Tensor, HeadsState | None]:
        """See `Mixer.forward`; `branch` is the inner mixer's."""
        q_BGRUD = q_BHUD.unflatten(1, (self.shape.num_kv_heads, -1))
        options: dict[str, Any] = {
            "scaling": scaling, "layout": layout, "softcap": softcap, "need_state": need_state, "commit": commit,
        }  # fmt: skip
        y, kept = growing_softmax(
            _select(q_BGRUD, self.kept).flatten(1, 2), _select(k_BGTD, self.kept), _select(v_BGTV, self.kept),
            state=None if state is None else state.kept, **options,
        )  # fmt: skip
        outputs = dict(zip(self.kept, y.unflatten(1, (len(self.kept), -1)).split(1, dim=1), strict=True))
        inner = None
        if self.inner is not None:
            y, inner = self.inner(
                _select(q_BGRUD, self.others).flatten(1, 2),
                *(_select(x, self.others) for x in (k_BGTD, v_BGTV, *keys_BGTD)),
                state=None if state is None else state.inner, branch=branch, **options,
            )  # fmt: skip
            outputs |= zip(self.others, y.unflatten(1, (len(self.others), -1)).split(1, dim=1), strict=True)
        y_BGRUV = torch.cat([outputs[group] for group in range(self.shape.num_kv_heads)], dim=1)
        return y_BGRUV.flatten(1, 2), None if kept is None else HeadsState(kept, inner)

    def advance(self, k_BGTD: Tensor, v_BGTV: Tensor, *keys_BGTD: Tensor, layout: Layout, state: Any = None) -> Any:
        """See `Mixer.advance`."""
        before = (None, None) if state is None else (state.kept, state.inner)
        kept = advance_softmax(_select(k_BGTD, self.kept), _select(v_BGTV, self.kept), layout=layout, state=before[0])
        if self.inner is None:
            return HeadsState(kept, None)
        rest = (_select(x, self.others) for x in (k_BGTD, v_BGTV, *keys_BGTD))
        return HeadsState(kept, self.inner.advance(*rest, layout=layout, state=before[1]))

    def operations(self, query: Query) -> list[tuple[Dispatcher, Call]]:
        """See `Mixer.operations`: the inner mixer's; kept heads run PyTorch's own attention."""
        return [] if self.inner is None else self.inner.operations(query)

    def cost(self, element_size: int) -> MixerCost:
        """The inner mixer's, and a key and a value per token and kept group; work that grows with the text is not in
        `flops_per_token`."""
        inner = MixerCost(state_bytes=0, bytes_per_token=0, flops_per_token=0)
        if self.inner is not None:
            inner = self.inner.cost(element_size)
        width = self.shape.head_dim + self.shape.value_dim
        return replace(inner, bytes_per_token=inner.bytes_per_token + len(self.kept) * width * element_size)


def _select(x_BG: Tensor, groups: Sequence[int]) -> Tensor:
    """Some groups of `[B, G, ...]`; a view where they are neighbours."""
    if groups[-1] - groups[0] == len(groups) - 1:
        return x_BG[:, groups[0] : groups[-1] + 1]
    return torch.cat([x_BG[:, group : group + 1] for group in groups], dim=1)
