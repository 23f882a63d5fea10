"""Does the linear branch work? Window alone, linear branch alone, both; layer by layer; loss against context.

The known failure: in window + linear students the window does all the work, hidden by short benchmarks (2510.05901).

Letters: N tokens that count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, cached_property, partial
from typing import Any, ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from linearize.evaluation.cache_checks import CacheProbe, check
from linearize.evaluation.context import EvalContext, EvalModel, Numbers, Section, SectionView, Stat
from linearize.evaluation.numbers import MeanNumbers, N
from linearize.evaluation.sections.branches.context_loss import ContextText
from linearize.evaluation.sections.branches.numbers import (
    Ablation,
    BranchesNumbers,
    BranchLosses,
    ContextLoss,
    ContextNumbers,
    Decoded,
    LayerCost,
    ModelBranches,
)
from linearize.evaluation.sections.branches.present import headline, present
from linearize.metrics.branches import AblatedView, difference, longest_reach, share_won, two_branch_layers, without
from linearize.metrics.intervals import Mean, mean_over_documents
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
        """Ablate students with two branches, and measure loss against context for every model."""
        work = _Work(self, ctx)
        models = {}
        for done, eval_model in enumerate(ctx.models):
            ctx.progress(f"branches of {eval_model.name}", done, len(ctx.models))
            layers = two_branch_layers(eval_model.plan)
            models[eval_model.name] = ModelBranches(
                role=eval_model.role,
                mixers=eval_model.mixer_names,
                ablation=work.cached(Ablation, eval_model, "ablation", work.ablation) if layers else None,
                layers=work.layers(eval_model, layers) if self.per_layer else [],
                context=work.cached(ContextNumbers, eval_model, "context", work.context) if work.context_text else None,
            )
        return BranchesNumbers(models=models).to_json()

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        return present(BranchesNumbers.model_validate(numbers))

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        return headline(BranchesNumbers.model_validate(numbers))


class _Work:
    """One run: the texts, and the teacher's losses on them."""

    def __init__(self, section: Branches, ctx: EvalContext) -> None:
        self.section, self.ctx = section, ctx
        self.reach = max((longest_reach(m.plan) or 0 for m in ctx.models), default=0)

    def cached(self, kind: type[N], eval_model: EvalModel, part: str, measure: Callable[[EvalModel], N]) -> N:
        """Numbers of one measurement, made unless an earlier run did."""
        ctx = self.ctx
        key = {
            "section": self.section.NAME,
            "part": part,
            "config": self.section.model_dump(mode="json"),
            "models": [(m.name, m.fingerprint) for m in (eval_model, ctx.teacher) if m is not None],
            "setting": [ctx.length, ctx.seed, self.reach, sum(map(len, ctx.documents))],
        }
        return ctx.results.numbers(kind, key, lambda: measure(eval_model))

    def text(self, tokens: int) -> PackedRows:
        """Rows of about so many tokens, documents that are longer than every window first."""
        chosen: list[Document] = []
        for document in sorted(self.ctx.documents, key=lambda document: len(document) <= self.reach + 1):
            if chosen and sum(map(len, chosen)) >= tokens:
                break
            chosen.append(document)
        return self.ctx.rows_of(chosen)

    def scores(self, views: Mapping[str, View], rows: PackedRows) -> TokenScores:
        return score_batches(rows.in_order(self.ctx.batch), views)

    @cached_property
    def rows(self) -> PackedRows:
        return self.text(self.section.tokens)

    def teacher_of(self, eval_model: EvalModel) -> EvalModel | None:
        """The teacher that a model is compared with."""
        teacher = self.ctx.teacher
        return teacher if teacher is not None and teacher.name != eval_model.name else None

    @cached_property
    def teacher_loss(self) -> Tensor:
        """The teacher's losses [N] on `rows`."""
        assert self.ctx.teacher is not None
        return self.scores({"teacher": View(model=self.ctx.teacher.model)}, self.rows).loss["teacher"]

    def ablation(self, eval_model: EvalModel) -> Ablation:
        """Both branches, each alone, and the loss through the cache."""
        model, layers, reach = eval_model.model, two_branch_layers(eval_model.plan), longest_reach(eval_model.plan)
        assert reach is not None
        views = {
            "both": View(model=model),
            "window": AblatedView(model=model, only=without("linear", layers)),
            "linear": AblatedView(model=model, only=without("window", layers)),
        }
        scores = self.scores(views, self.rows)
        losses = dict(scores.loss)
        if self.teacher_of(eval_model):
            losses["teacher"] = self.teacher_loss
        far_N = scores.positions >= reach
        far = {name: loss_N[far_N] for name, loss_N in losses.items()}
        return Ablation(
            reach=reach,
            layers=layers,
            all=_losses(losses, scores.documents),
            beyond=_losses(far, scores.documents[far_N]) if far_N.any() else None,
            decoded=self._decoded(eval_model, reach),
        )

    def _decoded(self, eval_model: EvalModel, reach: int) -> Decoded | None:
        """The loss with both branches where the last tokens of a text come one by one through the cache."""
        tokens = max(self.section.decode_tokens, 2 * reach + 9)
        document = max(self.ctx.documents, key=lambda d: min(len(d), tokens))
        row = torch.tensor(document.tokens[: min(tokens, self.ctx.length)])
        if len(row) < 8:
            return None
        deviation = check("decode", CacheProbe(eval_model.model.eval(), [row], len(row) // 2))
        return Decoded(**asdict(deviation), dtype=eval_model.dtype)

    def layers(self, eval_model: EvalModel, layers: Sequence[int]) -> list[LayerCost]:
        """What turning off one branch of one layer costs, on tokens beyond the window where there are any."""
        rows = self.text(self.section.layer_tokens)
        whole = cache(lambda: self.scores({"both": View(model=eval_model.model)}, rows))  # only if a layer is measured
        costs: list[LayerCost] = []
        for done, layer in enumerate(layers):
            self.ctx.progress(f"layers of {eval_model.name}", done, len(layers))
            measure = partial(self._layer, layer, rows, whole)
            costs.append(self.cached(LayerCost, eval_model, f"layer {layer}", measure))
        return costs

    def _layer(
        self, layer: int, rows: PackedRows, scores: Callable[[], TokenScores], eval_model: EvalModel
    ) -> LayerCost:
        whole = scores()
        far_N = whole.positions >= (longest_reach(eval_model.plan) or 0)
        far_N = far_N if far_N.any() else ~far_N
        views: dict[str, View] = {
            "linear": AblatedView(model=eval_model.model, only=without("linear", [layer])),
            "window": AblatedView(model=eval_model.model, only=without("window", [layer])),
        }
        loss = self.scores(views, rows).loss
        costs = {
            name: MeanNumbers.of(difference(loss_N[far_N], whole.loss["both"][far_N], whole.documents[far_N]))
            for name, loss_N in loss.items()
        }
        return LayerCost(
            layer=layer, tokens=int(far_N.sum()), without_linear=costs["linear"], without_window=costs["window"]
        )

    @cached_property
    def context_text(self) -> ContextText | None:
        """None where the text is too short for two contexts."""
        section, ctx, bos = self.section, self.ctx, self.ctx.tokenizer.bos_token_id
        return ContextText.choose(
            ctx.documents, section.contexts, length=ctx.length, tokens=section.context_tokens,
            bos=bos if isinstance(bos, int) else None,
        )  # fmt: skip

    @cached_property
    def teacher_contexts(self) -> list[Tensor]:
        """The teacher's losses [N] with each context, the whole document last."""
        assert self.ctx.teacher is not None
        return self._contexts(self.ctx.teacher)

    def _contexts(self, eval_model: EvalModel) -> list[Tensor]:
        assert self.context_text is not None
        view, tokens = View(model=eval_model.model), self.ctx.batch * self.ctx.length
        return [self.context_text.losses(view, size, tokens=tokens) for size in (*self.context_text.sizes, None)]

    def context(self, eval_model: EvalModel) -> ContextNumbers:
        """Loss against context."""
        text, teacher = self.context_text, self.teacher_of(eval_model)
        assert text is not None
        own = self.teacher_contexts if eval_model is self.ctx.teacher else self._contexts(eval_model)
        document_N, share = text.token_documents, None
        if teacher is not None:
            near_N, far_N = self.teacher_contexts[0], self.teacher_contexts[-1]
            share = share_won(near_N, near_N - (own[0] - own[-1]), far_N, document_N)
        means = [mean_over_documents(loss_N, document_N) for loss_N in own]
        return ContextNumbers(
            from_position=text.first,
            tokens=len(document_N),
            documents=len(text.documents),
            losses=[
                ContextLoss(size=size, value=mean.value, error=mean.error)
                for size, mean in zip([*text.sizes, None], means, strict=True)
            ],
            gain=MeanNumbers.of(difference(own[0], own[-1], document_N)),
            share_of_gain=_optional(share),
        )


def _losses(loss: Mapping[str, Tensor], document_N: Tensor) -> BranchLosses:
    """Mean losses, what is won back, and what the window brings."""
    both_N, window_N, linear_N = loss["both"], loss["window"], loss["linear"]
    against: dict[str, Any] = {}
    if "teacher" in loss:
        against["lost"] = MeanNumbers.of(difference(window_N, loss["teacher"], document_N))
        against["share"] = _optional(share_won(window_N, both_N, loss["teacher"], document_N))
    return BranchLosses(
        **{name: MeanNumbers.of(mean_over_documents(loss_N, document_N)) for name, loss_N in loss.items()},
        tokens=len(document_N),
        documents=len(document_N.unique()),
        won=MeanNumbers.of(difference(window_N, both_N, document_N)),
        window_brings=MeanNumbers.of(difference(linear_N, both_N, document_N)),
        **against,
    )


def _optional(mean: Mean | None) -> MeanNumbers | None:
    return None if mean is None else MeanNumbers.of(mean)
