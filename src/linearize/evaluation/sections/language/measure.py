"""Language modelling: every model on the same held-out tokens, and where a student falls behind its teacher.

Losses are in nats per token; the token that ends a document counts, the one that begins it does not. Standard errors
are over documents. A document longer than a row is cut into pieces, each a document of its own here.

Letters: B rows, T tokens a row, N tokens that count.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, Numbers, Section, SectionView, Stat
from linearize.evaluation.sections.language import present
from linearize.evaluation.sections.language.evidence import evidence_classes, evidence_distance
from linearize.evaluation.sections.language.token_bytes import bytes_of_tokens, prefix_bytes
from linearize.metrics.branches import longest_reach, window_reach
from linearize.metrics.intervals import (
    Mean,
    contrast_over_documents,
    mean_over_documents,
    ratio_over_documents,
)
from linearize.metrics.token_scores import IGNORED, Batch, TokenScores, View, number_documents, score_batches
from linearize.training.data.packing import PackedRows

LN2 = math.log(2)
LATE_DOCUMENTS = 8  # a stretch of positions that fewer documents reach says nothing on its own


class Language(Section):
    """Loss, perplexity, bits per byte, agreement with the teacher; by position, document length and evidence.

    `first_bin`: end of the first bin of positions, from which on they double. `default_reach`: how far back evidence is
    called near for a model without a window. `ablate`: students with a window and a linear branch also run with
    the window alone, which tells what the linear branch brings where the evidence lies beyond the window.
    """

    NAME: ClassVar[str] = "language"
    TITLE: ClassVar[str] = "Language modelling"

    first_bin: int = Field(default=8, ge=1)
    default_reach: int = Field(default=64, ge=1)
    ablate: bool = True

    def check(self, ctx: EvalContext) -> None:
        """Raises InputError where there is no text."""
        if not any(len(document) > 1 for document in ctx.documents):
            raise InputError("language modelling needs text: name some with --data, a .txt or .jsonl file for one")

    def run(self, ctx: EvalContext) -> Numbers:
        """All models in one pass over the rows."""
        rows = ctx.rows()
        key = {
            "section": self.NAME,
            "config": self.model_dump(),
            "models": [[c.name, c.role, c.fingerprint] for c in ctx.models],
            "rows": hashlib.sha256(rows.input_ids.numpy().tobytes() + rows.labels.numpy().tobytes()).hexdigest(),
        }
        numbers: Numbers = ctx.results.result(key, lambda: self._measure(ctx, rows))
        return numbers

    def _measure(self, ctx: EvalContext, rows: PackedRows) -> Numbers:
        teacher = ctx.teacher.name if ctx.teacher else None
        views = {c.name: View(model=c.model) for c in ctx.models}
        if self.ablate:
            views |= {
                _alone(c.name): View(model=c.model, branch="window")
                for c in ctx.students
                if window_reach(c.plan) is not None
            }
        batches = _told(rows, ctx.batch, ctx.progress)
        scores = score_batches(batches, views, reference=teacher, rows=ctx.batch)
        text = _Text(scores, rows, teacher)
        bytes_N, text_N = _bytes_of_targets(ctx, rows, scores)
        students = [c.name for c in ctx.students]
        return {
            "tokens": scores.positions.numel(),
            "documents": scores.documents.unique().numel(),
            "bytes": int(bytes_N.sum()),
            "length": rows.length,
            "models": {c.name: {"role": c.role, **_model(text, c.name, bytes_N, text_N)} for c in ctx.models},
            "positions": text.bins(scores.positions, self.first_bin, [c.name for c in ctx.models]),
            "lengths": text.bins(text.lengths, self.first_bin, [c.name for c in ctx.models]),
            "growth": _growth(text, students),
            "evidence": self._evidence(text, ctx, rows),
        }

    def _evidence(self, text: _Text, ctx: EvalContext, rows: PackedRows) -> list[dict[str, Any]]:
        """Losses by where the evidence is, for each reach of a window that a student (or the default) has."""
        distance_N = evidence_distance(rows)
        reaches: dict[int, list[str]] = {}
        for eval_model in ctx.students or ctx.models:
            reaches.setdefault(longest_reach(eval_model.plan) or self.default_reach, []).append(eval_model.name)
        found = []
        for reach, names in sorted(reaches.items()):
            masks = evidence_classes(distance_N, reach)
            shown = [c.name for c in ctx.models if c.role == "teacher" or c.name in names]
            found.append(
                {
                    "reach": reach,
                    "students": [name for name in names if name != text.teacher],
                    "classes": {name: text.part(mask_N, shown) for name, mask_N in masks.items()},
                    "compared": {name: _recall(text, masks, name) for name in names if text.compares(name)},
                }
            )
        return found

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        """Tables, plots and findings."""
        return present.present(numbers)

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, list[Stat]]:
        """Perplexity, how much of the teacher's probability is kept, how often both would say the same."""
        return present.headline(numbers)


