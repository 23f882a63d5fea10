"""What the branches section measures: losses with one branch off, by layer too, and with less and less context.

All in nats per token, with the standard error over documents.
"""

from __future__ import annotations

from dataclasses import dataclass

from linearize.evaluation.cache_checks import Deviation
from linearize.evaluation.numbers import MeanNumbers, NumbersModel, Role


class BranchLosses(NumbersModel):
    """Loss with both branches and with one; `won`: window - both, `window_brings`: linear - both.

    Without a teacher `teacher`, `lost` (window - teacher) and `share` (won / lost) are None; `share` also where the
    window alone loses nothing beyond chance.
    """

    both: MeanNumbers
    window: MeanNumbers
    linear: MeanNumbers
    teacher: MeanNumbers | None = None
    tokens: int
    documents: int
    won: MeanNumbers
    window_brings: MeanNumbers
    lost: MeanNumbers | None = None
    share: MeanNumbers | None = None

    @property
    def text(self) -> str:
        """`loss 2.1 with both, 2.3 window alone, ...`."""
        losses = {"with both": self.both, "window alone": self.window, "linear alone": self.linear}
        losses |= {} if self.teacher is None else {"teacher": self.teacher}
        return "loss " + ", ".join(f"{loss.value:.4f} {words}" for words, loss in losses.items())


@dataclass(frozen=True, kw_only=True)
class Decoded(Deviation):
    """Logits with both branches through the cache against those of one pass, in the model's `dtype`."""

    dtype: str


class Ablation(NumbersModel):
    """A student whose `layers` have two branches, `reach`: tokens that its longest window sees.

    Losses on `all` tokens, and on those `beyond` the reach (None: there are none); `decoded` is None for a short text.
    """

    reach: int
    layers: list[int]
    all: BranchLosses
    beyond: BranchLosses | None
    decoded: Decoded | None


class LayerCost(NumbersModel):
    """Loss with one branch of one layer off, less that with both; of tokens beyond the window where there are any."""

    layer: int
    tokens: int
    without_linear: MeanNumbers
    without_window: MeanNumbers


class ContextLoss(MeanNumbers):
    """Loss with contexts of `size` tokens; None: with whole documents."""

    size: int | None

    @property
    def label(self) -> str:
        """The size in words."""
        return "whole document" if self.size is None else f"{self.size} tokens"


class ContextNumbers(NumbersModel):
    """Loss against context on the same tokens, `from_position` on in their documents; the whole document comes last.

    `gain`: the first loss less the last; `share_of_gain`: of the teacher's gain (None: it has none, or no teacher).
    """

    from_position: int
    tokens: int
    documents: int
    losses: list[ContextLoss]
    gain: MeanNumbers
    share_of_gain: MeanNumbers | None


class ModelBranches(NumbersModel):
    """One model; `mixers`: by layer, empty for a plain one. `ablation` and `layers` need two branches in one layer."""

    role: Role
    mixers: list[str]
    ablation: Ablation | None
    layers: list[LayerCost]
    context: ContextNumbers | None

    @property
    def farthest(self) -> BranchLosses | None:
        """Losses beyond the window, else those on all tokens; None without an ablation."""
        return None if self.ablation is None else self.ablation.beyond or self.ablation.all


class BranchesNumbers(NumbersModel):
    """The whole section."""

    models: dict[str, ModelBranches]
