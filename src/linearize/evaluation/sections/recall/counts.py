"""Counts answers into the recall section's numbers: shares by cell, and each student against its teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from linearize.evaluation.context import EvalModel
from linearize.evaluation.haystack import HiddenFact
from linearize.evaluation.numbers import ShareNumbers
from linearize.evaluation.sections.recall.numbers import (
    AgainstTeacher,
    CacheAgreement,
    CellNumbers,
    ComparedNumbers,
    FactNumbers,
    ModelRecall,
    RecallTest,
    TestName,
)
from linearize.metrics.branches import window_reach
from linearize.metrics.intervals import Proportion

ABLE = 0.5
"""The teacher's share below which a length or a number of facts says nothing about a student."""

Answer = list[Any]
"""What one item gave: [text, correct, right in the full forward, whether cache and full forward agree]."""


def described(question: HiddenFact) -> FactNumbers:
    """Return an item without its text."""
    return FactNumbers(
        group=question.group, depth=question.depth, tokens=question.tokens, distance=question.distance,
        answer=question.answer,
    )  # fmt: skip


def measured(
    eval_model: EvalModel,
    tests: Mapping[TestName, Sequence[HiddenFact]],
    answers: Mapping[TestName, Sequence[Answer]],
    teacher: Mapping[TestName, Sequence[Answer]] | None,
) -> ModelRecall:
    """Return all that is known of one model."""
    context = getattr(eval_model.model.config.get_text_config(), "max_position_embeddings", None)
    reach = window_reach(eval_model.plan)
    agree = [answer[3] for group in answers.values() for answer in group]
    compares = teacher is not None and eval_model.role == "student"

    def one(test: TestName) -> RecallTest:
        questions, own = tests[test], answers[test]
        against = {"against_teacher": _against(test, questions, own, teacher[test], reach)} if compares else {}  # type: ignore[index]
        return RecallTest(
            **_counted(answer[1] for answer in own),
            full_forward=ShareNumbers(**_counted(answer[2] for answer in own)),
            cells=_cells(test, questions, own, context),
            given=[answer[0] for answer in own],
            **against,
        )

    return ModelRecall(
        role=eval_model.role,
        context=context,
        window_reach=reach,
        cache=CacheAgreement(items=len(agree), differ=agree.count("no"), ties=agree.count("tie")),
        needle=one("needle"),
        passkey=one("passkey"),
        keys=one("keys"),
    )


def _counted(hits: Any) -> dict[str, Any]:
    """Return the fields of a share."""
    return dict(Proportion.of(hits).to_dict())


def _share(answers: Sequence[Answer]) -> ShareNumbers:
    return ShareNumbers(**_counted(answer[1] for answer in answers))


def _cells(
    test: TestName, questions: Sequence[HiddenFact], answers: Sequence[Answer], context: int | None
) -> list[CellNumbers]:
    """Return a cell for each length and depth, length, or number of facts; tokens and distance are means."""
    places: dict[tuple[Any, ...], list[int]] = {}
    for index, question in enumerate(questions):
        places.setdefault((question.group, question.depth) if test == "needle" else (question.group,), []).append(index)
    cells = []
    for (group, *depth), indices in places.items():
        tokens, distances = [questions[i].tokens for i in indices], [questions[i].distance for i in indices]
        place: dict[str, Any] = {"keys": group, "chance": 1 / group} if test == "keys" else {"length": group}
        place |= {"depth": depth[0]} if depth else {}
        cell = CellNumbers(
            **_counted(answers[i][1] for i in indices),
            tokens=sum(tokens) / len(indices),
            distance=sum(distances) / len(indices),
            beyond_context=context is not None and max(tokens) >= context,
            **place,
        )
        cells.append(cell)
    return cells


def _against(
    test: TestName,
    questions: Sequence[HiddenFact],
    own: Sequence[Answer],
    teacher: Sequence[Answer],
    reach: int | None,
) -> AgainstTeacher:
    """Compare student and teacher on the same items: on all, and on those whose fact the window does not reach.

    Only `groups` (lengths, or numbers of facts) that the teacher can do count.
    """
    groups = [group for group in sorted({q.group for q in questions}) if _able(test, group, questions, teacher)]
    counted = [i for i, question in enumerate(questions) if question.group in groups]

    def compared(indices: Sequence[int]) -> ComparedNumbers:
        known = [i for i in indices if teacher[i][1]]
        return ComparedNumbers(
            student=_share([own[i] for i in indices]),
            teacher=_share([teacher[i] for i in indices]),
            kept=_share([own[i] for i in known]),
        )

    beyond = None if reach is None else compared([i for i in counted if questions[i].distance >= reach])
    return AgainstTeacher(groups=groups, all=compared(counted), beyond_window=beyond)


def _able(test: TestName, group: int, questions: Sequence[HiddenFact], teacher: Sequence[Answer]) -> bool:
    """Whether the teacher answers half of a group or more and, among several facts, more than by guessing."""
    share = Proportion.of(answer[1] for q, answer in zip(questions, teacher, strict=True) if q.group == group)
    guessed = test == "keys" and group > 1 and share.interval[0] <= 1 / group
    return share.value >= ABLE and not guessed
