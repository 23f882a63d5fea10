"""What is measured of a row of the SmolLM2 table: losses at two lengths, tasks, state and continuations; and what
`benchmarks.recall` measures of it.

Losses are in nats per token, on text that no row was trained or tuned on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import BaseModel, Field

from linearize.decoding.loading import load_any
from linearize.evaluation.run import EvaluationOptions, evaluate
from linearize.evaluation.sections.tasks.present import TasksNumbers
from linearize.metrics.intervals import mean_over_documents
from linearize.metrics.report import provenance
from linearize.metrics.token_scores import Batch, TokenScores, View, score_batches
from linearize.modeling.inspect import inspect_model
from linearize.modeling.io.teacher import load_tokenizer
from linearize.training.data.documents import Document
from linearize.training.data.loading import load_documents
from linearize.training.data.packing import document_rows

TASKS, RECALL = Path(__file__).parent / "tasks", Path(__file__).parent / "recall"
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
    """A task's score, and the share of its items that the shortest window of the rows measured together holds whole."""

    score: float
    error: float | None
    items: int
    inside_window: float | None


class RowNumbers(BaseModel):
    """All that was measured of a row; `losses` by length.

    `provenance` is that of the losses, `tasks_provenance` that of tasks measured in another run."""

    name: str
    losses: dict[int, Losses]
    state_bytes: int
    stages: list[StageNumbers]
    tasks: dict[str, TaskNumbers]
    continuations: list[str]
    provenance: dict[str, Any]
    tasks_provenance: dict[str, Any] | None = None


class Variant(BaseModel):
    """Recall of a row, or of a row with an exact store or retrieval heads: right answers and items by test and length,
    losses by length, bytes in bf16 and decode times by dtype at 4,096 tokens of context.

    `provenance` is that of the answers and losses, `decode_provenance` that of the times."""

    name: str
    recall: dict[str, dict[int, tuple[int, int]]] = Field(default_factory=dict)
    losses: dict[int, Losses] = Field(default_factory=dict)
    state_bytes: int | None = None
    decode_seconds: dict[str, float] = Field(default_factory=dict)
    groups_kept: int = 0
    provenance: dict[str, Any] = Field(default_factory=dict)
    decode_provenance: dict[str, Any] = Field(default_factory=dict)


Language = tuple[dict[int, Losses], list[str]]
"""Losses of a row by length, and what it writes after the prompts."""


def measure(
    name: str,
    folder: Path,
    options: argparse.Namespace,
    *,
    language: Language | None = None,
    scores: dict[str, TaskNumbers] | None = None,
) -> RowNumbers:
    """Losses and continuations (`language`), scores of tasks and state bytes of a row. What is None stays as an earlier
    run measured it, or is left out; so do losses at other lengths."""
    path = options.teacher if name == TEACHER else str(folder / name)
    file, earlier = folder / f"{name}.json", None
    if file.is_file():
        earlier = RowNumbers.model_validate_json(file.read_text(encoding="utf-8"))
    now = provenance(seed=0)
    tasks, tasks_provenance = ({}, None) if earlier is None else (earlier.tasks, earlier.tasks_provenance)
    if scores is not None:
        tasks, tasks_provenance = scores, now
    if language is not None:
        losses_at, written = ({} if earlier is None else earlier.losses) | language[0], language[1]
    elif earlier is not None:
        losses_at, written, now = earlier.losses, earlier.continuations, earlier.provenance
    else:
        losses_at, written = {}, []
    cache = inspect_model(path, contexts=[CACHE_CONTEXT])["cache"][0]
    return RowNumbers(
        name=name,
        losses=losses_at,
        state_bytes=cache["teacher_bytes" if name == TEACHER else "student_bytes"],
        stages=[] if name == TEACHER else _stages(folder / name),
        tasks=tasks,
        continuations=written,
        provenance=now,
        tasks_provenance=tasks_provenance,
    )


