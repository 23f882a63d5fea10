"""Rows of local task files turned back into the rows that lm-eval's own task definitions expect.

Local files hold prompts that were already put together (`Question: X`); a definition puts together its own from the
original fields. What is built here gives exactly the prompts of the definition on the original data set.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]
LETTERS = ("A", "B", "C", "D", "E", "F", "G", "H")


def piqa(row: Row) -> dict[str, Any]:
    """goal, sol1, sol2, label."""
    first, second = row["choices"]
    goal = _between(row["query"], "Question: ", "\n")
    return {"goal": goal, "sol1": first, "sol2": second, "label": row["gold"]}


def arc(row: Row) -> dict[str, Any]:
    """question, choices (text, label), answerKey."""
    return {"question": _between(row["query"], "Question: ", ""), **_lettered(row)}


def openbookqa(row: Row) -> dict[str, Any]:
    """question_stem, choices (text, label), answerKey."""
    return {"question_stem": row["query"], **_lettered(row)}


def hellaswag(row: Row) -> dict[str, Any]:
    """The original row; the label is text there."""
    return {**row, "label": str(row["label"])}


def winogrande(row: Row) -> dict[str, Any]:
    """sentence with `_` for the gap, option1, option2, answer (`1` or `2`).

    The options are what differs between the two contexts, from the last space before the difference on.
    """
    first, second = row["context_options"]
    same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
    start = first.rfind(" ", 0, same) + 1
    before = first[:start]
    if "_" in before:
        raise ValueError("a `_` before the gap")
    return {
        "sentence": f"{before}_ {row['continuation']}",
        "option1": first[start:],
        "option2": second[start:],
        "answer": str(row["gold"] + 1),
    }


def boolq(row: Row) -> dict[str, Any]:
    """passage, question without its question mark, label (1: yes)."""
    passage, found, question = _between(row["query"], "Passage: ", "?").rpartition("\nQuestion: ")
    if not found:
        raise ValueError("no line that begins with `Question: `")
    return {"passage": passage, "question": question, "label": row["gold"]}


def lambada(row: Row) -> dict[str, Any]:
    """text: the context, a space, the last word."""
    if " " in row["continuation"]:
        raise ValueError("more than one word to predict")
    return {"text": f"{row['context']} {row['continuation']}"}


def unchanged(row: Row) -> dict[str, Any]:
    """A file that holds the original fields."""
    return dict(row)


def mmlu(cells: list[str]) -> dict[str, Any]:
    """question, choices, answer (0 to 3) from a line of the original CSV: question, four choices, letter."""
    question, *choices, letter = cells
    if len(choices) != 4 or letter not in LETTERS[:4]:
        raise ValueError(f"{len(cells)} cells, the last one {letter!r}; expected a question, four choices, a letter")
    return {"question": question, "choices": choices, "answer": LETTERS.index(letter)}


def _lettered(row: Row) -> dict[str, Any]:
    choices = list(row["choices"])
    labels = list(LETTERS[: len(choices)])
    return {"choices": {"text": choices, "label": labels}, "answerKey": labels[row["gold"]]}


def _between(text: str, start: str, end: str) -> str:
    """What stands between, or ValueError."""
    if not (text.startswith(start) and text.endswith(end)):
        raise ValueError(f"expected text of the form {start + '...' + end!r}, found {text[:40]!r}")
    return text[len(start) : len(text) - len(end)]
