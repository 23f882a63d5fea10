"""Recall: facts hidden in long text and asked for at its end, the same questions for teacher and students.

Three tests: a needle in a haystack (length x depth), a pass key in repeated noise (length), and several of many facts
asked one after the other (multi-query associative recall, Arora et al. 2023, in sentences).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, EvalModel, Numbers, Section, SectionView, Stat
from linearize.evaluation.haystack import (
    CITY,
    CODE,
    PASS_KEY,
    Form,
    Hay,
    HiddenFact,
    Ruler,
    association_questions,
    needle_question,
    passkey_question,
)
from linearize.evaluation.recall import answer_greedily, full_forward
from linearize.evaluation.sections.recall.counts import Answer, described, measured
from linearize.evaluation.sections.recall.numbers import RecallNumbers, TestName
from linearize.evaluation.sections.recall.present import headline, present
from linearize.storage.files import expand_home

MORE = 3
"""Pass keys for each length, and questions for each number of facts, by the `items` of a needle's cell."""


class Recall(Section):
    """Needle, pass key and associative recall, by exact match of greedy answers generated through the cache.

    `lengths`: tokens of an item, its question and answer included; `depths`: share of the text before the needle;
    `items`: for each cell of the needle's grid; three times as many for each length of the pass key and each number of
    facts. `hay`: a text file, or a folder of them (None: the evaluation's held-out text). `needle`:
    how the fact is told (`code`: `The code of the red box is 4821.`; `city`: seven digits for a city; `custom`: your
    own `statement` with `{answer}` and `question`, the answer `answer` or random digits). `passkey`: what stands in the
    noise, a pass key or the same form as the needle (for models that only know that). `keys`: numbers of facts in
    one document of `keys_hay` tokens of hay (None: a quarter of the longest length); `queries`: how many of them are
    asked, at most.
    """

    NAME: ClassVar[str] = "recall"
    TITLE: ClassVar[str] = "Recall from far back"

    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    items: int = Field(default=6, ge=1)
    hay: str | None = None
    needle: Literal["code", "city", "custom"] = "code"
    statement: str | None = None
    question: str | None = None
    answer: str | None = None
    passkey: Literal["passkey", "needle"] = "passkey"
    keys: tuple[int, ...] = (1, 4, 8, 16)
    keys_hay: int | None = Field(default=None, ge=1)
    queries: int = Field(default=4, ge=1)

    @property
    def needs_text(self) -> bool:
        """As hay, where none is named."""
        return self.hay is None

    def check(self, ctx: EvalContext) -> None:
        """Lengths and depths in range, a needle that can be told and asked, hay that can be read."""
        if not self.lengths or min(self.lengths) < 1:
            raise InputError(f"recall: lengths are {list(self.lengths)}: give at least one, in tokens above 0")
        if not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise InputError(f"recall: depths are {list(self.depths)}: give shares of the text from 0 to 1")
        form = self._form()
        most = len(self._keys_form().things)
        if not self.keys or not all(1 <= keys <= most for keys in self.keys):
            raise InputError(f"recall: keys are {list(self.keys)}: allowed are 1 to {most} facts in a document")
        Hay(self._texts(ctx), form)
        for eval_model in ctx.models:
            _check_positions(eval_model, max(self.lengths))

    def run(self, ctx: EvalContext) -> Numbers:
        """Every model answers every item; shares, intervals, and each student against the teacher."""
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
            tests={test: [described(question) for question in found] for test, found in tests.items()},
            models={c.name: measured(c, tests, answers[c.name], teacher) for c in ctx.models},
        ).to_json()

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        """Return heat maps next to the teacher's, shares by length and by number of facts, and what they mean."""
        return present(RecallNumbers.model_validate(numbers))

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        """Return how much of what the teacher recalls the student recalls too."""
        return headline(RecallNumbers.model_validate(numbers))

    def questions(self, ctx: EvalContext) -> dict[TestName, list[HiddenFact]]:
        """The items of each test, by group; each is drawn from the seed and its own place alone."""
        ruler, form = Ruler(ctx.tokenizer), self._form()
        needle_hay, hay = Hay(self._texts(ctx), form), Hay(self._texts(ctx), self._keys_form())

        passkey = PASS_KEY if self.passkey == "passkey" else form

        def rng(*place: object) -> random.Random:
            return random.Random(f"{ctx.seed} {place}")

        return {
            "needle": [
                needle_question(ruler, needle_hay, form, rng("needle", length, depth, i), length=length, depth=depth)
                for length in sorted(set(self.lengths)) for depth in sorted(set(self.depths)) for i in range(self.items)
            ],
            "passkey": [
                passkey_question(ruler, passkey, rng("passkey", length, i), length=length)
                for length in sorted(set(self.lengths)) for i in range(MORE * self.items)
            ],
            "keys": [
                question
                for keys in sorted(set(self.keys)) for question in self._associations(ctx.seed, ruler, hay, keys)
            ],
        }  # fmt: skip

    def _associations(self, seed: int, ruler: Ruler, hay: Hay, keys: int) -> list[HiddenFact]:
        """Documents with `keys` facts each, until there are questions enough."""
        found: list[HiddenFact] = []
        while len(found) < MORE * self.items:
            found += association_questions(
                ruler, hay, self._keys_form(), random.Random(f"{seed} keys {keys} {len(found)}"),
                keys=keys, queries=self.queries, hay_tokens=self.keys_hay or max(1, max(self.lengths) // 4),
            )  # fmt: skip
        return found[: MORE * self.items]

    def _form(self) -> Form:
        """How the needle is told and asked for."""
        own = (self.statement, self.question, self.answer)
        if self.needle != "custom":
            if any(text is not None for text in own):
                raise InputError(f"recall: needle {self.needle!r} has its own words; for yours set needle to 'custom'")
            return CITY if self.needle == "city" else CODE
        if not self.statement or not self.question:
            raise InputError("recall: needle 'custom' needs a `statement` with {answer} in it and a `question`")
        if "{answer}" not in self.statement or "{" in self.statement.replace("{answer}", "") + self.question:
            raise InputError(
                f"recall: the statement {self.statement!r} must hold {{answer}}, and no other braces are allowed there "
                "or in the question"
            )
        return Form(statement=self.statement, question=self.question, answer=self.answer)

    def _keys_form(self) -> Form:
        return CITY if self.needle == "city" else CODE

    def _texts(self, ctx: EvalContext) -> Sequence[str]:
        """The texts to hide facts in."""
        if self.hay is None:
            if not ctx.texts:
                raise InputError("recall: there is no held-out text to hide facts in; set `hay` to a file or folder")
            return ctx.texts
        path = Path(expand_home(self.hay))
        files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise InputError(f"recall: hay {self.hay!r} is no text file and no folder of .txt files")
        return [file.read_text("utf-8", errors="replace") for file in files]


def _kept_answers(ctx: EvalContext, eval_model: EvalModel, test: str, questions: Sequence[HiddenFact]) -> list[Answer]:
    """The answers to one group of items, measured once: the key holds the very prompts."""
    prompts = hashlib.sha256("\0".join(f"{q.prompt}\0{q.answer}" for q in questions).encode()).hexdigest()
    rows = max(1, min(ctx.batch, ctx.batch * ctx.length // max(question.tokens for question in questions)))
    key = {
        "section": Recall.NAME, "test": test, "group": questions[0].group, "prompts": prompts, "batch": rows,
        "model": eval_model.fingerprint, "name": eval_model.name,
    }  # fmt: skip
    return list(ctx.results.result(key, partial(_answers, eval_model, questions, rows)))


def _answers(eval_model: EvalModel, questions: Sequence[HiddenFact], rows: int) -> list[Answer]:
    model, tokenizer = eval_model.model, eval_model.tokenizer
    found: list[Answer] = []
    for start in range(0, len(questions), rows):
        part = questions[start : start + rows]
        for question, given in zip(part, answer_greedily(model, tokenizer, part), strict=True):
            full = full_forward(model, tokenizer, question, given)
            found.append([given.text, given.correct, full.right, full.agrees])
    return found


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
