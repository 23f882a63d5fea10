"""What a judge says of all answers: MT-Bench ratings and pairs, AlpacaEval preferences; many requests at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from linearize.evaluation.chat import alpaca, mt_bench
from linearize.evaluation.chat.answers import Answers
from linearize.evaluation.chat.data import Instruction, Question
from linearize.evaluation.chat.journal import Record, file_name
from linearize.evaluation.chat.judge import Judge, Message
from linearize.evaluation.chat.summary import alpaca_summary, pair_summary, score_difference, scores_summary

T = TypeVar("T")
Progress = Callable[[str, int, int], None]


def each(
    items: Sequence[T], do: Callable[[T], Record], workers: int, progress: Callable[[int, int], None]
) -> list[Record]:
    """`do` of all items, `workers` at a time; the first error ends it, after what is under way."""
    pool = ThreadPoolExecutor(max_workers=workers)
    try:
        futures = [pool.submit(do, item) for item in items]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            progress(done, len(items))
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def judge_mt_bench(
    questions: Sequence[Question],
    answers: Sequence[Answers],
    judge: Judge,
    prompts: mt_bench.Prompts,
    *,
    root: Path | None,
    workers: int,
    pairwise: bool,
    has_teacher: bool,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """By model: `scores`, and for students `score_difference` and `against_teacher`. The first of `answers` is the
    teacher's if there is one."""
    singles = list(mt_bench.matches(questions, answers, pairs=False))
    pairs = list(mt_bench.matches(questions, answers, pairs=True)) if pairwise and has_teacher else []
    rated = _judged("MT-Bench ratings", singles, judge, prompts, root, workers, progress)
    compared = _judged("MT-Bench pairs", pairs, judge, prompts, root, workers, progress)
    by_model = {a.eval_model: [r for r in rated if r["model"] == a.eval_model] for a in answers}
    found: dict[str, dict[str, Any]] = {}
    for name, own in by_model.items():
        found[name] = {"scores": scores_summary(own, questions)}
        if has_teacher and name != answers[0].eval_model:
            found[name]["score_difference"] = score_difference(own, by_model[answers[0].eval_model])
            if pairs:
                found[name]["against_teacher"] = pair_summary(r for r in compared if r["model_1"] == name)
    return found


def _judged(
    what: str,
    wanted: Sequence[mt_bench.Match],
    judge: Judge,
    prompts: mt_bench.Prompts,
    root: Path | None,
    workers: int,
    progress: Progress,
) -> list[Record]:
    if not wanted:
        return []
    judgments = mt_bench.Judgments(root, judge, prompts, wanted)
    return each(wanted, judgments.judge_one, workers, partial(progress, what))


def judge_alpaca(
    found: Sequence[Instruction],
    answers: Sequence[Answers],
    judge: Judge,
    prompt: Sequence[Message],
    *,
    root: Path | None,
    workers: int,
    seed: int,
    has_teacher: bool,
    progress: Progress,
) -> dict[str, dict[str, Any]]:
    """By model: `judged`. Also `root/alpaca_eval/NAME/JUDGE/annotations.json`."""
    against = alpaca.baseline(found, answers[0] if has_teacher else None)
    if against is None:
        return {}
    generator, outputs = against
    numbers: dict[str, dict[str, Any]] = {}
    for own in (a for a in answers if a.eval_model != generator):
        texts = {record["question"]: record["turns"][0]["text"] for record in own.records}
        names = (generator, own.eval_model)

        def do(i: Instruction, texts: dict[str, str] = texts, names: tuple[str, str] = names) -> Record:
            return alpaca.annotate(i, (outputs[i.text], texts[i.text]), names, judge, prompt, seed)

        annotations = each(found, do, workers, partial(progress, f"AlpacaEval: {own.eval_model}"))
        where = (file_name(own.eval_model), file_name(judge.config.model), "annotations.json")
        alpaca.write_list(root, where, annotations)
        numbers[own.eval_model] = {"judged": alpaca_summary(annotations, generator)}
    return numbers
