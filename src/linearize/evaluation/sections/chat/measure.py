"""Chat: answers to MT-Bench and AlpacaEval in their official formats, judged at an OpenAI-compatible endpoint if given.

Files, under the evaluation's folder: `mt_bench/model_answer/NAME.jsonl` and
`mt_bench/model_judgment/JUDGE_{single,pair}.jsonl`, `alpaca_eval/NAME/model_outputs.json` and
`alpaca_eval/NAME/JUDGE/annotations.json`; and in `chat/` what a second run goes on from: answers with their lengths,
replies of the judge with their tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from linearize.errors import InputError
from linearize.evaluation.chat import alpaca, data, mt_bench
from linearize.evaluation.chat.answering import own_template
from linearize.evaluation.chat.answers import Answers
from linearize.evaluation.chat.data import Instruction, Question
from linearize.evaluation.chat.journal import Journal, file_name
from linearize.evaluation.chat.judge import Judge, JudgeConfig
from linearize.evaluation.chat.judging import judge_alpaca, judge_mt_bench
from linearize.evaluation.chat.summary import answers_summary, repeated_by_category
from linearize.evaluation.context import EvalContext, Numbers, Section, SectionView, Stat
from linearize.evaluation.sections.chat import present
from linearize.evaluation.sections.chat.present import TITLES

NO_ALPACA = f"AlpacaEval: no instructions; put alpaca_eval.json from {data.ALPACA} into DATA_ROOT/chat/alpaca_eval"
NO_PROMPT = (
    f"AlpacaEval: answers not judged; put the annotator's prompt from {data.ALPACA_PROMPT} into "
    "DATA_ROOT/chat/alpaca_eval/prompt.txt"
)
NO_BASELINE = "AlpacaEval: answers not judged; they need a teacher, or instructions with reference outputs"


class Chat(Section):
    """Answers of every model, and what a judge says of them.

    `questions`, `instructions`: at most so many of MT-Bench and AlpacaEval (None: all, or the evaluation's limit).
    `alpaca_file`: instructions in place of the official ones. `judge_parallel` requests at a time; one that fails is
    tried `judge_tries` times, `judge_wait` seconds before the second; a prompt whose reply cannot be read is asked
    `judge_asks` times.
    `price_in`, `price_out`: of a million tokens of the judge.
    """

    NAME: ClassVar[str] = "chat"
    TITLE: ClassVar[str] = "Chat"

    benchmarks: tuple[Literal["mt_bench", "alpaca_eval"], ...] = ("mt_bench", "alpaca_eval")
    max_new_tokens: int = Field(default=1024, ge=1)
    questions: int | None = Field(default=None, ge=1)
    instructions: int | None = Field(default=None, ge=1)
    alpaca_file: str | None = None
    alpaca_temperature: float = Field(default=0.7, ge=0)
    pairwise: bool = True
    judge_parallel: int = Field(default=4, ge=1)
    judge_tries: int = Field(default=6, ge=1)
    judge_asks: int = Field(default=3, ge=1)
    judge_wait: float = Field(default=1.0, ge=0)
    judge_timeout: float = Field(default=180.0, gt=0)
    price_in: float | None = Field(default=None, ge=0)
    price_out: float | None = Field(default=None, ge=0)

    @property
    def needs_text(self) -> bool:
        """No: it has its own questions."""
        return False

    def check(self, ctx: EvalContext) -> None:
        """Raise InputError for a missing file (and where to get it), or a judge that cannot be asked."""
        self._judge_config(ctx)
        questions, instructions, _ = self._items(ctx)
        if not questions and not instructions:
            raise InputError(f"chat has no questions: put those of MT-Bench from {data.FASTCHAT} into DATA_ROOT/chat")
        if ctx.judge_url is not None and questions:
            data.judge_prompts(_root(ctx))
            lacking = [q.id for q in questions if q.needs_reference and len(q.reference) < min(2, len(q.turns))]
            if lacking:
                raise InputError(
                    f"chat: no reference answers to questions {', '.join(map(str, lacking))}, which the judge needs; "
                    f"get mt_bench/reference_answer/gpt-4.jsonl from {data.FASTCHAT}"
                )
        if ctx.judge_url is not None and instructions:
            data.alpaca_prompt(ctx.data_root)

    def _items(self, ctx: EvalContext) -> tuple[list[Question], list[Instruction], list[str]]:
        """Questions, instructions, and a line on each that is left out."""
        notes, questions, instructions = [], [], []
        if "mt_bench" in self.benchmarks:
            try:
                questions = data.mt_bench_questions(_root(ctx), self.questions or ctx.limit)
            except InputError as error:
                if not ctx.skip_missing:
                    raise
                notes.append(f"MT-Bench: left out ({error})")
        if "alpaca_eval" in self.benchmarks:
            path = data.instructions_file(ctx.data_root, self.alpaca_file)
            if path is None:
                notes.append(NO_ALPACA)
            else:
                instructions = data.instructions(path, self.instructions or ctx.limit)
        return questions, instructions, notes

    def _judge_config(self, ctx: EvalContext) -> JudgeConfig | None:
        if (ctx.judge_url is None) != (ctx.judge_model is None):
            raise InputError("a judge needs both --judge-url and --judge-model")
        if ctx.judge_url is None or ctx.judge_model is None:
            return None
        return JudgeConfig(
            url=ctx.judge_url,
            model=ctx.judge_model,
            tries=self.judge_tries,
            wait=self.judge_wait,
            timeout=self.judge_timeout,
            asks=self.judge_asks,
        )

    def run(self, ctx: EvalContext) -> Numbers:
        """All answers first, model by model, then all judgments."""
        questions, instructions, notes = self._items(ctx)
        has_teacher = ctx.teacher is not None
        root = ctx.out or ctx.results.path("chat")
        held = self._answer(ctx, questions, instructions, root)
        models: dict[str, dict[str, Any]] = {c.name: {} for c in ctx.models}
        for benchmark, answers in held.items():
            for own in answers:
                found = {"answers": answers_summary(own, answers[0] if has_teacher else None)}
                if benchmark == mt_bench.NAME:
                    found["repeated"] = repeated_by_category(own, questions)
                models[own.eval_model][benchmark] = found
        config = self._judge_config(ctx)
        told = None if config is None else self._judge(ctx, config, questions, instructions, held, root, models, notes)
        return {
            "models": models,
            "students": [c.name for c in ctx.students],
            "judge": told,
            "notes": notes,
            "max_new_tokens": self.max_new_tokens,
            "template": own_template(ctx.tokenizer),
            "questions": len(questions),
            "instructions": len(instructions),
        }

    def _answer(
        self, ctx: EvalContext, questions: list[Question], instructions: list[Instruction], root: Path | None
    ) -> dict[str, list[Answers]]:
        held: dict[str, list[Answers]] = {}
        for eval_model in ctx.models:
            for benchmark in [
                name for name, items in ((mt_bench.NAME, questions), (alpaca.NAME, instructions)) if items
            ]:
                progress = partial(ctx.progress, f"{TITLES[benchmark]} answers: {eval_model.name}")
                size = {"max_new_tokens": self.max_new_tokens, "batch": ctx.batch}
                if benchmark == mt_bench.NAME:
                    own = mt_bench.answer(eval_model, questions, seed=ctx.seed, root=root, progress=progress, **size)
                else:
                    own = alpaca.answer(
                        eval_model, instructions, seed=ctx.seed, temperature=self.alpaca_temperature, root=root,
                        progress=progress, **size,
                    )  # fmt: skip
                held.setdefault(benchmark, []).append(own)
        return held

    def _judge(
        self,
        ctx: EvalContext,
        config: JudgeConfig,
        questions: list[Question],
        instructions: list[Instruction],
        held: Mapping[str, Sequence[Answers]],
        root: Path | None,
        models: dict[str, dict[str, Any]],
        notes: list[str],
    ) -> dict[str, Any]:
        """Adds what the judge says to `models`; returns what it took."""
        path = None if root is None else root / "chat" / f"judge-{file_name(config.model)}.jsonl"
        judge = Judge(config, Journal(path))
        has_teacher = ctx.teacher is not None
        said: list[tuple[str, dict[str, dict[str, Any]]]] = []
        if questions:
            prompts = data.judge_prompts(_root(ctx))
            found = judge_mt_bench(
                questions, held[mt_bench.NAME], judge, prompts, root=root, workers=self.judge_parallel,
                pairwise=self.pairwise, has_teacher=has_teacher, progress=ctx.progress,
            )  # fmt: skip
            said.append((mt_bench.NAME, found))
        prompt = data.alpaca_prompt(ctx.data_root) if instructions else None
        if instructions and prompt is None:
            notes.append(NO_PROMPT)
        if prompt is not None:
            found = judge_alpaca(
                instructions, held[alpaca.NAME], judge, prompt, root=root, workers=self.judge_parallel,
                seed=ctx.seed, has_teacher=has_teacher, progress=ctx.progress,
            )  # fmt: skip
            if not found:
                notes.append(NO_BASELINE)
            said.append((alpaca.NAME, found))
        for benchmark, by_model in said:
            for name, numbers in by_model.items():
                models[name][benchmark] |= numbers
        return {
            "model": config.model,
            **vars(judge.usage),
            "price_in": self.price_in,
            "price_out": self.price_out,
            "cost": judge.usage.cost(self.price_in, self.price_out),
        }

    @classmethod
    def present(cls, numbers: Numbers) -> SectionView:
        """Tables by category and of pairs, and of how the answers look."""
        return present.present(numbers)

    @classmethod
    def headline(cls, numbers: Numbers) -> Mapping[str, Sequence[Stat]]:
        """The rating, or without a judge how many answers loop."""
        return present.headline(numbers)


def _root(ctx: EvalContext) -> Path:
    if ctx.data_root is None:
        raise InputError(
            f"chat needs a folder of questions: put those of MT-Bench from {data.FASTCHAT} into DIR/chat and give "
            "--data-root DIR"
        )
    return ctx.data_root