def _stages(folder: Path) -> list[StageNumbers]:
    """The stages of a student, after those of the student that it started from, where that is at hand: where it was,
    or in the same folder."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    recorded = [Path(stage["start"]) for stage in recipe["stages"] if stage.get("start")]
    starts = [start if start.is_dir() else folder.parent / start.name for start in recorded]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    earlier = [stage for start in starts if (start / "report.json").is_file() for stage in _stages(start)]
    return [*earlier, *(StageNumbers.model_validate(stage) for stage in report["stages"])]


def task_scores(names: Sequence[str], folder: Path, options: argparse.Namespace) -> dict[str, dict[str, TaskNumbers]]:
    """lm-eval's scores of rows, with one run of the teacher for all."""
    settings = EvaluationOptions(limit=options.limit, include_path=TASKS)
    students = [str(folder / name) for name in names if name != TEACHER]
    report = evaluate(
        students[0] if students else options.teacher,
        compare=students[1:],
        teacher=options.teacher if students else None,
        tasks=TASK_NAMES,
        options=settings,
        out=options.kept,
    )
    scores = TasksNumbers.model_validate(report.sections["tasks"]).models
    return {
        name: {
            task: TaskNumbers(score=row.score, error=row.stderr, items=row.n, inside_window=row.inside_window)
            for task, row in scores[name].items()
        }
        for name in names
    }


def languages(names: Sequence[str], folder: Path, options: argparse.Namespace) -> dict[str, Language]:
    """Losses and continuations of rows, with one pass of the teacher for all."""
    guide, tokenizer = load_any(options.teacher)
    students = {
        name: guide if name == TEACHER else load_any(options.teacher, adapter=str(folder / name))[0] for name in names
    }
    torch.set_flush_denormal(True)
    documents = load_documents(list(options.text), load_tokenizer(options.teacher))
    prompts = (*PROMPTS, book_prompt(documents, tokenizer))
    losses_at: dict[str, dict[int, Losses]] = {name: {} for name in names}
    for length in options.lengths:
        rows = first_rows(documents, length, max(1, options.loss_tokens // length), tokenizer.eos_token_id)
        views: dict[str, View] = {}
        for name in set(names) - {TEACHER}:
            views |= {f"{name} {view}": of for view, of in _views(students[name]).items()}
        loss, away = distances(guide, views, rows)
        for name in names:
            own = {view: away[f"{name} {view}"] for view in ("student", "window") if f"{name} {view}" in away}
            losses_at[name][length] = Losses(documents=len(rows), teacher=loss, **own)
    return {
        name: (losses_at[name], [continued(student, tokenizer, prompt) for prompt in prompts])
        for name, student in students.items()
    }


def first_rows(documents: Sequence[Document], length: int, count: int, pad: int) -> list[Batch]:
    """The first `length` tokens of the first `count` documents that have so many, one row to a batch."""
    long = [document for document in documents if len(document) >= length][:count]
    cut = [Document(document.tokens[:length], document.loss_mask[:length]) for document in long]
    return list(document_rows(cut, length, pad_token_id=pad).in_order(1))


def losses(teacher: Any, student: Any, rows: Sequence[Batch]) -> Losses:
    """The teacher's loss, and of a student and its window alone how far they are from it."""
    loss, away = distances(teacher, {} if student is None else _views(student), rows)
    return Losses(documents=len(rows), teacher=loss, **away)


def _views(student: Any) -> dict[str, View]:
    """A student, and its window alone where it has a linear branch beside it."""
    views = {"student": View(model=student)}
    mixers = [getattr(mixer, "inner", mixer) for mixer in student.config.mixers()]  # of retrieval heads: the others'
    if any(getattr(mixer, "name", None) == "lolcats" for mixer in mixers):
        views["window"] = View(model=student, branch="window")
    return views


def distances(teacher: Any, views: Mapping[str, View], rows: Sequence[Batch]) -> tuple[Mean, dict[str, Distance]]:
    """The teacher's loss, and how far from it each view is, with one pass of the teacher for all."""
    scores = score_batches(rows, {TEACHER: View(model=teacher), **views}, reference=TEACHER)
    late = scores.positions >= LATE
    away = {}
    for view in views:
        gap = scores.loss[view] - scores.loss[TEACHER]
        away[view] = Distance(
            gap=_mean(scores, gap),
            kl=_mean(scores, scores.kl[view]),
            top1=_mean(scores, scores.top1[view]),
            gap_beyond=float(gap[late].mean()) if late.any() else None,
        )
    return _mean(scores, scores.loss[TEACHER]), away


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
