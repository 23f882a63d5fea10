"""Which layers of a student have both a window and a linear branch, and the losses of ablating them.

Letters: N tokens that count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from linearize.metrics.intervals import Mean, ratio_over_documents
from linearize.metrics.token_scores import Batch, View
from linearize.mixers import MixerConfig
from linearize.mixers.gla import GlaConfig
from linearize.mixers.layer_mixer import LayerMixerConfig
from linearize.mixers.lolcats import LolcatsConfig
from linearize.mixers.sliding_window import SlidingWindowConfig
from linearize.ops.window_linear.spec import ring_slots

WINDOWED = (LolcatsConfig, GlaConfig, SlidingWindowConfig)
Without = Literal["window", "linear"]


def window_reach(plan: Sequence[MixerConfig | None]) -> int | None:
    """Tokens that the plan's longest window reaches back, the query itself included.

    None where no mixer has both branches, or where one has none: then the branches cannot be run alone.
    """
    if any(isinstance(mixer, LayerMixerConfig) for mixer in plan):
        return None
    return longest_reach(plan) if two_branch_layers(plan) else None


def longest_reach(plan: Sequence[MixerConfig | None]) -> int | None:
    """Tokens that the longest window of any mixer reaches back, the query itself included; None without a window."""
    reaches = [
        ring_slots(mixer.window, mixer.window_shape) + 1
        for mixer in (None if entry is None else entry.inner for entry in plan)
        if isinstance(mixer, WINDOWED) and mixer.window
    ]
    return max(reaches, default=None)


def two_branch_layers(plan: Sequence[MixerConfig | None]) -> list[int]:
    """The layers whose mixer has a window and a linear branch."""
    return [i for i, mixer in enumerate(plan) if mixer is not None and mixer.has_two_branches]


@dataclass(frozen=True, kw_only=True)
class AblatedView(View):
    """A student some of whose layers run one branch: `only` maps a layer to the branch that is left."""

    only: Mapping[int, str] = field(default_factory=dict)

    def logits(self, batch: Batch) -> Tensor:
        """Logits [B, T, V] of packed rows."""
        device = next(self.model.parameters()).device
        inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
        logits_BTV: Tensor = self.model(**inputs, use_cache=False, branch=dict(self.only)).logits
        return logits_BTV


def without(branch: Without, layers: Iterable[int]) -> dict[int, str]:
    """What is left in these layers when a branch is off."""
    return dict.fromkeys(layers, "linear" if branch == "window" else "window")


def share_won(worst_N: Tensor, model_N: Tensor, best_N: Tensor, document_N: Tensor) -> Mean | None:
    """How much of the way from the worst loss to the best a model goes, paired over documents: 1 all, 0 nothing.

    None where the way is not longer than chance (its 95% interval holds 0): then there is nothing to take a share of.
    """
    way = difference(worst_N, best_N, document_N)
    if not clearly_positive(way):
        return None
    return ratio_over_documents(worst_N.double() - model_N, worst_N.double() - best_N, document_N)


def difference(first_N: Tensor, second_N: Tensor, document_N: Tensor) -> Mean:
    """The mean of first - second, paired token by token, its error over documents."""
    paired_N = first_N.double() - second_N.double()
    return ratio_over_documents(paired_N, torch.ones_like(paired_N), document_N)


def clearly_positive(mean: Mean) -> bool:
    """Whether a mean is above 0 beyond its 95% interval."""
    return mean.interval is not None and mean.interval[0] > 0
