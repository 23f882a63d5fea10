"""Language modelling: every model on the same held-out tokens, and where a student falls behind its teacher.

Losses are in nats per token; the token that ends a document counts, the one that begins it does not. Standard errors
are over documents. A document longer than a row is cut, and each part is a document of its own here.

Letters: B rows, T tokens a row, N tokens that count.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, EvalModel, Numbers, Section, SectionView, Stat
from linearize.evaluation.numbers import MeanNumbers
from linearize.evaluation.sections.language.numbers import (
    BinNumbers,
    ComparedLanguage,
    EvidenceNumbers,
    FarEvidence,
    GrowthMeans,
    GrowthNumbers,
    LanguageNumbers,
    ModelLanguage,
    PartLosses,
    PartNumbers,
    RatioNumbers,
)
from linearize.evaluation.sections.language.present import headline, present
from linearize.evaluation.sections.language.token_facts import bytes_of_targets, evidence_classes, evidence_distance
from linearize.metrics.branches import longest_reach, window_reach
from linearize.metrics.intervals import contrast_over_documents, mean_over_documents, ratio_over_documents
from linearize.metrics.token_scores import Batch, TokenScores, View, number_documents, score_batches
from linearize.training.data.packing import PackedRows

LN2 = math.log(2)
DEFAULT_REACH = 64  # tokens: how far back evidence is called near for a model without a window
LATE_DOCUMENTS = 8  # a stretch of positions that fewer documents reach says nothing on its own


class Language(Section):
    """Loss, perplexity, bits per byte, agreement with the teacher; by position, document length and evidence.

    `first_bin`: end of the first bin of positions, from which on they double. Students with a window and a linear
    branch also run with the window alone, which shows what the linear branch brings where the evidence is beyond it.
    """

    NAME: ClassVar[str] = "language"
    TITLE: ClassVar[str] = "Language modelling"

    first_bin: int = Field(default=8, ge=1)

    def check(self, ctx: EvalContext) -> None:
        """Raises InputError where there is no text."""
        if not any(len(document) > 1 for document in ctx.documents):
            raise InputError("language modelling needs text: name some with --data, a .txt or .jsonl file for one")

    def run(self, ctx: EvalContext) -> Numbers:
        """Measure all models in one pass over the rows."""
        rows = ctx.rows()
        key = {
            "section": self.NAME,
            "config": self.model_dump(),
            "models": [[m.name, m.role, m.fingerprint] for m in ctx.models],
            "rows": hashlib.sha256(rows.input_ids.numpy().tobytes() + rows.labels.numpy().tobytes()).hexdigest(),
        }
        numbers: Numbers = ctx.results.result(key, lambda: self._measure(ctx, rows).to_json())
        return numbers

    def _measure(self, ctx: EvalContext, rows: PackedRows) -> LanguageNumbers:
        teacher = ctx.teacher.name if ctx.teacher else None
        views = {m.name: View(model=m.model) for m in ctx.models}
        views |= {
            _alone(m.name): View(model=m.model, branch="window")
            for m in ctx.students
            if window_reach(m.plan) is not None
        }
        batches = _with_progress(rows, ctx.batch, ctx.progress)
        text = _Text(score_batches(batches, views, reference=teacher, rows=ctx.batch), teacher)
        names = [eval_model.name for eval_model in ctx.models]
        document_BT, _ = number_documents(rows.position_ids)
        length_N = document_BT.flatten().bincount()[text.documents]
        vocabulary = max(View(model=m.model).vocabulary for m in ctx.models)
        bytes_N, is_text_N = bytes_of_targets(ctx.tokenizer, vocabulary, rows, text.scores.targets)
        return LanguageNumbers(
            tokens=len(text.documents),
            documents=len(text.documents.unique()),
            bytes=int(bytes_N.sum()),
            length=rows.length,
            models={m.name: text.model(m, bytes_N, is_text_N) for m in ctx.models},
            positions=text.bins(text.scores.positions, self.first_bin, names),
            lengths=text.bins(length_N, self.first_bin, names),
            growth=_growth(text, [m.name for m in ctx.students]),
            evidence=_evidence(text, ctx, rows),
        )

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        return present(LanguageNumbers.model_validate(numbers))

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        return headline(LanguageNumbers.model_validate(numbers))


@dataclass(frozen=True)
class _Text:
    """The scores of all tokens, and means over parts of them."""

    scores: TokenScores
    teacher: str | None

    @property
    def documents(self) -> Tensor:
        """The document [N] of each token."""
        return self.scores.documents

    def compares(self, name: str) -> bool:
        """Whether this is a student with a teacher."""
        return self.teacher is not None and name != self.teacher

    def gap(self, name: str) -> Tensor:
        """Loss above the teacher's [N]."""
        assert self.teacher is not None
        return self.scores.loss[name] - self.scores.loss[self.teacher]

    def mean(self, value_N: Tensor, mask_N: Tensor | None = None) -> MeanNumbers:
        """Mean over all tokens, or over those of a mask."""
        mask_N = torch.ones_like(self.documents, dtype=torch.bool) if mask_N is None else mask_N
        return MeanNumbers.of(mean_over_documents(value_N[mask_N], self.documents[mask_N]))

    def contrast(self, value_N: Tensor, *parts: tuple[float, Tensor]) -> MeanNumbers:
        """Weighted sum of the means over masks."""
        return MeanNumbers.of(contrast_over_documents(value_N, self.documents, parts))

    def model(self, eval_model: EvalModel, bytes_N: Tensor, is_text_N: Tensor) -> ModelLanguage:
        """A model on all tokens."""
        name, bits = eval_model.name, None
        loss_N = self.scores.loss[name]
        loss = self.mean(loss_N)
        if bytes_N.sum():
            bits = MeanNumbers.of(ratio_over_documents(loss_N / LN2 * is_text_N, bytes_N, self.documents))
        own = {"role": eval_model.role, "loss": loss, "perplexity": _exponential(loss), "bits_per_byte": bits}
        if not self.compares(name):
            return ModelLanguage.model_validate(own)
        gap = self.mean(self.gap(name))
        agreement = {what: self.mean(getattr(self.scores, what)[name]) for what in ("kl", "top1", "top5")}
        return ComparedLanguage.model_validate(own | {"gap": gap, "kept": _exponential(gap, -1)} | agreement)

    def part(self, mask_N: Tensor, names: Sequence[str]) -> PartNumbers:
        """Tokens and documents of a part of the text, and what each model loses there."""
        tokens, models = int(mask_N.sum()), {}
        for name in names if tokens else ():
            losses = {"loss": self.mean(self.scores.loss[name], mask_N)}
            if self.compares(name):
                losses["gap"] = self.mean(self.gap(name), mask_N)
                if _alone(name) in self.scores.loss:
                    losses["window_gap"] = self.mean(self.gap(_alone(name)), mask_N)
            models[name] = PartLosses(**losses)
        return PartNumbers(tokens=tokens, documents=len(self.documents[mask_N].unique()), models=models)

    def bins(self, value_N: Tensor, first: int, names: Sequence[str]) -> list[BinNumbers]:
        """The text in parts by a number of each token: below `first`, then doubling; empty ones are left out."""
        edges = [0, first]
        while edges[-1] <= int(value_N.max()):
            edges.append(2 * edges[-1])
        parts = [(start, end, self.part((value_N >= start) & (value_N < end), names)) for start, end in pairwise(edges)]
        return [BinNumbers(start=start, end=end, **vars(part)) for start, end, part in parts if part.tokens]


