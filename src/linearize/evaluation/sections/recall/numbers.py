"""Numbers of the recall section: by model and test, shares of exact answers, by cell and against the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from linearize.evaluation.context import EvalModel
from linearize.evaluation.haystack import HiddenFact
from linearize.evaluation.numbers import NumbersModel, Role, ShareNumbers
from linearize.metrics.branches import window_reach

ABLE = 0.5
"""The teacher's share below which a length or a number of facts says nothing about a student."""

TestName = Literal["needle", "passkey", "keys", "multikey", "multivalue"]
TEST_NAMES: tuple[TestName, ...] = ("needle", "passkey", "keys", "multikey", "multivalue")


class Answer(NumbersModel):
    """A model's answer to one item; `right` and `agrees`: see `FullForward`."""

    text: str
    correct: bool
    right: bool
    agrees: Literal["yes", "no", "tie"]


class Answers(NumbersModel):
    """The answers to one group of items."""

    answers: list[Answer]


class FactNumbers(NumbersModel):
    """An item without its text: see `HiddenFact`."""

    group: int
    depth: float | None
    tokens: int
    distance: int
    answer: str

    @classmethod
    def of(cls, fact: HiddenFact) -> FactNumbers:
        """Leave the text out."""
        return cls(group=fact.group, depth=fact.depth, tokens=fact.tokens, distance=fact.distance, answer=fact.answer)


class CellNumbers(ShareNumbers):
    """The share at one length and depth, at one length, or at one number of facts (`keys`, with the `chance` to guess).

    `tokens`, `distance`: means over the items; `beyond_context`: whether texts are longer than the model's context.
    """

    tokens: float
    distance: float
    beyond_context: bool
    keys: int | None = None
    chance: float | None = None
    length: int | None = None
    depth: float | None = None

    @property
    def group(self) -> int:
        """The length in tokens, or the number of facts."""
        group = self.keys if self.length is None else self.length
        assert group is not None
        return group


class ComparedNumbers(NumbersModel):
    """Student and teacher on the same items; `kept`: of those that the teacher answers, the student's share."""

    student: ShareNumbers
    teacher: ShareNumbers
    kept: ShareNumbers


class AgainstTeacher(NumbersModel):
    """A student against its teacher, at the `groups` that the teacher can do.

    `all`: on all items; `beyond_window`: on those that its window does not reach (None: it has no window).
    """

    groups: list[int]
    all: ComparedNumbers
    beyond_window: ComparedNumbers | None


class RecallTest(ShareNumbers):
    """One test: the share of exact answers, of right full forwards, by cell, and what was answered, item by item."""

    full_forward: ShareNumbers
    cells: list[CellNumbers]
    answers: list[str]
    against_teacher: AgainstTeacher | None = None


class CacheAgreement(NumbersModel):
    """On how many items decoding through the cache and the full forward differ; `ties` are within the precision."""

    items: int
    differ: int
    ties: int


class ModelRecall(NumbersModel):
    """One model: its context and the reach of its window in tokens, where it has them, and its tests."""

    role: Role
    context: int | None
    window_reach: int | None
    cache: CacheAgreement
    needle: RecallTest
    passkey: RecallTest
    keys: RecallTest
    multikey: RecallTest | None = None
    multivalue: RecallTest | None = None

    def test(self, name: TestName) -> RecallTest:
        """The numbers of a test that was run."""
        test: RecallTest = getattr(self, name)
        return test

    @property
    def tests(self) -> list[TestName]:
        """The tests that were run."""
        return [name for name in TEST_NAMES if getattr(self, name) is not None]


class RecallNumbers(NumbersModel):
    """The items of each test, and what each model made of them."""

    tests: dict[TestName, list[FactNumbers]]
    models: dict[str, ModelRecall]


def recall_numbers(
    eval_model: EvalModel,
    tests: Mapping[TestName, Sequence[HiddenFact]],
    answers: Mapping[TestName, Sequence[Answer]],
    teacher: Mapping[TestName, Sequence[Answer]] | None,
) -> ModelRecall:
    """Count one model's answers; a student's also against the teacher's."""
    context = eval_model.context
    reach = window_reach(eval_model.plan)
    agree = [answer.agrees for group in answers.values() for answer in group]

    def counted(test: TestName) -> RecallTest:
        facts, own = tests[test], answers[test]
        compared = {}
        if teacher is not None and eval_model.role == "student":
            compared["against_teacher"] = _against(test, facts, own, teacher[test], reach)
        return RecallTest(
            **dict(_share(own)),
            full_forward=ShareNumbers.of(answer.right for answer in own),
            cells=_cells(test, facts, own, context),
            answers=[answer.text for answer in own],
            **compared,
        )

    return ModelRecall(
        role=eval_model.role,
        context=context,
        window_reach=reach,
        cache=CacheAgreement(items=len(agree), differ=agree.count("no"), ties=agree.count("tie")),
        **{test: counted(test) for test in tests},
    )


def _share(answers: Sequence[Answer]) -> ShareNumbers:
    return ShareNumbers.of(answer.correct for answer in answers)


def _cells(
    test: TestName, facts: Sequence[HiddenFact], answers: Sequence[Answer], context: int | None
) -> list[CellNumbers]:
    """A cell for each length and depth, length, or number of facts; tokens and distance are means."""
    places: dict[tuple[int, float | None], list[int]] = {}
    for index, fact in enumerate(facts):
        places.setdefault((fact.group, fact.depth if test == "needle" else None), []).append(index)
    cells = []
    for (group, depth), indices in places.items():
        tokens, distances = [facts[i].tokens for i in indices], [facts[i].distance for i in indices]
        place: dict[str, Any] = {"keys": group, "chance": 1 / group} if test == "keys" else {"length": group}
        place |= {} if depth is None else {"depth": depth}
        cell = CellNumbers(
            **dict(_share([answers[i] for i in indices])),
            tokens=sum(tokens) / len(indices),
            distance=sum(distances) / len(indices),
            beyond_context=context is not None and max(tokens) >= context,
            **place,
        )
        cells.append(cell)
    return cells


def _against(
    test: TestName, facts: Sequence[HiddenFact], own: Sequence[Answer], teacher: Sequence[Answer], reach: int | None
) -> AgainstTeacher:
    """Compare both on all items of the groups that the teacher can do, and on those beyond the student's window."""
    groups = [group for group in sorted({fact.group for fact in facts}) if _able(test, group, facts, teacher)]
    able = [i for i, fact in enumerate(facts) if fact.group in groups]

    def compared(indices: Sequence[int]) -> ComparedNumbers:
        return ComparedNumbers(
            student=_share([own[i] for i in indices]),
            teacher=_share([teacher[i] for i in indices]),
            kept=_share([own[i] for i in indices if teacher[i].correct]),
        )

    beyond = None if reach is None else compared([i for i in able if facts[i].distance >= reach])
    return AgainstTeacher(groups=groups, all=compared(able), beyond_window=beyond)


def _able(test: TestName, group: int, facts: Sequence[HiddenFact], teacher: Sequence[Answer]) -> bool:
    """Whether the teacher answers half of a group or more and, among several facts, more than by guessing."""
    share = _share([answer for fact, answer in zip(facts, teacher, strict=True) if fact.group == group])
    guessed = test == "keys" and group > 1 and share.low <= 1 / group
    return share.value >= ABLE and not guessed
