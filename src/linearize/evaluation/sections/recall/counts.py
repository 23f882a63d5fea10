"""The recall section's numbers: shares of exact answers by cell, and each student against the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from linearize.evaluation.context import EvalModel, Numbers
from linearize.evaluation.haystack import HiddenFact
from linearize.metrics.branches import window_reach
from linearize.metrics.intervals import Proportion

ABLE = 0.5
"""The teacher's share below which a length or a number of facts says nothing about a student."""

Answer = list[Any]
"""What one item gave: [text, correct, right in the full forward, whether cache and full forward agree]."""


def described(question: HiddenFact) -> Numbers:
    """An item without its text."""
    return {
        "group": question.group, "depth": question.depth, "tokens": question.tokens, "distance": question.distance,
        "answer": question.answer,
    }  # fmt: skip


def measured(
    eval_model: EvalModel,
    tests: Mapping[str, Sequence[HiddenFact]],
    answers: Mapping[str, Sequence[Answer]],
    teacher: Mapping[str, Sequence[Answer]] | None,
) -> Numbers:
    """All that is known of one model."""
    config = eval_model.model.config
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    reach = window_reach(eval_model.plan)
    agree = [answer[3] for found in answers.values() for answer in found]
    numbers: Numbers = {
        "role": eval_model.role, "context": context, "window_reach": reach,
        "cache": {"items": len(agree), "differ": agree.count("no"), "ties": agree.count("tie")},
    }  # fmt: skip
    for test, questions in tests.items():
        own = answers[test]
        numbers[test] = _share(own) | {
            "full_forward": Proportion.of(a[2] for a in own).to_dict(),
            "cells": _cells(test, questions, own, context),
            "given": [answer[0] for answer in own],
        }
        if teacher is not None and eval_model.role == "student":
            numbers[test]["against_teacher"] = _against(test, questions, own, teacher[test], reach)
    return numbers


def _share(answers: Sequence[Answer]) -> Numbers:
    return dict(Proportion.of(answer[1] for answer in answers).to_dict())


def _cells(test: str, questions: Sequence[HiddenFact], answers: Sequence[Answer], context: int | None) -> list[Numbers]:
    """One for each length and depth, length, or number of facts; tokens and distance are means over its items."""
    places: dict[tuple[Any, ...], list[int]] = {}
    for index, question in enumerate(questions):
        places.setdefault((question.group, question.depth) if test == "needle" else (question.group,), []).append(index)
    cells = []
    for place, indices in places.items():
        tokens, distances = [questions[i].tokens for i in indices], [questions[i].distance for i in indices]
        cell = _share([answers[i] for i in indices])
        cell |= {"tokens": sum(tokens) / len(indices), "distance": sum(distances) / len(indices)}
        cell |= {"beyond_context": context is not None and max(tokens) >= context}
        if test == "keys":
            cell |= {"keys": place[0], "chance": 1 / place[0]}
        else:
            cell |= {"length": place[0]} | ({"depth": place[1]} if test == "needle" else {})
        cells.append(cell)
    return cells


def _against(
    test: str, questions: Sequence[HiddenFact], own: Sequence[Answer], teacher: Sequence[Answer], reach: int | None
) -> Numbers:
    """Student and teacher on the same items: on all, and on those whose fact the window does not reach.

    Only `groups` (lengths, or numbers of facts) that the teacher can do count. `kept`: of the items that the teacher
    answers, the share that the student answers too.
    """
    groups = [group for group in sorted({q.group for q in questions}) if _able(test, group, questions, teacher)]
    counted = [i for i, question in enumerate(questions) if question.group in groups]

    def compared(indices: Sequence[int]) -> Numbers:
        known = [i for i in indices if teacher[i][1]]
        return {
            "student": _share([own[i] for i in indices]),
            "teacher": _share([teacher[i] for i in indices]),
            "kept": _share([own[i] for i in known]),
        }

    beyond = None if reach is None else [i for i in counted if questions[i].distance >= reach]
    return {
        "groups": groups,
        "all": compared(counted),
        "beyond_window": None if beyond is None else compared(beyond),
    }


def _able(test: str, group: int, questions: Sequence[HiddenFact], teacher: Sequence[Answer]) -> bool:
    """Whether the teacher answers half of a group or more and, among several facts, more than by guessing."""
    share = Proportion.of(answer[1] for q, answer in zip(questions, teacher, strict=True) if q.group == group)
    guessed = test == "keys" and group > 1 and share.interval[0] <= 1 / group
    return share.value >= ABLE and not guessed