@dataclass(frozen=True)
class _Text:
    """The scores with what is asked of them again and again."""

    scores: TokenScores
    rows: PackedRows
    teacher: str | None

    def compares(self, name: str) -> bool:
        """Whether this is a student with a teacher beside it."""
        return self.teacher is not None and name != self.teacher

    def gap(self, name: str) -> Tensor:
        """Loss above the teacher's [N]."""
        assert self.teacher is not None
        return self.scores.loss[name] - self.scores.loss[self.teacher]

    @property
    def lengths(self) -> Tensor:
        """Tokens [N] of the document (or piece) that each counted token is in."""
        document_BT, _ = number_documents(self.rows.position_ids)
        return document_BT.flatten().bincount()[self.scores.documents]

    def part(self, mask_N: Tensor, names: list[str]) -> dict[str, Any]:
        """Tokens and documents of a part of the text, and what each model loses there."""
        documents_N = self.scores.documents[mask_N]
        tokens = int(mask_N.sum())
        models = {}
        for name in names if tokens else ():
            models[name] = {"loss": mean_over_documents(self.scores.loss[name][mask_N], documents_N).to_dict()}
            if self.compares(name):
                models[name]["gap"] = mean_over_documents(self.gap(name)[mask_N], documents_N).to_dict()
                if _alone(name) in self.scores.loss:
                    alone = mean_over_documents(self.gap(_alone(name))[mask_N], documents_N)
                    models[name]["window_gap"] = alone.to_dict()
        return {"tokens": tokens, "documents": documents_N.unique().numel(), "models": models}

    def bins(self, value_N: Tensor, first: int, names: list[str]) -> list[dict[str, Any]]:
        """The text in parts by a number of each token: below `first`, then doubling; empty ones are left out."""
        edges = [0, first]
        while edges[-1] <= int(value_N.max()):
            edges.append(2 * edges[-1])
        found = []
        for start, end in pairwise(edges):
            part = self.part((value_N >= start) & (value_N < end), names)
            if part["tokens"]:
                found.append({"start": start, "end": end, **part})
        return found


def _alone(name: str) -> str:
    """The view of a student's window without its linear branch."""
    return f"{name} (window)"


def _told(rows: PackedRows, batch: int, progress: Callable[[str, int, int], None]) -> Iterator[Batch]:
    for done, some in enumerate(rows.in_order(batch)):
        progress("language modelling", done * batch, len(rows))
        yield some
    progress("language modelling", len(rows), len(rows))


def _exponential(mean: Mean, sign: int = 1) -> dict[str, float | None]:
    """exp of a mean, with its interval."""
    low, high = sorted(mean.interval or (mean.value, mean.value), reverse=sign < 0)
    known = mean.error is not None
    value, low, high = (math.exp(min(sign * x, 700.0)) for x in (mean.value, low, high))
    return {"value": value, "low": low if known else None, "high": high if known else None}


