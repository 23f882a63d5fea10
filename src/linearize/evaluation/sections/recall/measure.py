"""Recall: facts hidden in long text and asked for at its end, the same questions for teacher and students.

A needle in a haystack (length x depth), a pass key in repeated noise (length), several of many facts asked one after
the other (multi-query associative recall, Arora et al. 2023, in sentences), one of several needles and all codes of one
thing (multi-key and multi-value needles, RULER, 2404.06654).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, EvalModel, Numbers, Section, SectionView, Stat
from linearize.evaluation.haystack import (
    CODE,
    PASS_KEY,
    Hay,
    HiddenFact,
    Ruler,
    association_questions,
    multikey_question,
    multivalue_question,
    needle_question,
    passkey_question,
)
from linearize.evaluation.needles import COLOURS, OBJECTS
from linearize.evaluation.recall import answer_greedily, full_forward
from linearize.evaluation.sections.recall.numbers import (
    Answer,
    Answers,
    FactNumbers,
    RecallNumbers,
    TestName,
    recall_numbers,
)
from linearize.evaluation.sections.recall.present import headline, present

APART = 100
"""Tokens of a text for each of several needles, at least; shorter texts do not have them."""

MORE = 3
"""Pass keys for each length, and questions for each number of facts, by the `items` of a needle's cell."""


