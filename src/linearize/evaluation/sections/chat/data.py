"""The official files of MT-Bench (2306.05685) and AlpacaEval (2404.04475): what is asked, and rows written."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from linearize.errors import InputError
from linearize.storage.atomic import atomic_write_text
from linearize.storage.files import read_text, well_formed
from linearize.training.data.files import file_rows

MT_BENCH, ALPACA = "mt_bench", "alpaca_eval"
TITLES = {MT_BENCH: "MT-Bench", ALPACA: "AlpacaEval"}
FASTCHAT = "https://github.com/lm-sys/FastChat/tree/main/fastchat/llm_judge/data"
ALPACA_DATA = "https://huggingface.co/datasets/tatsu-lab/alpaca_eval"
ALPACA_PROMPT = "https://github.com/tatsu-lab/alpaca_eval (evaluators_configs/alpaca_eval_clf_gpt4_turbo)"
NEED_REFERENCE = ("math", "reasoning", "coding")
"""Categories of MT-Bench that are judged with a reference answer (FastChat, common.py)."""
TEMPERATURES = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}
"""By category of MT-Bench (FastChat, common.py); all other questions are answered at 0.7."""

FileRow = tuple[str, dict[str, object]]
"""A file's name in the evaluation's folder, and a row of it."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation of MT-Bench or an instruction of AlpacaEval, whose id is its text.

    `turns`: the user's. `reference`: MT-Bench's reference answers, or the output of AlpacaEval's `generator`.
    """

    id: int | str
    category: str
    turns: tuple[str, ...]
    temperature: float = 0.7
    reference: tuple[str, ...] = ()
    generator: str = ""


def read_questions(folder: Path, limit: int | None) -> dict[str, list[Question]]:
    """The questions of each benchmark that is there, `limit` of each at equal distances (None: all).

    Raises InputError for a file that is not in the official format, or where there is none.
    """
    questions = {}
    for benchmark, read in ((MT_BENCH, _mt_bench), (ALPACA, _alpaca)):
        if every := read(folder / benchmark) if (folder / benchmark).is_dir() else []:
            number = min(limit or len(every), len(every))
            questions[benchmark] = [every[index * len(every) // number] for index in range(number)]
    if not questions:
        raise InputError(f"{folder}: has no questions; put mt_bench/question.jsonl from {FASTCHAT} there")
    return questions


def _mt_bench(folder: Path) -> list[Question]:
    rows = _rows(folder / "question.jsonl", FASTCHAT, "question_id", "category", "turns")
    answers = _rows(folder / "reference_answer" / "gpt-4.jsonl", FASTCHAT, "question_id", "choices")
    references = {row["question_id"]: tuple(row["choices"][0]["turns"]) for row in answers}
    return [
        Question(
            id=row["question_id"],
            category=row["category"],
            turns=tuple(row["turns"]),
            temperature=TEMPERATURES.get(row["category"], 0.7),
            reference=references.get(row["question_id"], ()) if row["category"] in NEED_REFERENCE else (),
        )
        for row in rows
    ]


def _alpaca(folder: Path) -> list[Question]:
    fields = ("instruction", "dataset", "output", "generator")
    rows = [[row[field] for field in fields] for row in _rows(folder / "alpaca_eval.json", ALPACA_DATA, *fields)]
    return [
        Question(id=text, category=dataset, turns=(text,), reference=(output,), generator=generator)
        for text, dataset, output, generator in rows
    ]


def mt_bench_prompts(folder: Path) -> dict[str, dict[str, str]]:
    """The judge's prompts by name. Raises InputError for a missing file."""
    rows = _rows(folder / "judge_prompts.jsonl", FASTCHAT, "name", "system_prompt", "prompt_template")
    return {row["name"]: row for row in rows}


def alpaca_prompt(folder: Path) -> list[dict[str, str]]:
    """The annotator's prompt, which is ChatML, as messages. Raises InputError."""
    path = folder / ALPACA / "prompt.txt"
    text = read_text(path) if path.is_file() else ""
    if missing := [mark for mark in ("<|im_start|>", "{instruction}", "{output_1}", "{output_2}") if mark not in text]:
        raise InputError(f"{path}: lacks {', '.join(missing)}; get it from {ALPACA_PROMPT}")
    parts = [part.split("<|im_end|>")[0].partition("\n") for part in text.split("<|im_start|>")[1:]]
    return [{"role": role.strip(), "content": content.strip()} for role, _, content in parts]


def file_name(name: str) -> str:
    """A model's name as a file name."""
    return quote(name, safe="")


def answer_row(benchmark: str, model: str, question: Question, texts: Sequence[str]) -> FileRow:
    """The answers to all turns of a question as FastChat or AlpacaEval has them."""
    row: dict[str, object] = {"question_id": question.id, "answer_id": uuid4().hex[:22], "model_id": model}
    row |= {"choices": [{"index": 0, "turns": texts}], "tstamp": time.time()}
    if benchmark == MT_BENCH:
        return f"{MT_BENCH}/model_answer/{file_name(model)}.jsonl", row
    row = {"dataset": question.category, "instruction": question.id, "output": texts[0], "generator": model}
    return f"{ALPACA}/{file_name(model)}/model_outputs.json", row


def write_rows(out: Path | None, rows: Iterable[FileRow]) -> None:
    """Write the rows of each file, as a JSON list (`.json`) or JSON lines, under `out` (None: nothing)."""
    by_file: dict[str, list[Mapping[str, object]]] = {}
    for file, row in rows if out is not None else ():
        by_file.setdefault(file, []).append(row)
    for file, own in by_file.items():
        lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in own)
        path = Path(out or "", file)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, json.dumps(own, indent=2, ensure_ascii=False) if path.suffix == ".json" else lines)


def _rows(path: Path, source: str, *fields: str) -> list[dict[str, Any]]:
    """The rows of a file. Raises InputError that names the source to get it from."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; get it from {source}")
    rows = [row for _, row in file_rows(path) if isinstance(row, dict)]
    if not rows or not all(row.keys() >= {*fields} for row in rows):
        raise InputError(f"{path}: needs rows with {', '.join(fields)}; get it from {source}")
    return list(well_formed(rows))
