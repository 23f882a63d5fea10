"""Chat: answers to MT-Bench and AlpacaEval in their official formats, and a judge's verdicts where one is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from linearize.errors import InputError
from linearize.evaluation.context import EvalContext, Numbers, Section, SectionView, Stat
from linearize.evaluation.numbers import ResultCache
from linearize.evaluation.sections.chat.answering import answer_all
from linearize.evaluation.sections.chat.data import (
    FASTCHAT,
    Question,
    answer_row,
    file_name,
    read_questions,
    write_rows,
)
from linearize.evaluation.sections.chat.judge import Judge, Judgment, Texts, judge_tasks
from linearize.evaluation.sections.chat.present import (
    BenchmarkNumbers,
    ChatNumbers,
    benchmark_numbers,
    headline,
    judge_numbers,
    present,
)
from linearize.storage.journal import Journal


class Chat(Section):
    """Answers of every model, and what a judge says of them.

    `pairwise`: whether MT-Bench's judge also compares each student with the teacher. `judge_parallel`: requests at a
    time. `price_in`, `price_out`: of a million tokens of the judge.
    """

    NAME: ClassVar[str] = "chat"
    TITLE: ClassVar[str] = "Chat"
    NEEDS_TEXT: ClassVar[bool] = False

    max_new_tokens: int = Field(default=1024, ge=1)
    pairwise: bool = True
    judge_parallel: int = Field(default=4, ge=1)
    price_in: float | None = Field(default=None, ge=0)
    price_out: float | None = Field(default=None, ge=0)

    def check(self, ctx: EvalContext) -> None:
        """Raise InputError for a missing file (and where to get it), or a judge that cannot be asked."""
        judge = _judge(ctx, None)
        for questions in read_questions(_folder(ctx), ctx.limit).values():
            self._judged(ctx, judge, questions, {})

    def run(self, ctx: EvalContext) -> Numbers:
        """All answers to a benchmark, then all judgments of them."""
        out = ctx.out or ctx.results.path("chat")
        judge, teacher = _judge(ctx, out), None if ctx.teacher is None else ctx.teacher.name
        results = ResultCache(None if out is None else out / "chat")
        questions = read_questions(_folder(ctx), ctx.limit)
        numbers: dict[str, dict[str, BenchmarkNumbers]] = {}
        for name, items in questions.items():
            answers = {model.name: answer_all(ctx, model, items, self.max_new_tokens, results) for model in ctx.models}
            texts = {m: {q: [turn.text for turn in turns] for q, turns in own.items()} for m, own in answers.items()}
            write_rows(out, [answer_row(name, m, item, own[item.id]) for m, own in texts.items() for item in items])
            judgments = self._judged(ctx, judge, items, texts)
            write_rows(out, [judgment.row for judgment in judgments])
            numbers[name] = benchmark_numbers(answers, judgments, teacher)
        return ChatNumbers(
            models={model.name: {name: own[model.name] for name, own in numbers.items()} for model in ctx.models},
            students=[student.name for student in ctx.students],
            questions={name: len(items) for name, items in questions.items()},
            judge=None if judge is None else judge_numbers(judge, self.price_in, self.price_out),
            max_new_tokens=self.max_new_tokens,
            template=bool(ctx.tokenizer.chat_template),
        ).to_json()

    def _judged(self, ctx: EvalContext, judge: Judge | None, items: Sequence[Question], texts: Texts) -> list[Judgment]:
        """Judge all answers, some at a time; the first error ends it, after what is under way."""
        if judge is None:
            return []
        teacher = ctx.teacher.name if ctx.teacher is not None and self.pairwise else None
        tasks = judge_tasks(judge, _folder(ctx), items, texts, teacher, ctx.seed)
        judgments: list[Judgment] = []
        with ThreadPoolExecutor(self.judge_parallel) as pool:
            for judgment in pool.map(lambda task: task(), tasks):
                judgments.append(judgment)
                ctx.progress("judging answers", len(judgments), len(tasks))
        return judgments

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        return present(ChatNumbers.model_validate(numbers))

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        return headline(ChatNumbers.model_validate(numbers))


def _folder(ctx: EvalContext) -> Path:
    if ctx.data_root is None:
        raise InputError(f"chat needs questions: put MT-Bench's from {FASTCHAT} in DIR/chat and give --data-root DIR")
    return ctx.data_root / "chat"


def _judge(ctx: EvalContext, out: Path | None) -> Judge | None:
    if (ctx.judge_url is None) != (ctx.judge_model is None):
        raise InputError("a judge needs both --judge-url and --judge-model")
    if ctx.judge_url is None or ctx.judge_model is None:
        return None
    path = None if out is None else out / "chat" / f"judge-{file_name(ctx.judge_model)}.jsonl"
    return Judge(ctx.judge_url, ctx.judge_model, Journal(path, checksums=False, contents="the judge's replies"))
