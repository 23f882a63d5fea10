"""What the task definitions in this folder call: rows of local files, code that is run, literals that are compared.

The files are in `../shared/data/eval` next to the repository, or in the folder that LINEARIZE_EVAL_DATA names. lm-eval
imports this file by its path, so it imports nothing of the package.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "eval"
LETTERS = "ABCD"
TIME_LIMIT = 3.0  # seconds for one program
MEMORY_LIMIT = 2 << 30  # bytes
MAX_ANSWER = 10_000  # characters
MARK = "all tests passed"


def json_lines(*, files: Mapping[str, str], **metadata: object) -> dict[str, Dataset]:
    """Return the data set of a definition: its `dataset_kwargs` map splits to files of JSON lines.

    lm-eval passes the definition's metadata too, and from its command the arguments of the model. Raises OSError or
    ValueError.
    """
    return {split: _dataset(_path(name), _json_rows(_path(name))) for split, name in files.items()}


def mmlu(*, subject: str, **metadata: object) -> dict[str, Dataset]:
    """Return the examples and the questions of an MMLU subject, from the original CSV. Raises OSError or ValueError."""
    paths = {split: _path(f"mmlu/{split}/{subject}_{split}.csv") for split in ("dev", "test")}
    return {split: _dataset(path, _csv_rows(path, subject.replace("_", " "))) for split, path in paths.items()}


def _path(name: str) -> Path:
    root = Path(os.environ.get("LINEARIZE_EVAL_DATA") or DATA).expanduser()
    if not (path := root / name).is_file():
        raise FileNotFoundError(f"{path} does not exist: set LINEARIZE_EVAL_DATA to the folder that holds {name}")
    return path


def _dataset(path: Path, rows: list[dict[str, Any]]) -> Dataset:
    from datasets import Dataset

    if not rows:
        raise ValueError(f"{path}: holds no items")
    return Dataset.from_list(rows)


def _json_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return rows


def _csv_rows(path: Path, subject: str) -> list[dict[str, Any]]:
    rows = []
    with path.open(encoding="utf-8") as file:  # line breaks inside cells become \n
        for number, cells in enumerate(csv.reader(file), start=1):
            if len(cells) != 6 or cells[5] not in tuple(LETTERS):
                raise ValueError(f"{path}, row {number}: expected a question, four choices and a letter of {LETTERS}")
            question, *choices, letter = cells
            answer = LETTERS.index(letter)
            rows.append({"subject": subject, "question": question, "choices": choices, "answer": answer})
    return rows


def build_predictions(resps: Sequence[Sequence[str]], docs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return whole programs: the prompt followed by what the model wrote."""
    return [[doc["prompt"] + text for text in texts] for texts, doc in zip(resps, docs, strict=True)]


def pass_at_k(references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]) -> dict[str, float]:
    """Return the share of items whose first answer passes its test; each program runs in a process of its own."""
    if list(k) != [1]:
        raise ValueError(f"k is {k}: only [1] is measured here")
    passed = [passes(f"{texts[0]}\n{test}") for test, texts in zip(references, predictions, strict=True)]
    return {"pass@1": sum(passed) / len(passed)}


def passes(program: str, *, seconds: float = TIME_LIMIT) -> bool:
    """Whether a program runs to its last line in time. Not a sandbox: it has the rights of whoever starts it."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", f"{program}\nprint({MARK!r})"],
                cwd=folder,
                env={"PATH": "", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_limit,
            )
        except (OSError, ValueError):  # a null byte in the program, or one too long for a command line
            return False
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return code == 0 and output.read().decode(errors="replace").rstrip().endswith(MARK)


def _limit() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def literal_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the text between the answer's tags is the literal that the function returns."""
    answer = results[0].split("[/ANSWER]")[0].strip()[:MAX_ANSWER]
    return {"exact_match": float(same_literal(_right_side(answer), doc["output"]))}


def _right_side(answer: str) -> str:
    """Return what follows `==` in an assertion; any other text as it is."""
    try:
        (statement,) = ast.parse(answer).body
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return answer
    if isinstance(statement, ast.Assert) and isinstance(statement.test, ast.Compare):
        return ast.get_source_segment(answer, statement.test.comparators[-1]) or answer
    return answer


def same_literal(answer: str, truth: str) -> bool:
    """Equal as Python literals; as text where one of them is not a literal. Nothing is executed."""
    if len(answer) > MAX_ANSWER:
        return False
    try:
        return bool(ast.literal_eval(answer) == ast.literal_eval(truth))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return answer == truth
