"""Made-up files for the task definitions in benchmarks/tasks, a few items each."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

DEFINITIONS = Path(__file__).resolve().parents[2] / "benchmarks" / "tasks"

PIQA = [
    {
        "query": f"Question: how to {verb} a {thing}\n", "gold": i % 2,
        "choices": [f"use the {thing}", f"{verb} it slowly"],
    }
    for i, (verb, thing) in enumerate(
        [("open", "jar"), ("lift", "stone of some weight"), ("dry", "shirt"), ("cut", "rope"), ("fill", "cup"),
         ("mend", "net"), ("sharpen", "very old knife"), ("paint", "door"), ("hide", "key")]
    )
]  # fmt: skip
WINOGRANDE = [
    {
        "context_options": ["Ann lent the shirt to Bea since the shirt", "Ann lent the shirt to Bea since the shorts"],
        "continuation": "fitted badly.",
        "gold": 0,
    },
    *(
        {"context_options": [first, second], "continuation": end, "gold": gold}
        for first, second, end, gold in [
            ("Tom fears Bob because Tom", "Tom fears Bob because Bob", "is weak.", 0),
            ("Tom fears Bob because Tom", "Tom fears Bob because Bob", "is strong.", 1),
            ("the cup or the lid", "the cup or the pot", "broke, it was old.", 1),
            ("Sue saw that Sue", "Sue saw that Eve", "had won.", 0),
        ]
    ),
]  # fmt: skip
GSM8K = [
    {"question": f"Ada has {a} apples and eats {b}. How many are left?", "answer": f"{a}-{b}={a - b}.\n#### {a - b}"}
    for a, b in [(7, 3), (9, 4), (12, 5), (31, 8), (6, 6)]
]
CRUXEVAL = [
    {"code": "def f(x):\n    return x + [1]", "input": "[2]", "output": "[2, 1]", "id": "a"},
    {"code": "def f(s):\n    return s * 2", "input": "'ab'", "output": "'abab'", "id": "b"},
    {"code": "def f(n):\n    return n == 3", "input": "3", "output": "True", "id": "c"},
]
HUMANEVAL = [
    {
        "task_id": "X/0", "prompt": "def double(x):\n    ", "entry_point": "double",
        "test": "def check(f):\n    assert f(3) == 6\n",
    },
]  # fmt: skip


def task_functions() -> ModuleType:
    """What the definitions call, imported by its path as lm-eval does."""
    spec = importlib.util.spec_from_file_location("task_functions", DEFINITIONS / "utils.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON line a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_data(root: Path, *, subjects: Sequence[str] = ()) -> Path:
    """A data folder; MMLU with five examples and two questions for each subject named."""
    write_lines(root / "multiple_choice" / "piqa.jsonl", PIQA)
    write_lines(root / "multiple_choice" / "winogrande.jsonl", WINOGRANDE)
    write_lines(root / "multiple_choice" / "human_eval.jsonl", HUMANEVAL)
    write_lines(root / "gsm8k_test.jsonl", GSM8K)
    write_lines(root / "cruxeval.jsonl", CRUXEVAL)
    for place, subject in enumerate(subjects):
        for split, count in (("dev", 5), ("test", 2)):
            path = root / "mmlu" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as file:
                for i in range(count):
                    row = [
                        f"{split} question {place}.{i}?",
                        "one",
                        'two, or "2"',
                        "three",
                        "four",
                        "ABCD"[(place + i) % 4],
                    ]
                    csv.writer(file).writerow(row)
    return root