class Recall(Section):
    """Needle, pass key and associative recall, by exact match of greedy answers generated through the cache.

    `lengths`: tokens of an item, its question and answer included; `depths`: share of the text before the needle;
    `items`: for each cell of the needle's grid; three times as many for each length of the pass key and each number of
    facts. `passkey`: what the noise hides, a pass key or the same fact as the needle (for models that only know that).
    `keys`: numbers of facts in one document, with a quarter of the longest length in tokens of held-out text;
    `queries`: how many of them are asked, at most. `needles`: codes of different things in a text of which one is asked
    for, and `values`: codes of one thing that are all asked for, `items` texts at each length that holds 100 tokens for
    each (0: no such test).
    """

    NAME: ClassVar[str] = "recall"
    TITLE: ClassVar[str] = "Recall from far back"

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    items: int = Field(default=6, ge=1)
    passkey: Literal["passkey", "needle"] = "passkey"
    keys: tuple[int, ...] = (1, 4, 8, 16)
    queries: int = Field(default=4, ge=1)
    needles: int = Field(default=4, ge=0)
    values: int = Field(default=2, ge=0)

    def check(self, ctx: EvalContext) -> None:
        """Raises InputError for lengths, depths or keys out of range, and for text without a sentence."""
        if not self.lengths or min(self.lengths) < 1:
            raise InputError(f"recall: lengths are {list(self.lengths)}: give at least one, in tokens above 0")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise InputError(f"recall: depths are {list(self.depths)}: give shares of the text from 0 to 1")
        most = len(CODE.things)
        if not self.keys or not all(1 <= keys <= most for keys in self.keys):
            raise InputError(f"recall: keys are {list(self.keys)}: allowed are 1 to {most} facts in a document")
        if max(self.needles, self.values) > min(len(COLOURS), len(OBJECTS)):
            raise InputError(f"recall: needles and values are {self.needles} and {self.values}: give at most 10")
        Hay(ctx.texts)
        for eval_model in ctx.models:
            _check_positions(eval_model, max(self.lengths))

    def run(self, ctx: EvalContext) -> Numbers:
        """Every model answers every item."""
        tests = self.questions(ctx)
        total = sum(map(len, tests.values())) * len(ctx.models)
        answers: dict[str, dict[TestName, list[Answer]]] = {}
        done = 0
        for eval_model in ctx.models:
            own = answers.setdefault(eval_model.name, {})
            for test, questions in tests.items():
                own[test] = []
                for group in sorted({question.group for question in questions}):
                    part = [question for question in questions if question.group == group]
                    own[test] += _kept_answers(ctx, eval_model, test, part)
                    done += len(part)
                    ctx.progress(f"recall: {eval_model.name}", done, total)
        teacher = answers.get(ctx.teacher.name) if ctx.teacher else None
        return RecallNumbers(
            tests={test: [FactNumbers.of(question) for question in questions] for test, questions in tests.items()},
            models={m.name: recall_numbers(m, tests, answers[m.name], teacher) for m in ctx.models},
        ).to_json()

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        return present(RecallNumbers.model_validate(numbers))

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        return headline(RecallNumbers.model_validate(numbers))

    def questions(self, ctx: EvalContext) -> dict[TestName, list[HiddenFact]]:
        """The items of each test, by group; each is drawn from the seed and its own place alone."""
        ruler, hay = Ruler(ctx.tokenizer), Hay(ctx.texts)
        passkey = PASS_KEY if self.passkey == "passkey" else CODE

        def rng(*place: object) -> random.Random:
            return random.Random(f"{ctx.seed} {place}")

        lengths = sorted(set(self.lengths))
        tests: dict[TestName, list[HiddenFact]] = {
            "needle": [
                needle_question(ruler, hay, rng("needle", length, depth, i), length=length, depth=depth)
                for length in lengths for depth in sorted(set(self.depths)) for i in range(self.items)
            ],
            "passkey": [
                passkey_question(ruler, passkey, rng("passkey", length, i), length=length)
                for length in lengths for i in range(MORE * self.items)
            ],
            "keys": [
                question
                for keys in sorted(set(self.keys)) for question in self._associations(ctx.seed, ruler, hay, keys)
            ],
            "multikey": [
                multikey_question(ruler, hay, rng("multikey", length, i), length=length, keys=self.needles)
                for length in lengths for i in range(self.items) if length >= APART * self.needles > 0
            ],
            "multivalue": [
                multivalue_question(ruler, hay, rng("multivalue", length, i), length=length, values=self.values)
                for length in lengths for i in range(self.items) if length >= APART * self.values > 0
            ],
        }  # fmt: skip
        return {test: questions for test, questions in tests.items() if questions}

    def _associations(self, seed: int, ruler: Ruler, hay: Hay, keys: int) -> list[HiddenFact]:
        """Documents with `keys` facts each, until there are enough questions."""
        questions: list[HiddenFact] = []
        while len(questions) < MORE * self.items:
            questions += association_questions(
                ruler, hay, random.Random(f"{seed} keys {keys} {len(questions)}"),
                keys=keys, queries=self.queries, hay_tokens=max(1, max(self.lengths) // 4),
            )  # fmt: skip
        return questions[: MORE * self.items]


def _kept_answers(ctx: EvalContext, eval_model: EvalModel, test: str, questions: Sequence[HiddenFact]) -> list[Answer]:
    """The answers to one group of items, measured once: the key holds the very prompts."""
    prompts = hashlib.sha256("\0".join(f"{q.prompt}\0{q.answer}" for q in questions).encode()).hexdigest()
    rows = max(1, min(ctx.batch, ctx.batch * ctx.length // max(question.tokens for question in questions)))
    key = {
        "section": Recall.NAME, "test": test, "group": questions[0].group, "prompts": prompts, "batch": rows,
        "model": eval_model.fingerprint, "name": eval_model.name,
    }  # fmt: skip
    return ctx.results.numbers(Answers, key, partial(_answers, eval_model, questions, rows)).answers


def _answers(eval_model: EvalModel, questions: Sequence[HiddenFact], rows: int) -> Answers:
    model, tokenizer = eval_model.model, eval_model.tokenizer
    answers: list[Answer] = []
    for start in range(0, len(questions), rows):
        batch = questions[start : start + rows]
        for question, generated in zip(batch, answer_greedily(model, tokenizer, batch), strict=True):
            full = full_forward(model, tokenizer, question, generated)
            answer = Answer(text=generated.text, correct=generated.correct, right=full.right, agrees=full.agrees)
            answers.append(answer)
    return Answers(answers=answers)


def _check_positions(eval_model: EvalModel, longest: int) -> None:
    """Raise InputError for lengths that a table of learned positions does not have."""
    model: PreTrainedModel = eval_model.model
    for name, module in model.named_modules():
        learned = isinstance(module, nn.Embedding) and name.rsplit(".", 1)[-1] in ("wpe", "embed_positions")
        if learned and longest > module.num_embeddings:
            raise InputError(
                f"recall: lengths go up to {longest} tokens and {eval_model.name} has a table of "
                f"{module.num_embeddings} positions; give shorter lengths"
            )
