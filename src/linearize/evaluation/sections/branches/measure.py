"""Does the linear branch work? Window alone, linear branch alone, both; layer by layer; loss against context.

The known failure: in window + linear students the window does all the work, hidden by short benchmarks (2510.05901).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from linearize.evaluation.cache_checks import CacheProbe, check
from linearize.evaluation.context import EvalContext, EvalModel, Numbers, Section, SectionView, Stat
from linearize.evaluation.sections.branches import present
from linearize.evaluation.sections.branches.context_loss import ContextText
from linearize.metrics.branches import (
    AblatedView,
    Without,
    clearly_positive,
    difference,
    longest_reach,
    share_won,
    two_branch_layers,
    without,
)
from linearize.metrics.intervals import mean_over_documents
from linearize.metrics.token_scores import TokenScores, View, score_batches
from linearize.training.data.documents import Document
from linearize.training.data.packing import PackedRows


class Branches(Section):
    """Ablation of the branches on held-out text, and what context is worth to each model.

    `tokens`, `layer_tokens`, `context_tokens`: of text, for the whole student, for each layer, and for each context;
    documents that are longer than the window come first. `contexts`: sizes in tokens, even. `decode_tokens`: of one
    text, also fed through the cache token by token (half of them as its prompt).
    """

    NAME: ClassVar[str] = "branches"
    TITLE: ClassVar[str] = "Does the memory work?"

    per_layer: bool = True
    tokens: int = Field(16_000, ge=100)
    layer_tokens: int = Field(5_000, ge=100)
    context_tokens: int = Field(5_000, ge=100)
    contexts: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048)
    decode_tokens: int = Field(160, ge=16)

    @field_validator("contexts")
    @classmethod
    def _even(cls, contexts: tuple[int, ...]) -> tuple[int, ...]:
        if any(size < 4 or size % 2 for size in contexts):
            raise ValueError(f"contexts {list(contexts)}: each must be even and at least 4 tokens")
        return tuple(sorted(set(contexts)))

    def run(self, ctx: EvalContext) -> Numbers:
        """Ablation for students with two branches, loss against context for every model."""
        work = _Work(self, ctx)
        models: Numbers = {}
        for done, eval_model in enumerate(ctx.models):
            ctx.progress(f"branches of {eval_model.name}", done, len(ctx.models))
            models[eval_model.name] = {
                "role": eval_model.role,
                "mixers": eval_model.mixer_names,
                "ablation": work.ablation(eval_model),
                "layers": work.layers(eval_model) if self.per_layer else [],
                "context": work.context(eval_model),
            }
        return {"models": models}

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        """Findings, tables and plots: see `present.py`."""
        return present.present(numbers)

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        """The share of what the window loses that the linear branch wins back, or what the context beyond is worth."""
        return present.headline(numbers)


class _Work:
    """One run: the texts, the teacher's losses, and what is kept."""

    def __init__(self, section: Branches, ctx: EvalContext) -> None:
        self.section, self.ctx = section, ctx
        self.reach = max((longest_reach(c.plan) or 0 for c in ctx.models), default=0)

    def kept(self, eval_model: EvalModel, part: str, measure: Callable[[], Any]) -> Any:
        """A part's numbers, measured unless an earlier run did."""
        ctx, teacher = self.ctx, self.ctx.teacher
        key = {
            "section": self.section.NAME,
            "part": part,
            "config": self.section.model_dump(mode="json"),
            "models": [(c.name, c.fingerprint) for c in (eval_model, teacher) if c is not None],
            "setting": [ctx.length, ctx.seed, self.reach, sum(map(len, ctx.documents))],
        }
        return ctx.results.result(key, measure)

    def text(self, tokens: int) -> PackedRows:
        """Rows of about so many tokens, documents that are longer than every window first."""
        ctx = self.ctx
        longer = [d for d in ctx.documents if len(d) > self.reach + 1]
        shorter = [d for d in ctx.documents if len(d) <= self.reach + 1]
        return ctx.rows_of(_first([*longer, *shorter], tokens))

    def scores(self, views: Mapping[str, View], rows: PackedRows) -> TokenScores:
        return score_batches(rows.in_order(self.ctx.batch), views)

    @cached_property
    def rows(self) -> PackedRows:
        return self.text(self.section.tokens)

    @cached_property
    def layer_rows(self) -> PackedRows:
        return self.text(self.section.layer_tokens)

    @cached_property
    def teacher_loss(self) -> Tensor | None:
        """The teacher's losses [N] on `rows`."""
        teacher = self.ctx.teacher
        return None if teacher is None else self.scores({"t": View(model=teacher.model)}, self.rows).loss["t"]

    def ablation(self, eval_model: EvalModel) -> Numbers | None:
        """Both branches, each alone, and the loss through the cache; None without two branches in one layer."""
        return (
            self.kept(eval_model, "ablation", lambda: self._ablation(eval_model))
            if two_branch_layers(eval_model.plan)
            else None
        )

    def _ablation(self, eval_model: EvalModel) -> Numbers:
        model, found, own_reach = eval_model.model, two_branch_layers(eval_model.plan), longest_reach(eval_model.plan)
        assert own_reach is not None
        views = {
            "both": View(model=model),
            "window": AblatedView(model=model, only=without("linear", found)),
            "linear": AblatedView(model=model, only=without("window", found)),
        }
        scores = self.scores(views, self.rows)
        losses = dict(scores.loss)
        teacher = self.ctx.teacher
        if self.teacher_loss is not None and teacher is not None and teacher.name != eval_model.name:
            losses["teacher"] = self.teacher_loss
        beyond_N = scores.positions >= own_reach
        return {
            "reach": own_reach,
            "layers": found,
            "all": _losses(losses, scores.documents),
            "beyond": _losses({n: x[beyond_N] for n, x in losses.items()}, scores.documents[beyond_N])
            if beyond_N.any()
            else None,
            "decoded": self._decoded(eval_model, own_reach),
        }

    def _decoded(self, eval_model: EvalModel, own_reach: int) -> Numbers | None:
        """The loss with both branches where the last tokens of a text come one by one through the cache."""
        wanted = max(self.section.decode_tokens, 2 * own_reach + 9)
        document = max(self.ctx.documents, key=lambda d: min(len(d), wanted))
        row = torch.tensor(document.tokens[: min(wanted, self.ctx.length)])
        if len(row) < 8:
            return None
        found = check("decode", CacheProbe(eval_model.model.eval(), [row], len(row) // 2))
        return {**asdict(found), "dtype": str(eval_model.model.dtype).removeprefix("torch.")}

    def layers(self, eval_model: EvalModel) -> list[Numbers]:
        """What turning off one branch of one layer costs, on tokens beyond the window where there are any."""
        found: list[Numbers] = []
        base: list[TokenScores] = []
        for done, layer in enumerate(two_branch_layers(eval_model.plan)):
            self.ctx.progress(f"layers of {eval_model.name}", done, len(two_branch_layers(eval_model.plan)))
            found.append(self.kept(eval_model, f"layer {layer}", lambda i=layer: self._layer(eval_model, i, base)))  # type: ignore[misc]
        return found

    def _layer(self, eval_model: EvalModel, layer: int, base: list[TokenScores]) -> Numbers:
        """`base` keeps the scores of the whole student from layer to layer."""
        if not base:
            base.append(self.scores({"both": View(model=eval_model.model)}, self.layer_rows))
        whole, own_reach = base[0], longest_reach(eval_model.plan) or 0
        beyond_N = whole.positions >= own_reach
        beyond_N = beyond_N if beyond_N.any() else ~beyond_N
        branches: tuple[Without, ...] = ("linear", "window")
        views: dict[str, View] = {
            name: AblatedView(model=eval_model.model, only=without(name, [layer])) for name in branches
        }
        scores = self.scores(views, self.layer_rows)
        costs = {
            f"without_{name}": difference(
                scores.loss[name][beyond_N], whole.loss["both"][beyond_N], whole.documents[beyond_N]
            ).to_dict()
            for name in branches
        }
        return {"layer": layer, "tokens": int(beyond_N.sum()), **costs}

    @cached_property
    def context_text(self) -> ContextText | None:
        section, ctx = self.section, self.ctx
        bos = ctx.tokenizer.bos_token_id
        return ContextText.choose(
            ctx.documents, section.contexts, length=ctx.length, tokens=section.context_tokens,
            bos=bos if isinstance(bos, int) else None, one_per_row=ctx.one_per_row,
        )  # fmt: skip

    @cached_property
    def teacher_contexts(self) -> list[Tensor]:
        """The teacher's losses [N] with each context, the whole document last."""
        assert self.ctx.teacher is not None
        return self._contexts(self.ctx.teacher)

    def _contexts(self, eval_model: EvalModel) -> list[Tensor]:
        assert self.context_text is not None
        view, sizes = View(model=eval_model.model), [*self.context_text.sizes, None]
        return [self.context_text.losses(view, size, rows=self.ctx.batch) for size in sizes]

    def context(self, eval_model: EvalModel) -> Numbers | None:
        """Loss against context; None where the text is too short for two contexts."""
        if self.context_text is None:
            return None
        return self.kept(eval_model, "context", lambda: self._context(eval_model))

    def _context(self, eval_model: EvalModel) -> Numbers:
        text, teacher = self.context_text, self.ctx.teacher
        assert text is not None
        is_teacher = teacher is not None and teacher.name == eval_model.name
        own = self.teacher_contexts if is_teacher else self._contexts(eval_model)
        document_N = text.token_documents
        means = [mean_over_documents(x_N, document_N).to_dict() for x_N in own]
        share = None
        if teacher is not None and not is_teacher:
            far, near = self.teacher_contexts[0], self.teacher_contexts[-1]
            share = _share_of_gain(own[0] - own[-1], far - near, document_N)
        return {
            "from_position": text.first,
            "tokens": len(document_N),
            "documents": len(text.documents),
            "losses": [{"size": size, **mean} for size, mean in zip([*text.sizes, None], means, strict=True)],
            "gain": difference(own[0], own[-1], document_N).to_dict(),
            "share_of_gain": share,
        }


def _losses(loss: Mapping[str, Tensor], document_N: Tensor) -> Numbers:
    """Mean losses, what is won back, and what the window brings; each with its error over documents."""
    found: Numbers = {name: mean_over_documents(x_N, document_N).to_dict() for name, x_N in loss.items()}
    found["tokens"], found["documents"] = len(document_N), len(document_N.unique())
    found["won"] = difference(loss["window"], loss["both"], document_N).to_dict()
    found["window_brings"] = difference(loss["linear"], loss["both"], document_N).to_dict()
    if "teacher" in loss:
        found["lost"] = difference(loss["window"], loss["teacher"], document_N).to_dict()
        share = share_won(loss["window"], loss["both"], loss["teacher"], document_N)
        found["share"] = None if share is None else share.to_dict()
    return found


def _share_of_gain(own_N: Tensor, teacher_N: Tensor, document_N: Tensor) -> Numbers | None:
    """What of the teacher's gain from context a student has; None where the teacher gains nothing beyond noise."""
    zero_N = torch.zeros_like(teacher_N)
    if not clearly_positive(difference(teacher_N, zero_N, document_N)):
        return None
    share = share_won(teacher_N, teacher_N - own_N, zero_N, document_N)
    return None if share is None else share.to_dict()


def _first(documents: Sequence[Document], tokens: int) -> list[Document]:
    """The first documents of about so many tokens."""
    chosen: list[Document] = []
    for document in documents:
        if chosen and sum(map(len, chosen)) >= tokens:
            break
        chosen.append(document)
    return chosen
