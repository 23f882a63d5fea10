"""What answers look like without a judge: length, empty ones, and loops, a known failure of linearized models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from linearize.metrics.intervals import Mean, Proportion, mean_over_documents

LOOP_SHARE = 0.5
"""An answer loops when at least this share of its 4-grams stood in it before ..."""
LOOP_NGRAMS = 12
"""... and it has at least so many 4-grams."""


def repeated(text: str, n: int = 4) -> tuple[float, int]:
    """Share of the n-grams of words that stood in the text before, and how many n-grams it has.

    A text without spaces counts letter by letter.
    """
    units: Sequence[str] = text.split()
    if len(units) < 2:
        units = text.strip()
    grams = [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]
    return (1 - len(set(grams)) / len(grams) if grams else 0.0), len(grams)


def loops(text: str) -> bool:
    """Whether the answer goes round in circles."""
    share, grams = repeated(text)
    return share >= LOOP_SHARE and grams >= LOOP_NGRAMS


def described(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Numbers of a list of answers, each `{question, text, tokens, ended, cut}`; errors are over questions."""
    questions = [answer["question"] for answer in answers]
    texts = [str(answer["text"]) for answer in answers]
    return {
        "answers": len(answers),
        "words": mean_of([len(text.split()) for text in texts], questions),
        "tokens": mean_of([answer["tokens"] for answer in answers], questions),
        "repeated": mean_of([repeated(text)[0] for text in texts], questions),
        "empty": Proportion.of(not text for text in texts).to_dict(),
        "looping": Proportion.of(map(loops, texts)).to_dict(),
        "unended": Proportion.of(not answer["ended"] for answer in answers).to_dict(),
        "cut": Proportion.of(answer["cut"] > 0 for answer in answers).to_dict(),
    }


def mean_of(values: Sequence[float], questions: Sequence[Any]) -> dict[str, Any] | None:
    """Mean and its standard error over questions (an answer to a second turn is no independent draw); None of none."""
    if not values:
        return None
    numbers = {question: index for index, question in enumerate(dict.fromkeys(questions))}
    index_N = torch.tensor([numbers[question] for question in questions])
    found: Mean = mean_over_documents(torch.tensor(values, dtype=torch.float64), index_N)
    return {"mean": found.value, "error": found.error, "count": found.tokens}
