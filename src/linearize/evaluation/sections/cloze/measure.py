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

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, EvalModel, Numbers, Section, SectionView, Stat, TooLittleTextError
from linearize.evaluation.numbers import DifferenceNumbers, ShareNumbers
from linearize.evaluation.sections.cloze.items import SPARE_TOKENS, ClozeItem, cut_items, word_answers
from linearize.evaluation.sections.cloze.present import (
    ClozeExample,
    ClozeNumbers,
    ComparedCloze,
    ExampleAnswer,
    ModelCloze,
    headline,
    present,
)

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
        if (items := len(self._cut(ctx))) < FEWEST:
            raise TooLittleTextError(
                f"cloze: {items} items in the text, at least {FEWEST} are needed (a sentence that ends in a word "
                f"after {self.min_words} words or more of the same document); give more or longer text"
            )

    def _cut(self, ctx: EvalContext) -> list[ClozeItem]:
        longest = min([ctx.length, *filter(None, (m.context for m in ctx.models))])
        return cut_items(
            ctx.texts, ctx.tokenizer, items=self.items, choices=self.choices, min_words=self.min_words,
            max_words=self.max_words, max_tokens=longest - SPARE_TOKENS, seed=ctx.seed,
        )  # fmt: skip

    def run(self, ctx: EvalContext) -> Numbers:
        """Score and generate, model by model."""
        items = self._cut(ctx)
        digest = hashlib.sha256(repr(items).encode()).hexdigest()
        answers: dict[str, Mapping[str, Any]] = {}
        for one in ctx.models:
            key = {
                "section": self.NAME, "model": one.fingerprint, "name": one.name, "items": digest, "batch": ctx.batch,
            }  # fmt: skip
            progress = partial(ctx.progress, f"cloze: {one.name}")
            measure = partial(word_answers, one.model, one.tokenizer, items, batch=ctx.batch, progress=progress)
            answers[one.name] = ctx.results.result(key, measure)
        return ClozeNumbers(
            items=len(items),
            choices=self.choices,
            tokens=sum(len(item.choice_ids[0]) for item in items) / max(len(items), 1),
            models={m.name: _numbers(m, answers, ctx.teacher) for m in ctx.models},
            examples=_examples(items, answers),
        ).to_json()

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        return present(ClozeNumbers.model_validate(numbers))

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        return headline(ClozeNumbers.model_validate(numbers))


def _numbers(eval_model: EvalModel, answers: Mapping[str, Mapping[str, Any]], teacher: EvalModel | None) -> ModelCloze:
    """The shares of one model; for a student what it lost of the teacher's, and the gap between both losses."""
    own = answers[eval_model.name]
    differ = [a != b for a, b in zip(own["same_tokens"], own["greedy"], strict=True)]
    ties = [d and margin < own["tie"] for d, margin in zip(differ, own["margin"], strict=True)]
    numbers = ModelCloze(
        role=eval_model.role,
        scored=ShareNumbers.of(own["scored"]),
        greedy=ShareNumbers.of(own["greedy"]),
        generated=ShareNumbers.of(own["generated"]),
        cache_differs=sum(differ) - sum(ties),
        ties=sum(ties),
    )
    if teacher is None or teacher.name == eval_model.name:
        return numbers
    first = answers[teacher.name]
    lost = {way: [a - b for a, b in zip(first[way], own[way], strict=True)] for way in ("scored", "generated")}
    return ComparedCloze(
        **dict(numbers),
        scored_drop=DifferenceNumbers.of(first["scored"], own["scored"]),
        generated_drop=DifferenceNumbers.of(first["generated"], own["generated"]),
        gap=DifferenceNumbers.of(lost["generated"], lost["scored"]),
    )


def _examples(items: Sequence[ClozeItem], answers: Mapping[str, Mapping[str, Any]]) -> list[ClozeExample]:
    """The first items with what each model chose and wrote."""
    return [
        ClozeExample(
            context=" ".join(item.context.split()[-12:]),
            word=item.word,
            models={
                name: ExampleAnswer(chose=item.choices[own["choice"][i]], wrote=own["written"][i].strip())
                for name, own in answers.items()
            },
        )
        for i, item in enumerate(items[:EXAMPLES])
    ]
