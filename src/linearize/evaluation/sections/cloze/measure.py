"""The gap between scoring and generation: last-word cloze, the same items scored as choices and written freely.

Log-likelihood scores among choices hide damage that free generation shows (2603.26556: 0.2 points behind when scored,
20.8 when generating). For a faultless cache the greedily written tokens are those of the word exactly where each
token of the word is the argmax of a full forward pass, so the two are compared item by item as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from pydantic import Field
from transformers import PreTrainedModel

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, EvalModel, Numbers, Section, SectionView, Stat
from linearize.evaluation.numbers import DifferenceNumbers, ShareNumbers
from linearize.evaluation.sections.cloze import present
from linearize.evaluation.sections.cloze.answers import SPARE_TOKENS, word_answers
from linearize.evaluation.sections.cloze.items import ClozeItem, cut_items
from linearize.evaluation.sections.cloze.numbers import ClozeExample, ClozeNumbers, ExampleAnswer, ModelCloze
from linearize.metrics.intervals import Proportion, paired_difference

FEWEST = 8
EXAMPLES = 6


class Cloze(Section):
    """Last words of sentences, scored against `choices` - 1 other words and generated.

    `items`: how many at most; `min_words`, `max_words`: of the text before the word; texts are those of the context.
    """

    NAME: ClassVar[str] = "cloze"
    TITLE: ClassVar[str] = "Scoring against generation"

    items: int = Field(default=400, ge=FEWEST)
    choices: int = Field(default=4, ge=2)
    min_words: int = Field(default=24, ge=1)
    max_words: int = Field(default=256, ge=1)

    def check(self, ctx: EvalContext) -> None:
        """Raises InputError where the text has too few sentences to cut items from."""
        if self.max_words < self.min_words:
            raise InputError(f"cloze: max_words {self.max_words} is below min_words {self.min_words}")
        if len(found := self._cut(ctx)) < FEWEST:
            raise InputError(
                f"cloze: {len(found)} items in the text, at least {FEWEST} are needed (a sentence that ends in a word "
                f"after {self.min_words} words or more of the same document); give more or longer text"
            )

    def _cut(self, ctx: EvalContext) -> list[ClozeItem]:
        room = min([ctx.length, *filter(None, (_context(c.model) for c in ctx.models))])
        return cut_items(
            ctx.texts, ctx.tokenizer, items=self.items, choices=self.choices, min_words=self.min_words,
            max_words=self.max_words, max_tokens=room - SPARE_TOKENS, seed=ctx.seed,
        )  # fmt: skip

    def run(self, ctx: EvalContext) -> Numbers:
        """Both ways, model by model."""
        items = self._cut(ctx)
        digest = hashlib.sha256(repr(items).encode()).hexdigest()
        answers: dict[str, dict[str, Any]] = {}
        for eval_model in ctx.models:
            key: dict[str, Any] = {
                "section": self.NAME,
                "model": eval_model.fingerprint,
                "name": eval_model.name,
                "items": digest,
            }
            key |= {"batch": ctx.batch}
            answers[eval_model.name] = ctx.results.result(key, partial(_answers, eval_model, items, ctx))
        return ClozeNumbers(
            items=len(items),
            choices=self.choices,
            tokens=sum(len(item.choice_ids[0]) for item in items) / max(len(items), 1),
            models={c.name: _numbers(c, answers, ctx.teacher) for c in ctx.models},
            examples=_examples(items, answers),
        ).to_json()

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        """Return a table, a plot, findings, and some items."""
        return present.present(ClozeNumbers.model_validate(numbers))

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, list[Stat]]:
        """Return the share of words that each student writes, next to the teacher's."""
        return present.headline(ClozeNumbers.model_validate(numbers))


def _answers(eval_model: EvalModel, items: Sequence[ClozeItem], ctx: EvalContext) -> dict[str, Any]:
    return word_answers(
        eval_model.model,
        eval_model.tokenizer,
        items,
        batch=ctx.batch,
        told=partial(ctx.progress, f"cloze: {eval_model.name}"),
    )


def _numbers(eval_model: EvalModel, answers: Mapping[str, Mapping[str, Any]], teacher: EvalModel | None) -> ModelCloze:
    """Return the shares of one model; for a student what it lost of the teacher's, and the gap between both losses."""
    own = answers[eval_model.name]
    differ = [a != b for a, b in zip(own["same_tokens"], own["greedy"], strict=True)]
    ties = [d and margin < own["tie"] for d, margin in zip(differ, own["margin"], strict=True)]
    lost: dict[str, DifferenceNumbers] = {}
    if teacher is not None and teacher.name != eval_model.name:
        first = answers[teacher.name]
        ways = ("scored", "generated")
        by_item = {way: [a - b for a, b in zip(first[way], own[way], strict=True)] for way in ways}
        lost = {f"{way}_drop": _difference(first[way], own[way]) for way in ways}
        lost["gap"] = _difference(by_item["generated"], by_item["scored"])
    return ModelCloze(
        role=eval_model.role,
        scored=_share(own["scored"]),
        greedy=_share(own["greedy"]),
        generated=_share(own["generated"]),
        cache_differs=sum(differ) - sum(ties),
        ties=sum(ties),
        **lost,
    )


def _share(hits: Sequence[bool]) -> ShareNumbers:
    return ShareNumbers.model_validate(Proportion.of(hits).to_dict())


def _difference(first: Sequence[float], second: Sequence[float]) -> DifferenceNumbers:
    return DifferenceNumbers.model_validate(paired_difference(first, second).to_dict())


def _context(model: PreTrainedModel) -> int | None:
    """The longest text that the model's positions allow, where its config says."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def _examples(items: Sequence[ClozeItem], answers: Mapping[str, Mapping[str, Any]]) -> list[ClozeExample]:
    """Return the first items with what each model chose and wrote."""
    return [
        ClozeExample(
            context=" ".join(item.context.split()[-12:]),
            word=item.word,
            models={
                name: ExampleAnswer(chose=item.choices[own["choice"][i]], wrote=own["given"][i].strip())
                for name, own in answers.items()
            },
        )
        for i, item in enumerate(items[:EXAMPLES])
    ]
