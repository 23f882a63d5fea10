"""Held-out loss of student and teacher on the same tokens, their agreement, and what each branch of the student does.

Losses and divergences are in nats per token. Standard errors take documents as the independent draws: tokens of one
document are correlated, so an error over tokens would be too small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from linearize.errors import InputError
from linearize.metrics.intervals import Mean, mean_over_documents
from linearize.metrics.token_scores import Batch, TokenScores, View, score_batches

BRANCHES = ("both", "window", "linear")


@dataclass(frozen=True, kw_only=True)
class PositionBin:
    """Losses of the tokens whose position in their document is in [start, end)."""

    start: int
    end: int
    tokens: int
    teacher_loss: float | None = None
    student_loss: float | None = None
    window_loss: float | None = None


@dataclass(frozen=True, kw_only=True)
class LanguageModelingReport:
    """Student and teacher on the same held-out tokens; `*_error` are standard errors over documents, None if unknown.

    `gap` is student loss minus teacher loss, its error that of the paired difference.
    """

    tokens: int
    documents: int
    teacher_loss: float | None = None
    teacher_loss_error: float | None = None
    teacher_perplexity: float | None = None
    student_loss: float | None = None
    student_loss_error: float | None = None
    student_perplexity: float | None = None
    gap: float | None = None
    gap_error: float | None = None
    student_kl: float | None = None
    student_kl_error: float | None = None
    student_top1: float | None = None
    student_top1_error: float | None = None
    by_position: tuple[PositionBin, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self) | {"by_position": [asdict(b) for b in self.by_position]}


@dataclass(frozen=True, kw_only=True)
class BranchLosses:
    """The student's loss with both branches, with its window alone and with its linear branch alone.

    `share` is how much of the way from the window alone to the teacher the linear branch goes: 1 is all of it, 0
    nothing, below 0 harm; None without a teacher or where the window alone loses nothing.
    """

    tokens: int
    both: float
    window: float
    linear: float
    teacher: float | None = None
    share: float | None = None


@dataclass(frozen=True, kw_only=True)
class BranchAblation:
    """Branch losses on all tokens and on those with text beyond the window (None: no such token or no window)."""

    all_tokens: BranchLosses
    beyond_window: BranchLosses | None
    window: int | None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return asdict(self)


def held_out_report(
    student: nn.Module | None,
    teacher: nn.Module | None,
    batches: Iterable[Batch],
    *,
    position_bins: Sequence[int] | None = None,
    rows: int | None = None,
) -> LanguageModelingReport:
    """Measure student and teacher in one pass over packed batches; either may be None.

    `position_bins` are the edges of the position bins (default: 0, 1 and the powers of two up to the longest document).
    Raises InputError when the vocabularies differ or no token counts.
    """
    views = {name: View(model=m) for name, m in (("teacher", teacher), ("student", student)) if m is not None}
    scores = score_batches(batches, views, reference="teacher" if teacher is not None else None, rows=rows)
    return report_of(scores, position_bins=position_bins)


def report_of(scores: TokenScores, *, position_bins: Sequence[int] | None = None) -> LanguageModelingReport:
    """The report of token scores whose views are named `teacher`, `student` (both optional) and, for bins, `window`."""
    means = {
        name: mean_over_documents(x, scores.documents)
        for name, x in scores.loss.items()
        if name in ("teacher", "student")
    }
    fields: dict[str, Any] = {}
    for name, mean in means.items():
        fields |= {**_named(f"{name}_loss", mean), f"{name}_perplexity": math.exp(min(mean.value, 700.0))}
    if len(means) == 2:
        fields |= _named("gap", mean_over_documents(scores.loss["student"] - scores.loss["teacher"], scores.documents))
        fields |= _named("student_kl", mean_over_documents(scores.kl["student"], scores.documents))
        fields |= _named("student_top1", mean_over_documents(scores.top1["student"], scores.documents))
    tokens, documents = scores.positions.numel(), scores.documents.unique().numel()
    return LanguageModelingReport(
        tokens=tokens, documents=documents, by_position=by_position(scores, position_bins), **fields
    )


def _named(name: str, mean: Mean) -> dict[str, float | None]:
    return {name: mean.value, f"{name}_error": mean.error}


def by_position(scores: TokenScores, edges: Sequence[int] | None = None) -> tuple[PositionBin, ...]:
    """Mean losses by position in the document; bins without a token are left out."""
    edges = list(edges) if edges is not None else powers_of_two(int(scores.positions.max()))
    if sorted(set(edges)) != edges or len(edges) < 2:
        raise InputError(f"position bins {edges}: give at least two edges in rising order, such as 0,16,256")
    bins = []
    for start, end in pairwise(edges):
        inside_N = (scores.positions >= start) & (scores.positions < end)
        losses = {
            f"{name}_loss": x[inside_N].double().mean().item() for name, x in scores.loss.items() if name != "linear"
        }
        if tokens := int(inside_N.sum()):
            bins.append(PositionBin(start=start, end=end, tokens=tokens, **losses))
    return tuple(bins)


def powers_of_two(longest: int) -> list[int]:
    """Edges 0, 1, 2, 4, ... of which the last is beyond position `longest`."""
    return [0, *(2**i for i in range(longest.bit_length() + 1))]


def loss_only(model: nn.Module, batches: Iterable[Batch], branch: str = "both") -> tuple[float, int]:
    """Mean next-token loss (nats per token) of one model on packed batches, and the number of tokens."""
    scores = score_batches(batches, {"model": View(model=model, branch=branch)})
    mean = mean_over_documents(scores.loss["model"], scores.documents)
    return mean.value, mean.tokens


def ablation_views(student: nn.Module) -> dict[str, View]:
    """The views whose scores `ablation_of` needs: `student` (both branches), `window` and `linear`."""
    return {"student" if branch == "both" else branch: View(model=student, branch=branch) for branch in BRANCHES}


def branch_ablation(
    student: nn.Module, batches: Iterable[Batch], *, window: int | None = None, teacher: nn.Module | None = None
) -> BranchAblation:
    """The student's loss with both branches, the window alone and the linear branch alone, in one pass.

    `window`: tokens a query's window reaches back, itself included, for the figures beyond it; `teacher`: for shares.
    """
    views = ablation_views(student) | ({"teacher": View(model=teacher)} if teacher is not None else {})
    return ablation_of(score_batches(batches, views), window=window)


def ablation_of(scores: TokenScores, *, window: int | None) -> BranchAblation:
    """The ablation from token scores of the views `student`, `window`, `linear` and, if known, `teacher`."""
    beyond_N = scores.positions >= window if window is not None else scores.positions < 0
    return BranchAblation(
        all_tokens=_branch_losses(scores, beyond_N | True),
        beyond_window=_branch_losses(scores, beyond_N) if beyond_N.any() else None,
        window=window,
    )


def _branch_losses(scores: TokenScores, keep_N: Tensor) -> BranchLosses:
    loss = {name: x[keep_N].double().mean().item() for name, x in scores.loss.items()}
    teacher = loss.get("teacher")
    missing = loss["window"] - teacher if teacher is not None else 0.0
    return BranchLosses(
        tokens=int(keep_N.sum()),
        both=loss["student"],
        window=loss["window"],
        linear=loss["linear"],
        teacher=teacher,
        share=(loss["window"] - loss["student"]) / missing if missing > 0 else None,
    )
