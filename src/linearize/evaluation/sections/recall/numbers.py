"""What the recall section measures: by model and test, shares of exact answers, by cell and against the teacher."""

from __future__ import annotations

from typing import Literal

from linearize.evaluation.numbers import NumbersModel, Role, ShareNumbers

TestName = Literal["needle", "passkey", "keys"]
TEST_NAMES: tuple[TestName, ...] = ("needle", "passkey", "keys")


class FactNumbers(NumbersModel):
    """An item without its text: see `HiddenFact`."""

    group: int
    depth: float | None
    tokens: int
    distance: int
    answer: str


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
    given: list[str]
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

    def test(self, name: TestName) -> RecallTest:
        """Return the numbers of a test."""
        return {"needle": self.needle, "passkey": self.passkey, "keys": self.keys}[name]


class RecallNumbers(NumbersModel):
    """The items of each test, and what each model made of them."""

    tests: dict[TestName, list[FactNumbers]]
    models: dict[str, ModelRecall]
