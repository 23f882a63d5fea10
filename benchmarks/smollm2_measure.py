"""What is measured of a row of the SmolLM2 table: losses at two lengths, recall, tasks, state and continuations.

Losses are in nats per token, on text that no row was trained or tuned on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from linearize.decoding.loading import load_any
from linearize.evaluation.run import EvaluationOptions, evaluate
from linearize.evaluation.sections.recall import Recall
from linearize.evaluation.sections.recall.numbers import RecallNumbers
from linearize.evaluation.sections.tasks.present import TasksNumbers
from linearize.metrics.intervals import mean_over_documents
from linearize.metrics.report import provenance
from linearize.metrics.token_scores import Batch, TokenScores, View, score_batches
from linearize.modeling.inspect import inspect_model
from linearize.modeling.io.teacher import load_tokenizer
from linearize.training.data.documents import Document
from linearize.training.data.loading import load_documents
from linearize.training.data.packing import document_rows

TASKS = Path(__file__).parent / "tasks"
TASK_NAMES = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "lambada_openai")
TEACHER = "teacher"
LATE = 1024  # losses from this position on have a column of their own
CACHE_CONTEXT = 4096
PROMPTS = ("The train was late, and Anna", "Water boils at a lower temperature on a mountain because")
BOOK_TOKENS, WRITTEN = 1500, 40  # of the third prompt, the beginning of a held-out novel; of each answer


class Mean(BaseModel):
    """A mean over tokens and its standard error over documents (None for one document)."""

    value: float
    error: float | None


class Distance(BaseModel):
    """How far a student is from its teacher: loss and KL(teacher||student) in nats per token, the share of tokens with
    the same first choice, and the gap from position `LATE` on."""

    gap: Mean
    kl: Mean
    top1: Mean
    gap_beyond: float | None


class Losses(BaseModel):
    """Losses at one length. `window`: the student with its linear branch left out (None: it has none)."""

    documents: int
    teacher: Mean
    student: Distance | None = None
    window: Distance | None = None


class StageNumbers(BaseModel):
    """A stage as it was trained."""

    name: str
    tokens: int
    seconds: float


class TaskNumbers(BaseModel):
    """A task's score, and the share of its items that the student's window holds whole."""

    score: float
    error: float | None
    items: int
    inside_window: float | None


class RowNumbers(BaseModel):
    """All that was measured of a row; `losses` by length, `recall` by test and length (right answers, items)."""

    name: str
    losses: dict[int, Losses]
    state_bytes: int
    stages: list[StageNumbers]
    recall: dict[str, dict[int, tuple[int, int]]]
    tasks: dict[str, TaskNumbers]
    continuations: list[str]
    provenance: dict[str, Any]


def measure(name: str, folder: Path, options: argparse.Namespace) -> RowNumbers:
    """Losses, recall, tasks, state bytes and continuations of a row."""
    teacher, text = options.teacher, list(options.text)
    path = teacher if name == TEACHER else str(folder / name)
    guide, tokenizer = load_any(teacher)
    student = guide if name == TEACHER else load_any(teacher, adapter=path)[0]
    torch.set_flush_denormal(True)
    documents = load_documents(text, load_tokenizer(teacher))
    losses_at = {}
    for length in options.lengths:
        rows = first_rows(documents, length, max(1, options.loss_tokens // length), tokenizer.eos_token_id)
        losses_at[length] = losses(guide, None if name == TEACHER else student, rows)
    written = [continued(student, tokenizer, prompt) for prompt in (*PROMPTS, book_prompt(documents, tokenizer))]
    del guide, student
    cache = inspect_model(path, contexts=[CACHE_CONTEXT])["cache"][0]
    report = {} if name == TEACHER else json.loads((folder / name / "report.json").read_text(encoding="utf-8"))
    kept = {"teacher": teacher, "out": options.kept} if name != TEACHER else {"out": options.kept}
    recall: dict[str, dict[int, tuple[int, int]]] = {}
    tasks: dict[str, TaskNumbers] = {}
    if options.recall:
        section = Recall(
            lengths=tuple(options.recall), depths=(0.1, 0.5, 0.9), items=options.items, keys=(4,), values=0
        )
        recalled = RecallNumbers.model_validate(
            evaluate(path, sections=[section], data=text, **kept).sections["recall"]
        )
        own = recalled.models[TEACHER if name == TEACHER else list(recalled.models)[-1]]
        for test in ("passkey", "needle", "multikey"):
            for length in options.recall:
                cells = [cell for cell in own.test(test).cells if cell.length == length]
                hits, items = sum(cell.successes for cell in cells), sum(cell.n for cell in cells)
                recall.setdefault(test, {})[length] = (hits, items)
    if options.limit:
        settings = EvaluationOptions(limit=options.limit, include_path=TASKS)
        numbers = evaluate(path, tasks=TASK_NAMES, options=settings, **kept).sections["tasks"]
        scores = TasksNumbers.model_validate(numbers).models
        tasks = {
            task: TaskNumbers(score=row.score, error=row.stderr, items=row.n, inside_window=row.inside_window)
            for task, row in scores[TEACHER if name == TEACHER else list(scores)[-1]].items()
        }
    return RowNumbers(
        name=name,
        losses=losses_at,
        state_bytes=cache["teacher_bytes" if name == TEACHER else "student_bytes"],
        stages=[StageNumbers.model_validate(stage) for stage in report.get("stages", ())],
        recall=recall,
        tasks=tasks,
        continuations=written,
        provenance=provenance(seed=0),
    )


def first_rows(documents: Sequence[Document], length: int, count: int, pad: int) -> list[Batch]:
    """The first `length` tokens of the first `count` documents that have so many, one row to a batch."""
    long = [document for document in documents if len(document) >= length][:count]
    cut = [Document(document.tokens[:length], document.loss_mask[:length]) for document in long]
    return list(document_rows(cut, length, pad_token_id=pad).in_order(1))


def losses(teacher: Any, student: Any, rows: Sequence[Batch]) -> Losses:
    """The teacher's loss, and of a student and its window alone how far they are from it."""
    views = {TEACHER: View(model=teacher)}
    if student is not None:
        views["student"] = View(model=student)
        if any(getattr(mixer, "name", None) == "lolcats" for mixer in student.config.mixers()):
            views["window"] = View(model=student, branch="window")
    scores = score_batches(rows, views, reference=TEACHER)
    late = scores.positions >= LATE
    gaps = {}
    for view in list(views)[1:]:
        gap = scores.loss[view] - scores.loss[TEACHER]
        gaps[view] = Distance(
            gap=_mean(scores, gap),
            kl=_mean(scores, scores.kl[view]),
            top1=_mean(scores, scores.top1[view]),
            gap_beyond=float(gap[late].mean()) if late.any() else None,
        )
    return Losses(documents=len(rows), teacher=_mean(scores, scores.loss[TEACHER]), **gaps)


def book_prompt(documents: Sequence[Document], tokenizer: Any) -> str:
    """The first tokens of the first long document: a prompt that no window holds."""
    long = next((document for document in documents if len(document) > BOOK_TOKENS), documents[0])
    text: str = tokenizer.decode(long.tokens[:BOOK_TOKENS])
    return text


@torch.no_grad()
def continued(model: Any, tokenizer: Any, prompt: str) -> str:
    """What a model writes after a prompt, greedily."""
    inputs = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=WRITTEN, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    text: str = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
    return text


def _mean(scores: TokenScores, values: torch.Tensor) -> Mean:
    mean = mean_over_documents(values, scores.documents)
    return Mean(value=mean.value, error=mean.error)
