"""The verdict of a report: what a student keeps of its teacher, the most telling numbers, and every fault.

It reads what sections present (findings and stats); of their numbers it reads only `models.STUDENT.{kept,gap}` of the
language section and `kept.STUDENT` of the tasks'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from linearize.evaluation.context import Finding, Numbers, Section, SectionView, Stat
from linearize.evaluation.report.schema import KeptShare, Statement, StatEntry, StudentVerdict, Verdict
from linearize.evaluation.suites import SECTIONS
from linearize.metrics.intervals import plus_minus, share_text

ORDER = ("language", "tasks", "recall", "speed", "cloze", "branches", "consistency", "layers", "chat")
"""Which sections' stats come first."""

KEPT = {
    "language": (
        "probability per held-out token",
        "Probability kept: the student's probability of a held-out token by the teacher's, as a geometric mean, which "
        "is exp(-loss gap). 100% is a student that predicts text as well as its teacher.",
    ),
    "tasks": (
        "task scores above chance",
        "Task scores kept: (student - chance) / (teacher - chance), both summed over the tasks on which the teacher is "
        "clearly above chance.",
    ),
}
"""By section: the measure of which a share is kept, and how the share is defined."""


@dataclass(frozen=True, kw_only=True)
class PresentedSection:
    """A section of a report, presented once for the verdict, the page and the terminal; `stats` are by student."""

    title: str
    numbers: Numbers
    view: SectionView
    stats: Mapping[str, Sequence[Stat]]


def present_sections(
    sections: Mapping[str, Numbers], table: Mapping[str, type[Section]] = SECTIONS
) -> dict[str, PresentedSection]:
    """The sections of a report by name, in its order; one that the table does not know is left out."""
    return {
        name: PresentedSection(
            title=table[name].TITLE,
            numbers=numbers,
            view=table[name].present(numbers),
            stats=table[name].headline(numbers),
        )
        for name, numbers in sections.items()
        if name in table
    }


def verdict(students: Sequence[str], presented: Mapping[str, PresentedSection]) -> Verdict:
    """The verdict on each student, and the findings that name none of them."""
    ordered = sorted(presented, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    findings = [(name, finding) for name in ordered for finding in presented[name].view.findings]
    verdicts = {}
    for student in students:
        own = [(name, finding) for name, finding in findings if finding.student == student]
        bad, checked = _statements(own, "bad"), sum(finding.level == "good" for _, finding in own)
        kept = [share for name in ordered for share in kept_shares(name, presented[name].numbers, student)]
        verdicts[student] = StudentVerdict(
            headline=headline(kept, bad=len(bad), checked=checked),
            kept=kept,
            tiles=[
                StatEntry(section=name, label=stat.label, value=stat.value, detail=stat.detail)
                for name in ordered
                for stat in presented[name].stats.get(student, ())
            ],
            bad=bad,
            notes=_statements(own, "note"),
            checked=checked,
            faults=bool(bad),
        )
    shared = [(name, finding) for name, finding in findings if finding.student not in students]
    bad = _statements(shared, "bad")
    faults = bool(bad) or any(one.faults for one in verdicts.values())
    return Verdict(students=verdicts, bad=bad, notes=_statements(shared, "note"), faults=faults)


def _statements(findings: Sequence[tuple[str, Finding]], level: Literal["bad", "note"]) -> list[Statement]:
    return [Statement(section=name, text=finding.text) for name, finding in findings if finding.level == level]


def headline(kept: Sequence[KeptShare], *, bad: int, checked: int) -> str:
    """The sentence on a student: what it keeps, and whether it can be believed."""
    keeps = f"Keeps {' and '.join(share.text for share in kept)}. " if kept else ""
    if bad:
        faults, them = ("faults", "them") if bad > 1 else ("fault", "it")
        return f"{keeps}{bad} {faults} found: read {them} before any number."
    return f"{keeps}No fault found{f' in {checked} checks' if checked > 1 else ''}."


def kept_shares(section: str, numbers: Numbers, student: str) -> list[KeptShare]:
    """Shares of the teacher in a section's numbers; none without a teacher, or where it is at chance itself."""
    if section == "language":
        model = numbers.get("models", {}).get(student) or {}
        share, gap = model.get("kept"), model.get("gap")
        suffix = f", {plus_minus(gap['value'], gap['error'])} nats above its loss" if gap else ""
        return [_share(section, share, suffix)] if share else []
    if section == "tasks":
        share = (numbers.get("kept") or {}).get(student)
        return [_share(section, share)] if share else []
    return []


def _share(section: str, share: Mapping[str, Any], suffix: str = "") -> KeptShare:
    """A share as text with its interval, where it has one: `93.9% (93.1 to 94.8) of the teacher's ...`."""
    value, low, high = share["value"], share.get("low"), share.get("high")
    percent = f"{value:.1%}" if low is None or high is None else share_text(value, low, high)
    measure, definition = KEPT[section]
    text = f"{percent} of the teacher's {measure}{suffix}"
    return KeptShare(measure=measure, definition=definition, value=value, low=low, high=high, text=text)