def _alone(name: str) -> str:
    """The view of a student's window without its linear branch."""
    return f"{name} (window)"


def _with_progress(rows: PackedRows, batch: int, progress: Callable[[str, int, int], None]) -> Iterator[Batch]:
    for done, rows_of_batch in enumerate(rows.in_order(batch)):
        progress("language modelling", done * batch, len(rows))
        yield rows_of_batch
    progress("language modelling", len(rows), len(rows))


def _exponential(mean: MeanNumbers, sign: int = 1) -> RatioNumbers:
    """exp of a mean (or of its negative), with its interval."""
    value, *ends = (math.exp(min(sign * x, 700.0)) for x in (mean.value, *mean.interval))
    known = mean.error is not None
    return RatioNumbers(value=value, low=min(ends) if known else None, high=max(ends) if known else None)


def _evidence(text: _Text, ctx: EvalContext, rows: PackedRows) -> list[EvidenceNumbers]:
    """Losses by where the evidence is, for each reach of a student's window (or the default)."""
    distance_N = evidence_distance(rows)
    reaches: dict[int, list[str]] = {}
    for eval_model in ctx.students or ctx.models:
        reaches.setdefault(longest_reach(eval_model.plan) or DEFAULT_REACH, []).append(eval_model.name)
    entries = []
    for reach, names in sorted(reaches.items()):
        masks = evidence_classes(distance_N, reach)
        own = [m.name for m in ctx.models if m.role == "teacher" or m.name in names]
        entry = EvidenceNumbers(
            reach=reach,
            students=[name for name in names if name != text.teacher],
            classes={kind: text.part(mask_N, own) for kind, mask_N in masks.items()},
            compared={name: _far_evidence(text, masks, name) for name in names if text.compares(name)},
        )
        entries.append(entry)
    return entries