def _model(text: _Text, name: str, bytes_N: Tensor, text_N: Tensor) -> dict[str, Any]:
    """What is said of one model on all tokens."""
    scores = text.scores
    loss = mean_over_documents(scores.loss[name], scores.documents)
    found: dict[str, Any] = {"loss": loss.to_dict(), "perplexity": _exponential(loss), "bits_per_byte": None}
    if bytes_N.sum():
        bits_N = scores.loss[name] / LN2 * text_N
        found["bits_per_byte"] = ratio_over_documents(bits_N, bytes_N, scores.documents).to_dict()
    if text.compares(name):
        gap = mean_over_documents(text.gap(name), scores.documents)
        found |= {"gap": gap.to_dict(), "kept": _exponential(gap, -1)}
        for what in ("kl", "top1", "top5"):
            found[what] = mean_over_documents(getattr(scores, what)[name], scores.documents).to_dict()
    return found


def _bytes_of_targets(ctx: EvalContext, rows: PackedRows, scores: TokenScores) -> tuple[Tensor, Tensor]:
    """Bytes [N] of the text that each counted token stands for, and whether [N] it is text, which no EOS is.

    The space that some tokenizers put before a text is no part of it, so it is taken from a document's first token.
    """
    vocabulary = max(View(model=c.model).vocabulary for c in ctx.models)
    bytes_N = bytes_of_tokens(ctx.tokenizer, vocabulary)[scores.targets]
    begins_BT = (rows.position_ids == 0) & (rows.input_ids == ctx.tokenizer.bos_token_id)
    first_N = begins_BT[:, :-1][rows.labels[:, 1:] != IGNORED]
    return (bytes_N - prefix_bytes(ctx.tokenizer) * first_N).clamp(min=0), bytes_N > 0


def _growth(text: _Text, students: list[str]) -> dict[str, Any]:
    """Whether a student falls behind further on: its gap from `middle` on against that from a quarter of it on.

    `middle` is the largest power of two that several documents reach beyond. Empty where none is at least 16.
    """
    reached_D = torch.zeros(int(text.scores.documents.max()) + 1, dtype=torch.int64)
    reached_D.scatter_reduce_(0, text.scores.documents, text.scores.positions, "amax")
    far = int(reached_D.sort(descending=True).values[min(LATE_DOCUMENTS, len(reached_D)) - 1])
    middle = 2 ** (max(far, 1).bit_length() - 1)
    if middle < 16 or text.teacher is None or not students:
        return {}
    late_N = text.scores.positions >= middle
    early_N = (text.scores.positions >= middle // 4) & ~late_N
    if not early_N.any():
        return {}
    found: dict[str, Any] = {"early": middle // 4, "middle": middle, "end": int(reached_D.max()) + 1, "models": {}}
    for name in students:
        gap_N, documents_N = text.gap(name), text.scores.documents
        contrasts = {
            "early": [(1.0, early_N)],
            "late": [(1.0, late_N)],
            "growth": [(1.0, late_N), (-1.0, early_N)],
            "doubling": [(1.0, late_N), (-2.0, early_N)],
        }
        found["models"][name] = {
            what: contrast_over_documents(gap_N, documents_N, parts).to_dict() for what, parts in contrasts.items()
        }
    return found


def _recall(text: _Text, masks: Mapping[str, Tensor], name: str) -> dict[str, Any] | None:
    """How a student fares where the evidence is beyond its window; None without such tokens.

    `over_inside`: loss above the teacher's, less that where the evidence is inside. `over_all`: less that of all.
    `share`: how much of what its window alone loses there, against the teacher, the linear branch wins back; None where
    the window cannot run alone or loses nothing.
    """
    far_N = masks["beyond"]
    if not far_N.any() or not masks["inside"].any():
        return None
    gap_N, documents_N = text.gap(name), text.scores.documents
    over = {"over_all": torch.ones_like(far_N), "over_inside": masks["inside"]}
    found: dict[str, Any] = {
        what: contrast_over_documents(gap_N, documents_N, [(1.0, far_N), (-1.0, mask_N)]).to_dict()
        for what, mask_N in over.items()
    }
    found["share"] = None
    if _alone(name) in text.scores.loss:
        lost_N = text.gap(_alone(name))
        lost = mean_over_documents(lost_N[far_N], documents_N[far_N])
        if lost.interval is not None and lost.interval[0] > 0:
            won_N = lost_N - gap_N
            found["share"] = ratio_over_documents(won_N[far_N], lost_N[far_N], documents_N[far_N]).to_dict()
    return found
