"""The files of MT-Bench and AlpacaEval: questions, reference answers, the judge's prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from linearize.errors import InputError
from linearize.storage.files import expand_home, read_json, read_text, well_formed

FASTCHAT = "https://github.com/lm-sys/FastChat/tree/main/fastchat/llm_judge/data"
ALPACA = "https://huggingface.co/datasets/tatsu-lab/alpaca_eval"
ALPACA_PROMPT = (
    "https://github.com/tatsu-lab/alpaca_eval (src/alpaca_eval/evaluators_configs/alpaca_eval_clf_gpt4_turbo)"
)
NEED_REFERENCE = ("math", "reasoning", "coding")
"""Categories that are judged with a reference answer (FastChat, common.py)."""
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
"""Of each category of MT-Bench (FastChat, common.py); another one is answered at 0.7."""
PROMPTS = tuple(
    f"{kind}{turn}"
    for kind in ("single-v1", "single-math-v1", "pair-v2", "pair-math-v1")
    for turn in ("", "-multi-turn")
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One conversation of MT-Bench. `reference`: the reference answers, one a turn, where there are any."""

    id: Any
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()

    @property
    def needs_reference(self) -> bool:
        """Whether it is judged against the reference answer."""
        return self.category in NEED_REFERENCE


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One of AlpacaEval. `output`: of the model that others are compared with (`generator`), where the file has it."""

    text: str
    dataset: str
    output: str | None = None
    generator: str | None = None


def mt_bench_questions(root: Path, limit: int | None) -> list[Question]:
    """The questions in `root/chat/mt_bench`, categories in turn when there is a limit.

    Raises InputError for a file that is missing or not in the official format.
    """
    folder = root / "chat" / "mt_bench"
    rows = _rows(needed(folder / "question.jsonl", FASTCHAT))
    references = folder / "reference_answer" / "gpt-4.jsonl"
    known = {row.get("question_id"): row for row in _rows(references)} if references.is_file() else {}
    return in_turn([_question(row, known, folder) for row in rows], lambda q: q.category, limit)


def _question(row: Mapping[str, Any], references: Mapping[Any, Any], folder: Path) -> Question:
    turns, found = row.get("turns"), references.get(row.get("question_id"))
    if "question_id" not in row or not isinstance(turns, list) or not turns:
        raise InputError(f"{folder / 'question.jsonl'}: a row has no question_id or no turns; take it from {FASTCHAT}")
    return Question(
        id=row["question_id"],
        category=str(row.get("category", "")),
        turns=tuple(map(str, turns)),
        reference=tuple(map(str, found["choices"][0]["turns"])) if found else (),
    )


def judge_prompts(root: Path) -> dict[str, dict[str, str]]:
    """The official prompts by name. Raises InputError for a missing file or prompt."""
    path = needed(root / "chat" / "judge_prompts.jsonl", FASTCHAT)
    found = {str(row.get("name")): row for row in _rows(path)}
    lacking = [name for name in PROMPTS if name not in found]
    if lacking:
        raise InputError(f"{path}: lacks the prompts {', '.join(lacking)}; take the file from {FASTCHAT}")
    return found


def instructions_file(root: Path | None, given: str | None) -> Path | None:
    """The file of instructions: the one given, else the official one under `root`; None where that is missing.

    Raises InputError if the one given is missing.
    """
    if given is not None:
        return needed(Path(expand_home(given)), ALPACA)
    path = root / "chat" / "alpaca_eval" / "alpaca_eval.json" if root is not None else None
    return path if path is not None and path.is_file() else None


def instructions(path: Path, limit: int | None) -> list[Instruction]:
    """Instructions of a JSON list or JSON lines: rows with `instruction` (and `input`), or with `turns`."""
    found: dict[str, Instruction] = {}
    for row in _rows(path):
        instruction = _instruction(row, path)
        found.setdefault(instruction.text, instruction)
    return in_turn(list(found.values()), lambda i: i.dataset, limit)


def _instruction(row: Mapping[str, Any], path: Path) -> Instruction:
    turns = row.get("turns")
    text = row.get("instruction") or (turns[0] if isinstance(turns, list) and turns else None)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{path}: a row has no instruction (fields: {', '.join(map(str, row))}); see {ALPACA}")
    text = f"{text}\n\n{row['input']}" if row.get("input") else text
    output = row.get("output") if isinstance(row.get("generator"), str) else None
    return Instruction(
        text=text,
        dataset=str(row.get("dataset") or row.get("category") or path.stem),
        output=output,
        generator=row.get("generator") if output is not None else None,
    )


def alpaca_prompt(root: Path | None) -> list[dict[str, str]] | None:
    """The annotator's prompt under `root`, as messages; None where it is missing. ChatML marks part the messages."""
    path = root / "chat" / "alpaca_eval" / "prompt.txt" if root is not None else None
    if path is None or not path.is_file():
        return None
    text = read_text(path).strip()
    lacking = [name for name in ("{instruction}", "{output_1}", "{output_2}") if name not in text]
    if lacking:
        raise InputError(f"{path}: lacks {', '.join(lacking)}; take it from {ALPACA_PROMPT}")
    if "<|im_start|>" not in text:
        return [{"role": "user", "content": text}]
    parts = [part.split("<|im_end|>")[0].partition("\n") for part in text.split("<|im_start|>")[1:]]
    return [{"role": role.strip(), "content": content.strip()} for role, _, content in parts]


def in_turn(items: Sequence[Any], group: Any, limit: int | None) -> list[Any]:
    """All in their order, or the first `limit` when each group gives one in turn, in the order of the list."""
    if limit is None or limit >= len(items):
        return list(items)
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(group(item), []).append(index)
    mixed = [index for row in zip_longest(*groups.values()) for index in row if index is not None]
    return [items[index] for index in sorted(mixed[:limit])]


def needed(path: Path, source: str) -> Path:
    """The path. Raises InputError, with where to get the file, if it is not there."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; get it from {source}")
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON list, or of JSON lines."""
    if path.suffix == ".json":
        found: Iterable[Any] = read_json(path)
    else:
        found = [
            _line(path, number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()
        ]
    rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []
    if not rows:
        raise InputError(f"{path}: holds no rows; a JSON list of objects or one object a line is needed")
    return rows


def _line(path: Path, number: int, line: str) -> Any:
    try:
        return well_formed(json.loads(line))
    except ValueError as error:
        raise InputError(f"{path}: line {number} is no JSON; get the file again") from error