def _growth(text: _Text, students: Sequence[str]) -> GrowthNumbers:
    """Whether a student falls behind further on: its gap from `middle` on against that from a quarter of it on.

    `middle` is the largest power of two that several documents reach beyond. Empty where none is at least 16.
    """
    position_N = text.scores.positions
    reached_D = torch.zeros(int(text.documents.max()) + 1, dtype=torch.int64)
    reached_D.scatter_reduce_(0, text.documents, position_N, "amax")
    far = int(reached_D.sort(descending=True).values[min(LATE_DOCUMENTS, len(reached_D)) - 1])
    middle = 2 ** (max(far, 1).bit_length() - 1)
    late_N = position_N >= middle
    early_N = (position_N >= middle // 4) & ~late_N
    if middle < 16 or text.teacher is None or not students or not early_N.any():
        return GrowthNumbers()
    models = {}
    for name in students:
        gap_N, late, early = text.gap(name), (1.0, late_N), (1.0, early_N)
        models[name] = GrowthMeans(
            early=text.contrast(gap_N, early),
            late=text.contrast(gap_N, late),
            growth=text.contrast(gap_N, late, (-1.0, early_N)),
            doubling=text.contrast(gap_N, late, (-2.0, early_N)),
        )
    return GrowthNumbers(early=middle // 4, middle=middle, end=int(reached_D.max()) + 1, models=models)


def _far_evidence(text: _Text, masks: Mapping[str, Tensor], name: str) -> FarEvidence | None:
    """How a student fares where the evidence is beyond its window; None without such tokens, or any inside."""
    far_N, inside_N = masks["beyond"], masks["inside"]
    if not far_N.any() or not inside_N.any():
        return None
    gap_N, share = text.gap(name), None
    if _alone(name) in text.scores.loss:
        lost_N = text.gap(_alone(name))
        if text.mean(lost_N, far_N).clearly_positive:
            won_N = lost_N - gap_N
            share = MeanNumbers.of(ratio_over_documents(won_N[far_N], lost_N[far_N], text.documents[far_N]))
    return FarEvidence(
        over_all=text.contrast(gap_N, (1.0, far_N), (-1.0, torch.ones_like(far_N))),
        over_inside=text.contrast(gap_N, (1.0, far_N), (-1.0, inside_N)),
        share=share,
    )
